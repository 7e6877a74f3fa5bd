"""Which numbers of workers a training job may have, and how a step's rows are shared out at each.

The global batch is that of the largest number: micro-batch x accumulation x max. With fewer workers each does more
forward passes in a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from tenfold.platform.errors import ConfigError
from tenfold.platform.experiment import Compute
from tenfold.platform.training.options import TrainingOptions

if TYPE_CHECKING:
    from tenfold.platform.method import PlanSection


def usable_sizes(compute: Compute, accumulation: int) -> tuple[int, ...]:
    """Return the numbers of workers that can share a step's forward passes equally, smallest first.

    Args:
        compute: its `workers` give the range; the largest is always usable.
        accumulation: forward passes of a worker in one step at the largest number.
    """
    passes = accumulation * compute.max_workers
    return tuple(size for size in range(compute.min_workers, compute.max_workers + 1) if passes % size == 0)


def accumulation_at(size: int, accumulation: int, largest: int) -> int:
    """Return the forward passes of a worker in one step when there are `size` workers."""
    passes = accumulation * largest
    if passes % size:
        raise ValueError(f"{passes} forward passes of a step cannot be shared by {size} workers")
    return passes // size


def shares(sizes: Sequence[int]) -> int:
    """Return what the number of micro-batches in an epoch must be a multiple of, so that every size can share them."""
    return math.lcm(*sizes)


def plan_sizes(config: BaseModel, compute: Compute) -> tuple[int, PlanSection | None]:
    """Find out which numbers of workers the trainings of a configuration can use.

    Returns:
        The fewest workers that every training can start with, and what a plan says about it: None without a range.

    Raises:
        ConfigError: no training can use another number than the largest.
    """
    from tenfold.platform.method import PlanSection

    if compute.min_workers == compute.max_workers:
        return compute.max_workers, None
    found = {
        name: usable_sizes(compute, options.gradient_accumulation_steps)
        for name, options in _trainings(config, "config")
    }
    if found and all(len(sizes) == 1 for sizes in found.values()):
        raise ConfigError(
            f"compute.workers = {compute.min_workers} to {compute.max_workers}: only {compute.max_workers} workers "
            f"can share a step, which has gradient_accumulation_steps x {compute.max_workers} forward passes. Use "
            f"another range, more gradient_accumulation_steps, or compute.workers={compute.max_workers}"
        )
    rows = tuple((name, f"{', '.join(map(str, sizes))} workers") for name, sizes in found.items())
    least = max((sizes[0] for sizes in found.values()), default=compute.min_workers)
    return least, PlanSection("elastic", rows) if rows else None


def _trainings(value: Any, name: str) -> Iterator[tuple[str, TrainingOptions]]:
    """Walk a configuration and yield the dotted names and options of its trainings."""
    if isinstance(value, TrainingOptions):
        yield name, value
    elif isinstance(value, BaseModel):
        for key in type(value).model_fields:
            yield from _trainings(getattr(value, key), f"{name}.{key}")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _trainings(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _trainings(inner, f"{name}.{number}")
