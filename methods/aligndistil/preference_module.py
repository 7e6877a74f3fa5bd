"""What the preference objectives train: a policy whose whole responses are scored beside those of a frozen reference.

The losses are functions of sums over tokens (`preference_losses`), so their slopes are known as soon as these sums
are. The label rows therefore meet the heads twice, a chunk at a time: once without gradients for the sums, then as a
weighted sum of token losses whose weights are the slopes, which computes its gradients at once. No pass holds more
than a chunk of logits, and nothing reads a head after the forward pass (ZeRO-3).

Legend: B pairs or examples, N sequences (2B for pairs: the chosen ones, then the rejected ones in the same order), T
padded length, R label positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tenfold.methods.aligndistil import preference_losses
from tenfold.methods.aligndistil.aligned_module import AlignedModule, by_sequence
from tenfold.methods.aligndistil.config import AlignDistilConfig
from tenfold.platform.data.positions import label_positions, next_labels
from tenfold.platform.losses.chunked_rows import DivergenceTerm, Needs, Side, Task, run
from tenfold.platform.losses.divergence import DivergenceOptions
from tenfold.platform.losses.fused_inputs import make_side, row_weight, target_term
from tenfold.platform.losses.fused_linear import fused_linear_cross_entropy, fused_linear_distillation
from torch import Tensor

CDPO_SMOOTHING = 0.1  # of cdpo, where label_smoothing is 0


@dataclass(frozen=True)
class Scores:
    """What two models make of sequences; float32 or wider, without a graph.

    Attributes:
        policy: [N] l_theta, the log-probability of all label tokens together.
        lengths: [N] their number.
        reference: [N] l_ref; None without a reference.
        kl: [N] K = sum_t KL(pi_ref || pi_theta); None where the objective does not read it.
    """

    policy: Tensor
    lengths: Tensor
    reference: Tensor | None = None
    kl: Tensor | None = None

    def part(self, start: int, stop: int) -> Scores:
        """Return sequences [start, stop)."""
        given = (self.policy, self.lengths, self.reference, self.kl)
        return Scores(*(None if values is None else values[start:stop] for values in given))  # type: ignore[arg-type]

    @property
    def log_ratio(self) -> Tensor:
        """Return l_theta - l_ref, or l_theta where there is no reference."""
        return self.policy if self.reference is None else self.policy - self.reference

    @property
    def token_mean(self) -> Tensor:
        """Return l_theta divided by the number of tokens; 0 for a sequence without any."""
        return self.policy / self.lengths.clamp(min=1)


def pair_losses(chosen: Scores, rejected: Scores, config: AlignDistilConfig) -> Tensor:
    """Return the objective's loss of each pair, [B], differentiable in `policy` and `kl` of both sides."""
    objective, beta, smoothing = config.objective, config.beta, config.label_smoothing
    if objective == "simpo":
        options = config.simpo
        return preference_losses.simpo(
            chosen.token_mean, rejected.token_mean, options.beta, options.gamma_ratio, smoothing
        )
    assert chosen.reference is not None
    assert rejected.reference is not None
    given = (chosen.policy, rejected.policy, chosen.reference, rejected.reference)
    if objective == "ipo":
        return preference_losses.ipo(*given, beta)
    if objective in ("dpo", "cdpo"):
        if objective == "cdpo" and not smoothing:
            smoothing = CDPO_SMOOTHING
        return preference_losses.dpo(*given, beta, smoothing)
    assert chosen.kl is not None
    assert rejected.kl is not None
    h = preference_losses.margin(*given)
    if objective == "tdpo1":
        return preference_losses.tdpo1(h, chosen.kl, rejected.kl, beta)
    return preference_losses.tdpo2(h, chosen.kl, rejected.kl, beta, config.tdpo_alpha)


@torch.no_grad()
def rewards(scores: Scores, config: AlignDistilConfig) -> Tensor:
    """Return the reward of each sequence that the objective implies, [N].

    beta (l_theta - l_ref), of TDPO beta (l_theta - l_ref + K), and of SimPO beta times the mean log-probability.
    """
    if config.objective == "simpo":
        return config.simpo.beta * scores.token_mean
    return config.beta * (scores.log_ratio if scores.kl is None else scores.log_ratio + scores.kl)


class PreferenceModule(AlignedModule):
    """Policy and reference on pairs: DPO, cDPO, IPO, SimPO, TDPO1 and TDPO2; see `AlignedModule`.

    Attributes:
        sequences_per_example: rows of a batch that belong to one example.
    """

    sequences_per_example: ClassVar[int] = 2

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        num_examples: Tensor | None = None,
        num_items_in_batch: Any = None,
    ) -> dict[str, Any]:
        """Return loss and statistics; in eval mode also the columns that `PreferenceTrainer` names, [B] each.

        Args:
            input_ids: int64 [2B, T]: chosen, then rejected.
            attention_mask: [2B, T].
            labels: int64 [2B, T], -100 = not counted.
            num_examples: pairs of the whole global batch; None: of this micro-batch.
            num_items_in_batch: label tokens of the global batch, from the Trainer; not used.
        """
        policy = self.read(input_ids, attention_mask, labels)
        with self._reference(input_ids, attention_mask, labels) as reference:
            scores = self._score(policy, reference, labels)
            size = len(labels) // 2
            chosen, rejected = scores.part(0, size), scores.part(size, 2 * size)
            with torch.enable_grad():
                losses = pair_losses(chosen, rejected, self.options)
                total = losses.sum() - self.options.nll_weight * chosen.token_mean.sum()
                value = total / divisor(num_examples, size)
            loss = self._with_gradient(value, scores, policy, reference, labels)
        if not self.training:
            return {"loss": loss, "statistics": {}, **self._columns(chosen, rejected, losses)}
        return {"loss": loss, "statistics": self._statistics(chosen, rejected)}

    @contextmanager
    def _reference(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Iterator[Side | None]:
        """Yield what the reference reads; None for an objective without one."""
        if "reference" not in self.frozen:
            yield None
            return
        with self.reading("reference", input_ids, attention_mask, labels) as side:
            yield side

    @torch.no_grad()
    def _score(self, policy: Side, reference: Side | None, labels: Tensor) -> Scores:
        """Go through the label rows without gradients; in training the results are leaves of a graph."""
        targets = next_labels(labels)
        student = make_side("policy", policy.hidden, policy.head, policy.bias)
        teacher = teacher_targets = divergence = None
        if reference is not None:
            teacher = make_side("reference", reference.hidden, reference.head, reference.bias)
            teacher_targets = target_term("reference", teacher, targets, None)
            if self._reads_kl:
                weight = row_weight("KL", None, student)
                divergence = DivergenceTerm("forward_kl", DivergenceOptions(), weight, self.num_columns)
        rows = run(
            Task(
                student,
                teacher,
                self.options.loss_chunk_rows,
                target_term=target_term("policy", student, targets, None),
                divergence_term=divergence,
                teacher_target_term=teacher_targets,
            ),
            Needs(),
        )
        return Scores(
            policy=by_sequence(-rows.target_rows, labels).requires_grad_(self.training),
            lengths=label_positions(labels).sum(1),
            reference=None if teacher is None else by_sequence(-rows.teacher_target_rows, labels),
            kl=by_sequence(rows.divergence_rows, labels).requires_grad_(self.training) if self._reads_kl else None,
        )

    @property
    def _reads_kl(self) -> bool:
        return self.options.objective in ("tdpo1", "tdpo2")

    def _with_gradient(
        self, value: Tensor, scores: Scores, policy: Side, reference: Side | None, labels: Tensor
    ) -> Tensor:
        """Return the value, in training with its gradient in the policy's hidden rows, head and bias.

        d value = sum_b (d value / d l_b) d l_b + (d value / d K_b) d K_b: the slopes of a sequence weigh its rows.
        """
        if not self.training:
            return value.detach()
        leaves = [scores.policy] if scores.kl is None else [scores.policy, scores.kl]
        slopes = torch.autograd.grad(value, leaves)
        sequence = label_positions(labels).nonzero()[:, 0]
        targets, chunk = next_labels(labels), self.options.loss_chunk_rows
        if len(slopes) == 1:
            weighted = fused_linear_cross_entropy(
                policy.hidden, policy.head, targets, bias=policy.bias, row_weight=-slopes[0][sequence], chunk=chunk
            )
        else:
            assert reference is not None
            weighted = fused_linear_distillation(
                policy.hidden,
                policy.head,
                reference.hidden,
                reference.head,
                divergence="forward_kl",
                divergence_weight=slopes[1][sequence],
                targets=targets,
                target_weight=-slopes[0][sequence],
                student_bias=policy.bias,
                teacher_bias=reference.bias,
                num_columns=self.num_columns,
                chunk=chunk,
            ).total
        return value.detach() + (weighted - weighted.detach())

    @torch.no_grad()
    def _statistics(self, chosen: Scores, rejected: Scores) -> dict[str, tuple[Tensor, Tensor]]:
        """Return (sum, number of pairs) of what is logged in training."""
        reward_chosen, reward_rejected = rewards(chosen, self.options), rewards(rejected, self.options)
        values = {
            "reward_chosen": reward_chosen,
            "reward_rejected": reward_rejected,
            "reward_margin": reward_chosen - reward_rejected,
            "reward_accuracy": 100 * (reward_chosen > reward_rejected),
            "logp_chosen": chosen.policy,
            "logp_rejected": rejected.policy,
        }
        if chosen.kl is not None and rejected.kl is not None:
            values |= {"kl_chosen": chosen.kl, "kl_rejected": rejected.kl}
        return {name: sum_and_number(value) for name, value in values.items()}

    def _columns(self, chosen: Scores, rejected: Scores, losses: Tensor) -> dict[str, Tensor]:
        return {
            "reward_chosen": rewards(chosen, self.options),
            "reward_rejected": rewards(rejected, self.options),
            "preference_nll": losses.detach(),
            "nll": -chosen.policy.detach(),
            "num_labels": chosen.lengths,
        }


def divisor(num_examples: Tensor | None, size: int) -> Tensor | int:
    """Return what sums over examples are divided by: their number in the global batch, or `size` where it is None."""
    return max(size, 1) if num_examples is None else num_examples


def sum_and_number(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return a statistic of the Trainer."""
    return values.detach().float().sum(), torch.tensor(float(len(values)), device=values.device)
