"""Which cells are neighbours in space (3.2, 3.12)."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from tenfold.methods.gates.config import SpatialGraph
from tenfold.methods.gates.graph import Graph
from tenfold.methods.gates.nearest import by_section, nearest_others
from tenfold.methods.gates.pruning import prune
from tenfold.platform.errors import DataError

if TYPE_CHECKING:
    from scipy.sparse import spmatrix

logger = logging.getLogger(__name__)

RADIUS_FACTOR = 1.1  # our choice: takes in the six neighbours of a hexagonal lattice and none of the next ring
RADIUS_NEIGHBOUR = 6
MANY_NEIGHBOURS = 100  # on average; above, the radius is in another unit than the coordinates
MOST_EDGES = 30_000_000  # of a section: about 2 GB while the graph is built
BLOCK = 65_536

Edges = tuple[np.ndarray, np.ndarray]  # receivers and senders, int64 [E]
NO_EDGES = (np.zeros(0, np.int64), np.zeros(0, np.int64))


def spatial_graph(
    coordinates: np.ndarray,
    options: SpatialGraph,
    *,
    sections: np.ndarray | None = None,
    existing: spmatrix | None = None,
) -> Graph:
    """Link cells that are close to each other; not across sections, unless `z_radius` says so, and not to themselves.

    Two cells at the same place are neighbours. (The official code drops all edges of length 0.)

    Args:
        coordinates: [N, 2] or [N, 3].
        options: kind, radius, k, z_radius.
        sections: section of each cell [N]; None: there is one. `z_radius` links a section with the next in sorted
            order, by the distance between their cells in the coordinates that are given: they must be aligned.
        existing: sparse [N, N], for kind existing; its weights are not read.

    Raises:
        DataError: a coordinate is not finite, a radius takes in hundreds of cells, or the existing graph does not fit.
    """
    places = np.asarray(coordinates, dtype=np.float64)
    _check(places)
    parts = by_section(len(places), sections)
    edges: list[Edges] = [NO_EDGES]
    if options.kind == "existing":
        edges.append(_existing(len(places), sections, existing))
    elif options.kind == "knn":
        edges.extend(_nearest(places, options.k, sections))
    elif options.kind == "delaunay":
        edges.extend(_delaunay(places, cells) for cells in parts)
    else:
        radius = automatic_radius(places, sections) if options.radius == "auto" else options.radius
        edges.extend(_within_radius(places, cells, radius) for cells in parts)
    if options.z_radius is not None:
        for before, after in itertools.pairwise(parts):
            edges.extend(_between(places, before, after, options.z_radius))
    receivers, senders = (np.concatenate(ends) for ends in zip(*edges, strict=True))
    return Graph.from_edges(receivers, senders, len(places))


def automatic_radius(coordinates: np.ndarray, sections: np.ndarray | None = None) -> float:
    """Return 1.1 x the median distance of a cell to the 6th nearest other cell of its section (our choice).

    On a hexagonal lattice this gives the 6 neighbours, on a square one the 8 cells around, in any unit. In a section
    of fewer than 7 cells the farthest cell counts; without two cells in any section the radius is 0.

    Args:
        coordinates: [N, 2] or [N, 3].
        sections: section of each cell [N]; None: there is one.
    """
    from scipy.spatial import cKDTree

    distances = [np.zeros(0)]
    for cells in by_section(len(coordinates), sections):
        nth = min(RADIUS_NEIGHBOUR, len(cells) - 1)
        if nth > 0:  # the tree counts from 1, and the cell itself is one of those at distance 0
            own = coordinates[cells]
            distances.append(cKDTree(own).query(own, k=[nth + 1])[0][:, 0])
    together = np.concatenate(distances)
    return RADIUS_FACTOR * float(np.median(together)) if len(together) else 0.0


def _check(places: np.ndarray) -> None:
    if places.ndim != 2 or places.shape[1] not in (2, 3):
        raise DataError(f"coordinates have shape {places.shape}; need [cells, 2] or [cells, 3]")
    wrong = np.flatnonzero(~np.isfinite(places).all(axis=1))
    if len(wrong):
        listed = ", ".join(str(number) for number in wrong[:10])
        raise DataError(
            f"coordinates of {len(wrong)} cells are NaN or infinite (cells number {listed}). Mend or drop them"
        )


def _existing(number: int, sections: np.ndarray | None, matrix: spmatrix | None) -> Edges:
    if matrix is None or matrix.shape != (number, number):
        shape = "none" if matrix is None else matrix.shape
        raise DataError(
            f"the existing spatial graph has shape {shape}; {number} cells need ({number}, {number}). Compute it with "
            "squidpy on the same cells, or use spatial_graph.kind = radius"
        )
    graph = Graph.from_matrix(matrix).without_self_loops()
    graph = graph if sections is None else prune(graph, sections)
    return graph.receivers, graph.senders


def _within_radius(places: np.ndarray, cells: np.ndarray, radius: float) -> Edges:
    """Return all pairs of cells at most `radius` apart, both ways."""
    from scipy.spatial import cKDTree

    tree = cKDTree(places[cells])
    _check_number(int(tree.count_neighbors(tree, radius)) - len(cells), len(cells), radius)
    pairs = cells[tree.query_pairs(radius, output_type="ndarray")]
    return np.concatenate([pairs[:, 0], pairs[:, 1]]), np.concatenate([pairs[:, 1], pairs[:, 0]])


def _check_number(edges: int, cells: int, radius: float) -> None:
    """Speak up before a radius in the wrong unit fills the memory (official scripts: 150, whatever the unit)."""
    found = f"a radius of {radius:g} takes in {edges / cells:.0f} neighbours a cell on average"
    advice = "It is in the coordinates' unit: use a smaller one, spatial_graph.radius = auto, or kind = knn"
    if edges > MOST_EDGES:
        raise DataError(f"{found}, {edges} edges in all (at most {MOST_EDGES}). {advice}")
    if edges > MANY_NEIGHBOURS * cells:
        logger.warning("%s. %s", found, advice)


def _nearest(places: np.ndarray, k: int, sections: np.ndarray | None) -> Iterator[Edges]:
    """Yield edges from the k nearest other cells to each cell; a section of n <= k cells has n - 1."""
    for cells, others in nearest_others(places, k, sections):
        if others.shape[1] < k:
            logger.warning("spatial_graph.k = %d: a section has %d cells; all are neighbours", k, len(cells))
        yield np.repeat(cells, others.shape[1]), others.ravel()


def _delaunay(places: np.ndarray, cells: np.ndarray) -> Edges:
    """Return the edges of the triangulation; cells at one place are linked to each other and have the same others."""
    from scipy.sparse import csr_matrix, identity
    from scipy.spatial import Delaunay, QhullError

    if len(cells) < 2:
        return NO_EDGES
    corners, corner = np.unique(places[cells], axis=0, return_inverse=True)
    try:
        offsets, senders = Delaunay(corners).vertex_neighbor_vertices
    except (QhullError, ValueError) as error:
        raise DataError(
            "spatial_graph.kind = delaunay: the cells of a section lie on a line, or are too few; use radius or knn"
        ) from error
    links = csr_matrix((np.ones(len(senders)), senders, offsets), shape=(len(corners), len(corners)))
    at = csr_matrix((np.ones(len(cells)), corner.ravel(), np.arange(len(cells) + 1)))
    graph = Graph.from_matrix(at @ (links + identity(len(corners))) @ at.T).without_self_loops()
    return cells[graph.receivers], cells[graph.senders]


def _between(places: np.ndarray, before: np.ndarray, after: np.ndarray, radius: float) -> Iterator[Edges]:
    """Yield the pairs of cells of two sections at most `radius` apart, both ways (STAGATE's 3-D option)."""
    from scipy.spatial import cKDTree

    first, second = cKDTree(places[before]), cKDTree(places[after])
    _check_number(2 * int(first.count_neighbors(second, radius)), len(before) + len(after), radius)
    for start in range(0, len(before), BLOCK):
        block = before[start : start + BLOCK]
        near = second.query_ball_point(places[block], radius)
        ours = np.repeat(block, [len(found) for found in near])
        theirs = after[np.fromiter(itertools.chain.from_iterable(near), np.int64, len(ours))]
        yield ours, theirs
        yield theirs, ours
