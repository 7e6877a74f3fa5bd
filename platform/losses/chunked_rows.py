"""The loop behind the fused losses: logits, values and gradients of a chunk of rows at a time.

Legend: L live rows, V vocabulary, D hidden size. A chunk of rows is as large as the matrix products need to be fast;
the elementwise work on its logits goes in blocks of few rows, which stay in the processor's cache. The logits of a
chunk are overwritten by their gradient, so that a pass holds one [chunk, V] buffer a side, whatever L is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tenfold.platform.losses.divergence import DIVERGENCES, DivergenceOptions, log_probabilities
from tenfold.platform.losses.divergence_gradient import (
    cross_entropy_value_and_gradient,
    divergence_value_and_gradient,
)
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of one block. CPU: 4 MiB of float32, which a second-level cache or a share of the third holds; measured
# against whole chunks, log_softmax and exp run 6 times faster. Elsewhere a block must be worth a kernel launch.
_BLOCK_ELEMENTS_CPU = 2**20
_BLOCK_ELEMENTS_DEVICE = 2**24


@dataclass(frozen=True)
class Side:
    """Hidden rows [L, D] and the output head [V, D] with optional bias [V] that reads them; one dtype."""

    hidden: Tensor
    head: Tensor
    bias: Tensor | None

    def new_buffer(self, num_rows: int) -> Tensor:
        """Return an uninitialised [num_rows, V] buffer for logits."""
        return self.hidden.new_empty(num_rows, self.head.shape[0])

    def logits(self, start: int, stop: int, buffer: Tensor) -> Tensor:
        """Write the logits of rows [start, stop) into the buffer and return that part of it."""
        out = buffer[: stop - start]
        if self.bias is None:
            return torch.mm(self.hidden[start:stop], self.head.t(), out=out)
        return torch.addmm(self.bias, self.hidden[start:stop], self.head.t(), out=out)


@dataclass(frozen=True)
class TargetTerm:
    """sum_r weight[r] * cross entropy(logits[r], targets[r]); targets [L] int64, weight [L]."""

    targets: Tensor
    weight: Tensor


@dataclass(frozen=True)
class DivergenceTerm:
    """sum_r weight[r] * divergence of row r over the first num_columns columns; weight [L]."""

    name: str
    options: DivergenceOptions
    weight: Tensor
    num_columns: int


@dataclass(frozen=True)
class Task:
    """All that one pass computes: up to three sums over the same rows, and the teacher's most probable tokens."""

    student: Side
    teacher: Side | None
    chunk: int
    target_term: TargetTerm | None = None
    divergence_term: DivergenceTerm | None = None
    teacher_target_term: TargetTerm | None = None
    predict_columns: int | None = None


@dataclass(frozen=True)
class Needs:
    """Which gradients a pass accumulates."""

    student_hidden: bool = False
    student_head: bool = False
    student_bias: bool = False
    teacher_hidden: bool = False

    @property
    def student(self) -> bool:
        """Whether the gradient of the student's logits is needed at all."""
        return self.student_hidden or self.student_head or self.student_bias


class Result:
    """Per-row values [L] of each term, predictions [L] int64, and gradients where they were asked for."""

    def __init__(self, task: Task, needs: Needs):
        student = task.student
        rows, device = student.hidden.shape[0], student.hidden.device
        self.dtype = torch.promote_types(student.hidden.dtype, torch.float32)
        self.target_rows = torch.zeros(rows, dtype=self.dtype, device=device)
        self.divergence_rows = torch.zeros_like(self.target_rows)
        self.teacher_target_rows = torch.zeros_like(self.target_rows)
        self.prediction = torch.empty(rows, dtype=torch.int64, device=device) if task.predict_columns else None
        self.student_hidden = torch.empty_like(student.hidden) if needs.student_hidden else None
        self.student_head = None
        if needs.student_head:
            # A single product needs no wider accumulator than its own dtype.
            dtype = student.head.dtype if rows <= task.chunk else self.dtype
            self.student_head = torch.zeros(student.head.shape, dtype=dtype, device=device)
        columns = student.head.shape[0]
        self.student_bias = torch.zeros(columns, dtype=self.dtype, device=device) if needs.student_bias else None
        self.teacher_hidden = None
        if needs.teacher_hidden and task.teacher is not None:
            self.teacher_hidden = torch.zeros_like(task.teacher.hidden)


def block_ranges(num_rows: int, num_columns: int, device: torch.device) -> Iterator[slice]:
    """Yield slices that cover num_rows rows in blocks of about the cache's size."""
    elements = _BLOCK_ELEMENTS_CPU if device.type == "cpu" else _BLOCK_ELEMENTS_DEVICE
    size = max(1, elements // max(1, num_columns))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def _cross_entropy_rows(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy [N] of logits [N, V] in float32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.logsumexp(wide, -1) - wide.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _target_part(logits: Tensor, term: TargetTerm, rows: slice, need_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Cross entropy of a block of rows and, if asked for, its gradient times the row weights."""
    if not need_gradient:
        return _cross_entropy_rows(logits, term.targets[rows]), None
    value, gradient = cross_entropy_value_and_gradient(logits, term.targets[rows])
    return value, gradient.mul_(term.weight[rows].unsqueeze(-1))


def _divergence_part(
    student_logits: Tensor, teacher_logits: Tensor, term: DivergenceTerm, rows: slice, need_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Divergence of a block of rows and, if asked for, its gradient times the row weights."""
    student_logits, teacher_logits = student_logits[:, : term.num_columns], teacher_logits[:, : term.num_columns]
    if not need_gradient:
        log_q, log_p = log_probabilities(student_logits, teacher_logits, term.options)
        return DIVERGENCES[term.name](log_q, log_p, term.options), None
    value, gradient = divergence_value_and_gradient(
        student_logits, teacher_logits, divergence=term.name, options=term.options
    )
    return value, gradient.mul_(term.weight[rows].unsqueeze(-1))


def _process_block(
    task: Task, needs: Needs, result: Result, student: Tensor, teacher: Tensor | None, rows: slice
) -> None:
    """Fill the values of one block of rows and replace its logits by their weighted gradient."""
    student_gradient = teacher_gradient = None
    if task.predict_columns and teacher is not None and result.prediction is not None:
        result.prediction[rows] = teacher[:, : task.predict_columns].argmax(-1)
    if task.target_term is not None:
        result.target_rows[rows], student_gradient = _target_part(student, task.target_term, rows, needs.student)
    if task.divergence_term is not None and teacher is not None:
        result.divergence_rows[rows], gradient = _divergence_part(
            student, teacher, task.divergence_term, rows, needs.student
        )
        if student_gradient is None:
            student_gradient = gradient
        elif gradient is not None:
            student_gradient[:, : gradient.shape[-1]].add_(gradient)
    if task.teacher_target_term is not None and teacher is not None:
        result.teacher_target_rows[rows], teacher_gradient = _target_part(
            teacher, task.teacher_target_term, rows, needs.teacher_hidden
        )
    if student_gradient is not None:
        student.copy_(student_gradient)
    if teacher_gradient is not None and teacher is not None:
        teacher.copy_(teacher_gradient)


def accumulate_student(task: Task, result: Result, gradient: Tensor, start: int, stop: int) -> None:
    """Add what the gradient [chunk, V] of a chunk's logits gives for the hidden rows, the head and the bias."""
    side = task.student
    if result.student_hidden is not None:
        torch.mm(gradient, side.head, out=result.student_hidden[start:stop])
    if result.student_head is not None:
        if result.student_head.dtype == gradient.dtype:
            result.student_head.addmm_(gradient.t(), side.hidden[start:stop])
        else:
            result.student_head.add_(gradient.t() @ side.hidden[start:stop])
    if result.student_bias is not None:
        result.student_bias.add_(gradient.sum(0, dtype=result.dtype))


@torch.no_grad()
def run(task: Task, needs: Needs) -> Result:
    """Go once through all rows and return values, predictions and gradients.

    Args:
        task: what to compute; all its tensors are read as constants.
        needs: which gradients to accumulate. Without any, no gradient work is done.

    Returns:
        The filled result. The head's gradient is accumulated in float32 over chunks.
    """
    result = Result(task, needs)
    num_rows = task.student.hidden.shape[0]
    if num_rows == 0:
        return result
    chunk = min(task.chunk, num_rows)
    student_buffer = task.student.new_buffer(chunk)
    teacher_buffer = None if task.teacher is None else task.teacher.new_buffer(chunk)
    for start in range(0, num_rows, chunk):
        stop = min(start + chunk, num_rows)
        student = task.student.logits(start, stop, student_buffer)
        teacher = None
        if task.teacher is not None and teacher_buffer is not None:
            teacher = task.teacher.logits(start, stop, teacher_buffer)
        for block in block_ranges(stop - start, student.shape[1], student.device):
            rows = slice(start + block.start, start + block.stop)
            _process_block(task, needs, result, student[block], None if teacher is None else teacher[block], rows)
        if needs.student:
            accumulate_student(task, result, student, start, stop)
        if result.teacher_hidden is not None and task.teacher is not None and teacher is not None:
            torch.mm(teacher, task.teacher.head, out=result.teacher_hidden[start:stop])
    return result


def _weighted_sum(rows: Tensor, term: TargetTerm | DivergenceTerm | None) -> Tensor:
    """Sum of a term's rows times their weights, in which a weight of 0 removes a row whatever its value."""
    return rows.sum() if term is None else torch.where(term.weight != 0, rows * term.weight, 0.0).sum()


def _sums(task: Task, result: Result) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sums of divergence, cross entropy and teacher cross entropy."""
    return (
        _weighted_sum(result.divergence_rows, task.divergence_term),
        _weighted_sum(result.target_rows, task.target_term),
        _weighted_sum(result.teacher_target_rows, task.teacher_target_term),
    )


class _FusedSum(torch.autograd.Function):
    """Runs the pass in the forward, gradients included; differentiable in the four tensors before the task."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor | None,
        task: Task,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        needed = ctx.needs_input_grad
        needs = Needs(needed[0], needed[1], needed[2], needed[3] and task.teacher_target_term is not None)
        result = run(task, needs)
        # Gradients only: a head gathered for the forward pass (ZeRO-3) is gone by the backward pass.
        ctx.save_for_backward(
            result.student_hidden,
            None if result.student_head is None else result.student_head.to(student_head.dtype),
            None if result.student_bias is None else result.student_bias.to(student_head.dtype),
            result.teacher_hidden,
        )
        parts = _sums(task, result)
        ctx.mark_non_differentiable(*parts, *([] if result.prediction is None else [result.prediction]))
        return parts[0] + parts[1] + parts[2], *parts, result.prediction

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *(None if saved is None else saved * grad_total for saved in ctx.saved_tensors), None


def evaluate(task: Task) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Run a task.

    Returns:
        Total, divergence, cross entropy and teacher cross entropy (scalars; the total has a graph if one is wanted and
        the parts never), and the predictions [L] or None.
    """
    student, teacher = task.student, task.teacher
    tensors = [student.hidden, student.head, student.bias, None if teacher is None else teacher.hidden]
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return _FusedSum.apply(*tensors, task)
    result = run(task, Needs())
    parts = _sums(task, result)
    return parts[0] + parts[1] + parts[2], *parts, result.prediction
