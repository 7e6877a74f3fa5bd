"""Routes of packed requests: whose token is whose, what is decided once, what goes on from pass to pass."""

import pytest
import torch
from tenfold.methods.layermoe.packed import PackedState
from tenfold.methods.layermoe.state import RouteMemory, RoutingState


def scores(*values):
    """Return [1, T, 2] scores of tokens; a value below 0 speaks for class 1."""
    return torch.tensor([[[float(value), 0.0] for value in values]])


def classes_of(lengths, memories, row, *, pool="sequence", layer=0):
    states = [RoutingState(memory=memory) for memory in memories]
    return PackedState(states, lengths).classify(layer, row, pool)


def test_each_token_has_the_class_of_its_own_request():
    memories = [RouteMemory() for _ in range(3)]
    # means 1, -2 and 0.5
    found = classes_of([2, 1, 3], memories, scores(4, -2, -2, 3, -1, -0.5), layer=7)
    assert found.tolist() == [[0, 0, 1, 0, 0, 0]]
    assert [memory.layers[7][0].tolist() for memory in memories] == [[0], [1], [0]]


def test_a_decision_holds_whatever_comes_later_and_wherever_in_the_row():
    first, second = RouteMemory(), RouteMemory()
    classes_of([2, 1], [first, second], scores(1, 1, -1))
    assert classes_of([1, 1], [second, first], scores(9, -9)).tolist() == [[1, 0]]


def test_layers_decide_for_themselves():
    memory = RouteMemory()
    assert classes_of([1], [memory], scores(1), layer=0).tolist() == [[0]]
    assert classes_of([1], [memory], scores(-1), layer=3).tolist() == [[1]]
    assert classes_of([1], [memory], scores(5), layer=3).tolist() == [[1]]


def test_prefix_pooling_goes_on_from_pass_to_pass():
    values = torch.randn(12, generator=torch.Generator().manual_seed(1))
    expected = [int(values[: end + 1].mean() < 0) for end in range(12)]
    assert set(expected) == {0, 1}
    memory, other, found, start = RouteMemory(), RouteMemory(), [], 0
    for length in (5, 4, 1, 1, 1):
        row = scores(100, *values[start : start + length].tolist())
        found += classes_of([1, length], [other, memory], row, pool="prefix")[0, 1:].tolist()
        start += length
    assert found == expected


@pytest.mark.parametrize("lengths", [[2, 2], [1, 1]])
def test_a_row_that_is_not_its_requests_is_refused(lengths):
    with pytest.raises(RuntimeError, match="split_sizes"):
        classes_of(lengths, [RouteMemory(), RouteMemory()], scores(1, 2, 3))
