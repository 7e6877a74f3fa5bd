"""The papers' competitors for different vocabularies: ULD (arXiv 2402.12030) and MinED (FuseLLM, arXiv 2401.10491).

Built like the losses of `objective`, where the total and the biases are explained; `settings.num_columns` counts the
student's entries. Both distillation sums are divided by Z, the label tokens of the global batch.

Legend: N student's and M teacher's label tokens, K pairs of them, V_s and V_t rows of the heads, d student's and D
teacher's hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from tenfold.methods.dskd.loss_parts import Loss, LossSettings, plain_sum, row_count, row_weights
from tenfold.platform.losses.chunked_rows import Side
from tenfold.platform.losses.fused_distillation import fused_linear_distillation
from tenfold.platform.losses.fused_inputs import check_chunk, cut_head, make_side
from tenfold.platform.losses.fused_linear import fused_linear_cross_entropy
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

# Logit of what a target excludes; its probability is exactly 0.
_EXCLUDED = -1e5


def uld_pairs(student_counts_B: Tensor, teacher_counts_B: Tensor) -> tuple[Tensor, Tensor]:
    """Pair the k-th label token of the student with the teacher's, up to the shorter sample (ULD).

    Args:
        student_counts_B: label tokens of each sample, int64.
        teacher_counts_B: the teacher's.

    Returns:
        int64 [K] rows of the student's and of the teacher's label tokens of the batch.
    """
    pairs_B = torch.minimum(student_counts_B, teacher_counts_B)
    step_K = torch.arange(int(pairs_B.sum()), device=pairs_B.device)
    step_K = step_K - _starts(pairs_B).repeat_interleave(pairs_B)
    students = _starts(student_counts_B).repeat_interleave(pairs_B)
    teachers = _starts(teacher_counts_B).repeat_interleave(pairs_B)
    return students + step_K, teachers + step_K


def _starts(counts_B: Tensor) -> Tensor:
    return counts_B.cumsum(0) - counts_B


def uld(
    student_Nd: Tensor,
    student_head_Vd: Tensor,
    teacher_MD: Tensor,
    teacher_head_VD: Tensor,
    student_index_K: Tensor,
    teacher_index_K: Tensor,
    labels_N: Tensor,
    num_items: Tensor,
    settings: LossSettings,
    num_teacher_columns: int,
    *,
    student_bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
) -> Loss:
    """Universal logit distillation: the distance of the sorted probabilities of paired tokens, without temperature.

    Args:
        student_Nd: h_s at all label positions.
        student_head_Vd: W_s [V_s, d].
        teacher_MD: h_t at all of the teacher's label positions.
        teacher_head_VD: W_t [V_t, D], frozen.
        student_index_K: rows of the student, from `uld_pairs`.
        teacher_index_K: rows of the teacher.
        labels_N: gold next tokens of the student, int64.
        num_items: Z, scalar.
        settings: alpha, columns, chunk.
        num_teacher_columns: entries of the teacher's tokenizer.
        student_bias_V: of the student's head.
        teacher_bias_V: of the teacher's head.
    """
    ce = fused_linear_cross_entropy(student_Nd, student_head_Vd, labels_N, bias=student_bias_V, chunk=settings.chunk)
    student_head_Vd, student_bias_V = cut_head(student_head_Vd, student_bias_V, settings.num_columns)
    teacher_head_VD, teacher_bias_V = cut_head(teacher_head_VD, teacher_bias_V, num_teacher_columns)
    distance = sorted_distance(
        student_Nd.index_select(0, student_index_K),
        student_head_Vd,
        teacher_MD.index_select(0, teacher_index_K),
        teacher_head_VD,
        student_bias_V=student_bias_V,
        teacher_bias_V=teacher_bias_V,
        chunk=settings.chunk,
    )
    parts = {"ce": (ce.detach(), row_count(labels_N)), "uld": (distance.detach(), row_count(student_index_K))}
    return Loss(((1 - settings.kd_rate) * ce + settings.kd_rate * distance) / num_items, parts)


def sorted_distance(
    student_Kd: Tensor,
    student_head_Vd: Tensor,
    teacher_KD: Tensor,
    teacher_head_VD: Tensor,
    *,
    student_bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
    chunk: int,
) -> Tensor:
    """sum_k |p_k - q_k| of the probabilities in descending order, the shorter side padded with 0, summed over rows.

    Like the losses of `platform.losses.fused_linear`: chunk by chunk, gradients in the same pass, no teacher gradient.

    Returns:
        Scalar float32 (float64 for float64 inputs), 0 with a valid graph without rows; at most 2 a row.
    """
    check_chunk(chunk)
    student = make_side("student", student_Kd, student_head_Vd, student_bias_V)
    teacher = make_side("teacher", teacher_KD.detach(), teacher_head_VD.detach(), teacher_bias_V)
    return _SortedDistance.apply(student.hidden, student.head, student.bias, teacher, chunk)


class _SortedDistance(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, teacher: Side, chunk: int
    ) -> Tensor:
        student, wide = Side(hidden, head, bias), torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros(head.shape, dtype=wide, device=head.device) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros(len(head), dtype=wide, device=head.device) if ctx.needs_input_grad[2] else None
        rows = min(chunk, len(hidden))
        student_buffer, teacher_buffer = student.new_buffer(rows), teacher.new_buffer(rows)
        for start in range(0, len(hidden), chunk):
            stop = min(start + chunk, len(hidden))
            q = student.logits(start, stop, student_buffer).to(wide).softmax(-1)
            p = teacher.logits(start, stop, teacher_buffer).to(wide).softmax(-1)
            gap, order = q.sort(dim=-1, descending=True)
            extra = p.shape[1] - q.shape[1]
            gap = pad(gap, (0, max(extra, 0))).sub_(pad(p.sort(dim=-1, descending=True).values, (0, max(-extra, 0))))
            total += gap.abs().sum()
            if grad_hidden is None and grad_head is None and grad_bias is None:
                continue
            # each probability has the slope of its rank: 1 above the teacher's, -1 below
            slope = torch.empty_like(q).scatter_(-1, order, gap[:, : q.shape[1]].sign_())
            gradient = slope.sub_((q * slope).sum(-1, keepdim=True)).mul_(q).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(gradient, head, out=grad_hidden[start:stop])
            if grad_head is not None:
                grad_head += gradient.T @ hidden[start:stop]
            if grad_bias is not None:
                grad_bias += gradient.sum(0, dtype=wide)
        # gradients only: a head gathered for the forward pass (ZeRO-3) is gone by the backward pass
        narrow = [None if grad is None else grad.to(head.dtype) for grad in (grad_head, grad_bias)]
        ctx.save_for_backward(grad_hidden, *narrow)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *(None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors), None, None


def mined_teacher_head(
    teacher_head_VD: Tensor, student_to_teacher: Tensor, teacher_bias_V: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the teacher's head in the student's vocabulary: rows [V_s, D] and biases [V_s] (MinED).

    A student's token that some teacher token maps to has the logit of that teacher token, all others -1e5: products
    with these rows are MinED's target logits, and no dense target is ever stored.

    Args:
        teacher_head_VD: W_t.
        student_to_teacher: [V_s] of `vocabulary.minimum_edit_tables`, -1 = none.
        teacher_bias_V: of the teacher's head.
    """
    is_mapped, source = student_to_teacher >= 0, student_to_teacher.clamp(min=0)
    rows = teacher_head_VD.detach()[source] * is_mapped[:, None]
    biases = rows.new_zeros(len(rows)) if teacher_bias_V is None else teacher_bias_V.detach()[source].to(rows.dtype)
    return rows, biases.masked_fill(~is_mapped, _EXCLUDED)


def mined(
    student_Nd: Tensor,
    student_head_Vd: Tensor,
    teacher_MD: Tensor,
    teacher_rows_VD: Tensor,
    teacher_bias_V: Tensor,
    teacher_position_N: Tensor,
    labels_N: Tensor,
    num_items: Tensor,
    settings: LossSettings,
    *,
    student_bias_V: Tensor | None = None,
) -> Loss:
    """MinED: forward KL at tau to the teacher's mapped logits, to the gold label where no teacher token corresponds.

    The hard target (+100 at the gold label, -1e5 elsewhere) is a one-hot distribution, so its KL is the cross entropy
    at tau. (The official code overwrites the student's logits in float32, which makes its loss vanish.)

    Args:
        student_Nd: h_s at all label positions.
        student_head_Vd: W_s [V_s, d].
        teacher_MD: h_t at all of the teacher's label positions.
        teacher_rows_VD: [V_s, D], from `mined_teacher_head`.
        teacher_bias_V: [V_s], from `mined_teacher_head`.
        teacher_position_N: int64, each row's row in `teacher_MD`, -1 = hard target (`alignment.mined_positions`).
        labels_N: gold next tokens of the student, int64.
        num_items: Z, scalar.
        settings: alpha, temperature, columns, chunk. The divergence is the forward KL, whatever they say.
        student_bias_V: of the student's head.
    """
    alpha, tau = settings.kd_rate, settings.options.temperature
    soft_N = (teacher_position_N >= 0).nonzero().squeeze(-1)
    hard_N = (teacher_position_N < 0).nonzero().squeeze(-1)
    # both parts of a soft target's loss from one pass over its logits
    soft = fused_linear_distillation(
        student_Nd.index_select(0, soft_N),
        student_head_Vd,
        teacher_MD.index_select(0, teacher_position_N[soft_N]),
        teacher_rows_VD,
        divergence="forward_kl",
        options=settings.options,
        divergence_weight=row_weights(soft_N, alpha),
        targets=labels_N[soft_N],
        target_weight=row_weights(soft_N, 1 - alpha),
        student_bias=student_bias_V,
        teacher_bias=teacher_bias_V,
        num_columns=settings.num_columns,
        chunk=settings.chunk,
    )
    rows, labels = student_Nd.index_select(0, hard_N), labels_N[hard_N]
    hard_ce = fused_linear_cross_entropy(
        rows,
        student_head_Vd,
        labels,
        bias=student_bias_V,
        row_weight=row_weights(hard_N, 1 - alpha),
        chunk=settings.chunk,
    )
    hard = fused_linear_cross_entropy(
        rows / tau,
        student_head_Vd,
        labels,
        bias=None if student_bias_V is None else student_bias_V / tau,
        row_weight=row_weights(hard_N, alpha),
        num_columns=settings.num_columns,
        chunk=settings.chunk,
    )
    count = row_count(labels_N)
    parts = {
        "ce": (plain_sum(soft.cross_entropy + hard_ce, 1 - alpha), count),
        "mined": (plain_sum(soft.divergence + hard, alpha), count),
        "soft_targets": (row_count(soft_N), count),
    }
    return Loss((soft.total + hard_ce + hard) / num_items, parts)
