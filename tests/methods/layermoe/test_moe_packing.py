"""Packing of documents into blocks, and their batches."""

import itertools
import json

import pytest
import torch
from tenfold.methods.layermoe.corpora import Corpus, documents
from tenfold.methods.layermoe.packing import BlockCollator, Packer, blocks_by_language, pack, packed_blocks
from tenfold.platform.errors import DataError, ModelError

EOS = 1
FLORES = {"en": "eng", "zh": "zho_simpl", "el": "ell", "bn": "ben"}
GROUPS = {"en": 0, "zh": 0, "el": 1, "bn": 2}


@pytest.fixture(scope="module")
def letters(byte_tokenizer):
    """One whose pad is its EOS."""
    return byte_tokenizer(pad_token="</s>")


def flores(languages, stop=40):
    return [Corpus(language=name, path=f"sample:flores101/dev/{FLORES[name]}.dev", stop=stop) for name in languages]


def text_corpus(path, texts, language="en"):
    path.write_text("".join(text + "\n" for text in texts))
    return Corpus(language=language, path=str(path))


def expected_blocks(corpus, tokenizer, length, most=None):
    """One document at a time, the whole stream at once."""
    stream = []
    for text in itertools.islice(documents(corpus), most):
        stream += tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
    return [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]


def test_documents_are_joined_with_one_eos_each_and_the_tail_is_dropped(tmp_path, letters):
    corpus = text_corpus(tmp_path / "a.txt", ["abc", "d", "", "efghij"])
    blocks = packed_blocks([corpus], letters, 4, seed=0, groups={"en": 0})
    a, b, c, d, *rest = letters.encode("abcdefghij", add_special_tokens=False)
    e, f, g, h, i, j = rest
    # abc. d.ef ghij .
    assert sorted(blocks["input_ids"]) == sorted([[a, b, c, EOS], [d, EOS, e, f], [g, h, i, j]])
    assert list(blocks["labels"]) == list(blocks["input_ids"])


def test_blocks_are_those_of_a_slow_packer_for_every_language_apart(letters):
    corpora = flores(["en", "el", "zh", "bn"])
    blocks = packed_blocks(corpora, letters, 96, seed=3, groups=GROUPS)
    everything = list(blocks)
    for number, corpus in enumerate(corpora):
        rows = [row for row in everything if row["language"] == number]
        assert sorted(row["input_ids"] for row in rows) == sorted(expected_blocks(corpus, letters, 96))
        group = GROUPS[corpus.language]
        assert {(row["old"], row["group"]) for row in rows} == {(group == 0, group)}
    assert blocks_by_language(blocks, ["en", "el", "zh", "bn"]) == {
        corpus.language: len(expected_blocks(corpus, letters, 96)) for corpus in corpora
    }


def test_eos_labels_stay_where_pad_is_eos(tmp_path, letters):
    assert letters.pad_token_id == letters.eos_token_id == EOS
    corpus = text_corpus(tmp_path / "a.txt", ["ab"] * 20)
    blocks = packed_blocks([corpus], letters, 6, seed=0, groups={"en": 0})
    batch = BlockCollator(letters.pad_token_id)([blocks[index] for index in range(4)])
    assert batch["labels"].eq(EOS).sum() == 8
    assert batch["labels"].equal(batch["input_ids"])
    assert batch["attention_mask"].all()


def test_the_seed_decides_the_order_alone(letters):
    corpora = flores(["en", "el"])
    first, again, other = (packed_blocks(corpora, letters, 64, seed=seed, groups=GROUPS) for seed in (1, 1, 2))
    assert list(first["input_ids"]) == list(again["input_ids"])
    assert list(first["input_ids"]) != list(other["input_ids"])
    assert sorted(first["input_ids"]) == sorted(other["input_ids"])
    # shuffled over languages
    languages = list(first["language"])
    assert languages not in (sorted(languages), sorted(languages, reverse=True))


def test_several_files_of_a_language_are_one_stream(tmp_path, letters):
    texts = [text for text in documents(flores(["en"]))]
    parts = [text_corpus(tmp_path / "one.txt", texts[:11]), text_corpus(tmp_path / "two.txt", texts[11:])]
    joined = text_corpus(tmp_path / "all.txt", texts)
    split = packed_blocks(parts, letters, 50, seed=4, groups=GROUPS)
    assert list(split["input_ids"]) == list(packed_blocks([joined], letters, 50, seed=4, groups=GROUPS)["input_ids"])


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_only_the_first_documents_of_a_language_are_read(letters, most):
    [corpus] = flores(["en"])
    found = packed_blocks([corpus], letters, 32, seed=0, groups=GROUPS, max_documents=most)
    assert sorted(found["input_ids"]) == sorted(expected_blocks(corpus, letters, 32, most))


@pytest.mark.parametrize(("budget", "documents_read"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3), (100, 5)])
def test_documents_are_read_until_the_budget_is_reached(tmp_path, letters, budget, documents_read):
    packer = Packer(2, EOS)
    blocks = list(pack(["abc"] * 5, letters, packer, token_budget=budget))
    assert packer.documents == documents_read
    assert packer.tokens == 4 * documents_read
    assert len(blocks) == 2 * documents_read
    assert packer.rest == []


def test_the_budget_is_of_each_language(letters):
    corpora = flores(["en", "el"])
    found = packed_blocks(corpora, letters, 16, seed=0, groups=GROUPS, token_budget=800)
    for language, number in blocks_by_language(found, ["en", "el"]).items():
        [corpus] = flores([language])
        longest = max(len(text.encode()) for text in documents(corpus))
        assert 800 // 16 <= number <= (800 + longest + 1) // 16


def test_no_more_of_a_file_is_read_than_is_used(tmp_path, letters):
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\n" * 5000 + b"\xff\n")
    corpus = Corpus(language="en", path=str(path))
    assert len(packed_blocks([corpus], letters, 4, seed=0, groups=GROUPS, token_budget=400)) == 100
    assert len(packed_blocks([corpus], letters, 4, seed=0, groups=GROUPS, max_documents=70)) == 70
    with pytest.raises(DataError, match=r"a\.txt, line 5001: not UTF-8"):
        packed_blocks([corpus], letters, 4, seed=0, groups=GROUPS)


def test_a_language_that_fills_no_block_is_an_error(tmp_path, letters):
    corpora = [*flores(["el"]), text_corpus(tmp_path / "a.txt", ["abc", "de"])]
    with pytest.raises(DataError, match=r"^en: 2 documents have 7 tokens, which fill no block of 8\. Give more text"):
        packed_blocks(corpora, letters, 8, seed=0, groups=GROUPS)
    assert len(packed_blocks(corpora[1:], letters, 7, seed=0, groups=GROUPS)) == 1


def test_a_tokenizer_without_eos_is_an_error(tmp_path, letters):
    import copy

    bare = copy.deepcopy(letters)
    bare.eos_token = None
    with pytest.raises(ModelError, match="no EOS token"):
        packed_blocks(flores(["en"]), bare, 8, seed=0, groups=GROUPS)


def test_a_packer_goes_on_where_it_stopped(letters):
    texts = list(documents(flores(["en"])))
    whole = Packer(40, EOS)
    blocks = list(pack(texts, letters, whole))
    first = Packer(40, EOS)
    begun = list(pack(texts[:13], letters, first))
    resumed = Packer(1, 0)
    vars(resumed).update(json.loads(json.dumps(vars(first))))
    assert begun + list(pack(texts[13:], letters, resumed)) == blocks
    assert vars(resumed) == vars(whole)
    assert whole.tokens == sum(map(len, blocks)) + len(whole.rest)


def test_blocks_on_disk_are_those_in_memory_and_are_packed_once(tmp_path, letters, monkeypatch):
    import datasets
    from tenfold.methods.layermoe import packing

    corpora = flores(["en", "el"])
    memory = packed_blocks(corpora, letters, 64, seed=5, groups=GROUPS)
    disk = packed_blocks(corpora, letters, 64, seed=5, groups=GROUPS, folder=tmp_path / "blocks")
    assert isinstance(disk, datasets.Dataset)
    assert disk.to_dict() == memory.to_dict()
    [file] = (tmp_path / "blocks").iterdir()

    monkeypatch.setattr(packing, "pack", None)  # would be needed to pack again
    again = packed_blocks(corpora, letters, 64, seed=6, groups=GROUPS, folder=tmp_path / "blocks")
    assert sorted(again["input_ids"]) == sorted(memory["input_ids"])
    monkeypatch.undo()
    packed_blocks(corpora, letters, 65, seed=6, groups=GROUPS, folder=tmp_path / "blocks")
    packed_blocks(corpora, letters, 64, seed=6, groups={**GROUPS, "el": 2}, folder=tmp_path / "blocks")
    packed_blocks(corpora, letters, 64, seed=6, groups=GROUPS, max_documents=9, folder=tmp_path / "blocks")
    assert len(list((tmp_path / "blocks").iterdir())) == 4
    assert file.exists()


def test_a_failed_packing_leaves_no_file(tmp_path, letters):
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\n" * 5000 + b"\xff\n")
    with pytest.raises(DataError, match="not UTF-8"):
        packed_blocks(
            [Corpus(language="en", path=str(path))], letters, 4, seed=0, groups=GROUPS, folder=tmp_path / "blocks"
        )
    assert list((tmp_path / "blocks").iterdir()) == []


def test_batches_carry_the_group_of_rows_and_the_old_tokens():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "old": True, "group": 0, "language": 2},
        {"input_ids": [8, 9], "labels": [-100, 9], "old": False, "group": 1, "language": 0},
    ]
    batch = BlockCollator(pad_token_id=0)(rows)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[5, 6, 7], [-100, 9, -100]],
        "old_mask": [[True] * 3, [False] * 3],
        "group": [0, 1],
        "language": [2, 0],
    }
    assert batch["old_mask"].dtype == torch.bool
    assert {batch[name].dtype for name in ("input_ids", "labels", "attention_mask", "group")} == {torch.int64}


def test_padding_is_of_no_old_language():
    rows = [{"input_ids": [1] * size, "labels": [1] * size, "old": True, "group": 0, "language": 0} for size in (3, 1)]
    assert BlockCollator(0)(rows)["old_mask"].tolist() == [[True, True, True], [True, False, False]]
