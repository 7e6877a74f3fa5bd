"""The nearest other cells of each cell, within its section."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BLOCK = 65_536


def as_coordinates(coordinates: np.ndarray) -> np.ndarray:
    """Return coordinates as float64 [N, dimensions]; a list of N numbers lies on a line."""
    coordinates = np.asarray(coordinates, dtype=np.float64)
    return coordinates[:, None] if coordinates.ndim == 1 else coordinates


def by_section(num_cells: int, sections: np.ndarray | None) -> list[np.ndarray]:
    """Return the cells of each section, ascending; all cells where `sections` is None.

    Raises:
        ValueError: `sections` does not name one for each cell.
    """
    if sections is None:
        return [np.arange(num_cells)] if num_cells else []
    if len(sections) != num_cells:
        raise ValueError(f"sections has {len(sections)} entries for {num_cells} cells; needs one for each")
    codes = np.unique(np.asarray(sections), return_inverse=True)[1]
    return np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1]) if num_cells else []


def nearest_others(
    coordinates: np.ndarray, count: int, sections: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield blocks of cells with their nearest other cells, nearest first.

    A cell at the same place counts as another cell. Which of several cells at the same distance comes last is open.

    Args:
        coordinates: [N, dimensions], or [N] on a line.
        count: m; a section of n <= m cells gives n - 1, a single cell 0.
        sections: section of each cell [N]; None: there is one.

    Yields:
        Cells int64 [B] and their neighbours int64 [B, m]; every cell is in exactly one block.
    """
    from scipy.spatial import cKDTree

    coordinates = as_coordinates(coordinates)
    for cells in by_section(len(coordinates), sections):
        tree = cKDTree(coordinates[cells])
        available = min(count, len(cells) - 1)
        for start in range(0, len(cells), BLOCK):
            own = np.arange(start, min(start + BLOCK, len(cells)))
            found = tree.query(coordinates[cells[own]], k=np.arange(1, available + 2))[1]
            # Where several cells share a place, the cell itself may come later, or not at all: then the last one goes.
            itself = found == own[:, None]
            itself[~itself.any(axis=1), -1] = True
            yield cells[own], cells[found[~itself].reshape(len(own), available)]
