"""Corpora: what is configured, what is read from which file, and what is said about a wrong one."""

import gzip
import itertools
import json

import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError
from tenfold.methods.layermoe.corpora import (
    Corpus,
    LanguageData,
    by_language,
    check_corpora,
    corpora_digest,
    documents,
    group_of_language,
    languages_of,
    lines_by_language,
    replay_warnings,
)
from tenfold.platform.errors import DataError
from tenfold.platform.validation import validate_all

TEXTS = [
    "One two.",
    "",
    "  spaces stay  ",
    "\u4e00\u4e8c \u2028 one line still",
    "\u0395\u03bb\u03bb\u03ac\u03b4\u03b1",
]
KEPT = [text for text in TEXTS if text]


def text_file(path, texts=TEXTS, end="\n"):
    data = "".join(text + end for text in texts).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def row_file(path, texts=TEXTS, field="text"):
    data = "".join(json.dumps({"id": number, field: text}) + "\n" for number, text in enumerate(texts)).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def read(path, language="en", **options):
    return list(documents(Corpus(language=language, path=str(path), **options)))


def data_of(path="x.txt", **groups):
    languages = [language for group in groups.values() for language in group]
    groups.setdefault("evaluation", languages)
    return LanguageData(**{name: [corpus(language, path) for language in group] for name, group in groups.items()})


def corpus(language, path="x.txt", **options):
    return Corpus(language=language, path=path, **options)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.dev", "a.devtest"])
def test_a_line_of_a_text_file_is_a_document_and_blank_ones_are_none(tmp_path, name):
    assert read(text_file(tmp_path / name)) == KEPT


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz"])
def test_rows_of_json_lines_give_their_text(tmp_path, name):
    assert read(row_file(tmp_path / name)) == KEPT
    assert read(row_file(tmp_path / name, field="content"), field="content") == KEPT


def test_json_lists_and_parquet_are_read_by_the_platforms_readers(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.json") == KEPT
    assert read(tmp_path / "a.parquet") == KEPT
    assert read(tmp_path / "a.parquet", start=2, stop=4) == TEXTS[2:4]


def test_blank_lines_are_kept_where_files_must_stay_parallel(tmp_path):
    corpora = [corpus("en", text_file(tmp_path / "a.txt"))]
    assert list(documents(corpora, keep_blank=True)) == TEXTS
    assert lines_by_language(corpora, 2, keep_blank=True) == {"en": TEXTS[:2]}
    with pytest.raises(DataError, match="holds no text"):
        list(documents(corpus("en", text_file(tmp_path / "b.txt", ["", " "])), keep_blank=True))


def test_windows_line_ends_and_a_byte_order_mark_are_not_part_of_the_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\r\nthree".encode())
    assert read(path) == ["one", "two", "three"]


def test_a_format_reads_files_of_any_ending(tmp_path):
    path = text_file(tmp_path / "eng.lines")
    assert read(path, format="text") == KEPT
    with pytest.raises(DataError, match=r"eng\.lines: the ending '\.lines' is unknown; known: .*\.txt\.gz"):
        read(path)


@pytest.mark.parametrize(("start", "stop"), [(0, None), (1, 3), (2, None), (0, 1)])
def test_start_and_stop_count_blank_lines_so_that_parallel_files_stay_parallel(tmp_path, start, stop):
    path = text_file(tmp_path / "a.txt")
    assert read(path, start=start, stop=stop) == [text for text in TEXTS[start:stop] if text]


def test_packaged_samples_are_parallel_sentences():
    lines = [read(f"sample:flores101/dev/{name}.dev") for name in ("eng", "zho_simpl", "npi")]
    assert [len(each) for each in lines] == [997] * 3
    assert lines[0][0].startswith("On Monday, scientists from the Stanford University School of Medicine")
    assert len(read("sample:flores101/devtest/ell.devtest", start=12)) == 1000


def test_uris_and_home_folders_are_read(tmp_path, monkeypatch):
    path = text_file(tmp_path / "a.txt")
    assert read(f"file://{path}") == KEPT
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("~/a.txt") == KEPT


def test_a_file_is_read_no_further_than_documents_are_taken(tmp_path):
    good = "".join(f"line {number}\n" for number in range(200_000)).encode()
    (tmp_path / "a.txt").write_bytes(good + b"\xff\xfe\n")
    found = documents(corpus("en", str(tmp_path / "a.txt")))
    assert list(itertools.islice(found, 3)) == ["line 0", "line 1", "line 2"]
    with pytest.raises(DataError, match=r"a\.txt, line 200001: not UTF-8 text"):
        list(found)


def test_a_missing_file_is_told_with_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("none.txt", "none.jsonl", "none.json", "none.parquet", "none.txt.gz"):
        with pytest.raises(DataError, match=rf"^{name}: no such file; relative paths start at {tmp_path}$"):
            read(name)


def test_an_empty_file_and_one_of_blank_lines_hold_no_text(tmp_path):
    for name, content in (("a.txt", ""), ("a.txt", "\n  \n\n"), ("a.jsonl", ""), ("b.jsonl", '{"text": " "}\n')):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=rf"{name}: holds no text\. Give a file with text"):
            read(tmp_path / name)
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError, match=r"holds no text from 2 to 9\."):
        read(tmp_path / "a.txt", start=2, stop=9)


def test_files_that_are_not_what_their_ending_says_are_named(tmp_path):
    (tmp_path / "a.txt.gz").write_text("not packed\n")
    with pytest.raises(DataError, match=r"a\.txt\.gz: cannot be read"):
        read(tmp_path / "a.txt.gz")
    whole = gzip.compress(b"line\n" * 10_000)
    (tmp_path / "b.txt.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"b\.txt\.gz: cannot be read"):
        read(tmp_path / "b.txt.gz")
    (tmp_path / "c.txt").mkdir()
    with pytest.raises(DataError, match=r"c\.txt: cannot be read"):
        read(tmp_path / "c.txt")
    (tmp_path / "d.txt").write_bytes("two\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"d\.txt, line 1: not UTF-8 text: .* Convert the file to UTF-8"):
        read(tmp_path / "d.txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"content": "x", "id": 1}', "line 2: no 'text', only content, id; needs text. .* set `field`"),
        ('{"text": 5}', "line 2: 'text' is a int; needs text"),
        ('{"text": null}', "line 2: 'text' is a NoneType; needs text"),
        ('["x"]', "line 2: a list; needs an object with the text under 'text'"),
        ('{"text": ', "line 2: not JSON: .* at column"),
    ],
)
def test_a_row_without_text_is_named_with_its_line(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(DataError, match=rf"a\.jsonl, {message}"):
        read(tmp_path / "a.jsonl")


def test_a_row_of_a_parquet_file_without_text_is_named(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 1: no 'text', only body"):
        read(tmp_path / "a.parquet")


def test_several_corpora_of_a_language_are_joined_in_their_order(tmp_path):
    files = [text_file(tmp_path / f"{name}.txt", [name]) for name in "abc"]
    corpora = [corpus("en", files[2]), corpus("el", files[1]), corpus("en", files[0])]
    assert languages_of(corpora) == ["en", "el"]
    assert {name: list(documents(own)) for name, own in by_language(corpora).items()} == {
        "en": ["c", "a"],
        "el": ["b"],
    }
    assert lines_by_language(corpora, max_lines=1) == {"en": ["c"], "el": ["b"]}


def test_a_language_in_two_groups_is_an_error():
    with pytest.raises(ValidationError, match=r"es, el in both old and new; a language belongs to one group"):
        data_of(old=["en", "es", "el"], new=["el", "es"])
    with pytest.raises(ValidationError, match=r"el in both new and earlier"):
        data_of(old=["en"], new=["el"], earlier=["el"])


def test_a_language_called_as_a_group_is_an_error():
    with pytest.raises(ValidationError, match="a language is called new, as a group is in metrics"):
        data_of(old=["en"], new=["new"])


def test_a_language_without_held_out_lines_is_an_error():
    with pytest.raises(ValidationError, match=r"evaluation has no lines of en, tr; give held-out text"):
        data_of(old=["en"], new=["el", "tr"], evaluation=["el"])


def test_configuration_errors_are_one_sentence_each():
    good = {"language": "el", "path": "el.txt"}
    wrong = {
        "new": [{**good, "start": 5, "stop": 5}],
        "evaluation": [{**good, "language": "a b"}],
        "stage1_length": 1,
        "old": [{**good, "paht": "x"}],
    }
    _, errors = validate_all(LanguageData, wrong, "config.data")
    assert len(errors) == 4
    text = "\n".join(errors)
    for part in (
        "stop must be above start; got start 5, stop 5",
        "did you mean config.data.old.0.path",
        "stage1_length",
    ):
        assert part in text


def test_paths_that_leave_the_samples_are_an_error():
    with pytest.raises(ValidationError, match="must not leave them"):
        corpus("en", "sample:../pyproject.toml")


def test_groups_are_numbered_by_expansion():
    first = data_of(old=["en", "zh"], new=["el", "tr"])
    assert group_of_language(first) == {"en": 0, "zh": 0, "el": 1, "tr": 1}
    third = data_of(old=["en"], earlier=["el", "bn", "hi"], new=["ru"])
    found = group_of_language(third, [["el", "tr"], ["bn", "hi"]])
    assert found == {"en": 0, "el": 1, "bn": 2, "hi": 2, "ru": 3}
    # a model without a record of expansions
    assert group_of_language(third) == {"en": 0, "el": 1, "bn": 1, "hi": 1, "ru": 2}


def test_languages_without_replay_are_warned_about():
    data = data_of(old=["en"], new=["el"])
    assert replay_warnings(data) == []
    assert replay_warnings(data, {"old": ["en"]}) == []
    [known] = replay_warnings(data, {"old": ["en", "zh", "es"], "earlier": []})
    assert "data.old has no documents of zh, es, which the model has" in known
    [earlier] = replay_warnings(data, {"earlier": ["tr"]})
    assert earlier.startswith("data.earlier has no documents of tr")
    measured = data_of(old=["en"], new=["el"], evaluation=["en", "el", "de", "bn"])
    [evaluated] = replay_warnings(measured, later=["bn"])
    assert evaluated.startswith("data.evaluation measures de, without documents in data.old")
    [empty] = replay_warnings(data_of(new=["el"]))
    assert empty.startswith("data.old is empty")


def test_checking_reads_the_start_of_every_corpus(tmp_path):
    good, long = text_file(tmp_path / "good.txt"), text_file(tmp_path / "long.txt", ["word"] * 50)
    data = LanguageData(new=[corpus("el", good), corpus("el", long)], evaluation=[corpus("el", good)])
    size = sum(len(text.encode()) for text in KEPT)
    assert check_corpora(data, limit=10) == [
        (
            "new el",
            f"{good}: 4 documents, {size} bytes; {long}: more than 10 documents (the first 10 have 40 bytes)",
        ),
        ("evaluation el", f"{good}: 4 documents, {size} bytes"),
    ]
    missing = LanguageData(new=[corpus("el", good)], evaluation=[corpus("el", str(tmp_path / "none.txt"))])
    with pytest.raises(DataError, match=r"none\.txt: no such file"):
        check_corpora(missing)


def test_the_digest_changes_with_the_text_and_its_range_but_not_with_its_place(tmp_path):
    one, copy = text_file(tmp_path / "one.txt"), text_file(tmp_path / "copy.txt")
    base = corpora_digest([corpus("en", one)])
    assert corpora_digest([corpus("en", copy)]) == base
    others = [corpus("en", one, stop=2), corpus("el", one), corpus("en", text_file(tmp_path / "x.txt", ["other"]))]
    digests = {corpora_digest([other]) for other in others} | {corpora_digest([corpus("en", one)] * 2), base}
    assert len(digests) == 5
    text_file(tmp_path / "one.txt", [*TEXTS, "more"])
    assert corpora_digest([corpus("en", one)]) not in digests
    with pytest.raises(DataError, match="no such file"):
        corpora_digest([corpus("en", str(tmp_path / "none.txt"))])


def test_the_digest_of_a_large_file_is_taken_without_reading_it(tmp_path, monkeypatch):
    from tenfold.methods.layermoe import corpora

    path = tmp_path / "a.txt"
    text_file(path)
    monkeypatch.setattr(corpora, "WHOLE_DIGEST_BYTES", 5)
    path.chmod(0o644)
    first = corpora_digest([corpus("en", str(path))])
    assert corpora_digest([corpus("en", str(path))]) == first
    text_file(path, [*TEXTS, "more"])
    assert corpora_digest([corpus("en", str(path))]) != first
