"""The module that an expansion trains: the model, next-token loss and the routing terms of the stage.

Legend: B sequences, T padded length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tenfold.methods.layermoe.balance import balance_loss
from tenfold.methods.layermoe.classification import classifier_hits, classifier_sum
from tenfold.methods.layermoe.language_prior import PriorForm, base_probability, group_prior_sum, prior_sum
from tenfold.methods.layermoe.modeling import layout_of
from tenfold.methods.layermoe.state import RouteWith, RoutingState, collecting
from tenfold.platform.data.positions import label_positions, next_labels
from tenfold.platform.losses.fused_linear import fused_linear_cross_entropy, linear_cross_entropy_rows
from tenfold.platform.training.label_rows import check_whole_head, label_rows
from tenfold.platform.training.module import TrainedModule
from torch import Tensor, nn

Parts = dict[str, tuple[Tensor, Tensor]]
OLD_GROUP = 0


@dataclass(frozen=True)
class Objective:
    """What a stage adds to the next-token loss; a weight of None leaves a term out.

    Attributes:
        balance_weight: alpha of stage 1.
        prior_weight: beta of stage 2.
        classifier_weight: gamma of stage 2, for models with classifiers.
        prior_form: form of language-prior routing.
        route_with: class by which classifier layers route in training.
        chunk: label positions whose logits exist at once; changes no value.
    """

    balance_weight: float | None = None
    prior_weight: float | None = None
    classifier_weight: float | None = None
    prior_form: PriorForm = "nll"
    route_with: RouteWith = "predicted"
    chunk: int = 512

    @property
    def reads_routing(self) -> bool:
        """Say whether any term reads what routers or classifiers say."""
        return any(w is not None for w in (self.balance_weight, self.prior_weight, self.classifier_weight))

    @property
    def reads_groups(self) -> bool:
        """Say whether batches must tell the language groups: the terms of stage 2."""
        return self.prior_weight is not None or self.classifier_weight is not None


class ExpansionModule(TrainedModule):
    """A language model, dense or expanded, and the loss of one stage; see `TrainedModule`.

    Args:
        model: the trained model. With a routing term in the objective it must be an expanded one.
        objective: what the stage adds to the next-token loss.
    """

    def __init__(self, model: nn.Module, objective: Objective):
        super().__init__(model)
        self.objective = objective
        layout = layout_of(self.config)
        self._top_k, self._sizes = layout.top_k, dict(enumerate(layout.experts))

    def check_heads(self) -> None:
        """Make sure that the loss reads what the model predicts.

        Raises:
            ModelError: its logits are not its head applied to the last hidden state.
        """
        check_whole_head(self.exported)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        group: Tensor | None = None,
        old_mask: Tensor | None = None,
        language: Tensor | None = None,
        num_old_tokens: Tensor | int | None = None,
        num_real_tokens: Tensor | int | None = None,
        num_sequences: Tensor | int | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Any]:
        """Return loss and statistics of one micro-batch; in eval mode the next-token loss of each sequence.

        Next-token loss, prior and classifier loss are sums over the micro-batch divided by counts of the whole step;
        the balance is that of the micro-batch, in the mean over those of the step.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T]; padded tokens count nowhere.
            labels: int64 [B, T], -100 = not counted.
            group: int64 [B], language group of each sequence, 0 = old; needed in stage 2.
            old_mask: bool [B, T], which tokens are of an old language; default: all of the sequences of group 0.
            language: int64 [B], number of each sequence's language; handed through in eval mode.
            num_old_tokens: `old_tokens` of the whole global step; default: those of this batch.
            num_real_tokens: tokens of the whole global step that are no padding; default: those of this batch.
            num_sequences: sequences of the whole global step; default: those of this batch.
            num_items_in_batch: label tokens of the whole global step; default: those of this batch.

        Raises:
            ValueError: a term of stage 2 and no `group`.
        """
        if not self.training:
            return self._evaluation(input_ids, attention_mask, labels, language)
        if self.objective.reads_groups and group is None:
            raise ValueError("the loss of the review needs the language group of each sequence, group [B]")
        with self._routing(group) as state:
            side = label_rows(self.exported, input_ids, attention_mask, labels)
        targets = next_labels(labels)
        own = fused_linear_cross_entropy(side.hidden, side.head, targets, bias=side.bias, chunk=self.objective.chunk)
        count = torch.as_tensor(targets.numel(), device=own.device)
        loss, statistics = own / _step_count(num_items_in_batch, count), {"ntp": (own, count)}
        if state is not None:
            mask, old = attention_mask.bool(), old_tokens(attention_mask, group, old_mask)
            for value, parts in (
                self._balance(state, mask),
                self._prior(state, old, num_old_tokens),
                self._group_prior(state, mask, old, group, num_real_tokens),
                self._classifier(state, group, num_sequences),
            ):
                loss, statistics = loss + value, statistics | parts
            statistics |= self._probabilities(state, mask, old)
        return {"loss": loss, "statistics": statistics}

    @contextlib.contextmanager
    def _routing(self, group: Tensor | None) -> Iterator[RoutingState | None]:
        """Yield what routers and classifiers say in the block; None where no term reads it."""
        if not self.objective.reads_routing:
            yield None
            return
        with collecting(self.exported, groups=group, route_with=self.objective.route_with) as state:
            yield state

    def _balance(self, state: RoutingState, mask: Tensor) -> tuple[Tensor | float, Parts]:
        weight = self.objective.balance_weight
        if weight is None:
            return 0.0, {}
        value, loads = balance_loss(state.router_logits, mask, self._top_k)
        one = torch.ones_like(value)
        parts = {
            "balance": (value, one),
            "load_base": (torch.stack([load[0] for load in loads.values()]).mean(), one),
            "load_largest": (torch.stack([load.max() for load in loads.values()]).mean(), one),
        }
        return weight * value / self.micro_batches, parts

    def _prior(self, state: RoutingState, old: Tensor, total: Tensor | int | None) -> tuple[Tensor | float, Parts]:
        weight, form = self.objective.prior_weight, self.objective.prior_form
        if weight is None or form == "group":
            return 0.0, {}
        value, count = prior_sum(state.router_logits, old, form), old.sum()
        return weight * value / _step_count(total, count), {"prior": (value, count)}

    def _group_prior(
        self, state: RoutingState, mask: Tensor, old: Tensor, group: Tensor | None, total: Tensor | int | None
    ) -> tuple[Tensor | float, Parts]:
        weight = self.objective.prior_weight
        if weight is None or group is None or self.objective.prior_form != "group":
            return 0.0, {}
        groups = group[:, None].expand_as(mask).masked_fill(old, OLD_GROUP)
        value, count = group_prior_sum(state.router_logits, self._sizes, groups, mask), mask.sum()
        return weight * value / _step_count(total, count), {"prior": (value, count)}

    def _classifier(
        self, state: RoutingState, group: Tensor | None, total: Tensor | int | None
    ) -> tuple[Tensor | float, Parts]:
        weight, logits = self.objective.classifier_weight, state.classifier_logits
        if weight is None or group is None:
            return 0.0, {}
        value, count = classifier_sum(logits, group), torch.as_tensor(len(group), device=group.device)
        hits, is_old = classifier_hits(logits, group), group == OLD_GROUP
        parts = {
            "classifier": (value, count),
            "classifier_accuracy_old": ((hits * is_old).sum(), is_old.sum()),
            "classifier_accuracy_new": ((hits * ~is_old).sum(), (~is_old).sum()),
        }
        return weight * value / _step_count(total, count), parts

    def _probabilities(self, state: RoutingState, mask: Tensor, old: Tensor) -> Parts:
        """Return the mean probability of expert 0, of new and of old tokens; stage 1 has new ones alone."""
        probability, new = base_probability(state.router_logits), mask & ~old
        parts = {"p0_new": ((probability * new).sum(), new.sum())}
        if self.objective.reads_groups:
            parts["p0_old"] = ((probability * old).sum(), old.sum())
        return parts

    @torch.no_grad()
    def _evaluation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        language: Tensor | None,
    ) -> dict[str, Any]:
        side, mask = label_rows(self.exported, input_ids, attention_mask, labels), label_positions(labels)
        losses = linear_cross_entropy_rows(
            side.hidden, side.head, next_labels(labels), bias=side.bias, chunk=self.objective.chunk
        )
        nll = losses.new_zeros(len(labels)).index_add(0, mask.nonzero()[:, 0], losses)
        counts = mask.sum(1)
        return {
            "loss": losses.sum() / counts.sum().clamp(min=1),
            "statistics": {},
            "nll": nll,
            "num_labels": counts,
            "language": torch.full_like(counts, -1) if language is None else language,
        }


def old_tokens(attention_mask_BT: Tensor, group_B: Tensor | None, old_mask_BT: Tensor | None = None) -> Tensor:
    """Return which tokens are real and of an old language, bool [B, T]: by `old_mask`, else by group, else none."""
    real = attention_mask_BT.bool()
    if old_mask_BT is not None:
        return real & old_mask_BT.bool()
    return torch.zeros_like(real) if group_B is None else real & (group_B == OLD_GROUP)[:, None]


def _step_count(total: Tensor | int | None, count: Tensor) -> Tensor:
    """Return the count of the whole step as float32, at least 1; of this batch where that is not given."""
    return torch.as_tensor(count if total is None else total, device=count.device).float().clamp(min=1.0)
