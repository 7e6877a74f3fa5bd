"""Next-token loss of a model over tokenised rows, at label positions only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tenfold.platform.data.collator import CausalCollator
from tenfold.platform.data.positions import IGNORED, label_positions, next_labels
from tenfold.platform.losses.fused_linear import linear_cross_entropy_rows
from tenfold.platform.models.heads import head_of
from tenfold.platform.models.hidden import check_head, evaluating, final_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    check_head(model)
    collate = CausalCollator(pad_token_id=0)  # masked and to the right: no counted position sees it
    head, bias = head_of(model)
    total, count = 0.0, 0
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            batch = collate([rows[index] for index in range(start, min(start + batch_size, len(rows)))])
            batch = {name: value.to(model.device) for name, value in batch.items()}
            hidden = final_hidden(model, batch["input_ids"], batch["attention_mask"])
            hidden, targets = hidden[label_positions(batch["labels"])], next_labels(batch["labels"])
            losses = linear_cross_entropy_rows(hidden, head, targets, bias=bias, chunk=chunk)
            total, count = total + losses.sum(dtype=torch.float64).item(), count + len(targets)
    return total, count


def label_bytes(rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the UTF-8 bytes of the texts that carry labels, EOS and other special tokens left out."""
    texts = tokenizer.batch_decode(
        [[label for label in row["labels"] if label != IGNORED] for row in rows], skip_special_tokens=True
    )
    return sum(len(text.encode("utf-8")) for text in texts)


def perplexity(sum_nll: float, num_tokens: int) -> float:
    """Return exp(sum_nll / num_tokens): nan for no tokens, inf where it overflows."""
    if not num_tokens:
        return math.nan
    try:
        return math.exp(sum_nll / num_tokens)
    except OverflowError:
        return math.inf
