"""The losses of DSKD and DSKDv2 for different vocabularies, on the rows (tokens) that carry a label.

They are built like those of `objective`, where the total and the biases are explained; `settings.num_columns` counts
the student's entries.

Legend: N student's and M teacher's label tokens, K aligned pairs of them, V_s and V_t rows of the heads, v entries
that both vocabularies have, d student's and D teacher's hidden size.
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
from tenfold.platform.data.positions import IGNORED
from tenfold.platform.losses.fused_distillation import fused_linear_distillation
from tenfold.platform.losses.fused_linear import fused_linear_cross_entropy, fused_linear_divergence
from torch import Tensor


def dual_space_v1_cma(
    student_Nd: Tensor,
    student_head_Vd: Tensor,
    teacher_MD: Tensor,
    teacher_head_VD: Tensor,
    t2s_Nd: Tensor,
    s2t_MD: Tensor,
    labels_N: Tensor,
    num_items: Tensor,
    settings: LossSettings,
    num_teacher_columns: int,
    *,
    mask: Mask = "gold",
    passes: int | None = None,
    student_bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
) -> Loss:
    """DSKD with cross-model attention (arXiv 2406.17328): KD = L_t2s_ce + L_stu + L_tea, each divided by Z.

    L_t2s_ce holds what the student's positions read of the teacher to the gold labels; L_stu counts the tokens where
    that reading predicts the gold label (the divisor stays Z), L_tea is the forward KL over all of the teacher's label
    positions, whose number is not Z. On text that the student generated, the teacher's predictions stand for the
    labels where the student has the token, and L_stu is the mean over the tokens that it counts (v2).

    Args:
        student_Nd: h_s, last hidden states at the predicting positions.
        student_head_Vd: W_s [V_s, d]; gradient from CE and L_stu alone, through z_s.
        teacher_MD: h_t at the teacher's predicting positions.
        teacher_head_VD: W_t [V_t, D], frozen.
        t2s_Nd: what `cross_model_attention` gives the student's positions, with its graph.
        s2t_MD: what it gives the teacher's positions, with its graph.
        labels_N: gold next tokens of the student, int64; on generated text the teacher's predictions as the
            student's tokens, -100 = none.
        num_items: Z, the student's label tokens of the global batch, scalar.
        settings: divergence, alpha, columns, chunk.
        num_teacher_columns: entries of the teacher's tokenizer.
        mask: none: L_stu counts all tokens; else those where the reading predicts the label.
        passes: forward passes of all ranks in one step, for L_stu as the mean of generated text, which is averaged
            over them; None: it is divided by Z.
        student_bias_V: of the student's head.
        teacher_bias_V: of the teacher's head.
    """
    alpha = settings.kd_rate
    correct = best_tokens(t2s_Nd, student_head_Vd, student_bias_V, settings) == labels_N
    weight = row_weights(labels_N, alpha)
    counted = weight if mask == "none" else weight * correct
    if passes is not None:
        counted = counted * num_items / ((counted != 0).sum().clamp(min=1e-3) * passes)
    student_space = fused_linear_distillation(
        student_Nd,
        student_head_Vd,
        t2s_Nd,
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
        s2t_MD,
        teacher_head_VD.detach(),
        teacher_MD,
        teacher_head_VD,
        divergence="forward_kl",
        row_weight=row_weights(s2t_MD[:, 0], alpha),
        temperature=settings.options.temperature,
        student_bias=constant(teacher_bias_V),
        teacher_bias=teacher_bias_V,
        num_columns=num_teacher_columns,
        chunk=settings.chunk,
    )
    count, labelled = row_count(labels_N), (labels_N != IGNORED).sum().float()
    in_student = plain_sum(student_space.divergence, alpha)
    if passes is not None:
        in_student = in_student * passes / num_items
    parts = {
        "ce": (plain_sum(student_space.cross_entropy, 1 - alpha), labelled),
        "student_space": (in_student, count if passes is None else torch.ones_like(count)),
        "t2s_ce": (plain_sum(student_space.teacher_cross_entropy, alpha), labelled),
        "t2s_accuracy": (correct.sum().float(), labelled),
        "teacher_space": (plain_sum(teacher_space, alpha), row_count(s2t_MD)),
    }
    return Loss((student_space.total + teacher_space) / num_items, parts)


def labelled_pairs(
    student_index_K: Tensor, teacher_index_K: Tensor, teacher_prediction_M: Tensor, t2s_id: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the aligned pairs whose teacher prediction the student has a token for (v2, exact token alignment).

    Args:
        student_index_K: int64, rows of the student's label tokens.
        teacher_index_K: int64, rows of the teacher's label tokens.
        teacher_prediction_M: argmax of z_t over the tokenizer's entries, int64.
        t2s_id: [V_t], the table of `vocabulary.teacher_labels`.

    Returns:
        Both indices of the pairs that are kept, and the student's labels of these.
    """
    labels = t2s_id[teacher_prediction_M[teacher_index_K]]
    kept = labels >= 0
    return student_index_K[kept], teacher_index_K[kept], labels[kept]


def dual_space_v2_eta(
    student_Nd: Tensor,
    student_head_Vd: Tensor,
    teacher_KD: Tensor,
    teacher_head_VD: Tensor,
    projected_teacher_Kd: Tensor,
    projected_student_KD: Tensor,
    student_index_K: Tensor,
    teacher_label_K: Tensor,
    labels_N: Tensor,
    num_items: Tensor,
    settings: LossSettings,
    num_teacher_columns: int,
    *,
    micro_batches: int = 1,
    agreement_threshold: float = 1.0,
    spaces: str = "both",
    mask: Mask = "agreement",
    counts: StepCounts | None = None,
    student_bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
) -> Loss:
    """DSKDv2 with exact token alignment (arXiv 2504.11426): KD = L_stu + L_t2s_ce + L_tea over aligned pairs.

    All three are means over the K pairs of this micro-batch, with `counts` of the step (L_stu over the agreeing ones,
    unless their share is above `agreement_threshold`); CE alone is divided by Z. Without any pair KD is 0 with a
    graph.

    Args:
        student_Nd: h_s at all label positions, for CE.
        student_head_Vd: W_s [V_s, d]; gradient from CE and L_stu alone, through z_s.
        teacher_KD: h_t of the pairs.
        teacher_head_VD: W_t [V_t, D], frozen.
        projected_teacher_Kd: h_t P of the pairs, with the graph of P.
        projected_student_KD: h_s S of the pairs, with a constant S.
        student_index_K: int64, the pairs' rows in `student_Nd`, each at most once (`labelled_pairs`).
        teacher_label_K: int64, the teacher's predictions as the student's tokens.
        labels_N: gold next tokens of the student, int64.
        num_items: Z, label tokens of the global batch, scalar.
        settings: divergence, alpha, columns, chunk.
        num_teacher_columns: entries of the teacher's tokenizer.
        micro_batches: forward passes of all ranks in one step; local means are averaged over them, as DeepSpeed does.
        agreement_threshold: in [0, 1].
        spaces: both, student (without L_tea) or teacher (L_tea alone).
        mask: pairs that L_stu counts: those that agree (v2), those that predict the gold label, or all.
        counts: of the whole step, for exact means; `micro_batches` is not read then.
        student_bias_V: of the student's head.
        teacher_bias_V: of the teacher's head.
    """
    count, pairs = row_count(labels_N), row_count(student_index_K)
    divisor = pairs.clamp(min=1) * micro_batches
    if counts is not None:
        divisor = counts.pairs.clamp(min=1) * counts.passes
    mean_K = row_weights(student_index_K, settings.kd_rate) / divisor
    ce_weight = row_weights(labels_N, 1 - settings.kd_rate) / num_items
    total = student_Nd.new_zeros((), dtype=torch.float32)
    parts: dict[str, tuple[Tensor, Tensor]] = {"counted_pairs": (pairs, count)}
    if spaces != "student":
        teacher_space = fused_linear_distillation(
            projected_student_KD,
            teacher_head_VD.detach(),
            teacher_KD,
            teacher_head_VD,
            divergence=settings.divergence,
            # the second temperature belongs to the projected teacher alone
            options=replace(settings.options, teacher_temperature=1.0),
            divergence_weight=mean_K,
            student_bias=constant(teacher_bias_V),
            teacher_bias=teacher_bias_V,
            num_columns=num_teacher_columns,
            chunk=settings.chunk,
        )
        total = total + teacher_space.total
        parts["teacher_space"] = (plain_sum(teacher_space.divergence * divisor, settings.kd_rate), pairs)
    if spaces == "teacher":
        ce = fused_linear_cross_entropy(
            student_Nd, student_head_Vd, labels_N, bias=student_bias_V, row_weight=ce_weight, chunk=settings.chunk
        )
        parts["ce"] = (plain_sum(ce * num_items, 1 - settings.kd_rate), count)
        # the projector is no part of this ablation, but every trained parameter takes part in every step
        return Loss(total + ce + 0.0 * projected_teacher_Kd.sum(), parts)
    matching_K = None if counts is None else counts.rows
    if matching_K is None:
        reference_K = labels_N[student_index_K] if mask == "gold" else teacher_label_K
        matching_K = best_tokens(projected_teacher_Kd, student_head_Vd, student_bias_V, settings) == reference_K
    number = matching_K.sum().float()
    whole = counts or StepCounts(pairs, number, micro_batches)
    masked = mask != "none" and bool(whole.matching <= agreement_threshold * whole.pairs)
    if masked:
        stu_K = settings.kd_rate * matching_K.float() / (whole.matching.clamp(min=1e-3) * whole.passes)
    else:
        stu_K = mean_K
    # CE needs the student's logits of all rows anyway: the pairs go to their rows, the others get no weight
    sums = fused_linear_distillation(
        student_Nd,
        student_head_Vd,
        _at_rows(projected_teacher_Kd, student_index_K, len(labels_N), 0.0),
        student_head_Vd.detach(),
        divergence=settings.divergence,
        options=settings.options,
        divergence_weight=_at_rows(stu_K, student_index_K, len(labels_N), 0.0),
        targets=labels_N,
        target_weight=ce_weight,
        teacher_targets=_at_rows(teacher_label_K, student_index_K, len(labels_N), IGNORED),
        teacher_target_weight=_at_rows(mean_K, student_index_K, len(labels_N), 0.0),
        student_bias=student_bias_V,
        teacher_bias=student_bias_V,
        num_columns=settings.num_columns,
        chunk=settings.chunk,
    )
    alpha = settings.kd_rate
    parts |= {
        "ce": (plain_sum(sums.cross_entropy * num_items, 1 - alpha), count),
        "t2s_ce": (plain_sum(sums.teacher_cross_entropy * divisor, alpha), pairs),
        "student_space": (plain_sum(sums.divergence * divisor, alpha), pairs),
        MATCHED[mask]: (number, pairs),
    }
    if masked:
        parts["student_space"] = mean_part(plain_sum(sums.divergence, alpha), whole, number, exact=counts is not None)
    return Loss(total + sums.total, parts)


def overlap_kd(
    student_Nd: Tensor,
    student_head_Vd: Tensor,
    teacher_KD: Tensor,
    teacher_overlap_head_vD: Tensor,
    student_index_K: Tensor,
    student_overlap_v: Tensor,
    labels_N: Tensor,
    num_items: Tensor,
    settings: LossSettings,
    *,
    student_bias_V: Tensor | None = None,
    teacher_overlap_bias_v: Tensor | None = None,
) -> Loss:
    """Overlap sub-vocabulary KD (KDFlow, arXiv 2603.01875): one divergence of both softmaxes over the common entries.

    The pairs are those of the exact token alignment, without its label condition; the sum is divided by Z.

    Args:
        student_Nd: h_s at all label positions.
        student_head_Vd: W_s [V_s, d]; gets gradient from CE and, in the common entries' rows, from KD.
        teacher_KD: h_t of the pairs.
        teacher_overlap_head_vD: W_t[O_t], frozen.
        student_index_K: int64, the pairs' rows in `student_Nd`.
        student_overlap_v: O_s of `vocabulary.overlap`, int64.
        labels_N: gold next tokens of the student, int64.
        num_items: Z, label tokens of the global batch, scalar.
        settings: divergence, alpha, chunk.
        student_bias_V: of the student's head.
        teacher_overlap_bias_v: of the teacher's common entries.
    """
    alpha = settings.kd_rate
    ce = fused_linear_cross_entropy(
        student_Nd,
        student_head_Vd,
        labels_N,
        bias=student_bias_V,
        row_weight=row_weights(labels_N, 1 - alpha),
        chunk=settings.chunk,
    )
    kd = fused_linear_distillation(
        student_Nd.index_select(0, student_index_K),
        student_head_Vd.index_select(0, student_overlap_v),
        teacher_KD,
        teacher_overlap_head_vD,
        divergence=settings.divergence,
        options=settings.options,
        student_bias=None if student_bias_V is None else student_bias_V.index_select(0, student_overlap_v),
        teacher_bias=teacher_overlap_bias_v,
        chunk=settings.chunk,
    ).total
    count, pairs = row_count(labels_N), row_count(student_index_K)
    parts = {"ce": (plain_sum(ce, 1 - alpha), count), "kd": (kd.detach(), pairs), "counted_pairs": (pairs, count)}
    return Loss((ce + alpha * kd) / num_items, parts)


def _at_rows(values_K: Tensor, index_K: Tensor, num_rows: int, fill: float) -> Tensor:
    """Return [num_rows, ...] with the values at their rows; differentiable."""
    rows = values_K.new_full((num_rows, *values_K.shape[1:]), fill)
    return rows.index_copy(0, index_K, values_K)
