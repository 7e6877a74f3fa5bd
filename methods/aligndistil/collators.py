"""Rows of preference data to padded batches.

Legend: B rows of the data (pairs or single answers), T and T' padded lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tenfold.platform.data.collator import CausalCollator
from tenfold.platform.data.positions import IGNORED
from torch import Tensor

Row = Mapping[str, Any]


class PairCollator:
    """Puts both answers of every pair into one batch, which one forward pass reads.

    Args:
        pad_token_id: fills `input_ids` on the right; `attention_mask` is 0 and `labels` -100 there.
    """

    def __init__(self, pad_token_id: int):
        self._collate = CausalCollator(pad_token_id)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask and labels, each int64 [2B, T]: B chosen rows, then the rejected ones.

        Args:
            rows: as `tokenising.pair_rows` makes them; row B + i of the batch is the rejected answer of row i.
        """
        rejected = [{"input_ids": row["rejected_input_ids"], "labels": row["rejected_labels"]} for row in rows]
        return self._collate([*rows, *rejected])


class SingleCollator:
    """Batches single answers that are good or bad (KTO, arXiv 2402.01306).

    Args:
        pad_token_id: as for `PairCollator`.
        mismatched: also give every prompt the answer of the next row, the last one that of the first: KTO's reference
            point is taken from these. One row alone is its own next row, so its batch says nothing about z_0.
        max_length: where the mismatched rows are cut on the right; default: they are not.
    """

    def __init__(self, pad_token_id: int, mismatched: bool, max_length: int | None = None):
        self._collate = CausalCollator(pad_token_id, scalar=("desirable",))
        self._collate_mismatched = CausalCollator(pad_token_id)
        self._mismatched, self._max_length = mismatched, max_length

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask, labels (int64 [B, T]) and desirable (bool [B]).

        With `mismatched` also mismatched_input_ids, mismatched_attention_mask and mismatched_labels, int64 [B, T'].

        Args:
            rows: as `tokenising.single_rows` makes them.
        """
        batch = self._collate(rows)
        if not self._mismatched:
            return batch
        following = [*rows[1:], rows[0]]
        crossed = [mismatched_row(row, other, self._max_length) for row, other in zip(rows, following, strict=True)]
        others = self._collate_mismatched(crossed)
        return batch | {f"mismatched_{name}": value for name, value in others.items()}


def mismatched_row(row: Row, other: Row, max_length: int | None = None) -> dict[str, list[int]]:
    """Return `input_ids` and `labels` of the prompt of `row` with the answer of `other`, cut to `max_length`."""
    ids = list(row["input_ids"])[: _prompt_length(row)]
    answer = list(other["input_ids"])[_prompt_length(other) :]
    labels = [IGNORED] * len(ids) + answer
    return {"input_ids": (ids + answer)[:max_length], "labels": labels[:max_length]}


def _prompt_length(row: Row) -> int:
    """Return the number of tokens before the answer; an answer has at least one."""
    return next(at for at, label in enumerate(row["labels"]) if label != IGNORED)
