"""Embeddings that GATES is compared with: principal components, alone and averaged over neighbours (6.1, 6.6).

Legend: N cells, G genes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix
    from tenfold.methods.gates.graph import Graph

EXACT_GENES = 1000  # up to which the covariance of the genes is formed; above, Lanczos


def pca_embedding(expression: csr_matrix, num_components: int, seed: int) -> np.ndarray:
    """Return principal components of centred, unscaled expression; it stays sparse.

    Args:
        expression: [N, G], N at least 1.
        num_components: at most N - 1 and G - 1 are taken, at least 1.
        seed: of the start of the Lanczos iteration, above 1000 genes.

    Returns:
        float32 [N, min(num_components, N - 1, G - 1)]; a single cell is at 0.
    """
    from sklearn.decomposition import PCA

    num_cells, num_genes = expression.shape
    if num_cells == 1:
        return np.zeros((1, 1), dtype=np.float32)
    count = max(1, min(num_components, num_cells - 1, num_genes - 1))
    solver = "covariance_eigh" if num_genes <= EXACT_GENES else "arpack"
    model = PCA(count, svd_solver=solver, random_state=seed)
    return model.fit_transform(expression.astype(np.float64)).astype(np.float32)


def spatial_pca_embedding(
    expression: csr_matrix, graph: Graph, num_components: int, seed: int, rounds: int = 2
) -> np.ndarray:
    """Return principal components averaged over each cell's neighbours and itself, `rounds` times.

    Args:
        expression: [N, G].
        graph: neighbours in space, N nodes; a self loop is added to each where missing.
        num_components: as in `pca_embedding`.
        seed: as in `pca_embedding`.
        rounds: of averaging.

    Returns:
        float32 [N, components].
    """
    values = pca_embedding(expression, num_components, seed).astype(np.float64)
    adjacency = graph.with_self_loops().to_matrix().astype(np.float64)
    degrees = np.diff(adjacency.indptr)[:, None]
    for _ in range(rounds):
        values = adjacency @ values / degrees
    return values.astype(np.float32)
