"""The module of the distilled objectives: the policy, its frozen models, and the loss of sections 3.5 and 3.8.

Legend: B sequences, T padded length, R label positions of the batch in row-major order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from tenfold.methods.aligndistil.aligned_module import AlignedModule, by_sequence
from tenfold.methods.aligndistil.config import AlignDistilConfig
from tenfold.methods.aligndistil.extrapolation import contrast_of
from tenfold.methods.aligndistil.fused import AlignmentSums, fused_alignment_loss
from tenfold.platform.data.positions import label_positions, next_labels
from tenfold.platform.losses.chunked_rows import Side
from tenfold.platform.losses.fused_linear import linear_cross_entropy_rows
from torch import Tensor, nn

Parts = dict[str, tuple[Tensor, Tensor]]

# What evaluation keeps of a sequence, [B] each: sums over its label positions.
SUMS = ("kl", "kl_dpo", "kl_other", "reward", "dpo_reward", "alpha", "tvd")


class DistillationModule(AlignedModule):
    """Policy and teacher on the same responses, given ones or the policy's own.

    Args:
        policy: the trained model.
        config: the method's options; `objective` is one of `TEACHERS`.
        frozen: "dpo" and, but for `gkd`, "reverse" or "reference".
        num_columns: entries of the tokenizer.
    """

    def __init__(self, policy: nn.Module, config: AlignDistilConfig, frozen: Mapping[str, Any], *, num_columns: int):
        super().__init__(policy, config, frozen, num_columns=num_columns)
        self.contrast = contrast_of(config)
        self.other = next((name for name in self.frozen if name != "dpo"), None)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        num_sequences: Tensor | int | None = None,
        truncated: Tensor | None = None,
        is_measured: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Any]:
        """Return loss and statistics of one micro-batch; in eval mode the sums of each sequence.

        Args:
            input_ids: int64 [B, T], padded on the right.
            attention_mask: [B, T].
            labels: int64 [B, T], -100 = not scored. A sequence without a label counts for nothing.
            num_sequences: sequences with a label in the whole global step; default: those of this batch.
            truncated: bool [B], which responses were cut; given where the policy wrote them.
            is_measured: also compute the statistics that cost further passes over the logits.
            num_items_in_batch: not read; sequences count alike, whatever their tokens.
        """
        mask, want_metrics = label_positions(labels), is_measured or not self.training
        with contextlib.ExitStack() as stack:
            policy = self.read(input_ids, attention_mask, labels)
            dpo, other = (
                None if name is None else stack.enter_context(self.reading(name, input_ids, attention_mask, labels))
                for name in ("dpo", self.other)
            )
            assert dpo is not None
            sums = fused_alignment_loss(
                policy,
                dpo,
                other,
                self.contrast,
                self._row_weight(mask, num_sequences),
                num_columns=self.num_columns,
                want_metrics=want_metrics,
                chunk=self.options.loss_chunk_rows,
            )
            if not self.training:
                return self._evaluation(policy, sums, labels)
            parts = _statistics(sums.rows, mask, self.other)
            if truncated is not None:
                sequences = parts["response_length"][1]
                parts["truncated"] = (truncated.sum(), sequences)
                if is_measured and other is not None:
                    parts["realised_reward"] = (self._realised_reward(dpo, other, labels).sum(), sequences)
        return {"loss": sums.total, "statistics": parts}

    def _row_weight(self, mask: Tensor, num_sequences: Tensor | int | None) -> Tensor:
        """Return 1 / (tokens of the sequence * sequences) [R]; without `length_norm` 1 / sequences."""
        tokens = mask.sum(1)
        number = (tokens > 0).sum() if num_sequences is None else torch.as_tensor(num_sequences, device=mask.device)
        sequences = number.float().clamp(min=1.0)
        each = tokens.clamp(min=1) if self.options.length_norm else torch.ones_like(tokens)
        return (1.0 / (each * sequences))[mask.nonzero()[:, 0]]

    @torch.no_grad()
    def _realised_reward(self, dpo: Side, other: Side, labels: Tensor) -> Tensor:
        """beta_0 sum_t [log pi_dpo(y_t) - log pi_other(y_t)] of what was written, [B]."""
        targets = next_labels(labels)
        losses = [
            linear_cross_entropy_rows(
                side.hidden,
                side.head,
                targets,
                bias=side.bias,
                chunk=self.options.loss_chunk_rows,
            )
            for side in (other, dpo)
        ]
        return self.contrast.beta * by_sequence(losses[0] - losses[1], labels)

    def _evaluation(self, policy: Side, sums: AlignmentSums, labels: Tensor) -> dict[str, Any]:
        nll, num_labels = self.nll_rows(policy, labels)
        none = torch.zeros_like(sums.rows["kl"])
        columns = {name: by_sequence(sums.rows.get(name, none), labels) for name in SUMS}
        return {"loss": sums.total, "statistics": {}, "nll": nll, "num_labels": num_labels, **columns}


def _statistics(rows: dict[str, Tensor], mask: Tensor, other: str | None) -> Parts:
    """Return what is logged of the label positions: name -> (sum, count).

    Per token, but for `reward`, `dpo_reward` and `kl_dpo_sequence`, which are sums over a sequence. `alpha_max` and
    `token_loss_max` are the largest of a forward pass, in the mean over passes.
    """
    tokens, sequences = mask.sum(), mask.any(1).sum()
    one = torch.ones_like(tokens)
    names = {"kl": "kl", "alpha": "alpha", "tvd": "tvd", "token_weight": "weight", "kl_dpo": "kl_dpo"}
    parts = {name: (rows[key].sum(), tokens) for name, key in names.items() if key in rows}
    parts["response_length"] = (tokens, sequences)
    if "kl_dpo" in rows:
        parts["kl_dpo_sequence"] = (rows["kl_dpo"].sum(), sequences)
    if "kl_other" in rows:
        parts[f"kl_{other}"] = (rows["kl_other"].sum(), tokens)
        parts |= {name: (rows[name].sum(), sequences) for name in ("reward", "dpo_reward")}
    if len(rows["loss"]):
        parts |= {"alpha_max": (rows["alpha"].max(), one), "token_loss_max": (rows["loss"].max(), one)}
    return parts
