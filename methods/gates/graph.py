"""Directed graphs of cells: who receives from whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix, spmatrix


@dataclass(frozen=True, eq=False)
class Graph:
    """Directed edges by receiver (CSR): cell i receives from senders[offsets[i]:offsets[i + 1]].

    Attributes:
        offsets: int64 [N + 1].
        senders: int64 [E], ascending within a receiver, no duplicates.
    """

    offsets: np.ndarray
    senders: np.ndarray

    @property
    def num_nodes(self) -> int:
        """N."""
        return len(self.offsets) - 1

    @property
    def num_edges(self) -> int:
        """E, one for each direction."""
        return len(self.senders)

    @property
    def receivers(self) -> np.ndarray:
        """Receiver of every edge, int64 [E], ascending."""
        return np.repeat(np.arange(self.num_nodes), np.diff(self.offsets))

    @classmethod
    def from_edges(cls, receivers: np.ndarray, senders: np.ndarray, num_nodes: int) -> Graph:
        """Build a graph from edges in any order; an edge that occurs twice counts once.

        Args:
            receivers: integers [E] in [0, num_nodes).
            senders: integers [E] in [0, num_nodes).
            num_nodes: N.

        Raises:
            ValueError: the lengths differ, or a number is outside.
        """
        receivers, senders = np.asarray(receivers, dtype=np.int64), np.asarray(senders, dtype=np.int64)
        if receivers.shape != senders.shape or receivers.ndim != 1:
            raise ValueError(f"receivers {receivers.shape} and senders {senders.shape} must be equally long lists")
        for ends in (receivers, senders):
            if len(ends) and (ends.min() < 0 or ends.max() >= num_nodes):
                raise ValueError(f"edges name cells {ends.min()} to {ends.max()}; there are {num_nodes}")
        keys = np.unique(receivers * num_nodes + senders)
        rows = keys // max(num_nodes, 1)
        offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=num_nodes))]).astype(np.int64)
        return cls(offsets, keys - rows * num_nodes)

    @classmethod
    def from_matrix(cls, matrix: spmatrix) -> Graph:
        """Build a graph from the pattern of a sparse matrix: row i receives from its nonzero columns.

        Args:
            matrix: any sparse format [N, N]; weights are not read, a stored 0 is no edge.

        Raises:
            ValueError: the matrix is not square.
        """
        if matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"an adjacency of shape {matrix.shape} is not square")
        coo = matrix.tocoo()
        stored = coo.data != 0
        return cls.from_edges(coo.row[stored], coo.col[stored], coo.shape[0])

    def to_matrix(self) -> csr_matrix:
        """Return the adjacency, float32 [N, N], 1 at every edge."""
        from scipy.sparse import csr_matrix

        ones = np.ones(self.num_edges, dtype=np.float32)
        return csr_matrix((ones, self.senders, self.offsets), shape=(self.num_nodes, self.num_nodes))

    def with_self_loops(self) -> Graph:
        """Return the graph with exactly one self loop on every node (3.5)."""
        nodes = np.arange(self.num_nodes)
        return Graph.from_edges(
            np.concatenate([self.receivers, nodes]), np.concatenate([self.senders, nodes]), self.num_nodes
        )

    def without_self_loops(self) -> Graph:
        """Return the graph without self loops."""
        receivers = self.receivers
        other = receivers != self.senders
        return Graph.from_edges(receivers[other], self.senders[other], self.num_nodes)

    def reversed(self) -> Graph:
        """Return the graph with every edge turned round."""
        return Graph.from_edges(self.senders, self.receivers, self.num_nodes)

    def symmetric(self) -> Graph:
        """Return the union of the graph and its reverse."""
        receivers = self.receivers
        return Graph.from_edges(
            np.concatenate([receivers, self.senders]), np.concatenate([self.senders, receivers]), self.num_nodes
        )

    def statistics(self) -> dict[str, float]:
        """Return the number of edges; the mean, least and most senders of a cell; the cells without any."""
        degrees = np.diff(self.offsets)
        return {
            "edges": float(self.num_edges),
            "mean_neighbours": float(degrees.mean()) if len(degrees) else 0.0,
            "min_neighbours": float(degrees.min(initial=self.num_nodes)) if len(degrees) else 0.0,
            "max_neighbours": float(degrees.max(initial=0)),
            "isolated": float((degrees == 0).sum()),
        }
