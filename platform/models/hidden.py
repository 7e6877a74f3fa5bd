"""Last hidden states: what a model's head reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tenfold.platform.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def final_hidden(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the hidden states after the final norm; no logits are computed.

    Gradients flow unless the caller stops them.

    Args:
        model: a causal language model.
        input_ids: [B, T] int64, padded on the right: positions count from the first column.
        attention_mask: [B, T], 1 = real.

    Returns:
        [B, T, D] in the model's dtype.
    """
    return model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def check_head(model: PreTrainedModel) -> None:
    """Make sure that the model's logits are its head applied to the last hidden states, by trying it on 8 tokens.

    Under ZeRO-3 call it on all ranks, inside `deepspeed.zero.GatheredParameters` of the head.

    Raises:
        ModelError: the model scales or caps its logits; losses that multiply hidden states with the head would be
            wrong.
    """
    import torch

    training = [module for module in model.modules() if module.training]
    model.eval()
    head = model.get_output_embeddings()
    ids = torch.arange(1, 9, device=head.weight.device)[None] % model.config.get_text_config().vocab_size
    mask = torch.ones_like(ids)
    try:
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
            found = head(final_hidden(model, ids, mask)).float()
    finally:
        for module in training:
            module.training = True
    # bfloat16 keeps 8 bits; a scale or cap of any use changes more.
    if not torch.allclose(expected, found, rtol=1e-2, atol=1e-2 * expected.abs().max().item()):
        raise ModelError(
            f"{model.config.model_type}: its logits are not the head applied to the last hidden states (they are "
            f"scaled or capped). Losses on hidden states do not support that: choose another model"
        )
