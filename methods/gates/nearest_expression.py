"""The most similar cells by all genes: candidates by matrix products in float32, their order in float64 (3.3).

Legend: N cells, G genes, k neighbours, m candidates (a few more than k), B rows of a block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Similarity = Literal["cosine", "euclidean", "pearson"]

BLOCK_ROWS = 2048
SPARE = 10  # candidates beyond k: similarities within a step of each other are equal when they are chosen
STEPS = 2.0**17  # a step is more than the rounding of products, up to 2e-6 for similarities up to 1
TINY = 1e-30
PAIR_VALUES = 2_000_000  # of rows that are compared at once: about 100 MB


def most_similar(expression: csr_matrix, k: int, similarity: Similarity, block_rows: int = BLOCK_ROWS) -> np.ndarray:
    """Return candidates for the k most similar other cells of each.

    Similarities exist for B x B cells at a time, and each serves both of its cells; rows are dense for 2 B cells.

    Args:
        expression: float32 CSR [N, G]; the similarity must be defined for every row.
        k: 1 to N - 1.
        similarity: cosine, euclidean or pearson.
        block_rows: B; changes memory and speed, not the neighbours.

    Returns:
        int64 [N, m], m = min(k + 10, N - 1), most similar first up to rounding.
    """
    number = expression.shape[0]
    wanted = min(k + SPARE, number - 1)
    values = np.full((number, wanted), -np.inf, dtype=np.float32)
    cells = np.full((number, wanted), -1, dtype=np.int64)
    blocks = [slice(start, min(start + block_rows, number)) for start in range(0, number, block_rows)]
    shift, scale = _frame(expression, similarity)
    for index, own in enumerate(blocks):
        rows = _vectors(expression[own], similarity, shift, scale)
        for other in blocks[index:]:
            columns = rows if other == own else _vectors(expression[other], similarity, shift, scale)
            similar = rows @ columns.T
            if similarity == "euclidean":
                _to_distances(similar, rows, columns)
            if other == own:
                np.fill_diagonal(similar, -np.inf)
            else:
                _take(values[other], cells[other], similar.T, own.start)
            _take(values[own], cells[own], similar, other.start)
    return cells


def reorder(expression: csr_matrix, candidates: np.ndarray, k: int, similarity: Similarity) -> np.ndarray:
    """Return the k most similar of each cell's candidates by float64 similarity; of equal ones the smaller number.

    Args:
        expression: float32 CSR [N, G].
        candidates: int64 [N, m], distinct within a row; -1 for none.
        k: neighbours.
        similarity: cosine, euclidean or pearson.

    Returns:
        int64 [N, k]; -1 where there are fewer.
    """
    number, listed = candidates.shape
    means, lengths = _means_and_lengths(expression, similarity)
    found = np.full((number, k), -1, dtype=np.int64)
    mean_values = max(1, expression.nnz // max(number, 1))
    step = max(1, PAIR_VALUES // (mean_values * listed))
    for start in range(0, number, step):
        block = candidates[start : start + step]
        owners, places = np.nonzero(block >= 0)
        others = block[owners, places]
        scores = np.full(block.shape, -np.inf)
        owners += start
        own, other = expression[owners].astype(np.float64), expression[others].astype(np.float64)
        if similarity == "euclidean":
            values = -np.sqrt(_sums((own - other).power(2)))
        else:
            products = _sums(own.multiply(other)) - expression.shape[1] * means[owners] * means[others]
            values = products / (lengths[owners] * lengths[others])
        # Sums in another order differ in the last digits; those do not decide.
        scores[owners - start, places] = values.round(12)
        order = np.lexsort((block, -scores))[:, :k]
        found[start : start + step, : order.shape[1]] = np.take_along_axis(block, order, axis=1)
    return found


def _frame(expression: csr_matrix, similarity: Similarity) -> tuple[np.ndarray, float]:
    """Return the centre [G] and size that bring distances to the order of 1, where float32 is finest."""
    if similarity != "euclidean":
        return np.zeros(expression.shape[1], dtype=np.float32), 1.0
    centre = np.asarray(expression.mean(axis=0, dtype=np.float64)).ravel()
    squares = _sums(expression.power(2)) + centre @ centre - 2 * (expression @ centre)
    return centre.astype(np.float32), float(np.sqrt(max(squares.max(initial=0), TINY)))


def _means_and_lengths(expression: csr_matrix, similarity: Similarity) -> tuple[np.ndarray, np.ndarray]:
    """Return what pearson takes off a row, and the length of what is left, float64 [N]."""
    squares = _sums(expression.astype(np.float64).power(2))
    means = _sums(expression) / expression.shape[1] if similarity == "pearson" else np.zeros(len(squares))
    return means, np.sqrt(np.maximum(squares - expression.shape[1] * means**2, TINY))


def _vectors(rows: csr_matrix, similarity: Similarity, shift: np.ndarray, scale: float) -> np.ndarray:
    """Return dense float32 [B, G] whose inner products (euclidean: distances) order cells by similarity."""
    dense = rows.toarray().astype(np.float32, copy=False)
    if similarity == "euclidean":
        dense -= shift
        dense /= scale
        return dense
    if similarity == "pearson":
        dense -= dense.mean(axis=1, keepdims=True, dtype=np.float64)
    squares = np.einsum("ij,ij->i", dense, dense, dtype=np.float64)
    dense /= np.sqrt(np.maximum(squares, TINY))[:, None]
    return dense


def _to_distances(products: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> None:
    """Turn inner products into -|x - y|^2, in place."""
    products *= 2
    products -= np.einsum("ij,ij->i", rows, rows)[:, None]
    products -= np.einsum("ij,ij->i", columns, columns)


def _take(values: np.ndarray, cells: np.ndarray, similar: np.ndarray, first: int) -> None:
    """Merge a tile into the best so far, in place; tiles come in ascending order, so that earlier ones win ties.

    Args:
        values: float32 [B, m], descending, whole steps; -inf where nothing was found yet.
        cells: int64 [B, m].
        similar: float32 [B, C].
        first: number of the cell in the tile's first column.
    """
    wanted = values.shape[1]
    bound = values[:, -1:].copy()
    new = np.isneginf(bound[:, 0])
    if new.any() and similar.shape[1] > wanted:  # the tile's own m best will do
        kth = np.partition(similar[new], -wanted, axis=1)[:, [-wanted]]
        bound[new] = np.floor(kth * STEPS - 1) / STEPS
    rows, columns = np.nonzero(similar > bound)
    touched = np.unique(rows)
    found = np.rint(similar[rows, columns] * STEPS) / STEPS
    all_rows = np.concatenate([np.repeat(touched, wanted), rows])
    all_values = np.concatenate([values[touched].ravel(), found])
    all_cells = np.concatenate([cells[touched].ravel(), columns + first])
    order = np.lexsort((all_cells, -all_values, all_rows))
    starts = np.searchsorted(all_rows[order], touched)
    best = order[starts[:, None] + np.arange(wanted)]
    values[touched], cells[touched] = all_values[best], all_cells[best]


def _sums(matrix: csr_matrix) -> np.ndarray:
    return np.asarray(matrix.sum(axis=1, dtype=np.float64)).ravel()
