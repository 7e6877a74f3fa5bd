"""The losses of DSKD and DSKDv2 for a shared vocabulary, on the rows (tokens) that carry a label.

Legend: N label tokens, V vocabulary, d student's and D teacher's hidden size. All functions return

    total = (1 - alpha) CE + alpha KD

as a sum over tokens divided by `num_items` (the label tokens of the whole global batch), with the parts for logging.
No logits of more than `chunk` tokens exist at a time. No gradient reaches a teacher's tensor, and there is no tau^2
factor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from tenfold.platform.losses.divergence import DivergenceOptions
from tenfold.platform.losses.fused_distillation import fused_linear_distillation
from tenfold.platform.losses.fused_linear import (
    fused_linear_cross_entropy,
    fused_linear_divergence,
    linear_argmax,
)
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


def row_count(labels_N: Tensor) -> Tensor:
    """Return N as a float scalar."""
    return torch.tensor(float(len(labels_N)), device=labels_N.device)


def sft(student_Nd: Tensor, head_Vd: Tensor, labels_N: Tensor, num_items: Tensor, chunk: int) -> Loss:
    """Cross entropy alone: the baseline SFT, alpha = 0."""
    total = fused_linear_cross_entropy(student_Nd, head_Vd, labels_N, chunk=chunk)
    return Loss(total / num_items, {"ce": (total.detach(), row_count(labels_N))})


def vanilla_kd(
    student_Nd: Tensor,
    student_head_Vd: Tensor,
    teacher_ND: Tensor,
    teacher_head_VD: Tensor,
    labels_N: Tensor,
    num_items: Tensor,
    settings: LossSettings,
) -> Loss:
    """White-box distillation of one divergence between the two heads' distributions (v1, vanilla KD)."""
    sums = fused_linear_distillation(
        student_Nd,
        student_head_Vd,
        teacher_ND,
        teacher_head_VD,
        divergence=settings.divergence,
        options=settings.options,
        divergence_weight=row_weights(labels_N, settings.kd_rate),
        targets=labels_N,
        target_weight=row_weights(labels_N, 1 - settings.kd_rate),
        num_columns=settings.num_columns,
        chunk=settings.chunk,
    )
    count = row_count(labels_N)
    parts = {"ce": (plain_sum(sums.cross_entropy, 1 - settings.kd_rate), count)}
    parts["kd"] = (plain_sum(sums.divergence, settings.kd_rate), count)
    return Loss(sums.total / num_items, parts)


def dual_space_v1(
    student_Nd: Tensor,
    student_head_Vd: Tensor,
    teacher_ND: Tensor,
    teacher_head_VD: Tensor,
    projected_teacher_Nd: Tensor,
    projected_student_ND: Tensor,
    labels_N: Tensor,
    num_items: Tensor,
    settings: LossSettings,
) -> Loss:
    """DSKD, same vocabulary (arXiv 2406.17328): KD = L_stu + L_t2s_ce + L_tea.

    L_stu = D(z_s, sg(P(h_t) W_s^T)); L_t2s_ce = CE of the projected teacher against the gold labels, for P only;
    L_tea = forward KL of S(h_s) W_t^T to z_t, whatever the divergence of L_stu.

    Args:
        student_Nd: h_s, last hidden states at the predicting positions.
        student_head_Vd: W_s; gradient from CE and L_stu alone, through z_s.
        teacher_ND: h_t of the same positions.
        teacher_head_VD: W_t, frozen.
        projected_teacher_Nd: P(h_t), with the graph of P.
        projected_student_ND: S(h_s), with the graphs of S and the student.
        labels_N: gold next tokens, int64.
        num_items: label tokens of the global batch, scalar.
        settings: divergence, alpha, columns, chunk.
    """
    alpha, tau = settings.kd_rate, settings.options.temperature
    weight = row_weights(labels_N, alpha)
    student_space = fused_linear_distillation(
        student_Nd,
        student_head_Vd,
        projected_teacher_Nd,
        student_head_Vd.detach(),
        divergence=settings.divergence,
        options=settings.options,
        divergence_weight=weight,
        targets=labels_N,
        target_weight=row_weights(labels_N, 1 - alpha),
        teacher_targets=labels_N,
        teacher_target_weight=weight,
        num_columns=settings.num_columns,
        chunk=settings.chunk,
    )
    teacher_space = fused_linear_divergence(
        projected_student_ND,
        teacher_head_VD.detach(),
        teacher_ND,
        teacher_head_VD,
        divergence="forward_kl",
        row_weight=weight,
        temperature=tau,
        num_columns=settings.num_columns,
        chunk=settings.chunk,
    )
    count = row_count(labels_N)
    parts = {
        "ce": (plain_sum(student_space.cross_entropy, 1 - alpha), count),
        "student_space": (plain_sum(student_space.divergence, alpha), count),
        "t2s_ce": (plain_sum(student_space.teacher_cross_entropy, alpha), count),
        "teacher_space": (plain_sum(teacher_space.detach(), alpha), count),
    }
    return Loss((student_space.total + teacher_space) / num_items, parts)


def dual_space_v2(
    student_Nd: Tensor,
    student_head_Vd: Tensor,
    teacher_ND: Tensor,
    teacher_head_VD: Tensor,
    projected_teacher_Nd: Tensor,
    projected_student_ND: Tensor,
    teacher_prediction_N: Tensor | None,
    labels_N: Tensor,
    num_items: Tensor,
    settings: LossSettings,
    *,
    micro_batches: int = 1,
    agreement_threshold: float = 1.0,
    spaces: str = "both",
) -> Loss:
    """DSKDv2, same vocabulary, off-policy (arXiv 2504.11426): KD = L_stu + L_t2s_ce + L_tea.

    L_t2s_ce holds the projected teacher to the teacher's own prediction (not the gold label). L_stu counts tokens
    where
    the two agree and is the local mean over them, unless their share is above `agreement_threshold`: then it is the
    sum
    over all tokens. The threshold is on |agree| / N (official code: |agree| / Z, which can exceed 1). L_tea uses the
    same divergence as L_stu.

    Args:
        student_Nd, student_head_Vd, teacher_ND, teacher_head_VD, labels_N, num_items, settings: as in `dual_space_v1`.
        projected_teacher_Nd: h_t P, with the graph of P.
        projected_student_ND: h_s S with a constant S.
        teacher_prediction_N: argmax of z_t over the tokenizer's entries, int64; None computes it.
        micro_batches: forward passes of all ranks in one step; local means are averaged over them, as DeepSpeed does.
        agreement_threshold: in [0, 1].
        spaces: both, student (without L_tea) or teacher (L_tea alone).
    """
    weight = row_weights(labels_N, settings.kd_rate) / num_items
    ce_weight = row_weights(labels_N, 1 - settings.kd_rate) / num_items
    total = student_Nd.new_zeros((), dtype=torch.float32)
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    if spaces != "student":
        teacher_space = fused_linear_distillation(
            projected_student_ND,
            teacher_head_VD.detach(),
            teacher_ND,
            teacher_head_VD,
            divergence=settings.divergence,
            # the second temperature belongs to the projected teacher alone
            options=replace(settings.options, teacher_temperature=1.0),
            divergence_weight=weight,
            num_columns=settings.num_columns,
            predict=teacher_prediction_N is None and spaces == "both",
            chunk=settings.chunk,
        )
        total = total + teacher_space.total
        sum_of_rows = plain_sum(teacher_space.divergence * num_items, settings.kd_rate)
        parts["teacher_space"] = (sum_of_rows, row_count(labels_N))
        if teacher_prediction_N is None:
            teacher_prediction_N = teacher_space.teacher_prediction
    if spaces == "teacher":
        ce = fused_linear_cross_entropy(
            student_Nd, student_head_Vd, labels_N, row_weight=ce_weight, chunk=settings.chunk
        )
        parts["ce"] = (plain_sum(ce.detach() * num_items, 1 - settings.kd_rate), row_count(labels_N))
        # the projector is no part of this ablation, but every trained parameter takes part in every step
        return Loss(total + ce + 0.0 * projected_teacher_Nd.sum(), parts)
    if teacher_prediction_N is None:
        teacher_prediction_N = linear_argmax(
            teacher_ND, teacher_head_VD, num_columns=settings.num_columns, chunk=settings.chunk
        )
    student_space = _student_space_v2(
        student_Nd,
        student_head_Vd,
        projected_teacher_Nd,
        teacher_prediction_N,
        labels_N,
        num_items,
        settings,
        micro_batches=micro_batches,
        agreement_threshold=agreement_threshold,
    )
    return Loss(total + student_space.total, parts | student_space.parts)


def _student_space_v2(
    student_Nd: Tensor,
    student_head_Vd: Tensor,
    projected_teacher_Nd: Tensor,
    teacher_prediction_N: Tensor,
    labels_N: Tensor,
    num_items: Tensor,
    settings: LossSettings,
    *,
    micro_batches: int,
    agreement_threshold: float,
) -> Loss:
    """(1 - alpha) CE + alpha (L_stu + L_t2s_ce): all that the student's head reads, in one pass over its logits."""
    alpha, count = settings.kd_rate, row_count(labels_N)
    weight = row_weights(labels_N, alpha) / num_items
    t2s_prediction = linear_argmax(
        projected_teacher_Nd.detach(),
        student_head_Vd.detach(),
        num_columns=settings.num_columns,
        chunk=settings.chunk,
    )
    agree = t2s_prediction == teacher_prediction_N
    agreeing = agree.sum().float()
    masked = bool(agreeing <= agreement_threshold * len(labels_N))
    local = alpha * agree.float() / agreeing.clamp(min=1e-3) / micro_batches
    sums = fused_linear_distillation(
        student_Nd,
        student_head_Vd,
        projected_teacher_Nd,
        student_head_Vd.detach(),
        divergence=settings.divergence,
        options=settings.options,
        divergence_weight=local if masked else weight,
        targets=labels_N,
        target_weight=row_weights(labels_N, 1 - alpha) / num_items,
        teacher_targets=teacher_prediction_N,
        teacher_target_weight=weight,
        num_columns=settings.num_columns,
        chunk=settings.chunk,
    )
    divergence = sums.divergence * (micro_batches if masked else num_items)
    parts = {
        "ce": (plain_sum(sums.cross_entropy * num_items, 1 - alpha), count),
        "t2s_ce": (plain_sum(sums.teacher_cross_entropy * num_items, alpha), count),
        "student_space": (plain_sum(divergence, alpha), torch.ones_like(count) if masked else count),
        "t2s_agreement": (agreeing, count),
    }
    return Loss(sums.total, parts)


def row_weights(labels_N: Tensor, value: float) -> Tensor:
    """Return [N] float32, all `value`."""
    return torch.full(labels_N.shape, value, dtype=torch.float32, device=labels_N.device)


def plain_sum(weighted_sum: Tensor, factor: float) -> Tensor:
    """Return the plain sum of a part for logging; 0 where its factor is 0."""
    return weighted_sum.detach() / factor if factor else torch.zeros_like(weighted_sum)
