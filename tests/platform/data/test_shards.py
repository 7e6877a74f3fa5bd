"""Ragged columns on disk: what was written is read, row by row, and computed once."""

from types import SimpleNamespace

import pytest
import torch
from tenfold.platform.data.shards import ROWS_PER_SHARD, ShardedRows, fill_shards, write_shard
from tenfold.platform.storage import Storage

calls = []


def squares(item):
    """One row of number n has n entries of one column and one of another."""
    calls.append(len(item["rows"]))
    columns = [
        {
            "powers": torch.full((number, 2), float(number), dtype=torch.bfloat16),
            "number": torch.tensor([number * item["factor"]], dtype=torch.int32),
        }
        for number in item["rows"]
    ]
    write_shard(item, columns)
    return {"sum": sum(item["rows"])}


@pytest.fixture
def context(tmp_path):
    calls.clear()
    return SimpleNamespace(
        cache=Storage(tmp_path),
        compute=SimpleNamespace(cpus_per_worker=1, gpus_per_worker=0),
        map=lambda function, items, **_: [function(item) for item in items],
    )


def test_rows_are_read_as_they_were_written_also_empty_ones_and_beyond_a_shard(context):
    rows = list(range(ROWS_PER_SHARD + 3))
    results = fill_shards(context, "some/folder", squares, rows, {"factor": 10})
    assert [result["sum"] for result in results] == [sum(rows[:ROWS_PER_SHARD]), sum(rows[ROWS_PER_SHARD:])]
    read = ShardedRows(context.cache.local_path("some/folder"))
    for number in (0, 1, ROWS_PER_SHARD - 1, ROWS_PER_SHARD, ROWS_PER_SHARD + 2):
        row = read[number]
        assert row["powers"].shape == (number, 2)
        assert row["powers"].dtype == torch.bfloat16
        assert (row["powers"] == number).all()
        assert row["number"].tolist() == [10 * number]
        assert row["number"].dtype == torch.int64


def test_what_is_complete_is_not_computed_again(context):
    first = fill_shards(context, "folder", squares, [1, 2], {"factor": 1})
    assert fill_shards(context, "folder", squares, [1, 2], {"factor": 1}) == first
    assert calls == [2]
