"""Next-token loss of a model over tokenised rows, at label positions only."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tenfold.platform.data.collator import CausalCollator
from tenfold.platform.data.positions import label_positions, next_labels
from tenfold.platform.errors import ModelError
from tenfold.platform.losses.fused_linear import linear_cross_entropy_rows
from tenfold.platform.models.heads import final_hidden, head_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def token_nll(
    model: PreTrainedModel, rows: Sequence[Mapping[str, Any]], *, batch_size: int = 16, chunk: int = 512
) -> tuple[float, int]:
    """Return (summed loss in nats, number of labels); no [B, T, V] tensor is built.

    Sums are in float64. The model computes in eval mode and is left in the mode it was in.

    Args:
        model: a causal language model whose head reads the last hidden state as it is.
        rows: with `input_ids` and `labels`, as `tokenise` gives them (a Dataset or a list).
        batch_size: rows at once; does not change the value beyond rounding.
        chunk: label positions whose logits exist at once; does not change the value beyond rounding.

    Raises:
        ModelError: the model's logits are not its head applied to the last hidden state.
    """
    assert_post_norm_hidden(model)
    collate = CausalCollator(pad_token_id=0)  # masked and to the right: no counted position sees it
    head, bias = head_of(model)
    total, count = 0.0, 0
    with _eval_mode(model):
        for start in range(0, len(rows), batch_size):
            batch = collate([rows[index] for index in range(start, min(start + batch_size, len(rows)))])
            batch = {name: value.to(model.device) for name, value in batch.items()}
            hidden = final_hidden(model, batch["input_ids"], batch["attention_mask"])
            hidden, targets = hidden[label_positions(batch["labels"])], next_labels(batch["labels"])
            losses = linear_cross_entropy_rows(hidden, head, targets, bias=bias, chunk=chunk)
            total, count = total + losses.sum(dtype=torch.float64).item(), count + len(targets)
    return total, count


def perplexity(sum_nll: float, num_tokens: int) -> float:
    """Return exp(sum_nll / num_tokens): nan for no tokens, inf where it overflows."""
    if not num_tokens:
        return math.nan
    try:
        return math.exp(sum_nll / num_tokens)
    except OverflowError:
        return math.inf


@contextlib.contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switch to eval mode and put every module back into its own mode: frozen parts may stay in eval mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def assert_post_norm_hidden(model: PreTrainedModel) -> None:
    """Make sure that the logits are the head applied to the last hidden state, and nothing else.

    Losses that multiply hidden states with the head themselves are wrong otherwise (Gemma 2 caps its logits, Cohere
    and Granite scale them). One forward pass over 8 tokens; a cap is also looked up in the configuration, because
    small logits hardly show it.

    Raises:
        ModelError: they are not.
    """
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    ids = torch.arange(8, device=model.device)[None] % config.vocab_size
    mask = torch.ones_like(ids)
    with _eval_mode(model):
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        found = model.get_output_embeddings()(final_hidden(model, ids, mask)).float()
    # The same product twice: equal to the last bits of its dtype.
    tolerance = (1e-4 if model.dtype == torch.float32 else 1e-2) * expected.abs().max().item()
    if cap is not None or expected.shape != found.shape or not torch.allclose(expected, found, rtol=0, atol=tolerance):
        raise ModelError(
            f"{config.model_type}: its logits are not the head applied to the last hidden state (scaling, "
            "soft-capping, or a state before the norm). Losses and evaluation need that; use another model"
        )
