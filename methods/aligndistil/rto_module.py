"""What RTO trains: the policy and its critic by PPO's losses on responses that the policy has just written.

RTO (arXiv 2404.18922) is PPO with the dense reward beta (log pi_dpo - log pi_ref) at every token. What a step aims at
is made in `rto_experience`, the losses of a token are in `ppo_losses`. All models are read at the label positions
alone.

Legend: B sequences, T padded length, R label positions of the batch (`platform.data.positions`), D hidden size of the
critic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from tenfold.methods.aligndistil.aligned_module import AlignedModule, by_sequence
from tenfold.methods.aligndistil.config import AlignDistilConfig
from tenfold.methods.aligndistil.extrapolation import Contrast
from tenfold.methods.aligndistil.fused import fused_alignment_loss
from tenfold.methods.aligndistil.ppo_losses import is_clipped, policy_loss, value_loss
from tenfold.methods.aligndistil.rto_experience import Experience, Targets
from tenfold.platform.data.positions import label_positions, next_labels
from tenfold.platform.losses.chunked_rows import Side
from tenfold.platform.losses.fused_linear import fused_linear_cross_entropy, linear_cross_entropy_rows
from tenfold.platform.models.hidden import evaluating, final_hidden
from tenfold.platform.training.label_rows import frozen_label_rows
from torch import Tensor, nn


class PolicyLoss(NamedTuple):
    """A policy loss that can be differentiated, its value, and how many tokens' ratios are clipped."""

    total: Tensor
    value: Tensor
    num_clipped: Tensor


class Critic(nn.Module):
    """The body of a language model and a linear map of its last hidden states to one number.

    The map starts at 0: the first values are 0, not random ones that the first advantages would contain.

    Args:
        model: a causal language model, of which the body is kept.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.backbone = model.base_model
        self.weight = nn.Parameter(torch.zeros(model.config.get_text_config().hidden_size))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Return the values at the label positions, [R] float32 or wider.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T].
            labels: int64 [B, T], -100 = not counted.
        """
        states_RD = final_hidden(self.backbone, input_ids, attention_mask)[label_positions(labels)]
        wide = torch.promote_types(states_RD.dtype, torch.float32)
        # no matrix product, which autocast would round
        return (states_RD.to(wide) * self.weight.to(wide)).sum(-1) + self.bias.to(wide)


class RTOModule(AlignedModule):
    """Policy and critic; the frozen models are `dpo` and `reference`.

    The critic's parameters are this module's own: trained by the same optimizer with their own learning rate, kept
    with DeepSpeed's state, not exported. The losses share no parameter, so that their sum needs no weights; only the
    clipping by the common gradient norm lets one be felt in the other.

    Args:
        policy: the trained model.
        config: the method's options.
        frozen: by name.
        num_columns: entries of the tokenizer.
        critic: the critic.
    """

    def __init__(
        self,
        policy: nn.Module,
        config: AlignDistilConfig,
        frozen: Mapping[str, Any],
        *,
        num_columns: int,
        critic: Critic,
    ):
        super().__init__(policy, config, frozen, num_columns=num_columns)
        self.critic = critic
        self.other = "reference"  # what the DPO model is compared with before the first step

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute activations in backward, the critic's too."""
        super().gradient_checkpointing_enable(**kwargs)
        self.critic.backbone.gradient_checkpointing_enable(**kwargs)

    @torch.no_grad()
    def experience(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Experience:
        """Read responses in eval mode, as they were written; outside the forward pass, on all ranks.

        Args:
            input_ids: int64 [B, T] of prompts and responses.
            attention_mask: [B, T].
            labels: int64 [B, T], -100 = not of the response.
        """
        sequences, targets = (input_ids, attention_mask, labels), next_labels(labels)
        with evaluating(self):
            values = self.critic(*sequences)
            # gathers the head under ZeRO-3, which the policy's own forward pass would do
            with frozen_label_rows(self.exported, *sequences) as policy:
                log_policy = self._log_probs(policy, targets)
        with self.reading("dpo", *sequences) as dpo:
            log_dpo = self._log_probs(dpo, targets)
        with self.reading("reference", *sequences) as reference:
            log_reference = self._log_probs(reference, targets)
        return Experience(log_policy, log_dpo, log_reference, values)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        num_sequences: Tensor | int = 1,
        truncated: Tensor | None = None,
        targets: Targets | None = None,
        is_measured: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Any]:
        """Return loss and statistics of one micro-batch; in eval mode the sums of each given response.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T].
            labels: int64 [B, T], -100 = not counted. A sequence without a label counts for nothing.
            num_sequences: sequences with a label in the whole global step.
            truncated: bool [B], which responses were cut.
            targets: of the same R tokens; None in eval mode.
            is_measured: not read, all statistics are cheap.
            num_items_in_batch: not read; sequences count alike, whatever their tokens.
        """
        if targets is None:
            return self._evaluation(input_ids, attention_mask, labels)
        # a mean over the tokens of a sequence, then over the sequences of the global step
        counts = label_positions(labels).sum(1)
        number = torch.as_tensor(num_sequences, device=labels.device).float().clamp(min=1.0)
        weight = 1.0 / (counts[label_positions(labels).nonzero()[:, 0]] * number)
        values = self.critic(input_ids, attention_mask, labels)
        value_losses = value_loss(values, targets.values, targets.returns, clip=self.options.rto.value_clip)
        value = (value_losses * weight).sum()
        policy = self._policy_loss(self.read(input_ids, attention_mask, labels), next_labels(labels), targets, weight)
        tokens, sequences = counts.sum(), (counts > 0).sum()
        statistics = {
            "policy_loss": (policy.value * number, sequences),
            "value_loss": (value.detach() * number, sequences),
            "clipped": (policy.num_clipped, tokens),
            "response_length": (tokens, sequences),
        }
        if truncated is not None:
            statistics["truncated"] = (truncated.sum(), sequences)
        return {"loss": policy.total + value, "statistics": statistics | targets.statistics}

    def _policy_loss(self, policy: Side, tokens_R: Tensor, aims: Targets, weight_R: Tensor) -> PolicyLoss:
        """Return sum_r weight[r] loss[r] of the response tokens.

        The losses' derivatives by the log-probabilities, which are a number a row, weight a cross entropy of the rows:
        it has the gradient of the sum, and never all logits at once.
        """
        clip = self.options.rto.clip
        log_probs = self._log_probs(policy, tokens_R).requires_grad_()
        value = (policy_loss(log_probs, aims.log_policy, aims.advantages, clip=clip) * weight_R).sum()
        (slope,) = torch.autograd.grad(value, log_probs)
        with_gradient = fused_linear_cross_entropy(
            policy.hidden,
            policy.head,
            tokens_R,
            bias=policy.bias,
            row_weight=-slope,
            chunk=self.options.loss_chunk_rows,
        )
        value = value.detach()
        num_clipped = is_clipped(log_probs.detach(), aims.log_policy, clip=clip).sum()
        return PolicyLoss(with_gradient + (value - with_gradient).detach(), value, num_clipped)

    @torch.no_grad()
    def _log_probs(self, side: Side, targets_R: Tensor) -> Tensor:
        """Return log pi of the targets, [R], over the whole head, as tokens are drawn from.

        The products are float32: of bfloat16 logits the rewards, small differences of log-probabilities, would be
        mostly rounding.
        """
        wide = torch.promote_types(side.head.dtype, torch.float32)
        hidden, head, bias = (
            None if given is None else given.to(wide) for given in (side.hidden, side.head, side.bias)
        )
        with torch.autocast(targets_R.device.type, enabled=False):
            return -linear_cross_entropy_rows(hidden, head, targets_R, bias=bias, chunk=self.options.loss_chunk_rows)

    @torch.no_grad()
    def _evaluation(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Any]:
        """Return `nll`, `num_labels`, `rto_reward` and `kl_reference` of each sequence, [B] each.

        The last two are sums over the positions of what the policy expects there: of the dense reward before its clip,
        and of log pi - log pi_ref. So they follow the policy, though the responses are given ones.
        """
        sequences = (input_ids, attention_mask, labels)
        policy = self.read(*sequences)
        with self.reading("dpo", *sequences) as dpo, self.reading("reference", *sequences) as reference:
            found = fused_alignment_loss(
                policy,
                dpo,
                reference,
                Contrast("theorem1_const", beta=self.options.rto.reward_beta),
                None,
                num_columns=self.num_columns,
                want_metrics=True,
                chunk=self.options.loss_chunk_rows,
            ).rows
        nll, num_labels = self.nll_rows(policy, labels)
        reward, divergence = (by_sequence(found[name], labels) for name in ("reward", "kl_other"))
        loss = nll.sum() / num_labels.sum().clamp(min=1)
        columns = {"nll": nll, "num_labels": num_labels, "rto_reward": reward, "kl_reference": divergence}
        return {"loss": loss, "statistics": {}, **columns}
