"""Independent pieces of work over the cluster: streamed, shown, retried, and kept when a run is resumed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tenfold.platform.errors import ClusterError, TenfoldError

if TYPE_CHECKING:
    from tenfold.platform.context import RunContext

logger = logging.getLogger(__name__)

LOST_WORKER_RETRIES = 3


def map_items(
    context: RunContext,
    function: Callable[[Any], Any],
    items: Sequence[Any],
    *,
    name: str,
    keys: Sequence[str] | None = None,
    cpus: float = 1.0,
    gpus: float = 0.0,
) -> list[Any]:
    """Apply `function` to every item in Ray tasks and return the results in order.

    Ray keeps idle worker processes, so small pieces share one and its imports. A piece whose worker or node is lost is
    done again; one that raises ends the map, and what is done stays done for the next start of the run.

    Args:
        context: the run; results are kept in its storage.
        function: importable; takes one item, returns plain data (JSON).
        items: picklable pieces.
        name: names the map within the run.
        keys: one file-name-safe text per item that identifies it; default: its number.
        cpus: cores a piece reserves.
        gpus: GPUs a piece reserves.

    Raises:
        ClusterError: a piece failed; the message names it. A TenfoldError of the piece is raised as it is.
    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    names = list(keys) if keys is not None else [f"{index:06d}" for index in range(len(items))]
    if len(names) != len(items) or len(set(names)) != len(names):
        raise ValueError(
            f"map {name!r}: needs {len(items)} different keys, got {len(names)} ({len(set(names))} different)"
        )
    folder = f"map/{name}"
    kept = set(context.storage.list(folder))
    results: dict[str, Any] = {
        key: json.loads(context.storage.read_text(f"{folder}/{key}.json")) for key in names if f"{key}.json" in kept
    }
    if results:
        logger.info("%s: %d of %d pieces are done already", name, len(results), len(items))
    task = ray.remote(
        num_cpus=cpus,
        num_gpus=gpus,
        max_retries=LOST_WORKER_RETRIES,
        # a trial of a sweep reserves next to nothing for itself: its pieces must not be confined to that
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=None),  # type: ignore[arg-type]
    )(function)
    waiting = [(key, item) for key, item in zip(names, items, strict=True) if key not in results]
    running: dict[Any, str] = {}
    at_once = max(2 * int(ray.cluster_resources().get("CPU", 1) / max(cpus, 0.01)), 1)
    while waiting or running:
        while waiting and len(running) < at_once:
            key, item = waiting.pop(0)
            running[task.remote(item)] = key
        done, _ = ray.wait(list(running), num_returns=1)
        for reference in done:
            key = running.pop(reference)
            results[key] = _result_of(reference, name, key)
            context.storage.write_text(f"{folder}/{key}.json", json.dumps(results[key]))
            logger.info("%s: %d of %d", name, len(results), len(items))
    return [results[key] for key in names]


def _result_of(reference: Any, name: str, key: str) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, TenfoldError):
            raise cause from error
        raise ClusterError(f"{name}, piece {key}: {type(cause).__name__}: {cause}") from error
    except ray.exceptions.RayError as error:
        raise ClusterError(f"{name}, piece {key}: {error}. The same command does the missing pieces.") from error
