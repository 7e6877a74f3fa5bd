"""Neighbours in space: worked lattices, all pairs by brute force, invariants, the official code's errors."""

import logging

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from tenfold.methods.gates.config import SpatialGraph
from tenfold.methods.gates.spatial_graph import automatic_radius, spatial_graph
from tenfold.platform.errors import DataError


def pairs(graph):
    return set(zip(graph.receivers.tolist(), graph.senders.tolist(), strict=True))


def hexagonal(rows=10, columns=10, pitch=100.0):
    places = [
        (pitch * (column + 0.5 * (row % 2)), row * 0.866025 * pitch)
        for row in range(rows)
        for column in range(columns)
    ]
    return np.array(places)


def cells(number=80, dimensions=2, seed=0):
    return np.random.default_rng(seed).random((number, dimensions)) * 10


def pairs_within(places, radius, sections=None):
    return {
        (i, j)
        for i in range(len(places))
        for j in range(len(places))
        if i != j
        and np.linalg.norm(places[i] - places[j]) <= radius
        and (sections is None or sections[i] == sections[j])
    }


def test_the_automatic_radius_of_a_hexagonal_lattice_takes_in_its_six_neighbours():
    places = hexagonal()
    assert automatic_radius(places) == pytest.approx(110, abs=1e-3)
    graph = spatial_graph(places, SpatialGraph())
    degrees = np.diff(graph.offsets)
    assert np.bincount(degrees).tolist() == [0, 0, 2, 10, 16, 8, 64]
    assert graph.num_edges == 522
    assert graph.statistics()["mean_neighbours"] == pytest.approx(5.22)


def test_the_automatic_radius_of_a_square_lattice_takes_in_the_eight_cells_around():
    places = np.stack(np.meshgrid(np.arange(8.0), np.arange(8.0)), axis=-1).reshape(-1, 2)
    inner = (places.min(axis=1) > 0) & (places.max(axis=1) < 7)
    degrees = np.diff(spatial_graph(places, SpatialGraph()).offsets)
    assert set(degrees[inner]) == {8}


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("radius", [0.5, 2.0, 100.0])
def test_a_radius_links_all_cells_within_it_both_ways(dimensions, radius):
    places = cells(40, dimensions)
    assert pairs(spatial_graph(places, SpatialGraph(radius=radius))) == pairs_within(places, radius)


def test_a_cell_exactly_at_the_radius_is_a_neighbour():
    assert pairs(spatial_graph(np.array([[0.0, 0], [3, 4], [3, 4.1]]), SpatialGraph(radius=5))) == {
        (0, 1),
        (1, 0),
        (1, 2),
        (2, 1),
    }


def test_nearest_cells_are_senders_to_the_cell_that_lists_them():
    places = cells(50)
    graph = spatial_graph(places, SpatialGraph(kind="knn", k=4))
    distances = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    nearest = np.sort(np.argsort(distances, axis=1)[:, :4], axis=1)
    np.testing.assert_array_equal(graph.senders.reshape(50, 4), nearest)
    assert pairs(graph) != pairs(graph.reversed())
    # one far cell: it lists others, and nobody lists it
    places[7] = 1e3
    graph = spatial_graph(places, SpatialGraph(kind="knn", k=4))
    assert np.diff(graph.offsets)[7] == 4
    assert 7 not in graph.senders


@pytest.mark.parametrize("kind", ["radius", "knn", "delaunay"])
@pytest.mark.parametrize("sections", [None, np.repeat([0, 1], 40)])
def test_moving_turning_and_mirroring_a_tissue_keeps_its_graph(kind, sections):
    places = cells()
    graph = spatial_graph(places, SpatialGraph(kind=kind), sections=sections)
    turn = np.array([[np.cos(1.0), -np.sin(1.0)], [np.sin(1.0), np.cos(1.0)]])
    for moved in (places + 1000, places @ turn, places * [-1, 1], places * 137.0, places * 1e-3):
        assert pairs(spatial_graph(moved, SpatialGraph(kind=kind), sections=sections)) == pairs(graph)


@pytest.mark.parametrize("kind", ["radius", "knn", "delaunay"])
def test_a_permutation_of_the_cells_permutes_the_graph(kind):
    places, order = cells(), np.random.default_rng(1).permutation(80)
    graph = spatial_graph(places, SpatialGraph(kind=kind))
    permuted = spatial_graph(places[order], SpatialGraph(kind=kind))
    assert {(order[i], order[j]) for i, j in pairs(permuted)} == pairs(graph)


@pytest.mark.parametrize("kind", ["radius", "knn", "delaunay"])
def test_cells_at_one_place_are_neighbours_and_none_is_its_own(kind):
    # the official code drops edges of length 0
    places = np.concatenate([cells(30), cells(30)[:5]])
    found = pairs(spatial_graph(places, SpatialGraph(kind=kind)))
    for cell in range(5):
        assert {(cell, cell + 30), (cell + 30, cell)} <= found
    assert all(i != j for i, j in found)


def test_copies_of_a_corner_have_its_neighbours_in_a_triangulation():
    places = cells(30)
    plain = pairs(spatial_graph(places, SpatialGraph(kind="delaunay")))
    corner = [*range(30), 3, 3]
    doubled = pairs(spatial_graph(places[corner], SpatialGraph(kind="delaunay")))
    expected = {(i, j) for i in range(32) for j in range(32) if (corner[i], corner[j]) in plain}
    copies = {(i, j) for i in (3, 30, 31) for j in (3, 30, 31) if i != j}
    assert doubled == expected | copies


def test_a_triangulation_of_a_square_and_its_centre():
    places = np.array([[0.0, 0], [2, 0], [2, 2], [0, 2], [1, 1]])
    around = {(0, 1), (1, 2), (2, 3), (3, 0)} | {(4, corner) for corner in range(4)}
    assert pairs(spatial_graph(places, SpatialGraph(kind="delaunay"))) == around | {(j, i) for i, j in around}


@pytest.mark.parametrize("places", [np.arange(8.0).repeat(2).reshape(8, 2), np.eye(2), np.ones((5, 2))])
def test_cells_that_cannot_be_triangulated_are_refused_with_the_way_out(places):
    with pytest.raises(DataError, match="use radius or knn"):
        spatial_graph(places, SpatialGraph(kind="delaunay"))


@pytest.mark.parametrize("kind", ["radius", "knn", "delaunay", "existing"])
def test_no_edge_joins_two_sections(kind):
    # both sections have the same coordinates, and their cells alternate
    places = np.repeat(cells(40), 2, axis=0)
    sections = np.tile(["b", "a"], 40)
    existing = csr_matrix(np.ones((80, 80)))
    graph = spatial_graph(places, SpatialGraph(kind=kind), sections=sections, existing=existing)
    assert all(sections[i] == sections[j] for i, j in pairs(graph))
    alone = spatial_graph(cells(40), SpatialGraph(kind=kind), existing=existing[:40, :40])
    assert pairs(graph) == {(2 * i + part, 2 * j + part) for i, j in pairs(alone) for part in (0, 1)}


def test_consecutive_sections_are_linked_within_the_z_radius():
    places = cells(60)
    sections = np.random.default_rng(3).integers(0, 3, size=60)
    options = SpatialGraph(radius=1.0, z_radius=1.5)
    expected = pairs_within(places, 1.0, sections) | {
        (i, j) for i, j in pairs_within(places, 1.5) if abs(sections[i] - sections[j]) == 1
    }
    assert pairs(spatial_graph(places, options, sections=sections)) == expected
    assert pairs(spatial_graph(places, options)) == pairs_within(places, 1.0)


def test_the_automatic_radius_is_measured_within_sections():
    places = hexagonal()
    both = np.concatenate([places, places])
    sections = np.repeat([0, 1], 100)
    assert automatic_radius(both, sections) == pytest.approx(automatic_radius(places))
    assert automatic_radius(both) < automatic_radius(places) + 1e-6


def test_an_existing_graph_is_taken_without_self_loops():
    matrix = csr_matrix(np.array([[1, 0.5, 0], [0, 0, 2], [0, 0, 0]]))
    graph = spatial_graph(cells(3), SpatialGraph(kind="existing"), existing=matrix)
    assert pairs(graph) == {(0, 1), (1, 2)}
    for wrong in (None, csr_matrix((2, 2))):
        with pytest.raises(DataError, match=r"3 cells need \(3, 3\)"):
            spatial_graph(cells(3), SpatialGraph(kind="existing"), existing=wrong)


@pytest.mark.parametrize("number", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["radius", "knn"])
def test_few_cells_have_the_others_as_neighbours(number, kind, caplog):
    with caplog.at_level(logging.WARNING):
        graph = spatial_graph(cells(number), SpatialGraph(kind=kind))
    assert pairs(graph) <= {(i, j) for i in range(number) for j in range(number) if i != j}
    if kind == "knn":
        assert graph.num_edges == number * max(number - 1, 0)
        assert ("all are neighbours" in caplog.text) == (number > 0)


def test_coordinates_that_are_not_finite_are_named():
    places = cells(20)
    places[[4, 7]] = np.nan, np.inf
    with pytest.raises(DataError, match=r"2 cells are NaN or infinite \(cells number 4, 7\)"):
        spatial_graph(places, SpatialGraph())
    with pytest.raises(DataError, match=r"shape \(20,\); need"):
        spatial_graph(places[:, 0], SpatialGraph())


def test_a_radius_in_another_unit_is_reported(caplog):
    # official scripts use 150, in pixels, on coordinates in micrometres as well
    places = cells(300)
    with caplog.at_level(logging.WARNING):
        spatial_graph(places, SpatialGraph())
        assert not caplog.text
        assert spatial_graph(places, SpatialGraph(radius=150)).num_edges == 300 * 299
    assert "radius of 150 takes in 299 neighbours a cell on average" in caplog.text


def test_a_radius_that_would_fill_the_memory_is_refused_before_it_does():
    places = np.zeros((8000, 2))
    with pytest.raises(DataError, match="63992000 edges in all"):
        spatial_graph(places, SpatialGraph(radius=1.0))
    with pytest.raises(DataError, match="edges in all"):
        spatial_graph(places, SpatialGraph(kind="knn", k=1, z_radius=1.0), sections=np.repeat([0, 1], 4000))
