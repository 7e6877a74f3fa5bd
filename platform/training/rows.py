"""The order of an epoch's training rows: the same for every number of workers, and again after resuming."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class LengthGroups(Sampler[int]):
    """Rows of like length beside each other, drawn from the seed and the epoch.

    transformers' own sampler draws from torch's global generator, which is not the same on all ranks nor after
    resuming.

    Args:
        lengths: of the rows.
        group: rows among which those of like length are put together, one step's of a worker.
        seed: decides the order.
    """

    def __init__(self, lengths: Sequence[int], group: int, seed: int) -> None:
        self._lengths, self._group, self._seed, self._epoch = list(lengths), group, seed, 0

    def __len__(self) -> int:
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration is of."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(get_length_grouped_indices(self._lengths, self._group, generator=generator))


class EvenRows(Sampler[int]):
    """An order filled up with its own first rows, as accelerate does, but to the same number at every world size.

    The last step of an epoch then has the same rows however many workers share them.

    Args:
        order: the sampler of the rows.
        multiple: the number of rows becomes a multiple of it.
    """

    def __init__(self, order: Any, multiple: int) -> None:
        self._order, self._multiple = order, multiple

    def __len__(self) -> int:
        return -(-len(self._order) // self._multiple) * self._multiple

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration is of."""
        if hasattr(self._order, "set_epoch"):
            self._order.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        rows = list(self._order)
        yield from rows
        yield from itertools.islice(itertools.cycle(rows), len(self) - len(rows))
