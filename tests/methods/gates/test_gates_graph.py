"""Graphs by receiver, and pruning: against sets of pairs."""

import numpy as np
import pytest
from scipy.sparse import coo_matrix, csr_matrix
from tenfold.methods.gates.graph import Graph
from tenfold.methods.gates.pruning import expression_clusters, prune


def pairs(graph):
    return list(zip(graph.receivers.tolist(), graph.senders.tolist(), strict=True))


def random_graph(seed, number=9, edges=40):
    draw = np.random.default_rng(seed)
    receivers, senders = draw.integers(0, number, size=(2, edges))
    return Graph.from_edges(receivers, senders, number), set(zip(receivers.tolist(), senders.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_edges_are_kept_once_by_receiver_with_ascending_senders(seed):
    graph, expected = random_graph(seed)
    assert pairs(graph) == sorted(expected)
    assert (graph.num_nodes, graph.num_edges) == (9, len(expected))
    assert graph.offsets.dtype == graph.senders.dtype == graph.receivers.dtype == np.int64
    for cell in range(9):
        own = graph.senders[graph.offsets[cell] : graph.offsets[cell + 1]]
        assert own.tolist() == sorted(sender for receiver, sender in expected if receiver == cell)


@pytest.mark.parametrize("seed", range(5))
def test_loops_reversal_and_union_are_those_of_the_set_of_edges(seed):
    graph, edges = random_graph(seed)
    loops = {(cell, cell) for cell in range(9)}
    turned = {(sender, receiver) for receiver, sender in edges}
    assert pairs(graph.with_self_loops()) == sorted(edges | loops)
    assert pairs(graph.with_self_loops().with_self_loops()) == sorted(edges | loops)
    assert pairs(graph.without_self_loops()) == sorted(edges - loops)
    assert pairs(graph.reversed()) == sorted(turned)
    assert pairs(graph.symmetric()) == sorted(edges | turned)


def test_a_matrix_and_its_graph_have_the_same_pattern():
    graph, edges = random_graph(1)
    matrix = graph.to_matrix()
    assert matrix.dtype == np.float32
    dense = np.zeros((9, 9))
    dense[tuple(np.array(sorted(edges)).T)] = 1
    np.testing.assert_array_equal(matrix.toarray(), dense)
    for form in (matrix, matrix.tocsc(), matrix.tocoo(), -3.0 * matrix):
        assert pairs(Graph.from_matrix(form)) == pairs(graph)


def test_a_stored_zero_is_no_edge():
    matrix = csr_matrix((np.array([0.0, 2.0]), np.array([0, 1]), np.array([0, 2, 2])), shape=(2, 2))
    assert pairs(Graph.from_matrix(matrix)) == [(0, 1)]


def test_statistics_count_senders():
    graph = Graph.from_edges([0, 0, 0, 2], [1, 2, 3, 0], 4)
    expected = {"edges": 4, "mean_neighbours": 1, "min_neighbours": 0, "max_neighbours": 3, "isolated": 2}
    assert graph.statistics() == expected


def test_graphs_without_edges_or_cells_are_graphs():
    for number in (0, 1, 5):
        graph = Graph.from_edges([], [], number)
        assert (graph.num_nodes, graph.num_edges) == (number, 0)
        assert graph.to_matrix().shape == (number, number)
        assert pairs(graph.with_self_loops()) == [(cell, cell) for cell in range(number)]
        assert graph.statistics()["isolated"] == number


@pytest.mark.parametrize(("receivers", "senders"), [([0, 3], [1, 1]), ([0], [-1]), ([0, 1], [1])])
def test_edges_of_cells_that_are_not_there_are_refused(receivers, senders):
    with pytest.raises(ValueError, match=r"there are 3|equally long"):
        Graph.from_edges(receivers, senders, 3)


def test_a_matrix_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\) is not square"):
        Graph.from_matrix(coo_matrix((2, 3)))


def test_pruning_keeps_edges_between_equal_labels():
    graph, edges = random_graph(2)
    labels = np.array(list("aabbcacba"))
    assert pairs(prune(graph, labels)) == sorted((i, j) for i, j in edges if labels[i] == labels[j])
    assert pairs(prune(graph, np.zeros(9))) == sorted(edges)
    assert prune(graph, np.arange(9)).without_self_loops().num_edges == 0


def test_last_cells_that_lose_all_edges_stay_with_a_self_loop():
    # the official code reads the number of cells off the remaining edges
    path = Graph.from_edges([0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2], 4)
    pruned = prune(path, np.array(["a", "a", "b", "c"]))
    assert pairs(pruned) == [(0, 1), (1, 0)]
    assert pruned.to_matrix().shape == (4, 4)
    assert pairs(pruned.with_self_loops())[-2:] == [(2, 2), (3, 3)]


def test_cells_without_a_label_are_one_more_kind():
    path = Graph.from_edges([0, 1, 2, 3], [1, 2, 3, 0], 4)
    for missing in (None, float("nan")):
        labels = np.array(["a", missing, missing, "b"], dtype=object)
        assert pairs(prune(path, labels)) == [(1, 2)]


def test_pruning_needs_a_label_for_each_cell():
    with pytest.raises(ValueError, match="2 labels for 4 cells"):
        prune(Graph.from_edges([0], [1], 4), np.array([0, 1]))


def test_clusters_by_expression_find_separate_kinds():
    draw = np.random.default_rng(0)
    kinds = np.repeat([0, 1, 2], [40, 30, 20])[draw.permutation(90)]
    centres = 6.0 * np.eye(3, 12)
    expression = csr_matrix((centres[kinds] + 0.1 * draw.random((90, 12))).astype(np.float32))
    clusters = expression_clusters(expression, 0.2, seed=0)
    assert clusters.dtype == np.int64
    assert len(set(zip(clusters.tolist(), kinds.tolist(), strict=True))) == len(set(clusters.tolist())) == 3
    np.testing.assert_array_equal(expression_clusters(expression, 0.2, seed=0), clusters)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_few_cells_can_be_clustered(number):
    clusters = expression_clusters(csr_matrix(np.eye(number, 4, dtype=np.float32)), 0.2, seed=0)
    assert len(clusters) == number
