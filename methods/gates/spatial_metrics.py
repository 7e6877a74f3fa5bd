"""How coherent domains are in space, without true labels (5.4): PAS and CHAOS, lower is better for both."""

from __future__ import annotations

import numpy as np
from tenfold.methods.gates.nearest import as_coordinates, by_section, nearest_others


def pas(
    labels: np.ndarray,
    coordinates: np.ndarray,
    sections: np.ndarray | None = None,
    *,
    num_neighbours: int = 10,
    threshold: int = 6,
) -> float:
    """Return the share of abnormal spots: cells whose label differs from that of most of their nearest cells.

    Args:
        labels: [N], any values that can be compared.
        coordinates: [N, dimensions].
        sections: section of each cell [N]; neighbours are of the same section.
        num_neighbours: nearest other cells that are looked at.
        threshold: as many of them with another label make a cell abnormal; the same share of fewer in a section
            with fewer cells. A cell alone in its section is not abnormal.

    Returns:
        Share in [0, 1]; nan without cells.
    """
    labels = np.asarray(labels)
    if not len(labels):
        return float("nan")
    abnormal = 0
    for cells, neighbours in nearest_others(coordinates, num_neighbours, sections):
        available = neighbours.shape[1]
        differing = (labels[neighbours] != labels[cells][:, None]).sum(axis=1)
        abnormal += int((differing * num_neighbours >= threshold * available).sum()) if available else 0
    return abnormal / len(labels)


def chaos(labels: np.ndarray, coordinates: np.ndarray, sections: np.ndarray | None = None) -> float:
    """Return the mean distance of a cell to the nearest one of its domain, in z-scored coordinates.

    Each axis of each section is divided by its standard deviation (population); an axis without extent stays 0. A
    cell that is the only one of its domain in its section contributes 0.

    Args:
        labels: [N], any values that can be compared.
        coordinates: [N, dimensions].
        sections: section of each cell [N]; distances are within sections.

    Returns:
        Mean over all cells; nan without cells.
    """
    from scipy.spatial import cKDTree

    labels, coordinates = np.asarray(labels), as_coordinates(coordinates)
    if not len(labels):
        return float("nan")
    total = 0.0
    for cells in by_section(len(labels), sections):
        scores = coordinates[cells] - coordinates[cells].mean(axis=0)
        deviations = scores.std(axis=0)
        scores /= np.where(deviations > 0, deviations, 1.0)
        for domain in np.unique(labels[cells]):
            members = scores[labels[cells] == domain]
            if len(members) > 1:
                total += float(cKDTree(members).query(members, k=[2])[0].sum())
    return total / len(labels)
