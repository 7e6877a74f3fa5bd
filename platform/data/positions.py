"""Which positions carry a label: only these ever reach a head.

Legend: B batch, T padded length, N label positions of the batch, in row-major order (row by row, left to right).

For hidden states [B, T, D], `hidden[label_positions(labels)]` is [N, D], and row n predicts `next_labels(labels)[n]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100


def label_positions(labels_BT: Tensor) -> Tensor:
    """Return the mask [B, T] (bool) of positions i that predict a label: labels[:, i + 1] != -100.

    The last position predicts nothing, and a label at position 0 is predicted by none: both are left out.
    """
    mask = torch.zeros_like(labels_BT, dtype=torch.bool)
    mask[:, :-1] = labels_BT[:, 1:] != IGNORED
    return mask


def next_labels(labels_BT: Tensor) -> Tensor:
    """Return the labels [N] that the positions of `label_positions` predict, in their order."""
    shifted = labels_BT[:, 1:]
    return shifted[shifted != IGNORED]
