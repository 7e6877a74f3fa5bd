"""The losses of DSKD and DSKDv2 for a shared vocabulary, on the rows (tokens) that carry a label.

Legend: N label tokens, V vocabulary, d student's and D teacher's hidden size. All functions return

    total = (1 - alpha) CE + alpha KD

as a sum over tokens divided by `num_items` (the label tokens of the whole global batch), with the parts for logging.
No logits of more than `chunk` tokens exist at a time. No gradient reaches a teacher's tensor, and there is no tau^2
factor. Biases of the heads are added in their own space, the student's as a constant where it reads the teacher.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from tenfold.methods.dskd.loss_parts import (
    MATCHED,
    Loss,
    LossSettings,
    Mask,
    StepCounts,
    best_tokens,
    constant,
    mean_part,
    plain_sum,
    row_count,
    row_weights,
)
from tenfold.platform.losses.fused_distillation import fused_linear_distillation
from tenfold.platform.losses.fused_linear import fused_linear_cross_entropy, fused_linear_divergence
from torch import Tensor

__all__ = ["Loss", "LossSettings", "dual_space_v1", "dual_space_v2", "sft", "vanilla_kd"]


def sft(
    student_Nd: Tensor,
    head_Vd: Tensor,
    labels_N: Tensor,
    num_items: Tensor,
    chunk: int,
    *,
    bias_V: Tensor | None = None,
) -> Loss:
    """Cross entropy alone: the baseline SFT, alpha = 0."""
    total = fused_linear_cross_entropy(student_Nd, head_Vd, labels_N, bias=bias_V, chunk=chunk)
    return Loss(total / num_items, {"ce": (total.detach(), row_count(labels_N))})


def vanilla_kd(
    student_Nd: Tensor,
    student_head_Vd: Tensor,
    teacher_ND: Tensor,
    teacher_head_VD: Tensor,
    labels_N: Tensor,
    num_items: Tensor,
    settings: LossSettings,
    *,
    student_bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
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
        student_bias=student_bias_V,
        teacher_bias=teacher_bias_V,
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
    *,
    mask: Mask = "none",
    teacher_prediction_N: Tensor | None = None,
    student_bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
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
        mask: rows that L_stu counts; its divisor stays `num_items` (v1's way).
        teacher_prediction_N: argmax of z_t over the tokenizer's entries, int64, for the mask agreement; None computes
            it there.
        student_bias_V: of the student's head.
        teacher_bias_V: of the teacher's head.
    """
    alpha, tau = settings.kd_rate, settings.options.temperature
    weight = row_weights(labels_N, alpha)
    counted, parts = weight, {}
    if mask != "none":
        reference_N = labels_N if mask == "gold" else teacher_prediction_N
        if reference_N is None:
            reference_N = best_tokens(teacher_ND, teacher_head_VD, teacher_bias_V, settings)
        matching = best_tokens(projected_teacher_Nd, student_head_Vd, student_bias_V, settings) == reference_N
        counted = weight * matching
        parts[MATCHED[mask]] = (matching.sum().float(), row_count(labels_N))
    student_space = fused_linear_distillation(
        student_Nd,
        student_head_Vd,
        projected_teacher_Nd,
        student_head_Vd.detach(),
        divergence=settings.divergence,
        options=settings.options,
        divergence_weight=counted,
        targets=labels_N,
        target_weight=row_weights(labels_N, 1 - alpha),
        teacher_targets=labels_N,
        teacher_target_weight=weight,
        student_bias=student_bias_V,
        teacher_bias=student_bias_V,
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
        student_bias=constant(teacher_bias_V),
        teacher_bias=teacher_bias_V,
        num_columns=settings.num_columns,
        chunk=settings.chunk,
    )
    count = row_count(labels_N)
    parts |= {
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
    mask: Mask = "agreement",
    counts: StepCounts | None = None,
    student_bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
) -> Loss:
    """DSKDv2, same vocabulary, off-policy (arXiv 2504.11426): KD = L_stu + L_t2s_ce + L_tea.

    L_t2s_ce holds the projected teacher to the teacher's own prediction (not the gold label). L_stu counts tokens
    where the two agree and is the mean over them, of this micro-batch or with `counts` of the step, unless their
    share is above `agreement_threshold`: then it is the sum over all tokens. The threshold is on |agree| / N
    (official code: |agree| / Z, which can exceed 1). L_tea uses the same divergence as L_stu.

    Args:
        student_Nd, student_head_Vd, teacher_ND, teacher_head_VD, labels_N, num_items, settings: as in `dual_space_v1`.
        projected_teacher_Nd: h_t P, with the graph of P.
        projected_student_ND: h_s S with a constant S.
        teacher_prediction_N: argmax of z_t over the tokenizer's entries, int64; None computes it.
        micro_batches: forward passes of all ranks in one step; local means are averaged over them, as DeepSpeed does.
        agreement_threshold: in [0, 1].
        spaces: both, student (without L_tea) or teacher (L_tea alone).
        mask: rows that L_stu counts: those that agree (v2), those that predict the gold label, or all.
        counts: of the whole step, for exact means; `micro_batches` is not read then.
        student_bias_V: of the student's head.
        teacher_bias_V: of the teacher's head.
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
            student_bias=constant(teacher_bias_V),
            teacher_bias=teacher_bias_V,
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
            student_Nd, student_head_Vd, labels_N, bias=student_bias_V, row_weight=ce_weight, chunk=settings.chunk
        )
        parts["ce"] = (plain_sum(ce.detach() * num_items, 1 - settings.kd_rate), row_count(labels_N))
        # the projector is no part of this ablation, but every trained parameter takes part in every step
        return Loss(total + ce + 0.0 * projected_teacher_Nd.sum(), parts)
    if teacher_prediction_N is None:
        teacher_prediction_N = best_tokens(teacher_ND, teacher_head_VD, teacher_bias_V, settings)
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
        mask=mask,
        counts=counts,
        bias_V=student_bias_V,
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
    mask: Mask,
    counts: StepCounts | None,
    bias_V: Tensor | None,
) -> Loss:
    """(1 - alpha) CE + alpha (L_stu + L_t2s_ce): all that the student's head reads, in one pass over its logits."""
    alpha, count = settings.kd_rate, row_count(labels_N)
    weight = row_weights(labels_N, alpha) / num_items
    matching = None if counts is None else counts.rows
    if matching is None:
        reference_N = labels_N if mask == "gold" else teacher_prediction_N
        matching = best_tokens(projected_teacher_Nd, student_head_Vd, bias_V, settings) == reference_N
    number = matching.sum().float()
    whole = counts or StepCounts(count, number, micro_batches)
    masked = mask != "none" and bool(whole.matching <= agreement_threshold * whole.pairs)
    mean_of_matching = alpha * matching.float() / (whole.matching.clamp(min=1e-3) * whole.passes)
    sums = fused_linear_distillation(
        student_Nd,
        student_head_Vd,
        projected_teacher_Nd,
        student_head_Vd.detach(),
        divergence=settings.divergence,
        options=settings.options,
        divergence_weight=mean_of_matching if masked else weight,
        targets=labels_N,
        target_weight=row_weights(labels_N, 1 - alpha) / num_items,
        teacher_targets=teacher_prediction_N,
        teacher_target_weight=weight,
        student_bias=bias_V,
        teacher_bias=bias_V,
        num_columns=settings.num_columns,
        chunk=settings.chunk,
    )
    parts = {
        "ce": (plain_sum(sums.cross_entropy * num_items, 1 - alpha), count),
        "t2s_ce": (plain_sum(sums.teacher_cross_entropy * num_items, alpha), count),
        "student_space": (plain_sum(sums.divergence * num_items, alpha), count),
        MATCHED[mask]: (number, count),
    }
    if masked:
        parts["student_space"] = mean_part(plain_sum(sums.divergence, alpha), whole, number, exact=counts is not None)
    return Loss(sums.total, parts)
