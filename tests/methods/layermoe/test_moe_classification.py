"""The classifiers' loss: worked numbers of the specification and its classes."""

import math

import pytest
import torch
from tenfold.methods.layermoe.classification import class_of, classifier_hits, classifier_sum

LOGITS = torch.tensor([[2.0, -1.0], [0.5, 0.5]])
GROUPS = torch.tensor([0, 1])


def test_two_sequences_of_the_specification():
    assert classifier_sum({0: LOGITS}, GROUPS).item() / 2 == pytest.approx(0.370867, abs=1e-6)


def test_layers_count_alike():
    other = torch.tensor([[-1.0, 3.0], [0.0, 2.0]])
    expected = 0.048587 + 0.693147 + math.log(1 + math.exp(4)) + math.log(1 + math.exp(-2))
    assert classifier_sum({1: LOGITS, 7: other}, GROUPS).item() == pytest.approx(expected / 2, abs=1e-5)


@pytest.mark.parametrize(("classes", "expected"), [(2, [0, 1, 1, 1]), (3, [0, 1, 2, 2]), (4, [0, 1, 2, 3])])
def test_groups_beyond_the_last_class_belong_to_it(classes, expected):
    assert class_of(torch.tensor([0, 1, 2, 3]), classes).tolist() == expected


def test_the_second_expansion_is_new_to_two_classes():
    assert torch.equal(classifier_sum({0: LOGITS}, torch.tensor([0, 2])), classifier_sum({0: LOGITS}, GROUPS))


def test_three_classes_tell_expansions_apart():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    first, second = (classifier_sum({0: logits}, torch.tensor([group])).item() for group in (1, 2))
    assert first - second == pytest.approx(1.0)


def test_the_gradient_is_the_probability_minus_the_label():
    logits = LOGITS.clone().requires_grad_()
    classifier_sum({0: logits}, GROUPS).backward()
    expected = LOGITS.softmax(-1) - torch.eye(2)
    torch.testing.assert_close(logits.grad, expected)


def test_hits_are_the_share_of_layers_that_decide_right():
    wrong = LOGITS.flip(-1)
    layers = {0: LOGITS, 1: wrong, 2: torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 3: torch.tensor([[1.0, 0], [0, 1]])}
    # of equal logits the first class is taken
    assert classifier_hits(layers, GROUPS).tolist() == [0.75, 0.5]


def test_bfloat16_logits_are_read_in_float32():
    found = classifier_sum({0: LOGITS.bfloat16()}, GROUPS)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(2 * 0.370867, abs=1e-6)


def test_no_classifier_is_refused():
    with pytest.raises(ValueError, match="no layer has a classifier"):
        classifier_sum({}, GROUPS)
