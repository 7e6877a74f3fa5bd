"""Last hidden states: what a model's head reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Switch to eval mode and put every module back into its own mode: frozen parts may stay in eval mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_head(model: PreTrainedModel) -> None:
    """Make sure that the logits are the head applied to the last hidden state, and nothing else.

    Losses that multiply hidden states with the head themselves are wrong otherwise (Gemma 2 caps its logits, Cohere
    and Granite scale them). One forward pass over 8 tokens; a cap is also looked up in the configuration, because
    small logits hardly show it. Under ZeRO-3 call it on all ranks, inside `deepspeed.zero.GatheredParameters` of the
    head.

    Raises:
        ModelError: they are not.
    """
    import torch

    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    head = model.get_output_embeddings()
    ids = torch.arange(8, device=head.weight.device)[None] % config.vocab_size
    mask = torch.ones_like(ids)
    with evaluating(model), torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        found = head(final_hidden(model, ids, mask)).float()
    # The same product twice: equal to the last bits of its dtype.
    tolerance = (1e-4 if model.dtype == torch.float32 else 1e-2) * expected.abs().max().item()
    if cap is not None or expected.shape != found.shape or not torch.allclose(expected, found, rtol=0, atol=tolerance):
        raise ModelError(
            f"{config.model_type}: its logits are not the head applied to the last hidden state (scaling, "
            "soft-capping, or a state before the norm). Losses and evaluation need that; use another model"
        )
