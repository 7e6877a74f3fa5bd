"""What every objective trains: a policy beside frozen models, all read at the label positions alone."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from tenfold.methods.aligndistil.config import AlignDistilConfig
from tenfold.platform.data.positions import label_positions, next_labels
from tenfold.platform.losses.chunked_rows import Side
from tenfold.platform.losses.fused_linear import linear_cross_entropy_rows
from tenfold.platform.training.label_rows import check_whole_head, frozen_label_rows, label_rows
from tenfold.platform.training.module import TrainedModule
from torch import Tensor, nn


class AlignedModule(TrainedModule):
    """Base of the objectives' modules; see `TrainedModule`.

    Args:
        policy: the trained model.
        config: the method's options.
        frozen: name (dpo, reverse, reference) -> what `load_frozen` gave; kept out of this module's state.
        num_columns: entries of the tokenizer; padded rows of the heads are never compared.
    """

    def __init__(self, policy: nn.Module, config: AlignDistilConfig, frozen: Mapping[str, Any], *, num_columns: int):
        super().__init__(policy)
        self.options = config
        self.num_columns = num_columns
        # in a tuple, so that the frozen weights are neither trained nor saved with this module
        self._frozen = (dict(frozen),)

    @property
    def frozen(self) -> dict[str, Any]:
        """The frozen models by name."""
        return self._frozen[0]

    def check_heads(self) -> None:
        """Make sure that the losses read what the models predict.

        Raises:
            ModelError: a model's logits are not its head applied to the last hidden state.
        """
        for model in (self.exported, *self.frozen.values()):
            check_whole_head(model)

    def read(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Side:
        """Return the policy's hidden rows and head at the R label positions, with gradients."""
        return label_rows(self.exported, input_ids, attention_mask, labels)

    def reading(
        self, name: str, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> AbstractContextManager[Side]:
        """Yield those of a frozen model, as constants; all ranks must enter."""
        return frozen_label_rows(self.frozen[name], input_ids, attention_mask, labels)

    @torch.no_grad()
    def nll_rows(self, policy: Side, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the policy's next-token loss in nats and the number of labels of each sequence, [B] each."""
        losses = linear_cross_entropy_rows(
            policy.hidden, policy.head, next_labels(labels), bias=policy.bias, chunk=self.options.loss_chunk_rows
        )
        return by_sequence(losses, labels), label_positions(labels).sum(1)


def by_sequence(values_R: Tensor, labels_BT: Tensor) -> Tensor:
    """Sum values of the label positions [R] over each sequence, to [B]; differentiable."""
    rows = label_positions(labels_BT).nonzero()[:, 0]
    return values_R.new_zeros(len(labels_BT)).index_add(0, rows, values_R)
