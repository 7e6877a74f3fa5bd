"""What KTO trains: a policy whose single answers, each good or bad, are scored beside those of a frozen reference.

Legend: B examples, T and T' padded lengths.
"""

from __future__ import annotations

from typing import Any

import torch
from tenfold.methods.aligndistil import preference_losses
from tenfold.methods.aligndistil.preference_module import PreferenceModule, Scores, divisor, rewards, sum_and_number
from torch import Tensor


class KTOModule(PreferenceModule):
    """Policy and reference on single answers, each good or bad: KTO."""

    sequences_per_example = 1

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        desirable: Tensor,
        mismatched_input_ids: Tensor | None = None,
        mismatched_attention_mask: Tensor | None = None,
        mismatched_labels: Tensor | None = None,
        num_examples: Tensor | None = None,
        num_items_in_batch: Any = None,
    ) -> dict[str, Any]:
        """Return loss and statistics; in eval mode also the columns that `SinglesTrainer` names, [B] each.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T].
            labels: int64 [B, T], -100 = not counted.
            desirable: bool [B].
            mismatched_input_ids: int64 [B, T'], prompts with another example's answer; with the reference point
                `mismatched`.
            mismatched_attention_mask: [B, T'].
            mismatched_labels: int64 [B, T'].
            num_examples: examples of the whole global batch; None: of this micro-batch.
            num_items_in_batch: label tokens of the global batch, from the Trainer; not used.
        """
        point = None
        if self.options.kto.reference_point == "mismatched":
            assert mismatched_input_ids is not None
            assert mismatched_attention_mask is not None
            assert mismatched_labels is not None
            point = self._mismatched_point(mismatched_input_ids, mismatched_attention_mask, mismatched_labels)
        policy = self.read(input_ids, attention_mask, labels)
        with self._reference(input_ids, attention_mask, labels) as reference:
            scores = self._score(policy, reference, labels)
            if point is None:
                point = self._paired_point(scores, desirable)
            assert scores.reference is not None
            with torch.enable_grad():
                losses = preference_losses.kto(
                    scores.policy,
                    scores.reference,
                    desirable,
                    point,
                    self.options.beta,
                    self.options.kto.desirable_weight,
                    self.options.kto.undesirable_weight,
                )
                value = losses.sum() / divisor(num_examples, len(labels))
            loss = self._with_gradient(value, scores, policy, reference, labels)
        if not self.training:
            return {"loss": loss, "statistics": {}, **self._kto_columns(scores, losses, desirable)}
        return {"loss": loss, "statistics": self._kto_statistics(scores, desirable, point)}

    @torch.no_grad()
    def _mismatched_point(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Return z_0 from prompts with other examples' answers, of all ranks; a lone row has no other answer."""
        policy = self.read(input_ids, attention_mask, labels)
        with self._reference(input_ids, attention_mask, labels) as reference:
            ratios = self._score(policy, reference, labels).log_ratio.detach()
        number = len(ratios) if len(ratios) > 1 else 0
        sums = _over_ranks(torch.stack([ratios.sum() * (number > 0), ratios.new_tensor(float(number))]))
        return preference_losses.kl_reference_point(sums[0], sums[1])

    @staticmethod
    @torch.no_grad()
    def _paired_point(scores: Scores, desirable: Tensor) -> Tensor:
        """Return z_0 of each example from the opposite answers of this micro-batch on all ranks, [B]."""
        ratios, is_good = scores.log_ratio, desirable.to(scores.policy.dtype)
        parts = [(ratios * (1 - is_good)).sum(), (ratios * is_good).sum(), (1 - is_good).sum(), is_good.sum()]
        sums = _over_ranks(torch.stack(parts))
        return preference_losses.paired_reference_point(sums[:2], sums[2:], desirable)

    @torch.no_grad()
    def _kto_statistics(self, scores: Scores, desirable: Tensor, point: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        reward, log_probs = rewards(scores, self.options), scores.policy
        return {
            "reward_desirable": sum_and_number(reward[desirable]),
            "reward_undesirable": sum_and_number(reward[~desirable]),
            "logp_desirable": sum_and_number(log_probs[desirable]),
            "logp_undesirable": sum_and_number(log_probs[~desirable]),
            "reference_point": sum_and_number(point.expand(len(reward))),
        }

    def _kto_columns(self, scores: Scores, losses: Tensor, desirable: Tensor) -> dict[str, Tensor]:
        return {
            "reward": rewards(scores, self.options),
            "desirable": desirable,
            "preference_nll": losses.detach(),
            "nll": -scores.policy.detach(),
            "num_labels": scores.lengths,
        }


def _over_ranks(sums: Tensor) -> Tensor:
    """Return the sum over all ranks, all of which must call it equally often."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return sums
