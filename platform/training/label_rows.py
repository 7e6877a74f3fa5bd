"""What a language model's head reads at the label positions of a batch: of the trained model, and of frozen ones.

Legend: B rows, T padded length, R label positions of the batch in row-major order (`data.positions`), D hidden size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tenfold.platform.data.positions import label_positions
from tenfold.platform.losses.chunked_rows import Side
from tenfold.platform.models.heads import check_head, head_of
from tenfold.platform.models.hidden import final_hidden
from tenfold.platform.models.sharding import gathered
from torch import Tensor


def check_whole_head(model: Any) -> None:
    """Make sure that a loss which reads the head reads what the model predicts; also under ZeRO-3, on all ranks.

    Args:
        model: the trained one, or what `load_frozen` gave.

    Raises:
        ModelError: its logits are not its head applied to the last hidden state.
    """
    plain = getattr(model, "module", model)
    with gathered(head_of(plain)):
        check_head(plain)


def label_rows(model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Side:
    """Run the trained model, with gradients; inside the training module's `forward`.

    Args:
        model: a causal language model; its own forward pass under ZeRO-3 has the head gathered.
        input_ids: int64 [B, T].
        attention_mask: [B, T].
        labels: int64 [B, T], -100 = not counted.

    Returns:
        hidden [R, D], head [V, D] and bias.
    """
    states = final_hidden(model, input_ids, attention_mask)
    # after the pass: under ZeRO-3 that gives back what a tied embedding shares with the head
    head, bias = head_of(model)
    return Side(states[label_positions(labels)], head, bias)


@contextmanager
def frozen_label_rows(frozen: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Iterator[Side]:
    """Run a frozen model without gradients; its head is whole inside the block, also under ZeRO-3.

    Args:
        frozen: what `load_frozen` gave: a model, or DeepSpeed's engine around one. All ranks must call it.
        input_ids: int64 [B, T].
        attention_mask: [B, T].
        labels: int64 [B, T], -100 = not counted.

    Yields:
        Constants: hidden [R, D], head [V, D] and bias.
    """
    model = getattr(frozen, "module", frozen)
    with torch.no_grad():
        states = final_hidden(model, input_ids, attention_mask)[label_positions(labels)]
    head, bias = head_of(model)
    with gathered([head, bias]):
        yield Side(states.to(head.dtype), head.detach(), None if bias is None else bias.detach())
