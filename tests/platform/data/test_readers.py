import json

import pyarrow
import pyarrow.parquet
import pytest
from tenfold.platform import cluster
from tenfold.platform.data.config import DataSource
from tenfold.platform.data.readers import BadRow, read_rows
from tenfold.platform.errors import DataError

ROWS = [{"instruction": f"Say {number}.", "output": str(number)} for number in range(5)]


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path, **options):
    return list(read_rows(DataSource(path=str(path), **options)))


def test_json_lists_give_rows_with_their_row_and_line(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(ROWS, indent=1))
    found = read(path)
    assert [row for row, _ in found] == ROWS
    lines = path.read_text().split("\n")
    for number, (_, origin) in enumerate(found, start=1):
        line = int(origin.rsplit("line ", 1)[1].rstrip(")"))
        assert origin == f"{path}, row {number} (line {line})"
        assert [part.strip() for part in lines[line - 1 : line + 1]] == ["{", f'"instruction": "Say {number - 1}.",']


def test_json_lists_written_on_one_line_or_with_odd_spacing_are_read(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('\n\n[1 ,"a, [b]"\n,\t{"c": [2]}\n]\n')
    assert read(path) == [
        (1, f"{path}, row 1 (line 3)"),
        ("a, [b]", f"{path}, row 2 (line 3)"),
        ({"c": [2]}, f"{path}, row 3 (line 4)"),
    ]


@pytest.mark.parametrize("name", ["data.jsonl", "data.ndjson"])
def test_json_lines_give_rows_with_their_line_and_blank_lines_count(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"a": 1}\n\n{"a": 2}\r\n')
    assert read(path) == [({"a": 1}, f"{path}, line 1"), ({"a": 2}, f"{path}, line 3")]


def test_json_lines_are_not_broken_at_unicode_line_separators(tmp_path):
    row = {"instruction": "one\u2028two\x85three", "output": "\u2029"}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read(path) == [(row, f"{path}, line 1")]


def test_a_byte_order_mark_is_no_error(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"a": 1}\n', encoding="utf-8-sig")
    assert read(path)[0][0] == {"a": 1}


def test_a_line_that_is_not_json_comes_as_a_bad_row(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"a": 1}\n{"a": \n')
    bad, origin = read(path)[1]
    assert isinstance(bad, BadRow)
    assert bad.reason.startswith("not JSON: ")
    assert origin == f"{path}, line 2"


def test_parquet_gives_plain_python_rows(tmp_path):
    path = tmp_path / "data.parquet"
    rows = [{"messages": [{"role": "user", "content": "a"}], "refs": ["x", "y"]}, {"messages": [], "refs": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read(path) == [(rows[0], f"{path}, row 1"), (rows[1], f"{path}, row 2")]


def test_start_and_stop_cut_rows_and_keep_their_numbers(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl")
    found = read(path, start=1, stop=3)
    assert found == [(ROWS[1], f"{path}, line 2"), (ROWS[2], f"{path}, line 3")]


def test_format_overrides_the_ending(tmp_path):
    path = write_jsonl(tmp_path / "data.txt")
    assert [row for row, _ in read(path, format="jsonl")] == ROWS


def test_relative_paths_home_and_file_uris_are_found(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "data.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("data.jsonl", "~/data.jsonl", path.as_uri()):
        assert [row for row, _ in read(name)] == ROWS


def test_packaged_samples_are_read_by_name():
    row, origin = next(read_rows(DataSource(path="sample:instruct/short_instructions.json")))
    assert set(row) == {"instruction", "input", "output"}
    assert origin == "sample:instruct/short_instructions.json, row 1 (line 2)"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("missing.json", None, "no such file; relative paths start at"),
        ("data.csv", b"a,b", "the ending '.csv' is unknown; known: .json, .jsonl, .ndjson, .parquet"),
        ("empty.json", b" \n", "the file is empty"),
        ("empty.jsonl", b"", "the file is empty"),
        ("none.json", b"[]", "holds no rows from 0 to the end"),
        ("one.json", b'{"a": 1}', "holds one dict; needs a list of objects"),
        ("broken.json", b'[{"a": 1},\n{"a" 2}]', ", line 2: not JSON: "),
        ("latin.jsonl", b'{"a": "\xe9"}', "not UTF-8 text"),
        ("wrong.parquet", b"PAR?" * 5, "not a Parquet file"),
    ],
)
def test_an_unusable_file_is_named_with_the_reason(tmp_path, name, content, told):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value).startswith(str(path))
    assert told in str(error.value)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path, format="json")


def test_an_unknown_kind_of_address_is_an_error():
    with pytest.raises(DataError, match="cannot be read"):
        read("carrier://pigeon/a.jsonl")


def test_a_range_without_rows_says_so(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl")
    with pytest.raises(DataError, match="holds no rows from 5 to 9"):
        read(path, start=5, stop=9)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_hub_data_sets_are_read_by_split(tmp_path, hub_cache):
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl")
    write_jsonl(folder / "test.jsonl", ROWS[:1])
    assert [row for row, _ in read(folder, format="hub")] == ROWS
    assert read(folder, format="hub", split="test") == [(ROWS[0], f"{folder}, row 1")]


def test_a_data_set_or_split_that_cannot_be_loaded_is_named(tmp_path, hub_cache):
    with pytest.raises(DataError, match="no-such-owner/no-such-set, split train: the data set cannot be loaded"):
        read("no-such-owner/no-such-set", format="hub")
    write_jsonl(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match="split other: the data set cannot be loaded"):
        read(tmp_path, format="hub", split="other")


def test_without_a_cluster_ray_sources_are_read_without_starting_one(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("a cluster was started"))
    rows = [{"instruction": f"Say {n}.", "output": [str(n), "x"]} for n in range(6)]
    folder = tmp_path / "parts"
    folder.mkdir()
    for part in (2, 0, 1):
        table = pyarrow.Table.from_pylist(rows[part * 2 : part * 2 + 2])
        pyarrow.parquet.write_table(table, folder / f"{part}.parquet")
    write_jsonl(tmp_path / "data.jsonl", rows)
    for path in (folder, tmp_path / "data.jsonl"):
        assert read(path, format="ray") == [(row, f"{path}, row {n}") for n, row in enumerate(rows, start=1)]
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, row 2: not JSON"):
        read(tmp_path / "bad.jsonl", format="ray")
