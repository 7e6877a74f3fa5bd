"""Which cells express similarly, anywhere in the tissue (3.3).

Legend: N cells, G genes, k neighbours, m candidates (a few more than k).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
from tenfold.methods.gates.baselines import pca_embedding
from tenfold.methods.gates.config import ExpressionGraph
from tenfold.methods.gates.graph import Graph
from tenfold.methods.gates.nearest import by_section
from tenfold.methods.gates.nearest_expression import Similarity, most_similar, reorder

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

logger = logging.getLogger(__name__)

NUM_COMPONENTS = 50  # of the approximate index
LISTED = 60  # neighbours that it lists for each cell: of 15, real sections have half as many of the true ones


def expression_graph(
    expression: csr_matrix, options: ExpressionGraph, *, sections: np.ndarray | None = None, seed: int = 0
) -> tuple[Graph, str]:
    """Link every cell to the k most similar other cells; it receives from them.

    A cell never lists itself, also where others are exact copies of it. (The official code takes the first of a list
    for the cell itself.) Of equally similar cells those with smaller numbers are taken. A cell whose similarity is not
    defined (nothing expressed; with pearson: all genes alike) lists nobody, and nobody lists it.

    Args:
        expression: float32 CSR [N, G], log-normalised.
        options: k, similarity, direction, scope, and up to how many cells neighbours are exact. `direction: reverse`
            is the official orientation: a cell receives from those that list it.
        sections: section of each cell [N], for scope section.
        seed: of the approximate index.

    Returns:
        The graph without self loops, and how neighbours were found, for people.
    """
    number = expression.shape[0]
    usable = _usable(expression, options.similarity)
    receivers, senders = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    largest = 0
    for part in by_section(number, sections if options.scope == "section" else None):
        cells = part[usable[part]]
        largest = max(largest, len(cells))
        k = min(options.k, len(cells) - 1)
        if k < options.k:
            logger.warning("expression_graph.k = %d: there are only %d cells to choose from", options.k, len(cells))
        if k < 1:
            continue
        values = expression if len(cells) == number else expression[cells]
        if len(cells) <= options.exact_up_to:
            found = exact_neighbours(values, k, options.similarity)
        else:
            found = approximate_neighbours(values, k, options.similarity, seed)
        owners, others = np.nonzero(found >= 0)[0], found[found >= 0]
        receivers.append(cells[owners])
        senders.append(cells[others])
    graph = Graph.from_edges(np.concatenate(receivers), np.concatenate(senders), number)
    if options.direction == "reverse":
        graph = graph.reversed()
    if options.symmetrize:
        graph = graph.symmetric()
    how = "exact" if largest <= options.exact_up_to else f"pynndescent on {NUM_COMPONENTS} components"
    return graph, f"{options.similarity}, {how}"


def exact_neighbours(expression: csr_matrix, k: int, similarity: Similarity) -> np.ndarray:
    """Return the k most similar other cells of each, the most similar first.

    Args:
        expression: float32 CSR [N, G]; the similarity must be defined for every row.
        k: 1 to N - 1.
        similarity: cosine, euclidean (smaller distance is more similar) or pearson.

    Returns:
        int64 [N, k].
    """
    return reorder(expression, most_similar(expression, k, similarity), k, similarity)


def approximate_neighbours(expression: csr_matrix, k: int, similarity: Similarity, seed: int) -> np.ndarray:
    """Return most of the k most similar other cells of each, int64 [N, k]; -1 where fewer were found.

    An index on 50 components lists candidates, which are then ordered by their similarity in all genes. For cosine and
    pearson these are the singular vectors of rows of length 1, not centred: angles around the mean cell are other
    angles, and principal components find half as many of the most similar cells on real sections.

    Args:
        expression: float32 CSR [N, G]; the similarity must be defined for every row.
        k: 1 to N - 1.
        similarity: cosine, euclidean or pearson.
        seed: of the components and the index.
    """
    import pynndescent

    index = pynndescent.NNDescent(
        _components(expression, similarity, seed),
        metric="euclidean" if similarity == "euclidean" else "cosine",
        n_neighbors=min(max(k + 1, LISTED), expression.shape[0] - 1),
        random_state=seed,
    )
    listed = index.neighbor_graph[0].astype(np.int64)
    listed[listed == np.arange(len(listed))[:, None]] = -1
    return reorder(expression, listed, k, similarity)


def _components(expression: csr_matrix, similarity: Similarity, seed: int) -> np.ndarray:
    """Return float32 [N, at most 50], in which near cells are similar."""
    number = min(NUM_COMPONENTS, expression.shape[0] - 1, expression.shape[1] - 1)
    if similarity == "euclidean" or number < 1:
        return pca_embedding(expression, NUM_COMPONENTS, seed)
    from sklearn.decomposition import TruncatedSVD
    from sklearn.preprocessing import normalize

    return TruncatedSVD(number, random_state=seed).fit_transform(normalize(expression)).astype(np.float32)


def _usable(expression: csr_matrix, similarity: Similarity) -> np.ndarray:
    """Return for which cells the similarity to others is defined, bool [N]."""
    if similarity == "euclidean":
        return np.ones(expression.shape[0], dtype=bool)
    highest = expression.max(axis=1).toarray().ravel()
    lowest = expression.min(axis=1).toarray().ravel()
    return (highest != lowest) if similarity == "pearson" else (highest != 0) | (lowest != 0)
