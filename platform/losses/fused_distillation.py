"""A divergence and cross entropies of the same logits in one pass, for vocabularies whose logits do not fit in memory.

Legend: N rows (tokens), V vocabulary, D_s and D_t hidden sizes of student and teacher. See `fused_linear` for the
properties that all fused losses share.
"""

from dataclasses import dataclass

from tenfold.platform.losses.chunked_rows import DivergenceTerm, Side, Task, evaluate
from tenfold.platform.losses.divergence import DivergenceOptions, check_divergence
from tenfold.platform.losses.fused_inputs import (
    IGNORED,
    check_chunk,
    compared_columns,
    cut_head,
    live_rows,
    make_side,
    row_weight,
    select_side,
    select_targets,
    target_term,
)
from torch import Tensor


@dataclass(frozen=True)
class DistillationSums:
    """What `fused_linear_distillation` returns; scalars are float32 (float64 for float64 inputs).

    Attributes:
        total: the sum of the three parts, differentiable.
        divergence: sum_r divergence_weight[r] * D_r, without gradient, as the following.
        cross_entropy: the student's weighted cross entropy, 0 without targets.
        teacher_cross_entropy: the teacher side's weighted cross entropy, 0 without teacher targets.
        teacher_prediction: [N] int64, argmax of the teacher's logits within the compared columns, -100 where a row has
            no weight; None unless asked for.
    """

    total: Tensor
    divergence: Tensor
    cross_entropy: Tensor
    teacher_cross_entropy: Tensor
    teacher_prediction: Tensor | None


def fused_linear_distillation(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    divergence: str,
    options: DivergenceOptions = DivergenceOptions(),
    divergence_weight: Tensor | None = None,
    targets: Tensor | None = None,
    target_weight: Tensor | None = None,
    teacher_targets: Tensor | None = None,
    teacher_target_weight: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    num_columns: int | None = None,
    predict: bool = False,
    chunk: int = 512,
) -> DistillationSums:
    """Weighted sum of a divergence and up to two cross entropies of the same logits, from one pass over them.

    total = sum_r divergence_weight[r] D(student_r, teacher_r) + sum_r target_weight[r] CE(student_r, targets[r])
          + sum_r teacher_target_weight[r] CE(teacher_r, teacher_targets[r])

    With the factors in the weights it is the white-box distillation loss (1 - alpha) CE + alpha KD. The third sum is
    the one that trains DSKD's projector of the teacher's states (arXiv 2406.17328): its gradient goes to
    `teacher_hidden` and to nothing else, and the divergence's never goes there.

    Args:
        student_hidden: [N, D_s] last hidden states at the counted positions, after the final norm.
        student_head: [V, D_s] output embedding.
        teacher_hidden: [N, D_t], the same rows in the same order.
        teacher_head: [V, D_t]; never gets a gradient.
        divergence: a key of `tenfold.platform.losses.divergence.DIVERGENCES`.
        options: temperatures and shape of the divergence; the cross entropies have no temperature.
        divergence_weight: [N] constants, ones if None. Rows without any weight are skipped.
        targets: [N] int64 for the student, -100 = not counted; None leaves this sum out.
        target_weight: [N] constants, ones if None.
        teacher_targets: [N] int64 for the teacher's side, -100 = not counted; None leaves this sum out.
        teacher_target_weight: [N] constants, ones if None.
        student_bias: [V] bias of the student's head.
        teacher_bias: [V]; a constant.
        num_columns: compare only the first columns (heads padded to different widths, or rows of no token). The cross
            entropies keep all columns.
        predict: return the teacher's most probable token of each row that has a weight.
        chunk: rows per chunk; changes memory, never the value.

    Returns:
        Sums; `total` is differentiable in the student's tensors that require a gradient and, with teacher targets, in
        `teacher_hidden`. With no row or no weight it is 0 with a valid graph.

    Raises:
        ValueError: shapes, dtypes or vocabularies do not fit, a target is outside the vocabulary, unknown divergence.
    """
    check_divergence(divergence)
    check_chunk(chunk)
    columns = compared_columns(student_head, teacher_head, num_columns)
    if targets is None:
        student_head, student_bias = cut_head(student_head, student_bias, columns)
    if teacher_targets is None:
        teacher_head, teacher_bias = cut_head(teacher_head, teacher_bias, columns)
        teacher_hidden = teacher_hidden.detach()
    student = make_side("student", student_hidden, student_head, student_bias)
    teacher = make_side("teacher", teacher_hidden, teacher_head.detach(), teacher_bias)
    _check_rows(student, teacher)
    weight = row_weight("the divergence", divergence_weight, student)
    term = None if targets is None else target_term("targets", student, targets, target_weight)
    teacher_term = None
    if teacher_targets is not None:
        teacher_term = target_term("teacher_targets", teacher, teacher_targets, teacher_target_weight)

    live = live_rows([weight] + [one.weight for one in (term, teacher_term) if one is not None])
    if live is not None:
        weight = weight[live]
    total, divergence_sum, cross_entropy, teacher_cross_entropy, prediction = evaluate(
        Task(
            select_side(student, live),
            select_side(teacher, live),
            chunk,
            target_term=select_targets(term, live),
            divergence_term=DivergenceTerm(divergence, options, weight, columns),
            teacher_target_term=select_targets(teacher_term, live),
            predict_columns=columns if predict else None,
        )
    )
    if prediction is not None and live is not None:
        all_rows = prediction.new_full(student_hidden.shape[:1], IGNORED)
        prediction = all_rows.index_copy_(0, live, prediction)
    return DistillationSums(total, divergence_sum, cross_entropy, teacher_cross_entropy, prediction)


def _check_rows(student: Side, teacher: Side) -> None:
    if student.hidden.shape[0] != teacher.hidden.shape[0]:
        raise ValueError(
            f"student hidden states have shape {tuple(student.hidden.shape)}, the teacher's "
            f"{tuple(teacher.hidden.shape)}: both need the same rows."
        )
