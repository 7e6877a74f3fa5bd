"""Which entries of two vocabularies correspond: overlap, label table and MinED's maps (DSKDv2 and FuseLLM)."""

from pathlib import Path

import pytest
import torch
from tenfold.methods.dskd.vocabulary import edit_distances, minimum_edit_tables, overlap, teacher_labels

TOKENIZERS = Path(__file__).resolve().parents[3] / "shared" / "data" / "tokenizers"
needs_tokenizers = pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="needs ../shared/data/tokenizers")

BYTE_LEVEL = {"\u0120the": 4, "cat": 1, "\u0120dog": 7, "<|end|>": 9, "zzz": 3, "\u0120": 5}
SENTENCEPIECE = {"</s>": 0, "\u2581the": 2, "cat": 6, "\u2581bird": 3, "\u2581": 8, "\u0120": 5, "<|end|>": 1}


def vocabularies():
    from transformers import AutoTokenizer

    return [AutoTokenizer.from_pretrained(TOKENIZERS / name).get_vocab() for name in ("gpt2", "llama")]


def levenshtein(one, other):
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        previous, row[0] = row[0], i
        for j, right in enumerate(other, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]


def test_overlap_pairs_equal_strings_whatever_their_marker_and_the_ends_of_text():
    student, teacher = overlap(BYTE_LEVEL, SENTENCEPIECE, student_eos=9, teacher_eos=0)
    # the teacher's own "<|end|>" is not the student's: that one is taken by the pair of EOS
    assert student.tolist() == [1, 4, 5, 9]
    assert teacher.tolist() == [6, 2, 8, 0]


def test_the_letter_that_looks_like_a_marker_does_not_take_the_markers_place():
    _, teacher = overlap({"\u0120": 0, "<e>": 1}, SENTENCEPIECE, student_eos=1, teacher_eos=0)
    assert teacher.tolist() == [8, 0]
    assert teacher_labels({"\u0120": 0, "<e>": 1}, SENTENCEPIECE, 1, 0, 9)[[8, 5]].tolist() == [0, -1]


def test_overlap_of_the_smallest_student_ids_only():
    student, teacher = overlap(BYTE_LEVEL, SENTENCEPIECE, 9, 0, topk_vocab=2)
    assert student.tolist() == [1, 4]
    assert teacher.tolist() == [6, 2]
    for wrong in (0, -2):
        with pytest.raises(ValueError, match="topk_vocab is"):
            overlap(BYTE_LEVEL, SENTENCEPIECE, 9, 0, topk_vocab=wrong)


def test_unknown_teacher_tokens_and_rows_without_a_token_have_no_label():
    table = teacher_labels(BYTE_LEVEL, SENTENCEPIECE, student_eos=9, teacher_eos=0, num_teacher_rows=11)
    assert table.dtype == torch.int64
    assert table.tolist() == [9, 9, 4, -1, -1, -1, 1, -1, 5, -1, -1]
    with pytest.raises(ValueError, match="id 8, the head only 8 rows"):
        teacher_labels(BYTE_LEVEL, SENTENCEPIECE, 9, 0, num_teacher_rows=8)


@needs_tokenizers
def test_gpt2_and_llama_share_17830_strings_and_the_end_of_text():
    gpt2, llama = vocabularies()
    student, teacher = overlap(gpt2, llama, 50256, 2)
    assert len(student) == 17830 + 1
    assert (student.diff() > 0).all()
    assert teacher[student == 50256].tolist() == [2]
    assert len(teacher.unique()) == len(teacher)
    swapped = overlap(llama, gpt2, 2, 50256)
    assert sorted(zip(swapped[1].tolist(), swapped[0].tolist(), strict=True)) == list(
        zip(student.tolist(), teacher.tolist(), strict=True)
    )
    table = teacher_labels(gpt2, llama, 50256, 2, 32000)
    assert (table >= 0).sum() == len(student)
    torch.testing.assert_close(table[teacher], student)
    assert table[llama["<0x0A>"]] == -1


def test_minimum_edit_tables_agree_with_a_plain_search():
    student = {"\u0120the": 0, "cats": 1, "cat": 2, "mouse": 3, "<e>": 4, "house": 6}
    teacher = {"\u2581the": 1, "bat": 2, "cat": 5, "</s>": 3, "rouse": 0, "\u2581cat": 4}
    forward, backward = minimum_edit_tables(student, teacher, 4, 3, num_student_rows=8, num_teacher_rows=7)
    expected = [-1] * 7
    for token, index in teacher.items():
        string = token.replace("\u2581", "\u0120")
        distances = {i: levenshtein(string, other) for other, i in student.items()}
        expected[index] = min(distances, key=lambda i: (distances[i], i))
    expected[3] = 4
    assert forward.tolist() == expected
    # "rouse" is one edit from "mouse" and "house": the smaller id; "cat" has three teachers, of which 2 is the first
    assert expected[0] == 3
    assert backward.tolist() == [1, -1, 2, 0, 3, -1, -1, -1]


def test_minimum_edit_tables_of_one_vocabulary_are_the_identity():
    forward, backward = minimum_edit_tables(BYTE_LEVEL, BYTE_LEVEL, 9, 9, 12, 12)
    own = sorted(BYTE_LEVEL.values())
    assert forward[own].tolist() == backward[own].tolist() == own
    assert (forward >= 0).sum() == (backward >= 0).sum() == len(own)
    with pytest.raises(ValueError, match="id 9, the head only 9 rows"):
        minimum_edit_tables(BYTE_LEVEL, BYTE_LEVEL, 9, 9, 9, 12)


def test_the_vocabulary_is_searched_in_blocks_without_effect(monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def words(count):
        letters = torch.randint(97, 103, (count, 6), generator=generator).tolist()
        return {"".join(map(chr, row[: 2 + row[0] % 5])): 0 for row in letters} | {"<e>": 0}

    student, teacher = ({word: index for index, word in enumerate(words(60))} for _ in range(2))
    whole = minimum_edit_tables(student, teacher, student["<e>"], teacher["<e>"], len(student), len(teacher))
    monkeypatch.setattr("tenfold.methods.dskd.vocabulary._BLOCK", 7)
    blocks = minimum_edit_tables(student, teacher, student["<e>"], teacher["<e>"], len(student), len(teacher))
    torch.testing.assert_close(whole, blocks)
    for word, index in teacher.items():
        best = min(student, key=lambda own: (levenshtein(word, own), student[own]))
        assert whole[0][index] == student[best]


def test_edit_distances_of_long_strings_do_not_wrap():
    assert edit_distances(["a" * 300, ""], ["b" * 299, ""]).tolist() == [[300, 300], [299, 0]]


@needs_tokenizers
def test_gpt2_to_llama_finds_the_nearest_token():
    gpt2, llama = vocabularies()
    some = {token: index for token, index in gpt2.items() if index % 50 == 6}
    forward, _ = minimum_edit_tables(llama, some, 2, 50256, 32000, 50257)
    assert sorted((forward >= 0).nonzero().flatten().tolist()) == sorted(some.values())
    assert forward[50256] == 2
    searched = 0
    for token, index in sorted(some.items(), key=lambda item: item[1])[:-1:200]:
        string = token.replace("\u0120", "\u2581")
        best = min(llama, key=lambda own: (levenshtein(string, own.replace("\u0120", "\u2581")), llama[own]))
        assert forward[index] == llama[best], string
        searched += string not in llama
    assert searched >= 2
