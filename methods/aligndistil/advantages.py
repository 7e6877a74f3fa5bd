"""Rewards and advantages of tokens: what RTO (arXiv 2404.18922) gives to PPO (arXiv 1707.06347).

Legend: B sequences, T padded length. A mask [B, T] (bool) marks the positions whose logits predict a response token;
in every row they stand side by side. The reward of a position is that of the token it predicts, its value that of the
text up to it, and its advantage says how much better this token was than the policy's average one.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_VARIANCE = 1e-8  # under the root that advantages are divided by: equal ones become 0


def dense_rewards(log_dpo: Tensor, log_reference: Tensor, *, beta: float, clip: float) -> Tensor:
    """Return clip(beta (log pi_dpo - log pi_ref), +-clip) of sampled tokens: each one's share of the DPO reward.

    Args:
        log_dpo: log-probabilities by the DPO model, any shape, float32 or wider.
        log_reference: by the reference.
        beta: scale.
        clip: bound.
    """
    return (beta * (log_dpo - log_reference)).clamp(-clip, clip)


def token_rewards(dense: Tensor, log_policy: Tensor, log_reference: Tensor, *, kl_coefficient: float) -> Tensor:
    """Return dense rewards less PPO's penalty, kl_coefficient (log pi - log pi_ref) (its k1 estimate, not clipped).

    No reward of the whole sequence is added to the last token, as in the official code.
    """
    return dense - kl_coefficient * (log_policy - log_reference)


def generalised_advantages(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float, gae_lambda: float
) -> Tensor:
    """Return A_t = delta_t + gamma lambda A_{t+1} with delta_t = r_t + gamma V_{t+1} - V_t, per sequence.

    After the last token of a response value and advantage are 0, also where it was cut at the length limit: what is
    beyond is not part of it. The returns are A + V.

    Args:
        rewards_BT: float [B, T].
        values_BT: float [B, T].
        mask_BT: bool [B, T].
        gamma: discount.
        gae_lambda: lambda; 0 trusts the values (one step), 1 the rewards (their sum).

    Returns:
        [B, T], 0 outside the mask, whatever rewards and values are there.
    """
    rewards, values = (torch.where(mask_BT, given, 0.0) for given in (rewards_BT, values_BT))
    advantages = torch.zeros_like(values)
    advantage = next_value = values.new_zeros(len(values))
    for position in reversed(range(values.shape[1])):
        delta = rewards[:, position] + gamma * next_value - values[:, position]
        # rows whose response begins later or ended before carry nothing on
        advantage = torch.where(mask_BT[:, position], delta + gamma * gae_lambda * advantage, 0.0)
        next_value = values[:, position]
        advantages[:, position] = advantage
    return advantages


def moments(values: Tensor) -> Tensor:
    """Return (number, sum, sum of squares) of all values, [3] float64: those of several batches or ranks add up."""
    wide = values.double().flatten()
    return torch.stack([wide.new_tensor(float(len(wide))), wide.sum(), wide.square().sum()])


def mean_and_variance(moments_3: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance (divided by the number), float64 scalars; 0 and 0 for no values."""
    number, total, squares = moments_3
    mean = total / number.clamp(min=1.0)
    return mean, (squares / number.clamp(min=1.0) - mean.square()).clamp(min=0.0)


def standardised(advantages: Tensor, moments_3: Tensor) -> Tensor:
    """Return (A - mean) / std with mean and variance of the whole rollout batch, in the dtype of the advantages."""
    mean, variance = mean_and_variance(moments_3)
    return ((advantages.double() - mean) / variance.clamp(min=MIN_VARIANCE).sqrt()).to(advantages.dtype)
