"""The graph attention auto-encoder (3.6).

Legend: n_k cells up to ring k of a tile (all N for a whole section), G genes, H_l hidden widths, Z latent, E edges.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tenfold.methods.gates.attention import Edges, attention_weights, edge_product
from tenfold.methods.gates.reconstruction import SparseRows
from tenfold.methods.gates.tiles import Tile
from tenfold.platform.errors import ModelError
from torch import Tensor, nn
from torch.nn import functional

CONFIG, WEIGHTS = "config.json", "model.safetensors"
GRAPHS = ("first", "second")


@dataclass(frozen=True)
class Shape:
    """What decides the parameters.

    Attributes:
        num_genes: G.
        hidden_dims: widths of the encoder, the latent one last.
        alpha: weight of the second graph; 0: there is none.
        nonlinear: ELU after attention.
        init: glorot_uniform (GATES) or glorot_normal (STAGATE's port, with gain sqrt(2)).
    """

    num_genes: int
    hidden_dims: tuple[int, ...] = (512, 30)
    alpha: float = 0.01
    nonlinear: bool = True
    init: str = "glorot_uniform"

    @property
    def hops(self) -> int:
        """How far a cell's reconstruction reads: encoder and decoder each attend once a hidden layer."""
        return 2 * (len(self.hidden_dims) - 1)


@dataclass(frozen=True)
class Neighbourhood:
    """A tile's graphs as tensors.

    Attributes:
        counts: n_0, ..., n_K.
        graphs: for each graph receivers and senders of its edges, int32 [E], by receiver.
        ends: for each graph and each ring k < K: its edges up to that ring.
        order: int64 [E_1 + E_2]: the edges of both graphs by receiver.
        fused: for each ring k < K: both graphs' edges as one pattern [n_k, n_{k+1}].
    """

    counts: tuple[int, ...]
    graphs: tuple[tuple[Tensor, Tensor], ...]
    ends: tuple[tuple[int, ...], ...]
    order: Tensor
    fused: tuple[Edges, ...]

    @classmethod
    def build(cls, tile: Tile, device: Any = "cpu") -> Neighbourhood:
        """Make tensors of a tile."""
        rings = len(tile.counts) - 1
        receivers = [np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)) for offsets, _ in tile.graphs]
        senders = [graph[1] for graph in tile.graphs]
        order = np.argsort(np.concatenate(receivers), kind="stable")
        all_senders = np.concatenate(senders)[order]
        offsets = np.sum([graph[0] for graph in tile.graphs], axis=0)
        fused: list[Edges] = []
        for ring in range(rings):
            if fused and tile.counts[ring : ring + 2] == tile.counts[ring - 1 : ring + 1]:
                fused.append(fused[-1])  # as in a whole section
                continue
            end = offsets[tile.counts[ring]]
            fused.append(
                Edges.build(offsets[: tile.counts[ring] + 1], all_senders[:end], tile.counts[ring + 1], device)
            )
        return cls(
            tile.counts,
            tuple(
                (torch.from_numpy(r.astype(np.int32)).to(device), torch.from_numpy(s.astype(np.int32)).to(device))
                for r, s in zip(receivers, senders, strict=True)
            ),
            tuple(tuple(int(graph[0][count]) for count in tile.counts[:-1]) for graph in tile.graphs),
            torch.from_numpy(order).to(device),
            tuple(fused),
        )


class AutoEncoder(nn.Module):
    """Tied graph attention auto-encoder: W_l are its only matrices, the decoder uses their transposes.

    Every hidden layer attends over both graphs with the same M = X W; the decoder uses the encoder's attention.

    Args:
        shape: of the parameters.
        seed: of the initialisation; None leaves the weights undefined, to be loaded.
    """

    def __init__(self, shape: Shape, seed: int | None = None):
        super().__init__()
        self.shape = shape
        widths = [shape.num_genes, *shape.hidden_dims]
        self.weights = nn.ParameterList([nn.Parameter(torch.empty(a, b)) for a, b in itertools.pairwise(widths)])
        self.attention = nn.ParameterDict(
            {
                f"{graph}_{side}_{layer}": nn.Parameter(torch.empty(width))
                for graph in GRAPHS[: 2 if shape.alpha > 0 else 1]
                for layer, width in enumerate(shape.hidden_dims[:-1])
                for side in ("receiver", "sender")
            }
        )
        if seed is not None:
            self._initialise(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Glorot; an attention vector counts as an H x 1 matrix (3.6)."""
        for parameter in self.parameters():
            fans = parameter.shape[0] + (parameter.shape[1] if parameter.ndim == 2 else 1)
            if self.shape.init == "glorot_uniform":
                limit = (6 / fans) ** 0.5
                parameter.uniform_(-limit, limit, generator=generator)
            else:
                parameter.normal_(0.0, (2 * 2 / fans) ** 0.5, generator=generator)

    def forward(self, expression: SparseRows, cells: Neighbourhood) -> tuple[Tensor, Tensor, Tensor]:
        """Encode and decode the core cells.

        Args:
            expression: [n_K, G] of all cells of the tile.
            cells: the tile's graphs.

        Returns:
            Latent [n_0, Z], decoded hidden state D [n_0, H_1] (the reconstruction is D W_0^T), and M = X W_0 of the
            core [n_0, H_1].
        """
        hidden, first, attention = self._encode(expression, cells)
        latent = hidden
        rings, layers = len(cells.counts) - 1, len(self.weights) - 1
        for layer in range(layers, 0, -1):
            ring = rings - layers - (layers - layer) - 1
            values = self._upto(attention[layer - 1], cells, ring)
            hidden = self._activate(edge_product(values, hidden @ self.weights[layer].T, cells.fused[ring]))
        core = cells.counts[0]
        return latent[:core], hidden, first[:core]

    def encode(self, expression: SparseRows, cells: Neighbourhood) -> Tensor:
        """Return the latent of the core [n_0, Z]; a tile needs half of the hops for it."""
        return self._encode(expression, cells)[0][: cells.counts[0]]

    def attention_values(self, expression: SparseRows, cells: Neighbourhood) -> list[Tensor]:
        """Return the first layer's attention on the edges of each graph, self loops included."""
        first = expression.times(self.weights[0])
        return self._attend(first, 0, cells, len(cells.counts) - 2)

    def _encode(
        self, expression: SparseRows, cells: Neighbourhood
    ) -> tuple[Tensor, Tensor, list[tuple[list[Tensor], int]]]:
        first = mixed = expression.times(self.weights[0])
        attention: list[tuple[list[Tensor], int]] = []
        hidden, ring = mixed, len(cells.counts) - 1
        for layer in range(len(self.weights) - 1):
            if layer > 0:
                mixed = hidden @ self.weights[layer]
            ring -= 1
            values = self._attend(mixed, layer, cells, ring)
            attention.append((values, ring))
            hidden = self._activate(edge_product(self._fuse(values, cells, ring), mixed, cells.fused[ring]))
        return hidden @ self.weights[-1], first, attention

    def _attend(self, mixed: Tensor, layer: int, cells: Neighbourhood, ring: int) -> list[Tensor]:
        values = []
        for index, graph in enumerate(GRAPHS[: len(cells.graphs)]):
            receivers, senders = (part[: cells.ends[index][ring]] for part in cells.graphs[index])
            values.append(
                attention_weights(
                    mixed[: cells.counts[ring]] @ self.attention[f"{graph}_receiver_{layer}"],
                    mixed @ self.attention[f"{graph}_sender_{layer}"],
                    receivers,
                    senders,
                )
            )
        return values

    def _fuse(self, values: Sequence[Tensor], cells: Neighbourhood, ring: int) -> Tensor:
        """Return P = (1 - alpha) A_1 + alpha A_2 on the edges of both graphs."""
        if len(values) == 1:
            return values[0]
        both = torch.cat([(1 - self.shape.alpha) * values[0], self.shape.alpha * values[1]])
        return both[_order(cells, ring)]

    def _upto(self, attention: tuple[list[Tensor], int], cells: Neighbourhood, ring: int) -> Tensor:
        """Return P of the receivers up to a ring, from the values that the encoder computed."""
        values = [part[: cells.ends[index][ring]] for index, part in enumerate(attention[0])]
        return self._fuse(values, cells, ring)

    def _activate(self, values: Tensor) -> Tensor:
        return functional.elu(values, inplace=True) if self.shape.nonlinear else values

    def save_pretrained(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write config.json and model.safetensors into a folder."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        shape = {**self.shape.__dict__, "hidden_dims": list(self.shape.hidden_dims), "model_type": "gates"}
        (folder / CONFIG).write_text(json.dumps(shape, indent=1), encoding="utf-8")
        weights = self.state_dict() if state_dict is None else state_dict
        save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, folder / WEIGHTS)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> AutoEncoder:
        """Read a folder that `save_pretrained` wrote.

        Raises:
            ModelError: a file is missing or does not fit.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            stored = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            if stored.pop("model_type", None) != "gates":
                raise ValueError("its model_type is not gates")
            shape = Shape(**{**stored, "hidden_dims": tuple(stored["hidden_dims"])})
            network = cls(shape)
            network.load_state_dict(load_file(folder / WEIGHTS))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"{folder}: no usable spatial encoder: {error}. Save or copy it again") from error
        return network


def _order(cells: Neighbourhood, ring: int) -> Tensor:
    """Return the order by receiver of the edges of both graphs up to a ring, concatenated."""
    ends = [end[ring] for end in cells.ends]
    total = len(cells.graphs[0][0])
    order = cells.order[: sum(ends)]
    # edges of the second graph come after those of the first that are in use
    return torch.where(order < total, order, order - (total - ends[0]))
