"""Attention over edges and products with it, against dense matrices and loops."""

import math

import numpy as np
import pytest
import torch
from tenfold.methods.gates.attention import Edges, attention_weights, edge_product, weighted_sums
from tenfold.methods.gates.graph import Graph

NODES = 9


@pytest.fixture
def graph():
    draw = np.random.default_rng(0)
    # cell 8 receives from nobody but itself
    return Graph.from_edges(draw.integers(0, 8, 30), draw.integers(0, NODES, 30), NODES).with_self_loops()


@pytest.fixture
def edges(graph):
    return Edges.build(graph.offsets, graph.senders, NODES)


def draws(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes]


def dense(graph, values):
    matrix = torch.zeros(NODES, NODES, dtype=values.dtype)
    return matrix.index_put((torch.from_numpy(graph.receivers), torch.from_numpy(graph.senders)), values)


def weights(graph, receiver_scores, sender_scores):
    return attention_weights(
        receiver_scores, sender_scores, torch.from_numpy(graph.receivers), torch.from_numpy(graph.senders)
    )


def test_weights_are_the_softmax_of_sigmoids_in_every_row(graph):
    receiver_scores, sender_scores = draws((NODES,), (NODES,))
    found = dense(graph, weights(graph, receiver_scores, sender_scores))
    for i in range(NODES):
        senders = graph.senders[graph.offsets[i] : graph.offsets[i + 1]]
        terms = {
            int(j): math.exp(1 / (1 + math.exp(-(receiver_scores[i] + sender_scores[j]).item()))) for j in senders
        }
        expected = [terms.get(j, 0.0) / sum(terms.values()) for j in range(NODES)]
        assert found[i].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_rows_sum_to_one_and_no_weight_is_more_than_e_times_another(graph, scale):
    receiver_scores, sender_scores = draws((NODES,), (NODES,))
    values = weights(graph, scale * receiver_scores, scale * sender_scores)
    assert (values > 0).all()
    for i in range(NODES):
        row = values[graph.offsets[i] : graph.offsets[i + 1]]
        assert row.sum().item() == pytest.approx(1, abs=1e-12)
        assert row.max() / row.min() <= math.e * (1 + 1e-12)


def test_without_scores_every_sender_weighs_the_same_and_an_isolated_cell_is_its_own(graph):
    values = weights(graph, torch.zeros(NODES), torch.zeros(NODES))
    degrees = np.diff(graph.offsets)
    assert values.tolist() == pytest.approx(np.repeat(1 / degrees, degrees).tolist())
    assert values[graph.offsets[8] :].tolist() == [1.0]


def test_gradient_of_the_weights_is_that_of_finite_differences(graph):
    scores = [score.requires_grad_() for score in draws((NODES,), (NODES,))]
    assert torch.autograd.gradcheck(lambda a, b: weights(graph, a, b), scores)


def test_product_is_that_of_the_dense_matrix(graph, edges):
    values, states = draws((graph.num_edges,), (NODES, 4))
    torch.testing.assert_close(edge_product(values, states, edges), dense(graph, values) @ states)


def test_gradients_of_the_product_are_those_of_the_dense_matrix(graph, edges):
    values, states, out = draws((graph.num_edges,), (NODES, 4), (NODES, 4))
    gradients = []
    for product in (lambda v, s: edge_product(v, s, edges), lambda v, s: dense(graph, v) @ s):
        leaves = values.clone().requires_grad_(), states.clone().requires_grad_()
        (product(*leaves) * out).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_gradient_of_an_edge_that_occurs_twice_goes_to_both():
    edges = Edges.build(np.array([0, 2, 3]), np.array([1, 1, 0]), 2)  # as when both graphs have it
    values, states = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    assert edge_product(values, states, edges).tolist() == [[0, 5], [4, 0]]
    assert torch.autograd.gradcheck(
        lambda v, s: edge_product(v, s, edges), (values.requires_grad_(), states.requires_grad_())
    )


def test_product_of_fewer_receivers_than_senders_reads_all_senders():
    edges = Edges.build(np.array([0, 2]), np.array([0, 2]), 3)
    states = torch.tensor([[1.0], [10.0], [100.0]], requires_grad=True)
    found = edge_product(torch.tensor([2.0, 3.0]), states, edges)
    found.sum().backward()
    assert found.tolist() == [[302.0]]
    assert states.grad.flatten().tolist() == [2, 0, 3]


def test_rows_without_values_sum_to_zero():
    offsets, columns = torch.tensor([0, 0, 1, 1], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    found = weighted_sums(offsets, columns, torch.tensor([0.5]), torch.tensor([[1.0], [4.0]]))
    assert found.flatten().tolist() == [0, 2, 0]


def test_product_is_the_same_in_every_bit_each_time():
    draw = np.random.default_rng(2)
    graph = Graph.from_edges(draw.integers(0, 500, 8000), draw.integers(0, 500, 8000), 500).with_self_loops()
    edges = Edges.build(graph.offsets, graph.senders, 500)
    values, states = torch.rand(graph.num_edges), torch.randn(500, 64)

    def once():
        leaves = values.clone().requires_grad_(), states.clone().requires_grad_()
        found = edge_product(*leaves, edges)
        found.square().sum().backward()
        return found.detach(), leaves[0].grad, leaves[1].grad

    first, second = once(), once()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
