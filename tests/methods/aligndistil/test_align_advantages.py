"""Token rewards, advantages and their standardisation: worked numbers, sums by definition, padding, ranks."""

import itertools

import pytest
import torch
from tenfold.methods.aligndistil.advantages import (
    dense_rewards,
    generalised_advantages,
    mean_and_variance,
    moments,
    standardised,
    token_rewards,
)

REWARDS = torch.tensor([[0.098, -0.019, 0.049]], dtype=torch.float64)
VALUES = torch.tensor([[0.02, 0.01, 0.0]], dtype=torch.float64)
ALL = torch.ones(1, 3, dtype=torch.bool)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(rewards, values, gamma, gae_lambda):
    """A_t = sum_k (gamma lambda)^k delta_{t+k}, one response, plain numbers."""
    following = [*values[1:], 0.0][: len(values)]
    deltas = [reward + gamma * after - value for reward, after, value in zip(rewards, following, values, strict=True)]
    return [
        sum((gamma * gae_lambda) ** k * delta for k, delta in enumerate(deltas[start:]))
        for start in range(len(deltas))
    ]


def test_rewards_of_the_worked_example():
    log_reference, log_dpo, log_policy = (
        torch.tensor(values, dtype=torch.float64) for values in ([-2, -1.5, -3], [-1, -1.7, -2.5], [-1.8, -1.6, -2.9])
    )
    dense = dense_rewards(log_dpo, log_reference, beta=0.1, clip=10.0)
    rewards = token_rewards(dense, log_policy, log_reference, kl_coefficient=0.01)
    torch.testing.assert_close(rewards, REWARDS[0], rtol=0, atol=1e-12)


def test_advantages_and_returns_of_the_worked_example():
    advantages = generalised_advantages(REWARDS, VALUES, ALL, gamma=1.0, gae_lambda=0.95)
    assert advantages[0].tolist() == pytest.approx([0.1046725, 0.01755, 0.049], abs=1e-12)
    assert (advantages + VALUES)[0].tolist() == pytest.approx([0.1246725, 0.02755, 0.049], abs=1e-12)


def test_the_clip_bounds_the_dense_reward_before_the_penalty_is_taken_off():
    log_dpo, log_reference = torch.tensor([0.0, -40.0, -2.0]), torch.tensor([-40.0, 0.0, -1.0])
    dense = dense_rewards(log_dpo, log_reference, beta=1.0, clip=10.0)
    rewards = token_rewards(dense, torch.zeros(3), log_reference, kl_coefficient=0.5)
    assert rewards.tolist() == [10.0 - 20.0, -10.0, -1.0 - 0.5]


@pytest.mark.parametrize(("gamma", "gae_lambda"), itertools.product([1.0, 0.9], [0.0, 0.95, 1.0]))
def test_advantages_are_the_discounted_sums_of_their_definition(gamma, gae_lambda):
    # responses at different places of the rows, one of a single token, a row without any
    spans = [(2, 7), (0, 1), (4, 9), (0, 0)]
    rewards, values = drawn(4, 9), drawn(4, 9, seed=1)
    mask = torch.tensor([[start <= at < stop for at in range(9)] for start, stop in spans])
    found = generalised_advantages(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
    for row, (start, stop) in enumerate(spans):
        own = rewards[row, start:stop].tolist(), values[row, start:stop].tolist()
        assert found[row, start:stop].tolist() == pytest.approx(by_definition(*own, gamma, gae_lambda), abs=1e-12)
    assert not found[~mask].any()


def test_with_lambda_one_an_advantage_is_the_rewards_to_come_less_the_value():
    mask = torch.ones(2, 6, dtype=torch.bool)
    rewards, values = drawn(2, 6), drawn(2, 6, seed=1)
    advantages = generalised_advantages(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    torch.testing.assert_close(advantages + values, rewards.flip(1).cumsum(1).flip(1))


def test_with_a_perfect_critic_all_advantages_are_zero():
    rewards = drawn(2, 6)
    values = rewards.flip(1).cumsum(1).flip(1)
    advantages = generalised_advantages(
        rewards, values, torch.ones(2, 6, dtype=torch.bool), gamma=1.0, gae_lambda=0.95
    )
    torch.testing.assert_close(advantages, torch.zeros(2, 6, dtype=torch.float64), rtol=0, atol=1e-12)


def test_what_stands_outside_the_mask_does_not_matter_even_if_it_is_no_number():
    rewards, values = (torch.cat([torch.full((1, 2), torch.nan), given], dim=1) for given in (REWARDS, VALUES))
    rewards, values = (torch.cat([given, torch.full((1, 1), torch.inf)], dim=1) for given in (rewards, values))
    mask = torch.tensor([[False, False, True, True, True, False]])
    padded = generalised_advantages(rewards, values, mask, gamma=1.0, gae_lambda=0.95)
    plain = generalised_advantages(REWARDS, VALUES, ALL, gamma=1.0, gae_lambda=0.95)
    assert torch.equal(padded[:, 2:5], plain)
    assert padded[0, [0, 1, 5]].tolist() == [0, 0, 0]


def test_an_empty_batch_of_positions_gives_empty_advantages():
    empty = torch.zeros(3, 0)
    assert generalised_advantages(empty, empty, empty.bool(), gamma=1.0, gae_lambda=0.95).shape == (3, 0)


def test_standardised_advantages_have_mean_zero_and_unit_variance_over_all_parts_together():
    parts = [3 * drawn(7) + 5, drawn(2, seed=1), drawn(0)]
    total = torch.stack([moments(part) for part in parts]).sum(0)
    together = torch.cat([standardised(part, total) for part in parts])
    whole = torch.cat(parts)
    torch.testing.assert_close(together, (whole - whole.mean()) / whole.std(unbiased=False))
    # each part by itself has neither
    assert abs(together[:7].mean().item()) > 0.1


def test_equal_advantages_become_zero_and_a_single_one_too():
    for advantages in (torch.full((4,), 2.5), torch.tensor([1e-3])):
        assert standardised(advantages, moments(advantages)).tolist() == [0.0] * len(advantages)


def test_moments_of_nothing_give_zero_mean_and_variance():
    mean, variance = mean_and_variance(moments(torch.zeros(0)))
    assert (mean.item(), variance.item()) == (0.0, 0.0)


def test_variance_survives_a_mean_that_is_far_larger():
    values = (drawn(1000) + 1e4).float()
    mean, variance = mean_and_variance(moments(values))
    assert mean.item() == pytest.approx(values.double().mean().item(), rel=1e-9)
    assert variance.item() == pytest.approx(values.double().var(unbiased=False).item(), rel=1e-4)
