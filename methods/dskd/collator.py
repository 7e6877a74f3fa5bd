"""Batches of rows with what teaches them: the teacher's rows, its states, pairs of positions.

Legend: B rows, N and M label positions of the student's and the teacher's sequences, K pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tenfold.platform.data.collator import CausalCollator
from tenfold.platform.data.positions import label_positions
from tenfold.platform.data.shards import ShardedRows
from torch import Tensor
from torch.utils.data import Dataset

STATES = ("teacher_hidden", "teacher_prediction")


class TaughtRows(Dataset):
    """The student's rows with the columns that teach them.

    Args:
        rows: `input_ids` and `labels` of the student's tokenizer.
        teacher_rows: the same of the teacher's, where it differs.
        columns: what is read from disk for a row.
    """

    def __init__(self, rows: Any, teacher_rows: Sequence[Mapping[str, Any]] | None, columns: Sequence[ShardedRows]):
        self._rows, self._teacher_rows, self._columns = rows, teacher_rows, columns

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = dict(self._rows[index])
        if self._teacher_rows is not None:
            theirs = self._teacher_rows[index]
            row |= {"teacher_input_ids": theirs["input_ids"], "teacher_labels": theirs["labels"]}
        for columns in self._columns:
            row |= columns[index]
        return row


class TeachingCollator:
    """Collates the columns of `TaughtRows` that the rows have; validation rows have none.

    Pairs count the label positions of a row on disk, and those of the whole batch here.

    Args:
        pad_token_id: of the student's tokenizer.
        teacher_pad_token_id: of the teacher's.
    """

    def __init__(self, pad_token_id: int, teacher_pad_token_id: int):
        self._pad, self._teacher_pad = pad_token_id, teacher_pad_token_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask, labels [B, n] of the student and what the module's `forward` names."""
        states = tuple(name for name in STATES if name in rows[0])
        if "teacher_input_ids" not in rows[0]:
            batch = CausalCollator(self._pad, ragged=states)(rows)
            theirs = batch
        else:
            batch = CausalCollator(self._pad)(rows)
            teacher = [{**row, "input_ids": row["teacher_input_ids"], "labels": row["teacher_labels"]} for row in rows]
            theirs = CausalCollator(self._teacher_pad, ragged=states)(teacher)
            batch |= {name if name in states else f"teacher_{name}": value for name, value in theirs.items()}
        starts, their_starts = _starts(batch["labels"]), _starts(theirs["labels"])
        if "student_pairs" in rows[0]:
            batch["student_pairs"] = _moved([row["student_pairs"] for row in rows], starts)
            batch["teacher_pairs"] = _moved([row["teacher_pairs"] for row in rows], their_starts)
        if "teacher_position" in rows[0]:
            positions = torch.cat([row["teacher_position"] for row in rows])
            moved = _moved([row["teacher_position"] for row in rows], their_starts)
            batch["teacher_position"] = torch.where(positions >= 0, moved, -1)
        return batch


def _starts(labels: Tensor) -> list[int]:
    """Return how many label positions lie before each row."""
    counts = label_positions(labels).sum(1)
    return (counts.cumsum(0) - counts).tolist()


def _moved(parts: Sequence[Tensor], starts: Sequence[int]) -> Tensor:
    return torch.cat([part + start for part, start in zip(parts, starts, strict=True)])
