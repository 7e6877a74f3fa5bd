"""The module a training job optimises: a model to keep, whatever else is trained with it, and a loss.

Putting the loss inside `forward` is what lets DeepSpeed gather sharded weights (ZeRO-3) for a loss that reads the head
directly, and what puts projectors and other helpers under the same optimizer, checkpoint and gradient reduction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class TrainedModule(nn.Module):
    """Base of a method's training module.

    `forward(**batch, num_items_in_batch=None)` returns a dictionary with

    * `loss`: scalar, the sum over this micro-batch divided by `num_items_in_batch` (the number of label tokens of the
      whole global batch; the micro-batch's own number when it is None);
    * `statistics`: name -> (sum, count) pairs of detached scalars; their ratios are logged as `train/<name>`;
    * in eval mode also `nll` [B] and `num_labels` [B]: the model's own next-token loss, summed per row.

    Attributes:
        exported: the model that checkpoints keep in Hugging Face form; everything else is a training aid. It may have
            an adapter (`models.adapters`), which is merged in that form.
        micro_batches: forward passes of all ranks in this optimizer step; the Trainer sets it, since the last step of
            an epoch may have fewer.
    """

    # transformers.Trainer then passes num_items_in_batch and scales for accumulation and ranks by itself ...
    accepts_loss_kwargs = True
    # ... counting labels after the causal shift.
    loss_type = "ForCausalLM"
    micro_batches = 1
    exported: Any

    def __init__(self, exported: nn.Module):
        super().__init__()
        self.exported = exported

    @property
    def config(self) -> Any:
        """The exported model's configuration (DeepSpeed reads sizes from it)."""
        return self.exported.config

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute the exported model's activations in backward."""
        self.exported.gradient_checkpointing_enable(**kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what was trained: checkpoints leave frozen weights out, which are as they were loaded at first.

        Raises:
            RuntimeError: a trained weight or a buffer is missing, or a name is unknown, with `strict`.
        """
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        frozen = {
            name for name, parameter in self.named_parameters(remove_duplicate=False) if not parameter.requires_grad
        }
        wrong = [name for name in found.missing_keys if name not in frozen] + found.unexpected_keys
        if strict and wrong:
            raise RuntimeError(f"a checkpoint of another training: {len(wrong)} names differ, the first is {wrong[0]}")
        return found

    def projector_parameters(self) -> list[nn.Parameter]:
        """Return the parameters outside the exported model; they have their own learning rate."""
        kept = {id(parameter) for parameter in self.exported.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in kept and parameter.requires_grad]

    def forward(self, **batch: Tensor) -> dict[str, Any]:
        """Return loss and statistics of one micro-batch; see the class."""
        raise TypeError(f"{type(self).__name__} must define forward()")
