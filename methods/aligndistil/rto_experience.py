"""From what the models make of freshly written responses to what a step of PPO on them aims at.

Legend: B sequences, T padded length, R label positions of the batch (`platform.data.positions`): one for each token of
the responses.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from tenfold.methods.aligndistil.advantages import (
    dense_rewards,
    generalised_advantages,
    mean_and_variance,
    moments,
    standardised,
    token_rewards,
)
from tenfold.methods.aligndistil.config import RTOOptions
from tenfold.platform.data.positions import label_positions
from torch import Tensor

Statistics = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Experience:
    """Responses as the models see them with the weights that wrote them: [R] float32 each, in label order.

    Attributes:
        log_policy: log pi_old of the response's tokens.
        log_dpo: log pi_dpo.
        log_reference: log pi_ref.
        values: V_old of the text before each of them.
    """

    log_policy: Tensor
    log_dpo: Tensor
    log_reference: Tensor
    values: Tensor


@dataclass(frozen=True)
class Targets:
    """What a forward pass of training aims at; constants.

    An object and no further tensors of the batch: those the Trainer rounds to the model's dtype.

    Attributes:
        log_policy: log pi_old, [R].
        values: V_old, [R].
        advantages: [R], standardised over the whole rollout batch.
        returns: G, [R].
        statistics: what is known before the pass: name -> (sum, count).
    """

    log_policy: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    statistics: Statistics = field(default_factory=dict)


@dataclass(frozen=True)
class Judged:
    """Responses with rewards and advantages.

    Attributes:
        experience: of their tokens.
        dense: [R], the DPO model's reward of each token.
        advantages: [R], not standardised.
        num_sequences: scalar, sequences with a token.
    """

    experience: Experience
    dense: Tensor
    advantages: Tensor
    num_sequences: Tensor

    @classmethod
    def of(cls, experience: Experience, labels: Tensor, options: RTOOptions) -> Judged:
        """Reward the tokens of responses.

        Args:
            experience: of the same R tokens.
            labels: int64 [B, T].
            options: RTO's.
        """
        reference = experience.log_reference
        dense = dense_rewards(experience.log_dpo, reference, beta=options.reward_beta, clip=options.reward_clip)
        rewards = token_rewards(dense, experience.log_policy, reference, kl_coefficient=options.kl_coefficient)
        mask_BT = label_positions(labels)
        padded = rewards.new_zeros(2, *mask_BT.shape)
        padded[:, mask_BT] = torch.stack([rewards, experience.values])
        advantages = generalised_advantages(*padded, mask_BT, gamma=options.gamma, gae_lambda=options.gae_lambda)
        return cls(experience, dense, advantages[mask_BT], mask_BT.any(1).sum())

    @property
    def returns(self) -> Tensor:
        """Return G = A + V_old, [R]."""
        return self.advantages + self.experience.values

    @property
    def moments(self) -> Tensor:
        """Return the moments of advantages, returns and values, [3, 3] float64: to be added up over the step."""
        return torch.stack([moments(self.advantages), moments(self.returns), moments(self.experience.values)])

    def targets(self, step_moments: Tensor) -> Targets:
        """Return what the forward pass aims at.

        Args:
            step_moments: [3, 3], sum of `moments` over all micro-batches and ranks of the step.
        """
        seen, advantages = self.experience, step_moments[0]
        return Targets(
            log_policy=seen.log_policy,
            values=seen.values,
            advantages=standardised(self.advantages, advantages),
            returns=self.returns,
            statistics=self._statistics(step_moments),
        )

    def _statistics(self, step_moments: Tensor) -> Statistics:
        """Sums over a response of rewards and log pi - log pi_ref; and how the critic did in the whole step.

        The explained variance is 1 - Var(G - V_old) / Var(G), and G - V_old are the advantages.
        """
        errors, returns = (mean_and_variance(of)[1] for of in step_moments[:2])
        value = mean_and_variance(step_moments[2])[0]
        one, seen = torch.ones_like(value), self.experience
        return {
            "rto_reward": (self.dense.sum(), self.num_sequences),
            "kl_reference": ((seen.log_policy - seen.log_reference).sum(), self.num_sequences),
            "advantage_std": (errors.sqrt(), one),
            "value": (value, one),
            "explained_variance": (returns - errors, returns),
        }
