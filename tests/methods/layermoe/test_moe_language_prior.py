"""Language-prior routing: worked numbers of the specification, both forms, and what has no gradient."""

import math

import pytest
import torch
from tenfold.methods.layermoe.language_prior import (
    base_probability,
    group_prior_sum,
    layer_weights,
    own_experts,
    prior_sum,
    token_prior,
)

ONE = torch.ones(1, 1, dtype=torch.bool)


def logits_of(*probabilities):
    return torch.tensor(probabilities).log()[None, None]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow(logits, old, form):
    """The loss by loops over tokens, in float64; the mean over layers as the form says."""
    means = {}
    for layer, one in logits.items():
        costs = []
        for at in old.nonzero().tolist():
            scores = one[tuple(at)].double()
            chances = [math.exp(score) / sum(math.exp(other) for other in scores) for score in scores]
            if form == "official":
                chances = [math.exp(chance) / sum(math.exp(other) for other in chances) for chance in chances]
            costs.append(-math.log(chances[0]))
        means[layer] = costs
    if form == "nll":
        return sum(sum(costs) / len(costs) for costs in means.values()) / len(means)
    classes = {}
    for layer, costs in means.items():
        classes.setdefault(logits[layer].shape[-1], []).extend(costs)
    return sum(sum(costs) / len(costs) for costs in classes.values()) / len(classes)


def test_three_probabilities_of_the_specification():
    logits = logits_of(0.7, 0.2, 0.1)
    assert token_prior(logits, "nll").item() == pytest.approx(0.356675, abs=1e-6)
    assert token_prior(logits, "official").item() == pytest.approx(0.767950, abs=1e-6)


@pytest.mark.parametrize(
    ("num_experts", "right", "uniform", "wrong"),
    [(2, 0.313262, 0.693147, 1.313262), (3, 0.551445, 1.098612, 1.551445), (5, 0.904832, 1.609438, 1.904832)],
)
def test_the_official_form_at_certain_and_uniform_routers(num_experts, right, uniform, wrong):
    certain = torch.zeros(num_experts)
    certain[0] = 60.0
    cases = [(certain, right), (torch.zeros(num_experts), uniform), (certain.roll(1), wrong)]
    for scores, expected in cases:
        assert token_prior(scores[None, None], "official").item() == pytest.approx(expected, abs=1e-6)
    assert right == pytest.approx(math.log(1 + (num_experts - 1) / math.e), abs=1e-6)


@pytest.mark.parametrize(("form", "expected"), [("nll", [-2, 1, 1]), ("official", [-2 / 3, 1 / 3, 1 / 3])])
def test_gradient_at_a_uniform_router(form, expected):
    logits = torch.zeros(1, 1, 3, requires_grad=True)
    prior_sum({0: logits}, ONE, form).backward()
    assert logits.grad.flatten().tolist() == pytest.approx([value / 3 for value in expected])


def test_nll_vanishes_as_expert_0_becomes_certain_and_official_never_falls_below_its_floor():
    values = [token_prior(torch.tensor([[[gap, 0.0, 0.0]]])).item() for gap in (1.0, 5.0, 20.0)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 1e-8
    official = token_prior(30 * drawn(20, 50, 4), "official")
    assert official.min().item() >= math.log(1 + 3 / math.e) - 1e-6


@pytest.mark.parametrize("form", ["nll", "official"])
def test_layers_with_different_numbers_of_experts_agree_with_loops(form):
    logits = {0: drawn(2, 5, 4), 1: drawn(2, 5, 2, seed=1), 4: drawn(2, 5, 4, seed=2), 6: drawn(2, 5, 3, seed=3)}
    old = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 0, 0, 0]], dtype=torch.bool)
    found = prior_sum(logits, old, form) / old.sum()
    assert found.item() == pytest.approx(slow(logits, old, form), rel=1e-5)


def test_the_forms_weigh_layers_differently():
    logits = {0: torch.zeros(1, 1, 4), 1: torch.zeros(1, 1, 2), 2: torch.zeros(1, 1, 4)}
    assert layer_weights(logits, "nll") == dict.fromkeys(range(3), 1 / 3)
    assert layer_weights(logits, "official") == {0: 0.25, 1: 0.5, 2: 0.25}


@pytest.mark.parametrize("form", ["nll", "official"])
def test_new_tokens_get_no_gradient(form):
    logits, old = drawn(2, 6, 3).requires_grad_(), torch.zeros(2, 6, dtype=torch.bool)
    old[0, 1:4] = True
    prior_sum({2: logits}, old, form).backward()
    assert logits.grad[~old].abs().max() == 0
    assert logits.grad[old].abs().min() > 0


@pytest.mark.parametrize("form", ["nll", "official"])
def test_no_old_token_gives_zero_connected_to_the_graph(form):
    logits = drawn(2, 4, 3).requires_grad_()
    found = prior_sum({0: logits}, torch.zeros(2, 4, dtype=torch.bool), form)
    assert found.item() == 0
    found.backward()
    assert logits.grad.abs().max() == 0


def test_sums_of_pieces_are_the_sum_of_the_whole():
    logits, old = drawn(6, 5, 3), torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    whole = prior_sum({0: logits}, old)
    pieces = sum(prior_sum({0: logits[at : at + 2]}, old[at : at + 2]) for at in (0, 2, 4))
    assert pieces.item() == pytest.approx(whole.item(), rel=1e-6)


def test_logits_of_any_dtype_and_size_are_read_in_float32():
    found = token_prior(torch.tensor([[[400.0, 1.0, 0.0], [-400.0, 1.0, 0.0]]]).bfloat16())
    assert found.dtype == torch.float32
    assert found[0].tolist() == pytest.approx([0.0, 401.313262], rel=1e-6)


def test_the_probability_of_the_original_ffn_is_a_mean_over_layers():
    logits = {0: logits_of(0.7, 0.2, 0.1).requires_grad_(), 5: logits_of(0.1, 0.9)}
    found = base_probability(logits)
    assert found.item() == pytest.approx(0.4)
    assert not found.requires_grad


def test_a_model_without_routers_is_refused():
    with pytest.raises(ValueError, match="no layer has a router"):
        prior_sum({}, ONE)


class TestGroups:
    """The form for later expansions: tokens of every group prefer their own experts."""

    groups = torch.tensor([[0, 1, 2, 0], [1, 2, 2, 1]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)

    def test_a_group_owns_what_its_expansion_added(self):
        found = own_experts(torch.tensor([[0, 1, 2]]), [2, 1])
        assert found.dtype == torch.bool  # integers would index rows 0 and 1
        assert found[0].tolist() == [[True, False, False, False], [False, True, True, False], [False] * 3 + [True]]

    def test_it_agrees_with_loops_where_layers_have_different_numbers(self):
        sizes = {0: [1, 2], 3: [2, 0], 4: [0, 1]}
        logits = {layer: drawn(2, 4, 1 + sum(own), seed=layer) for layer, own in sizes.items()}
        expected = 0.0
        for layer, (first, second) in sizes.items():
            own = {0: [0], 1: range(1, 1 + first), 2: range(1 + first, 1 + first + second)}
            for b, t in self.mask.nonzero().tolist():
                scores = logits[layer][b, t].double()
                chances = [math.exp(score) / sum(math.exp(other) for other in scores) for score in scores]
                expected -= sum(math.log(chances[e]) for e in own[int(self.groups[b, t])]) / len(sizes)
        assert group_prior_sum(logits, sizes, self.groups, self.mask).item() == pytest.approx(expected, rel=1e-5)

    def test_of_old_tokens_alone_it_is_the_plain_form(self):
        logits, old = {0: drawn(2, 4, 3), 1: drawn(2, 4, 2, seed=1)}, torch.zeros_like(self.groups)
        found = group_prior_sum(logits, {0: [1, 1], 1: [1, 0]}, old, self.mask)
        assert found.item() == pytest.approx(prior_sum(logits, self.mask).item(), rel=1e-6)

    def test_padding_and_tokens_without_experts_get_no_gradient(self):
        logits = drawn(2, 4, 2).requires_grad_()
        group_prior_sum({0: logits}, {0: [1, 0]}, self.groups, self.mask).backward()
        counts = self.mask & (self.groups < 2)
        assert logits.grad[~counts].abs().max() == 0
        assert logits.grad[counts].abs().min() > 0

    def test_a_model_without_routers_is_refused(self):
        with pytest.raises(ValueError, match="no layer has a router"):
            group_prior_sum({}, {}, self.groups, self.mask)
