"""Ragged columns on disk: for every row of a data set some tensors, each with a length of its own.

They are computed once, over the cluster, in shards of a fixed number of rows, and read row by row as training needs
them. A folder counts as complete once its `meta.json` is there, which is written last.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.platform.storage import Storage

if TYPE_CHECKING:
    from tenfold.platform.context import RunContext
    from torch import Tensor

ROWS_PER_SHARD = 64
META, ROWS = "meta.json", "rows.safetensors"


def fill_shards(
    context: RunContext,
    folder: str,
    function: Callable[[Any], dict[str, Any]],
    rows: Sequence[Any],
    common: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Make sure that a folder of the cache holds the shards of `rows`; what is there is not computed again.

    Args:
        context: the run; a run that is stopped keeps the finished shards.
        folder: in the cache, named by a digest of everything that decides the content.
        function: importable; gets {**common, "rows": ..., "cache": URI, "path": ...} on a worker, calls `write_shard`
            and returns plain data about its shard.
        rows: plain data.
        common: plain data for every shard.

    Returns:
        What the function returned, in the order of the shards.
    """
    meta = f"{folder}/{META}"
    if context.cache.exists(meta):
        return json.loads(context.cache.read_text(meta))
    items = [
        {
            **common,
            "rows": [rows[index] for index in range(start, min(start + ROWS_PER_SHARD, len(rows)))],
            "cache": context.cache.uri,
            "path": _shard(folder, start),
        }
        for start in range(0, len(rows), ROWS_PER_SHARD)
    ]
    compute = context.compute
    results = context.map(
        function, items, name=folder.replace("/", "-"), cpus=compute.cpus_per_worker, gpus=compute.gpus_per_worker
    )
    context.cache.write_text(meta, json.dumps(results))
    return results


def write_shard(item: Mapping[str, Any], rows: Sequence[Mapping[str, Tensor]]) -> None:
    """Store the rows of one shard: the same names for all, tensors [n, ...] with an n of each row and name."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name in rows[0]:
        parts = [row[name] for row in rows]
        tensors[name] = torch.cat(parts).contiguous()
        tensors[_counts(name)] = torch.tensor([len(part) for part in parts])
    with tempfile.TemporaryDirectory() as scratch:
        save_file(tensors, Path(scratch) / ROWS)
        Storage(item["cache"]).upload(scratch, item["path"])


class ShardedRows:
    """Reads the columns of a row from disk, whole numbers as int64."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @functools.cache  # noqa: B019 (lives as long as the training)
    def _open(self, start: int) -> tuple[Any, dict[str, list[int]]]:
        from safetensors import safe_open

        file = safe_open(f"{_shard(self._folder, start)}/{ROWS}", framework="pt")
        names = [name for name in file.keys() if _counts(name) in file.keys()]  # noqa: SIM118 (no mapping)
        bounds = {name: [0, *file.get_tensor(_counts(name)).cumsum(0).tolist()] for name in names}
        return file, bounds

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return name -> [n, ...]."""
        number = index % ROWS_PER_SHARD
        file, bounds = self._open(index - number)
        values = {name: file.get_slice(name)[at[number] : at[number + 1]] for name, at in bounds.items()}
        return {name: value if value.is_floating_point() else value.long() for name, value in values.items()}


def _counts(name: str) -> str:
    return f"{name}.counts"


def _shard(folder: str | Path, start: int) -> str:
    return f"{folder}/shard-{start // ROWS_PER_SHARD:05d}"
