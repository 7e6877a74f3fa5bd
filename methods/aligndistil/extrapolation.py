"""The teacher of AlignDistil, those it is compared with, and the loss of a token, as functions of logits.

From arXiv 2503.02832. Legend: V vocabulary; `...` any leading shape. z^d are the logits of the DPO model, z^o those of
the second frozen model: the reverse DPO model of `aligndistil` and `contrast_const`, the initial model of the two
`theorem1` variants; `gkd` has none. All five teachers are z^d + e (z^d - z^o) with the extrapolation e below, so that
e = 0 is exactly the DPO model:

    aligndistil        e = alpha_t       alpha_t = r D_t + epsilon     weight beta_0 / alpha_t
    contrast_const     e = alpha         alpha = beta_0 / beta         weight beta
    theorem1_const     e = alpha - 1     alpha = beta_0 / beta         weight beta
    theorem1_adaptive  e = alpha_t - 1   alpha_t as above              weight beta_0 / alpha_t
    gkd                e = 0             alpha = 1                     weight 1

D_t is the total variation distance with its factor 1/2 (the official code leaves it out and halves r instead).
Everything is computed in float32, or wider where the logits are: a difference of bfloat16 logits times an alpha of 20
is off by more than a nat.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tenfold.platform.losses.divergence import divergence_rows, log_softmax_rows
from torch import Tensor

if TYPE_CHECKING:
    from tenfold.methods.aligndistil.config import AlignDistilConfig

ADAPTIVE = ("aligndistil", "theorem1_adaptive")
CONSTANT = ("contrast_const", "theorem1_const")
FROM_THE_INITIAL_MODEL = ("theorem1_const", "theorem1_adaptive")


@dataclass(frozen=True)
class Contrast:
    """What shapes teacher and token weight; plain numbers.

    Attributes:
        objective: one of aligndistil, contrast_const, theorem1_const, theorem1_adaptive, gkd.
        beta: beta_0 > 0, with which the DPO models were trained.
        scale: r >= 0 of alpha_t = r D_t + epsilon.
        epsilon: > 0, the smallest alpha_t.
        constant: alpha = beta_0 / beta > 0 of the two constant variants.
        temperature: > 0, divides student and teacher logits in the KL; D_t does not see it. The official code divides
            the teacher alone.
        max_weight: largest weight of a token; None: none.

    Raises:
        ValueError: an unknown objective or a number out of range.
    """

    objective: str = "aligndistil"
    beta: float = 0.1
    scale: float = 20.0
    epsilon: float = 1e-3
    constant: float = 1.0
    temperature: float = 1.0
    max_weight: float | None = None

    def __post_init__(self) -> None:
        allowed = (*ADAPTIVE, *CONSTANT, "gkd")
        if self.objective not in allowed:
            raise ValueError(f"objective {self.objective!r} has no teacher; choose one of {', '.join(allowed)}")
        for name in ("beta", "epsilon", "constant", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number > 0")
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"scale is {self.scale}; it must be a finite number >= 0")
        if self.max_weight is not None and not self.max_weight > 0:
            raise ValueError(f"max_weight is {self.max_weight}; it must be > 0, or None")


@dataclass(frozen=True)
class Teacher:
    """A teacher's logits [..., V] before the temperature, and alpha, token weight and D_t, [...] each; constants."""

    logits: Tensor
    alpha: Tensor
    weight: Tensor
    tvd: Tensor


def contrast_of(config: AlignDistilConfig) -> Contrast:
    """Return the numbers of a configuration.

    Raises:
        ValueError: its objective is no distillation.
    """
    return Contrast(
        objective=config.objective,
        beta=config.beta,
        scale=config.scale,
        epsilon=config.epsilon,
        constant=config.constant,
        temperature=config.temperature,
        max_weight=config.max_token_weight,
    )


@torch.no_grad()
def total_variation(dpo_logits: Tensor, other_logits: Tensor) -> Tensor:
    """D_t = 1/2 sum_v |pi_d(v) - pi_o(v)| in [0, 1], without temperature: [..., V] twice to [...]."""
    dpo, other = log_softmax_rows(dpo_logits, 1.0).exp_(), log_softmax_rows(other_logits, 1.0).exp_()
    return dpo.sub_(other).abs_().sum(-1).mul_(0.5)


def adaptive_alpha(tvd: Tensor, contrast: Contrast) -> Tensor:
    """alpha_t = r D_t + epsilon, of D_t [...]."""
    return tvd * contrast.scale + contrast.epsilon


@torch.no_grad()
def logit_difference(dpo_logits: Tensor, other_logits: Tensor) -> Tensor:
    """z^d - z^o [..., V] in float32 or wider, 0 wherever a model bans the token by a logit of -inf.

    With both banning it the difference has no value; with one it is infinite, and the other tokens would no longer
    count. The teacher has the DPO model's logit there.
    """
    wide = torch.promote_types(dpo_logits.dtype, torch.float32)
    return (dpo_logits.to(wide) - other_logits.to(wide)).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


@torch.no_grad()
def teacher(dpo_logits: Tensor, other_logits: Tensor | None, contrast: Contrast) -> Teacher:
    """Build the teacher of every position; see the table at the top.

    Args:
        dpo_logits: [..., V] in any float dtype; not changed.
        other_logits: [..., V]; None only for `gkd`, which does not read it.
        contrast: which teacher, with which numbers.

    Returns:
        Logits, alpha, weight and D_t in float32 or wider, without a graph. `gkd` has D_t = 0.

    Raises:
        ValueError: the second model is missing, or the shapes differ.
    """
    dpo = dpo_logits.to(torch.promote_types(dpo_logits.dtype, torch.float32))
    if contrast.objective == "gkd":
        one = dpo.new_ones(dpo.shape[:-1])
        return Teacher(dpo, one, _capped(one, contrast), torch.zeros_like(one))
    if other_logits is None or other_logits.shape != dpo.shape:
        given = None if other_logits is None else tuple(other_logits.shape)
        raise ValueError(
            f"{contrast.objective}: DPO logits have shape {tuple(dpo.shape)}, those of the second model {given}; "
            "both are needed, for the same positions and the same vocabulary"
        )
    tvd = total_variation(dpo, other_logits)
    if contrast.objective in ADAPTIVE:
        alpha = adaptive_alpha(tvd, contrast)
    else:
        alpha = torch.full_like(tvd, contrast.constant)
    extrapolation = alpha - 1.0 if contrast.objective in FROM_THE_INITIAL_MODEL else alpha
    difference = logit_difference(dpo, other_logits)
    logits = torch.addcmul(dpo, extrapolation.unsqueeze(-1), difference)
    return Teacher(logits, alpha, _capped(contrast.beta / alpha, contrast), tvd)


def _capped(weight: Tensor, contrast: Contrast) -> Tensor:
    return weight if contrast.max_weight is None else weight.clamp(max=contrast.max_weight)


def token_loss(student_logits: Tensor, dpo_logits: Tensor, other_logits: Tensor | None, contrast: Contrast) -> Tensor:
    """weight_t KL(pi_theta || pi*_t) of every position: the form with full logits and autograd.

    The summand of the paper's Eq. 18, which prints beta_t in front of its sum over t: it stands inside.

    Args:
        student_logits: [..., V]; the only input with a gradient, through both occurrences of pi_theta.
        dpo_logits: [..., V].
        other_logits: [..., V]; None only for `gkd`.
        contrast: which teacher, with which numbers.

    Returns:
        [...] float32 or wider, not reduced.

    Raises:
        ValueError: as `teacher`, or the student's shape differs.
    """
    target = teacher(dpo_logits, other_logits, contrast)
    kl = divergence_rows(student_logits, target.logits, divergence="reverse_kl", temperature=contrast.temperature)
    return target.weight * kl


def sequence_mean(token_values: Tensor, mask: Tensor, length_norm: bool = True) -> Tensor:
    """Mean over the counted tokens of a sequence, then over the sequences that have any (section 3.5).

    Args:
        token_values: [B, T]; what stands at positions that are not counted does not matter.
        mask: [B, T], true where a token counts.
        length_norm: False: the sum over a sequence's tokens in place of their mean.

    Returns:
        Scalar; 0 with a graph if nothing counts.
    """
    counted = mask.bool()
    sums = torch.where(counted, token_values, 0.0).sum(-1)
    tokens = counted.sum(-1)
    if length_norm:
        sums = sums / tokens.clamp(min=1)
    return sums.sum() / (tokens > 0).sum().clamp(min=1)
