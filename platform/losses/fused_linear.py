"""Output head and loss in one step, for vocabularies whose logits do not fit in memory.

Every function takes hidden states and output heads instead of logits, forms the logits of `chunk` rows at a time, and
computes the gradients in the same pass; the backward pass only multiplies them by the incoming scalar. The peak is
O(chunk * V) plus one gradient of the student's head, and the values do not depend on `chunk`. The heads are not kept
for the backward pass, so tensors that are gathered only for the forward pass (ZeRO-3) will do.

Legend: N rows (tokens), V vocabulary, D_s and D_t hidden sizes of student and teacher. Products are taken in the dtype
of the inputs (bfloat16, float32 or float64), everything after them in float32 or wider. Under autocast the inputs are
cast as its matrix products would be.
"""

import torch
from tenfold.platform.losses.chunked_rows import Needs, Task, evaluate, run
from tenfold.platform.losses.divergence import DivergenceOptions
from tenfold.platform.losses.fused_distillation import DistillationSums, fused_linear_distillation
from tenfold.platform.losses.fused_inputs import (
    check_chunk,
    cut_head,
    live_rows,
    make_side,
    select_side,
    select_targets,
    target_term,
)
from torch import Tensor

__all__ = [
    "DistillationSums",
    "fused_linear_cross_entropy",
    "fused_linear_distillation",
    "fused_linear_divergence",
    "linear_argmax",
    "linear_cross_entropy_rows",
]


def fused_linear_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    divergence: str,
    row_weight: Tensor | None = None,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    skew_lambda: float = 0.1,
    adaptive_alpha: float = 0.5,
    js_beta: float = 0.5,
    num_columns: int | None = None,
    chunk: int = 512,
) -> Tensor:
    """sum_r row_weight[r] * D_r of the logits that two heads read from two hidden states.

    Args:
        student_hidden: [N, D_s] last hidden states at the counted positions, after the final norm.
        student_head: [V, D_s] output embedding.
        teacher_hidden: [N, D_t], the same rows in the same order; a constant.
        teacher_head: [V, D_t]; a constant.
        divergence: a key of `tenfold.platform.losses.divergence.DIVERGENCES`.
        row_weight: [N] constants, ones if None; rows of weight 0 are skipped.
        temperature: tau, divides both logits; the sum is *not* multiplied by its square.
        teacher_temperature: divides the teacher's logits in addition.
        student_bias: [V].
        teacher_bias: [V]; a constant.
        skew_lambda: share mixed in by the skewed divergences.
        adaptive_alpha: tail mass of `adaptive_kl`.
        js_beta: student share of `jsd`.
        num_columns: compare the first columns only; needed where the heads are padded to different widths.
        chunk: rows per chunk; changes memory, never the value.

    Returns:
        Scalar float32, 0 with a valid graph if no row counts. The gradient goes to `student_hidden`, and to
        `student_head` and `student_bias` if they require one; nothing on the teacher's side gets any.

    Raises:
        ValueError: as `fused_linear_distillation`.
    """
    return fused_linear_distillation(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        divergence=divergence,
        options=DivergenceOptions(temperature, teacher_temperature, skew_lambda, adaptive_alpha, js_beta),
        divergence_weight=row_weight,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        num_columns=num_columns,
        chunk=chunk,
    ).total


def fused_linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    num_columns: int | None = None,
    chunk: int = 512,
) -> Tensor:
    """sum_r row_weight[r] * cross entropy of the logits hidden[r] head^T + bias against targets[r].

    Args:
        hidden: [N, D] last hidden states.
        head: [V, D] output embedding.
        targets: [N] int64, -100 = not counted.
        bias: [V].
        row_weight: [N] constants, ones if None; rows of weight 0 are skipped.
        num_columns: normalise over the first columns only; None for all.
        chunk: rows per chunk; changes memory, never the value.

    Returns:
        Scalar float32, 0 with a valid graph if no row counts. The gradient goes to `hidden`, `head` and `bias`, to
        each only if it requires one.

    Raises:
        ValueError: shapes or dtypes do not fit, or a target is outside the vocabulary.
    """
    check_chunk(chunk)
    side = make_side("student", hidden, *cut_head(head, bias, num_columns))
    term = target_term("targets", side, targets, row_weight)
    live = live_rows([term.weight])
    task = Task(select_side(side, live), None, chunk, target_term=select_targets(term, live))
    return evaluate(task)[0]


@torch.no_grad()
def linear_argmax(
    hidden: Tensor, head: Tensor, *, bias: Tensor | None = None, num_columns: int | None = None, chunk: int = 512
) -> Tensor:
    """Most probable token of each row, the lowest index among equals, without gradient.

    Args:
        hidden: [N, D] last hidden states.
        head: [V, D] output embedding.
        bias: [V].
        num_columns: look at the first columns only, so that rows of the head without a token are never chosen.
        chunk: rows per chunk.

    Returns:
        [N] int64.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    check_chunk(chunk)
    side = make_side("hidden", hidden, *cut_head(head, bias, num_columns))
    num_rows = hidden.shape[0]
    prediction = torch.empty(num_rows, dtype=torch.int64, device=hidden.device)
    buffer = side.new_buffer(min(chunk, num_rows))
    for start in range(0, num_rows, chunk):
        stop = min(start + chunk, num_rows)
        torch.argmax(side.logits(start, stop, buffer), dim=-1, out=prediction[start:stop])
    return prediction


@torch.no_grad()
def linear_cross_entropy_rows(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    num_columns: int | None = None,
    chunk: int = 512,
) -> Tensor:
    """Cross entropy of each row without gradient, for evaluation; arguments as `fused_linear_cross_entropy`.

    Returns:
        [N] float32, 0 where the target is -100.

    Raises:
        ValueError: shapes or dtypes do not fit, or a target is outside the vocabulary.
    """
    check_chunk(chunk)
    side = make_side("hidden", hidden, *cut_head(head, bias, num_columns))
    term = target_term("targets", side, targets, None)
    live = live_rows([term.weight])
    task = Task(select_side(side, live), None, chunk, target_term=select_targets(term, live))
    rows = run(task, Needs()).target_rows
    return rows if live is None else torch.zeros_like(term.weight).index_copy_(0, live, rows)
