"""What is trained: the auto-encoder and its loss on a tile, for one worker or several (3.7, 10.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from tenfold.methods.gates.network import AutoEncoder, Neighbourhood
from tenfold.methods.gates.reconstruction import SparseRows, squared_error
from tenfold.platform.training.module import TrainedModule
from torch import Tensor

LEAST_ERROR = 1e-12  # the norm has no gradient at 0


@dataclass(frozen=True)
class TileTensors:
    """A tile ready for the network.

    Attributes:
        expression: [n_K, G].
        cells: its graphs.
        squared_norm: |X|^2 of the core.
    """

    expression: SparseRows
    cells: Neighbourhood
    squared_norm: float


@dataclass(frozen=True)
class Objective:
    """The loss (3.7).

    Attributes:
        kind: frobenius |X - X_hat|_F, or mse.
        decay: lambda of lambda/2 |W|^2.
        scope: all matrices, or the last one (official code).
        num_cells: N of the whole section.
        num_genes: G.
    """

    kind: str
    decay: float
    scope: str
    num_cells: int
    num_genes: int


class SpatialModule(TrainedModule):
    """The auto-encoder with its loss; a batch is the number of a tile.

    All ranks' tiles of a step count as one: the squared errors are summed over the ranks before the root is taken, and
    what a rank returns has the gradient of its part times the number of ranks, since gradients are averaged.

    Args:
        network: the auto-encoder.
        objective: the loss.
        tile: returns the tile of a number with the senders of a step; in eval mode (step None) with all senders.
    """

    main_input_name = "tile"

    def __init__(self, network: AutoEncoder, objective: Objective, tile: Callable[[int, int | None], TileTensors]):
        super().__init__(network)
        self._objective = objective
        self._tile = tile
        self.losses: list[Tensor] = []
        self._library_options = SimpleNamespace()

    @property
    def config(self) -> Any:
        """Where libraries look for, and set, options of language models."""
        return self._library_options

    def forward(self, tile: Tensor, step: Tensor, num_items_in_batch: Any = None) -> dict[str, Any]:
        """Return loss and statistics of one tile; in eval mode its squared error and number of cells.

        Args:
            tile: int64 [1], the number of a tile.
            step: int64 [1], optimizer steps done: a resumed training draws what an uninterrupted one does.
            num_items_in_batch: of the Trainer, which knows no cells; not used.
        """
        part = self._tile(int(tile[0]), int(step[0]) if self.training else None)
        _, decoded, first = self.exported(part.expression, part.cells)
        dense, cores = part.expression.dense, part.cells.counts[0]
        core = None if dense is None else dense[:cores]
        error = squared_error(first, decoded, self.exported.weights[0], part.squared_norm, core)
        if not self.training:
            return {"loss": error.detach().float(), "squared_error": error.detach(), "num_cells": part.cells.counts[0]}
        loss = self._loss(error, part.cells.counts[0])
        self.losses.append(loss.detach())
        return {"loss": loss, "statistics": {}}

    def _loss(self, error: Tensor, num_cells: int) -> Tensor:
        """Return the loss over all ranks, with this rank's part of the gradient."""
        ranks, cells = 1, float(num_cells)
        total = error.detach().clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = torch.distributed.get_world_size()
            sums = torch.stack([total, total.new_tensor(cells)])
            torch.distributed.all_reduce(sums)
            total, cells = sums[0], float(sums[1])
        if self._objective.kind == "mse":
            scale = 1 / (cells * self._objective.num_genes)
            value = total * scale
        else:
            # a tile's norm grows with the root of its cells; scaled, a step weighs as one on the whole section
            root = (total.clamp(min=LEAST_ERROR) * (self._objective.num_cells / cells)).sqrt()
            scale = self._objective.num_cells / cells / (2 * root.item())
            value = root
        own = ranks * scale * error
        penalty = self._penalty()
        return (own + (value - own).detach()).float() + penalty

    def _penalty(self) -> Tensor:
        weights = list(self.exported.weights)
        if self._objective.scope == "last":
            weights = weights[-1:]
        squares = torch.stack([weight.square().sum() for weight in weights])
        return self._objective.decay / 2 * squares.sum()
