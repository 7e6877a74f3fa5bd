"""Refinement of domains by a vote of the nearest cells (3.10): once, all cells from the old labels."""

from __future__ import annotations

import numpy as np
from tenfold.methods.gates.config import Clustering
from tenfold.methods.gates.nearest import as_coordinates, by_section, nearest_others


def refine(
    labels: np.ndarray, coordinates: np.ndarray, options: Clustering, sections: np.ndarray | None = None
) -> np.ndarray:
    """Return refined labels; they keep their numbers, whatever their new sizes.

    Args:
        labels: integers >= 0, [N].
        coordinates: [N, dimensions].
        options: `refine` chooses the rule, `refine_neighbours` the number of cells that vote.
        sections: section of each cell [N]; cells vote in their own section only.

    Returns:
        int64 [N].
    """
    labels = np.asarray(labels, dtype=np.int64)
    if options.refine == "none":
        return labels.copy()
    rule = majority if options.refine == "majority" else spagcn_rule
    refined = labels.copy()
    coordinates = as_coordinates(coordinates)
    for cells in by_section(len(labels), sections):
        count = options.refine_neighbours
        if count == "auto":
            count = automatic_neighbours(len(cells)) if options.refine == "majority" else 6
        refined[cells] = rule(labels[cells], coordinates[cells], count)
    return refined


def automatic_neighbours(num_cells: int) -> int:
    """Return how many cells vote in a section: a twentieth of it, between 6 and 50 (3.10)."""
    return max(6, min(50, num_cells // 20))


def majority(labels: np.ndarray, coordinates: np.ndarray, count: int) -> np.ndarray:
    """Give each cell the most frequent label of its nearest others, its own not counted (GraphST's rule).

    Ties go to the label of the nearest cell among those that share it. A single cell keeps its label.

    Args:
        labels: integers >= 0, [N], of one section.
        coordinates: [N, dimensions].
        count: nearest cells that vote; all others where there are fewer.
    """
    refined = labels.copy()
    for cells, neighbours in nearest_others(coordinates, count):
        if neighbours.shape[1]:
            votes, around = _votes(labels, neighbours)
            own_votes = np.take_along_axis(votes, around, axis=1)
            nearest = (own_votes == votes.max(axis=1, keepdims=True)).argmax(axis=1)
            refined[cells] = around[np.arange(len(cells)), nearest]
    return refined


def spagcn_rule(labels: np.ndarray, coordinates: np.ndarray, count: int) -> np.ndarray:
    """Relabel a cell that stands alone among its nearest others and itself, where another label prevails (SpaGCN).

    With n others: fewer than n / 2 of the n + 1 have the cell's label, and more than n / 2 the most frequent one.

    Args:
        labels: integers >= 0, [N], of one section.
        coordinates: [N, dimensions].
        count: n; 6 on a hexagonal lattice, 4 on a square one.
    """
    refined = labels.copy()
    for cells, neighbours in nearest_others(coordinates, count):
        votes, _ = _votes(labels, np.column_stack([cells, neighbours]))
        half = neighbours.shape[1] / 2
        alone = votes[np.arange(len(cells)), labels[cells]] < half
        changed = alone & (votes.max(axis=1) > half)
        refined[cells[changed]] = votes[changed].argmax(axis=1)
    return refined


def _votes(labels: np.ndarray, voters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how many voters of each cell have each label [B, K], and the voters' labels [B, m]."""
    number = int(labels.max()) + 1
    around = labels[voters]
    flat = around + number * np.arange(len(voters))[:, None]
    return np.bincount(flat.ravel(), minlength=number * len(voters)).reshape(len(voters), number), around
