"""The spatial graph without edges between cells of different kinds (3.4, STAGATE's cell-type-aware network)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from tenfold.methods.gates.baselines import pca_embedding
from tenfold.methods.gates.communities import communities, neighbour_matrix
from tenfold.methods.gates.graph import Graph

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

NUM_COMPONENTS = 50  # components and neighbours as scanpy's defaults
NUM_NEIGHBOURS = 15


def prune(graph: Graph, labels: np.ndarray) -> Graph:
    """Keep the edges whose two cells have one label.

    A cell that loses all edges stays, alone. (The official code reads the number of cells off the edges, and crashes
    where the last cells lose theirs.) Cells without a label, None or NaN, count as one more label.

    Args:
        graph: N cells.
        labels: [N], any hashable values.

    Raises:
        ValueError: there is not one label for each cell.
    """
    import pandas as pd

    if len(labels) != graph.num_nodes:
        raise ValueError(f"{len(labels)} labels for {graph.num_nodes} cells; needs one for each")
    codes = pd.factorize(np.asarray(labels), use_na_sentinel=False)[0]
    receivers = graph.receivers
    same = codes[receivers] == codes[graph.senders]
    return Graph.from_edges(receivers[same], graph.senders[same], graph.num_nodes)


def expression_clusters(expression: csr_matrix, resolution: float, seed: int) -> np.ndarray:
    """Cluster cells by expression alone: principal components, 15 neighbours, Leiden.

    Args:
        expression: float32 CSR [N, G].
        resolution: of Leiden; more gives more clusters.
        seed: of all three.

    Returns:
        int64 [N], clusters in no order; all 0 for up to two cells.
    """
    if expression.shape[0] <= 2:
        return np.zeros(expression.shape[0], dtype=np.int64)
    matrix = neighbour_matrix(pca_embedding(expression, NUM_COMPONENTS, seed), NUM_NEIGHBOURS, seed)
    return communities(matrix, "leiden", resolution, seed).astype(np.int64)
