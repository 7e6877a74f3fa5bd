"""Ray Data on a cluster gives what the plain readers give, and names what it cannot read."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from tenfold.platform.data.config import DataSource
from tenfold.platform.data.readers import read_rows
from tenfold.platform.errors import DataError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("own_cluster")]


def read(path):
    return list(read_rows(DataSource(path=str(path), format="ray")))


def test_ray_data_gives_the_same_rows_in_order_as_the_plain_readers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Say {n}.", "output": [str(n), "x"]} for n in range(3000)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data.json").write_text(json.dumps(rows))
    folder = tmp_path / "parts"
    folder.mkdir()
    for part in range(3):
        table = pyarrow.Table.from_pylist(rows[part * 1000 : (part + 1) * 1000])
        pyarrow.parquet.write_table(table, folder / f"{part}.parquet")
    for name in ("data.jsonl", "data.json", "parts"):
        found = read(name)
        assert [row for row, _ in found] == rows
        assert found[-1][1] == f"{name}, row 3000"


def test_ray_data_names_a_missing_or_broken_file(tmp_path):
    with pytest.raises(DataError, match=r"missing\.jsonl: no such file"):
        read(tmp_path / "missing.jsonl")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"broken\.parquet: Ray Data cannot read it"):
        read(broken)
