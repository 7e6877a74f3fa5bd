"""PPO's losses: values and gradients in every case of the clipping, against plain numbers."""

import math

import pytest
import torch
from tenfold.methods.aligndistil.ppo_losses import is_clipped, policy_loss, value_loss

CLIP = 0.2


def slow_policy(ratio, advantage):
    return -min(ratio * advantage, max(0.8, min(1.2, ratio)) * advantage)


def slow_value(value, old, target):
    moved = old + max(-CLIP, min(CLIP, value - old))
    return 0.5 * max((value - target) ** 2, (moved - target) ** 2)


def ratio_and_gradient(ratio, advantage):
    log_prob = torch.tensor([math.log(ratio) - 1.5], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.tensor([-1.5], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    loss = policy_loss(log_prob, old, advantages, clip=CLIP)
    loss.sum().backward()
    return loss.item(), log_prob.grad.item()


# ratio, advantage, whether the gradient flows: it stops only where the step has gone far enough already
CASES = [
    (1.0, 2.0, True),
    (1.0, -2.0, True),
    (1.1, 2.0, True),
    (1.5, 2.0, False),
    (1.5, -2.0, True),
    (0.5, 2.0, True),
    (0.5, -2.0, False),
]


@pytest.mark.parametrize(("ratio", "advantage", "flows"), CASES)
def test_policy_loss_and_its_gradient_in_every_case(ratio, advantage, flows):
    loss, gradient = ratio_and_gradient(ratio, advantage)
    assert loss == pytest.approx(slow_policy(ratio, advantage), abs=1e-12)
    # d rho / d log pi = rho
    assert gradient == pytest.approx(-ratio * advantage if flows else 0.0, abs=1e-12)


def test_a_step_along_the_gradient_makes_good_tokens_more_and_bad_tokens_less_probable():
    logits = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    tokens, advantages = torch.tensor([1, 2]), torch.tensor([1.0, -1.0], dtype=torch.float64)
    rows = torch.arange(2)
    before = logits.log_softmax(1)[rows, tokens]
    policy_loss(before, before.detach(), advantages, clip=CLIP).sum().backward()
    after = (logits - 0.1 * logits.grad).log_softmax(1)[rows, tokens]
    assert (after - before).sign().tolist() == [1.0, -1.0]


@pytest.mark.parametrize("value", [0.4, 0.5, 0.6, 1.0, -1.0])
@pytest.mark.parametrize("target", [0.45, 2.0, -2.0])
def test_value_loss_is_the_larger_of_the_two_errors(value, target):
    values = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    old, returns = torch.tensor([0.5], dtype=torch.float64), torch.tensor([target], dtype=torch.float64)
    loss = value_loss(values, old, returns, clip=CLIP)
    assert loss.item() == pytest.approx(slow_value(value, 0.5, target), abs=1e-12)


def test_value_gradient_is_the_error_at_the_old_value_and_zero_beyond_the_clip():
    values = torch.tensor([0.5, 1.0], dtype=torch.float64, requires_grad=True)
    old, returns = torch.full((2,), 0.5, dtype=torch.float64), torch.full((2,), 2.0, dtype=torch.float64)
    value_loss(values, old, returns, clip=CLIP).sum().backward()
    assert values.grad.tolist() == [0.5 - 2.0, 0.0]


def test_clipped_ratios_are_those_outside_of_the_bounds():
    ratios = torch.tensor([1.0, 1.19, 1.21, 0.81, 0.79])
    assert is_clipped(ratios.log(), torch.zeros(5), clip=CLIP).tolist() == [False, False, True, False, True]
