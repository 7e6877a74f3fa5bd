"""Rows to padded batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tenfold.platform.data.positions import IGNORED
from torch import Tensor


class CausalCollator:
    """Pads to the longest row of the batch, on the right. Columns that are not named are left out.

    Legend: B rows, T padded length, n_i label positions of row i, N their sum.

    Args:
        pad_token_id: fills `input_ids`; `attention_mask` is 0 and `labels` -100 there.
        ragged: further columns with one entry per label position of the row ([n_i, ...]), concatenated over the batch
            to [N, ...]. They line up with `label_positions` of the batch.
        scalar: further columns with one number a row, stacked to [B].
        pad_to_multiple_of: round T up to a multiple of this, for hardware that likes it.
    """

    def __init__(
        self,
        pad_token_id: int,
        ragged: Sequence[str] = (),
        scalar: Sequence[str] = (),
        pad_to_multiple_of: int | None = None,
    ):
        self._pad = pad_token_id
        self._ragged, self._scalar = tuple(ragged), tuple(scalar)
        self._multiple = pad_to_multiple_of or 1

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask and labels, each int64 [B, T], and the named columns.

        Args:
            rows: values may be lists, numpy arrays or tensors; arrays and tensors keep their dtype, lists of floats
                become float32.

        Raises:
            ValueError: a ragged column has not one entry per label position, or a scalar one not one number.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), -(-longest // self._multiple) * self._multiple)
        batch = {
            "input_ids": torch.full(shape, self._pad, dtype=torch.int64),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED, dtype=torch.int64),
        }
        for number, row in enumerate(rows):
            size = len(row["input_ids"])
            batch["input_ids"][number, :size] = _tensor(row["input_ids"])
            batch["attention_mask"][number, :size] = 1
            batch["labels"][number, :size] = _tensor(row["labels"])
        counts = (batch["labels"][:, 1:] != IGNORED).sum(dim=1).tolist()
        for name in self._ragged:
            parts = [_tensor(row[name]) for row in rows]
            for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
                if part.dim() == 0 or len(part) != count:
                    raise ValueError(
                        f"{name} of row {number} of the batch has shape {list(part.shape)}; "
                        f"needs {count} entries, one per label position"
                    )
            batch[name] = torch.cat(parts)
        for name in self._scalar:
            values = [_tensor(row[name]) for row in rows]
            wrong = next((list(value.shape) for value in values if value.dim()), None)
            if wrong is not None:
                raise ValueError(f"{name} has shape {wrong}; needs one number per row")
            batch[name] = torch.stack(values)
        return batch


def _tensor(value: Any) -> Tensor:
    # torch.tensor copies: memory-mapped arrays are read-only, which as_tensor warns about.
    return value if isinstance(value, Tensor) else torch.tensor(value)
