"""Preference losses: worked numbers, scalar formulas written out, invariants, and trl's own functions."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from tenfold.methods.aligndistil import preference_losses as losses

# l_theta(w), l_theta(l), l_ref(w), l_ref(l): h = 2
PAIR = tuple(torch.tensor([value], dtype=torch.float64) for value in (-12.0, -15.0, -13.0, -14.0))
EXCHANGED = (PAIR[1], PAIR[0], PAIR[3], PAIR[2])


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def drawn(number, seed=0, scale=20.0):
    generator = torch.Generator().manual_seed(seed)
    return [-scale * torch.rand(7, generator=generator, dtype=torch.float64) for _ in range(number)]


def log_sigmoid(value):
    return -math.log1p(math.exp(-value))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (losses.dpo(*PAIR, 0.1), 0.59813887),
        (losses.dpo(*EXCHANGED, 0.1), 0.79813887),
        (losses.dpo(*PAIR, 0.01), 0.68319718),
        (losses.dpo(*PAIR, 0.1, 0.1), 0.61813887),
        (losses.ipo(*PAIR, 0.1), 9.0),
        (losses.simpo(PAIR[0] / 6, PAIR[1] / 5, 2.5, 0.5), 0.25192908),
        (losses.tdpo1(column(2.0), column(0.8), column(1.5), 0.1), 0.63025819),
        (losses.tdpo2(column(2.0), column(0.8), column(1.5), 0.1, 0.5), 0.61404645),
    ],
    ids=["dpo", "reverse", "small_beta", "cdpo", "ipo", "simpo", "tdpo1", "tdpo2"],
)
def test_worked_numbers_of_pairs(found, expected):
    assert found.item() == pytest.approx(expected, abs=5e-9)


@pytest.mark.parametrize(("point", "good", "bad"), [(0.0, 0.47502081, 0.47502081), (0.4, 0.48500450, 0.46505705)])
def test_worked_numbers_of_kto(point, good, bad):
    policy, reference = column(-12.0, -15.0), column(-13.0, -14.0)
    found = losses.kto(policy, reference, torch.tensor([True, False]), column(point), 0.1)
    assert found.tolist() == pytest.approx([good, bad], abs=5e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_each_loss_is_the_formula_written_out_for_single_numbers(smoothing):
    first, second, third, fourth, good_kl, bad_kl = drawn(6)
    h = losses.margin(first, second, third, fourth)
    found = {
        "dpo": losses.dpo(first, second, third, fourth, 0.3, smoothing),
        "ipo": losses.ipo(first, second, third, fourth, 0.3),
        "simpo": losses.simpo(first, second, 2.0, 0.7, smoothing),
        "tdpo1": losses.tdpo1(h, -good_kl, -bad_kl, 0.3),
        "tdpo2": losses.tdpo2(h, -good_kl, -bad_kl, 0.3, 0.6),
    }
    for row in range(len(first)):
        a, b, c, d, k, m = (float(values[row]) for values in (first, second, third, fourth, -good_kl, -bad_kl))
        ratio = (a - c) - (b - d)
        shifted = 2.0 * (a - b) - 1.4
        expected = {
            "dpo": -(1 - smoothing) * log_sigmoid(0.3 * ratio) - smoothing * log_sigmoid(-0.3 * ratio),
            "ipo": (ratio - 1 / 0.6) ** 2,
            "simpo": -(1 - smoothing) * log_sigmoid(shifted) - smoothing * log_sigmoid(-shifted),
            "tdpo1": -log_sigmoid(0.3 * (ratio - (m - k))),
            "tdpo2": -log_sigmoid(0.3 * (ratio - 0.6 * (m - k))),
        }
        for name, value in expected.items():
            assert found[name][row].item() == pytest.approx(value, rel=1e-9), name


def test_an_untrained_policy_has_the_loss_ln_2_and_for_kto_one_half():
    first, second = drawn(2)
    zero = torch.zeros(())
    assert losses.dpo(first, second, first, second, 0.1).tolist() == pytest.approx([math.log(2)] * 7)
    h = losses.margin(first, second, first, second)
    assert losses.tdpo2(h, torch.zeros(7), torch.zeros(7), 0.1, 0.5).tolist() == pytest.approx([math.log(2)] * 7)
    good = torch.arange(7) % 2 == 0
    assert losses.kto(first, first, good, zero, 0.1).tolist() == pytest.approx([0.5] * 7)
    assert losses.kl_reference_point((first - first).sum(), torch.tensor(7.0)).item() == 0


def test_dpo_and_its_reverse_share_out_a_probability_of_one():
    first, second, third, fourth = drawn(4)
    forward = losses.dpo(first, second, third, fourth, 0.2)
    reverse = losses.dpo(second, first, fourth, third, 0.2)
    torch.testing.assert_close((-forward).exp() + (-reverse).exp(), torch.ones(7, dtype=torch.float64))


def test_tdpo2_with_alpha_0_is_dpo():
    first, second, third, fourth, good_kl, bad_kl = drawn(6)
    h = losses.margin(first, second, third, fourth)
    expected = losses.dpo(first, second, third, fourth, 0.2)
    assert torch.equal(losses.tdpo2(h, -good_kl, -bad_kl, 0.2, 0.0), expected)


def test_both_forms_of_tdpo_agree_in_value_at_alpha_1_but_not_in_the_slope_of_the_chosen_kl():
    h, good_kl, bad_kl = (values.requires_grad_() for values in drawn(3))
    first = losses.tdpo1(h, good_kl, bad_kl, 0.2)
    second = losses.tdpo2(h, good_kl, bad_kl, 0.2, 1.0)
    torch.testing.assert_close(first, second)
    slopes = torch.autograd.grad(first.sum(), (h, good_kl, bad_kl))
    torch.testing.assert_close(slopes[1], slopes[0])
    torch.testing.assert_close(slopes[2], -slopes[0])
    others = torch.autograd.grad(second.sum(), (h, good_kl, bad_kl), materialize_grads=True)
    assert torch.equal(others[1], torch.zeros_like(h))
    torch.testing.assert_close(others[2], slopes[2])


def test_simpo_of_equal_means_is_ln_of_1_plus_e_to_the_gamma():
    means = drawn(1)[0]
    assert losses.simpo(means, means, 2.5, 0.5).tolist() == pytest.approx([math.log1p(math.exp(1.25))] * 7)


def test_better_answers_lower_every_loss():
    first, second, third, fourth = drawn(4)
    ahead = first + 0.5
    for name in ("dpo", "ipo"):
        loss = getattr(losses, name)
        # below the target of IPO, 1 / (2 beta) = 50, more is better
        assert (loss(ahead, second, third, fourth, 0.01) < loss(first, second, third, fourth, 0.01)).all()
    assert (losses.simpo(ahead, second, 2.5, 0.5) < losses.simpo(first, second, 2.5, 0.5)).all()
    good, zero = torch.ones(7, dtype=torch.bool), torch.zeros(())
    assert (losses.kto(ahead, third, good, zero, 0.1) < losses.kto(first, third, good, zero, 0.1)).all()
    assert (losses.kto(ahead, third, ~good, zero, 0.1) > losses.kto(first, third, ~good, zero, 0.1)).all()


@pytest.mark.parametrize("value", [-3000.0, 3000.0])
def test_extreme_margins_stay_finite_with_finite_slopes(value):
    h = torch.tensor([value]).requires_grad_()
    for smoothing in (0.0, 0.1):
        loss = losses.smoothed_logistic(h, smoothing)
        expected = max(-value, 0.0) * (1 - smoothing) + max(value, 0.0) * smoothing
        assert loss.item() == pytest.approx(expected)
        assert torch.isfinite(torch.autograd.grad(loss.sum(), h)[0]).all()


def test_the_reference_point_is_a_mean_cut_at_zero_without_a_gradient():
    total = torch.tensor(6.0, requires_grad=True)
    point = losses.kl_reference_point(total, torch.tensor(4.0))
    assert point.item() == 1.5
    assert not point.requires_grad
    assert losses.kl_reference_point(-total, torch.tensor(4.0)).item() == 0
    assert losses.kl_reference_point(torch.tensor(0.0), torch.tensor(0.0)).item() == 0


def test_no_gradient_reaches_the_reference_point():
    policy, point = drawn(1)[0].requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss = losses.kto(policy, policy.detach(), torch.ones(7, dtype=torch.bool), point, 0.1).sum()
    slopes = torch.autograd.grad(loss, (policy, point), allow_unused=True)
    assert slopes[1] is None
    assert slopes[0].abs().min() > 0


def test_paired_reference_points_come_from_the_opposite_answers():
    good = torch.tensor([True, False, True])
    ratios = torch.tensor([1.0, 5.0, 3.0])
    sums = torch.stack([ratios[~good].sum(), ratios[good].sum()])
    points = losses.paired_reference_point(sums, torch.tensor([1.0, 2.0]), good)
    assert points.tolist() == [5.0, 2.0, 5.0]
    only_good = losses.paired_reference_point(torch.tensor([0.0, 4.0]), torch.tensor([0.0, 3.0]), good | True)
    assert only_good.tolist() == [0.0] * 3


def test_kto_weights_scale_each_kind_of_answer():
    policy, reference = drawn(2)
    good, zero = torch.arange(7) < 3, torch.zeros(())
    plain = losses.kto(policy, reference, good, zero, 0.1)
    weighted = losses.kto(policy, reference, good, zero, 0.1, 2.0, 3.0)
    torch.testing.assert_close(weighted, plain * torch.where(good, 2.0, 3.0))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_is_trls(smoothing):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.cpo import CPOTrainer

    first, second = drawn(2)
    settings = SimpleNamespace(
        alpha=0.0,
        beta=2.5,
        simpo_gamma=1.25,
        loss_type="simpo",
        label_smoothing=smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )
    theirs, chosen, rejected = CPOTrainer.cpo_loss(settings, first, second)
    torch.testing.assert_close(losses.simpo(first, second, 2.5, 0.5, smoothing), theirs)
    torch.testing.assert_close(2.5 * first, chosen)
    torch.testing.assert_close(2.5 * second, rejected)
