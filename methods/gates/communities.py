"""Communities of the graph of similar cells: Leiden and Louvain, at a resolution or for a number (3.9).

Legend: N cells, d columns.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import igraph
    from scipy.sparse import csr_matrix

Kind = Literal["leiden", "louvain"]
RESOLUTIONS = (0.01, 3.0)
MAX_STEPS = 30

# Exact and quick enough. scanpy's own choice above 8,192 cells, pynndescent, gives a matrix since its 0.7 that scanpy
# 1.11 cannot read.
NEIGHBOUR_SEARCH = "sklearn"


def neighbour_matrix(values: np.ndarray, num_neighbours: int, seed: int) -> csr_matrix:
    """Return scanpy's weights between neighbours in an embedding: symmetric, float32 [N, N].

    Args:
        values: [N, d] floats, N at least 3.
        num_neighbours: of a cell, itself counted, as scanpy does; N - 1 where there are fewer cells.
        seed: of the approximate search that scanpy uses for many cells.
    """
    import scanpy
    from anndata import AnnData

    adata = AnnData(obsm={"values": np.asarray(values, dtype=np.float32)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scanpy.pp.neighbors(
            adata,
            n_neighbors=min(num_neighbours, len(values) - 1),
            use_rep="values",
            random_state=seed,
            transformer=NEIGHBOUR_SEARCH,
        )
    return adata.obsp["connectivities"].tocsr()


def communities(matrix: csr_matrix, kind: Kind, resolution: float, seed: int) -> np.ndarray:
    """Return the communities of a weighted graph at a resolution, integers [N] from 0.

    Leiden as `scanpy.tl.leiden(flavor="igraph", n_iterations=2, directed=False)`. Louvain is igraph's multilevel
    algorithm: scanpy's flavor igraph ignores the resolution.

    Args:
        matrix: symmetric weights [N, N]; the diagonal is not read.
        kind: leiden or louvain.
        resolution: of the modularity; larger gives more communities.
        seed: of the order in which nodes are visited.
    """
    return _partition(_graph(matrix), kind, resolution, seed)


def communities_of_number(matrix: csr_matrix, kind: Kind, number: int, seed: int) -> tuple[np.ndarray, float]:
    """Return communities at a resolution, found by bisection, that gives exactly `number` of them.

    At most 30 resolutions in [0.01, 3] are tried; where none gives the number, the nearest count is taken.

    Returns:
        Communities [N], and their resolution.
    """
    graph = _graph(matrix)
    return _search(lambda resolution: _partition(graph, kind, resolution, seed), number)


def _search(partition: Callable[[float], np.ndarray], number: int) -> tuple[np.ndarray, float]:
    low, high = RESOLUTIONS
    best: tuple[int, np.ndarray, float] | None = None
    for _ in range(MAX_STEPS):
        resolution = (low + high) / 2
        groups = partition(resolution)
        excess = int(groups.max()) + 1 - number
        if best is None or abs(excess) < best[0]:
            best = abs(excess), groups, resolution
        if excess == 0 or high - low < 1e-6:
            break
        low, high = (resolution, high) if excess < 0 else (low, resolution)
    assert best is not None
    return best[1], best[2]


def _graph(matrix: csr_matrix) -> igraph.Graph:
    import igraph
    from scipy.sparse import triu

    upper = triu(matrix, k=1).tocoo()
    graph = igraph.Graph(n=matrix.shape[0], edges=np.column_stack([upper.row, upper.col]), directed=False)
    graph.es["weight"] = upper.data.astype(np.float64)
    return graph


def _partition(graph: igraph.Graph, kind: Kind, resolution: float, seed: int) -> np.ndarray:
    with _seeded(seed):
        if kind == "louvain":
            found = graph.community_multilevel(weights="weight", resolution=resolution)
        else:
            found = graph.community_leiden(
                objective_function="modularity", weights="weight", resolution=resolution, n_iterations=2
            )
    return np.unique(np.array(found.membership), return_inverse=True)[1]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Let igraph draw from a generator of its own, and from Python's again afterwards."""
    import igraph

    igraph.set_random_number_generator(random.Random(seed))
    try:
        yield
    finally:
        igraph.set_random_number_generator(random)
