"""Cutting a section into tiles with all that their cores receive from."""

import numpy as np
import pytest
from tenfold.methods.gates.graph import Graph
from tenfold.methods.gates.tiles import cut_tile, parts_for, split_cells, whole


@pytest.fixture
def coordinates():
    return np.random.default_rng(0).random((1000, 2)) * [4, 1]


def looped(cells, degree, seed):
    draw = np.random.default_rng(seed)
    receivers, senders = np.repeat(np.arange(cells), degree), draw.integers(0, cells, cells * degree)
    return Graph.from_edges(receivers, senders, cells).with_self_loops()


def line(cells):
    nodes = np.arange(cells - 1)
    return Graph.from_edges(np.r_[nodes, nodes + 1], np.r_[nodes + 1, nodes], cells).with_self_loops()


def senders_of(tile, index, row):
    offsets, senders = tile.graphs[index]
    return sorted(tile.cells[senders[offsets[row] : offsets[row + 1]]].tolist())


@pytest.mark.parametrize("size", [1, 30, 128, 999, 1000, 5000])
def test_groups_hold_every_cell_once_and_none_is_too_large(coordinates, size):
    groups = split_cells(coordinates, size)
    assert np.array_equal(np.sort(np.concatenate(groups)), np.arange(1000))
    assert max(map(len, groups)) <= size
    # medians: no group is less than half as large as allowed
    assert min(map(len, groups)) >= min(size // 2, 1000)


def test_groups_are_compact(coordinates):
    groups = split_cells(coordinates, 250)
    assert len(groups) == 4
    for group in groups:  # a 4 x 1 field falls into four squares
        assert np.ptp(coordinates[group], axis=0).tolist() == pytest.approx([1, 1], abs=0.15)


def test_groups_do_not_mix_sections(coordinates):
    sections = np.random.default_rng(1).integers(0, 3, 1000)
    groups = split_cells(coordinates, 100, sections)
    assert all(len(set(sections[group])) == 1 for group in groups)
    assert sum(map(len, groups)) == 1000


def test_cells_at_one_place_are_split_as_well():
    groups = split_cells(np.zeros((10, 2)), 3)
    assert max(map(len, groups)) <= 3
    assert sum(map(len, groups)) == 10


@pytest.mark.parametrize("number", [1, 2, 3, 5, 8])
def test_parts_are_as_many_as_asked_equal_and_compact(coordinates, number):
    parts = parts_for(coordinates, number)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1000))
    sizes = [len(part) for part in parts]
    assert len(sizes) == number
    assert max(sizes) - min(sizes) <= 2
    box = sum(np.prod(np.ptp(coordinates[part], axis=0)) for part in parts)
    assert box < 4.01  # boxes of scattered parts would overlap


def test_parts_cut_between_sections_where_they_can(coordinates):
    sections = np.arange(1000) % 2
    assert [set(sections[part]) for part in parts_for(coordinates, 2, sections)] in ([{0}, {1}], [{1}, {0}])


def test_more_parts_than_cells_leave_some_empty():
    assert sorted(len(part) for part in parts_for(np.zeros((2, 2)), 3)) == [0, 1, 1]


def test_whole_section_is_one_tile_in_its_own_order():
    graph = line(5).without_self_loops()
    tile = whole([graph], 2)
    assert tile.cells.tolist() == [0, 1, 2, 3, 4]
    assert tile.counts == (5, 5, 5)
    assert senders_of(tile, 0, 0) == [0, 1]


def test_a_tile_on_a_line_has_one_ring_of_neighbours_for_each_hop():
    tile = cut_tile([line(20)], np.array([10, 11]), 2)
    assert tile.cells.tolist() == [10, 11, 9, 12, 8, 13]
    assert tile.counts == (2, 4, 6)
    assert len(tile.graphs[0][0]) == 4 + 1  # the outer ring only sends


@pytest.mark.parametrize("hops", [1, 2, 4])
def test_receivers_have_all_their_senders_and_these_lie_at_most_one_ring_further(hops):
    graphs = [looped(200, 2, 1), looped(200, 1, 2)]
    tile = cut_tile(graphs, np.array([5, 77, 130]), hops)
    assert len(set(tile.cells.tolist())) == len(tile.cells)
    for index, graph in enumerate(graphs):
        offsets, senders = tile.graphs[index]
        assert len(offsets) == tile.counts[-2] + 1
        for row in range(tile.counts[-2]):
            cell = tile.cells[row]
            assert (
                senders_of(tile, index, row) == graph.senders[graph.offsets[cell] : graph.offsets[cell + 1]].tolist()
            )
        for ring in range(hops):
            assert senders[: offsets[tile.counts[ring]]].max() < tile.counts[ring + 1]


def test_fanout_keeps_the_self_loop_and_at_most_as_many_others_without_repeats():
    graphs = [looped(200, 12, 1), looped(200, 12, 2)]
    tile = cut_tile(graphs, np.arange(50), 2, fanout=[3, 5], generator=np.random.default_rng(0))
    for index, limit in enumerate([3, 5]):
        for row in range(tile.counts[-2]):
            cell = tile.cells[row]
            found = senders_of(tile, index, row)
            there = graphs[index].senders[graphs[index].offsets[cell] : graphs[index].offsets[cell + 1]].tolist()
            assert cell in found
            assert len(set(found)) == len(found) == min(limit + 1, len(there))
            assert set(found) <= set(there)


def test_fanout_draws_every_other_sender_equally_often():
    graph = Graph.from_edges(np.zeros(6), np.arange(6), 6).with_self_loops()
    draw = np.random.default_rng(0)
    counts = np.zeros(6)
    for _ in range(2000):
        tile = cut_tile([graph], np.array([0]), 1, fanout=[2], generator=draw)
        counts[senders_of(tile, 0, 0)] += 1
    assert counts[0] == 2000
    assert counts[1:] / 2000 == pytest.approx(2 / 5, abs=0.05)


def test_a_fanout_of_all_senders_is_the_exact_tile():
    graphs = [looped(100, 4, 1)]
    exact = cut_tile(graphs, np.arange(10), 2)
    sampled = cut_tile(graphs, np.arange(10), 2, fanout=[100], generator=np.random.default_rng(0))
    assert np.array_equal(exact.cells, sampled.cells)
    assert np.array_equal(exact.graphs[0][1], sampled.graphs[0][1])
