"""Measurements that any run may take over: kept in the cache of the storage under all that decides them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tenfold.platform.context import RunContext


def kept(
    context: RunContext, function: Callable[[Any], Any], items: Sequence[Any], keys: Sequence[str], name: str
) -> list[Any]:
    """Apply a function on the cluster to those items that no run has measured yet; results in the order of the items.

    Args:
        context: the run.
        function: importable; takes one item, returns plain data.
        items: picklable.
        keys: one digest an item, of all that decides its result.
        name: of this piece of work in the run.
    """
    paths = [f"layermoe/measured/{key}.json" for key in keys]
    missing = [number for number, path in enumerate(paths) if not context.cache.exists(path)]
    made = context.map(
        function,
        [items[number] for number in missing],
        name=name,
        keys=[keys[number] for number in missing],
        cpus=context.compute.cpus_per_worker,
        gpus=context.compute.gpus_per_worker,
    )
    for number, result in zip(missing, made, strict=True):
        context.cache.write_text(paths[number], json.dumps(result))
    return [json.loads(context.cache.read_text(path)) for path in paths]
