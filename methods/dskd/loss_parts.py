"""What the losses of DSKD share: their settings and result, the rows that L_stu counts, and the parts for logging.

Legend as in `objective`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from tenfold.platform.losses.divergence import DivergenceOptions
from tenfold.platform.losses.fused_linear import linear_argmax
from torch import Tensor


@dataclass(frozen=True)
class LossSettings:
    """What all objectives share.

    Attributes:
        divergence: name in `tenfold.platform.losses.divergence.DIVERGENCES`.
        options: temperature (tau) and the divergences' shapes.
        kd_rate: alpha.
        num_columns: entries of the tokenizer; padded rows of the heads are never compared.
        chunk: tokens whose logits exist at once.
    """

    divergence: str
    options: DivergenceOptions
    kd_rate: float
    num_columns: int
    chunk: int


@dataclass(frozen=True)
class Loss:
    """The differentiable total and detached parts: name -> (sum, count)."""

    total: Tensor
    parts: dict[str, tuple[Tensor, Tensor]]


# The rows that L_stu counts: all, or those whose projected teacher predicts the gold label or the teacher's token.
Mask = Literal["none", "gold", "agreement"]
# How the share of the rows whose projected teacher predicts a token is logged.
MATCHED: dict[str, str] = {"none": "t2s_agreement", "gold": "t2s_accuracy", "agreement": "t2s_agreement"}


@dataclass(frozen=True)
class StepCounts:
    """What v2's means are over where they are those of a whole optimizer step (`normaliser: global`).

    Attributes:
        pairs: rows whose divergence is taken: label tokens, or with two tokenizers pairs that have a label; scalar.
        matching: those of them that the mask of L_stu keeps; scalar.
        passes: label tokens of the step by those of the forward passes that are counted here; 1 without on-policy
            passes. A mean has the share of its passes, as the sums that are divided by `num_items` have.
        rows: bool, the rows of this micro-batch that the mask keeps; None where there is none.
    """

    pairs: Tensor
    matching: Tensor
    passes: Tensor | float
    rows: Tensor | None = None


def row_count(labels_N: Tensor) -> Tensor:
    """Return N as a float scalar."""
    return torch.tensor(float(len(labels_N)), device=labels_N.device)


def best_tokens(hidden_NX: Tensor, head_VX: Tensor, bias_V: Tensor | None, settings: LossSettings) -> Tensor:
    """Return the most probable of the student's tokens [N], int64."""
    return linear_argmax(hidden_NX, head_VX, bias=bias_V, num_columns=settings.num_columns, chunk=settings.chunk)


def mean_part(mean: Tensor, whole: StepCounts, number: Tensor, *, exact: bool) -> tuple[Tensor, Tensor]:
    """Return (sum, count) for logging a masked L_stu: of its rows if `exact`, else the micro-batch's mean as one."""
    if not exact:
        return mean * whole.passes, torch.ones_like(number)
    return mean * whole.matching.clamp(min=1e-3) * whole.passes, number


def constant(bias_V: Tensor | None) -> Tensor | None:
    """Return a bias without its graph."""
    return None if bias_V is None else bias_V.detach()


def row_weights(labels_N: Tensor, value: float) -> Tensor:
    """Return [N] float32, all `value`."""
    return torch.full(labels_N.shape, value, dtype=torch.float32, device=labels_N.device)


def plain_sum(weighted_sum: Tensor, factor: float) -> Tensor:
    """Return the plain sum of a part for logging; 0 where its factor is 0."""
    return weighted_sum.detach() / factor if factor else torch.zeros_like(weighted_sum)
