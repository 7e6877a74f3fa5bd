"""The loss of AlignDistil and of the other teachers from hidden states, with never more than `chunk` rows of logits.

Logits of the student and of both frozen models are formed for a chunk of rows, the student's are overwritten by their
gradient w q (log(q / p*) - KL), and that goes into the gradients of hidden states and head before the next chunk. The
backward pass only multiplies by the incoming scalar, so that heads gathered for the forward pass alone (ZeRO-3) will
do.

Legend: R rows (label positions), D a model's hidden size, V vocabulary. All logits are float32 or wider, also where
the heads are bfloat16: alpha multiplies what rounding leaves of z^d - z^r by up to r + epsilon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tenfold.methods.aligndistil.extrapolation import Contrast, Teacher, logit_difference, teacher
from tenfold.platform.losses.chunked_rows import Needs, Result, Side, Task, accumulate_student, block_ranges
from tenfold.platform.losses.divergence import DivergenceOptions, log_softmax_rows, reverse_kl
from tenfold.platform.losses.divergence_gradient import divergence_value_and_gradient
from tenfold.platform.losses.fused_inputs import check_chunk, cut_head, live_rows, make_side, select_side
from tenfold.platform.losses.fused_inputs import row_weight as checked_weight
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows of a narrower head that are widened at once: 32 MiB of float32 at a hidden size of 2048.
_HEAD_ROWS = 4096


@dataclass(frozen=True)
class AlignmentSums:
    """What `fused_alignment_loss` returns.

    Attributes:
        total: scalar, sum_r row_weight[r] w_r KL_r in float32 or wider, differentiable.
        rows: [R] each, detached, 0 where a row has no weight. Always `kl` (per token, of the temperature), `weight`
            (w), `loss` (weight * kl), `alpha` and `tvd`; `gkd` has alpha 1 and tvd 0. With metrics, all without
            temperature: `kl_dpo` KL(student || dpo), and with a second model `kl_other` KL(student || other), `reward`
            beta_0 E_student[log pi_dpo - log pi_other] and `dpo_reward`, the same in expectation over the DPO model.
    """

    total: Tensor
    rows: dict[str, Tensor]


@dataclass(frozen=True)
class _Work:
    """All that one pass computes; R live rows with their weights [R]."""

    student: Side
    dpo: Side
    other: Side | None
    contrast: Contrast
    row_weight: Tensor
    num_columns: int
    want_metrics: bool
    chunk: int

    @property
    def names(self) -> list[str]:
        """The values of a row, in the order of `_run`."""
        names = ["kl", "weight", "loss", "alpha", "tvd"]
        if self.want_metrics:
            names += ["kl_dpo"] if self.other is None else ["kl_dpo", "kl_other", "reward", "dpo_reward"]
        return names


def fused_alignment_loss(
    student: Side,
    dpo: Side,
    other: Side | None,
    contrast: Contrast,
    row_weight: Tensor | None,
    *,
    num_columns: int,
    want_metrics: bool = False,
    chunk: int = 256,
) -> AlignmentSums:
    """sum_r row_weight[r] w_r KL(pi_theta || pi*)_r of the logits that three heads read from their hidden states.

    Args:
        student: hidden [R, D], head [>= num_columns, D] and bias; under autocast cast as its products would be.
        dpo: the same rows of the DPO model; constants in their own dtype, whatever autocast says.
        other: of the second frozen model; None only for `gkd`, which uses it for metrics alone.
        contrast: which teacher, with which numbers.
        row_weight: [R] constants, ones if None: 1 / (tokens of the sequence * sequences of the global step).
        num_columns: entries of the tokenizer; further rows of a head are padding and are not compared.
        want_metrics: also compute those values of a row that cost further passes over its logits.
        chunk: rows per chunk; changes memory, never the value.

    Returns:
        Total and rows; the total is 0 with a valid graph if there is no row or no weight.

    Raises:
        ValueError: shapes or dtypes do not fit, a head is smaller than the tokenizer, the second model is missing.
    """
    check_chunk(chunk)
    frozen = {"dpo": dpo} | ({} if other is None else {"other": other})
    frozen = {name: _constant(name, side, student, num_columns) for name, side in frozen.items()}
    if other is None and contrast.objective != "gkd":
        raise ValueError(f"{contrast.objective} reads two frozen models; only the DPO model is given")
    student = make_side("student", student.hidden, student.head, student.bias)
    cut_head(student.head, student.bias, num_columns)  # says so if the head is too small
    weight = checked_weight("the loss", row_weight, student)
    live = live_rows([weight])
    work = _Work(
        select_side(student, live),
        select_side(frozen["dpo"], live),
        select_side(frozen["other"], live) if "other" in frozen else None,
        contrast,
        weight if live is None else weight[live],
        num_columns,
        want_metrics,
        chunk,
    )
    tensors = (work.student.hidden, work.student.head, work.student.bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        total, *values = _AlignmentSum.apply(*tensors, work)
        rows = dict(zip(work.names, values, strict=True))
    else:
        rows = _run(work, Needs())[1]
        total = torch.dot(rows["loss"], work.row_weight)
    if live is not None:
        rows = {name: torch.zeros_like(weight).index_copy_(0, live, value) for name, value in rows.items()}
    return AlignmentSums(total, rows)


def _constant(name: str, side: Side, student: Side, num_columns: int) -> Side:
    """Check a frozen side and keep the compared rows of its head.

    Raises:
        ValueError: it does not fit itself, the student's rows or the tokenizer.
    """
    if len(side.hidden) != len(student.hidden):
        raise ValueError(
            f"{name}: hidden states have shape {tuple(side.hidden.shape)}, the student's "
            f"{tuple(student.hidden.shape)}: both need the same rows"
        )
    head, bias = cut_head(side.head.detach(), None if side.bias is None else side.bias.detach(), num_columns)
    with torch.autocast(side.hidden.device.type, enabled=False):
        return make_side(name, side.hidden.detach(), head, bias)


def _write_logits(hidden: Tensor, head: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write hidden head^T + bias into out [n, V], accumulated and rounded in out's dtype."""
    if head.dtype == out.dtype:
        torch.mm(hidden, head.t(), out=out)
    elif head.is_cuda:
        torch.mm(hidden, head.t(), out_dtype=out.dtype, out=out)
    else:  # no such product on a CPU; a product of two bfloat16 is exact in float32
        wide = hidden.to(out.dtype)
        for start in range(0, len(head), _HEAD_ROWS):
            part = slice(start, min(start + _HEAD_ROWS, len(head)))
            torch.mm(wide, head[part].to(out.dtype).t(), out=out[:, part])
    if bias is not None:
        out.add_(bias)


def _metrics(student: Tensor, dpo: Tensor, other: Tensor | None, beta: float) -> dict[str, Tensor]:
    """Values of rows of logits [n, V] that training does not need; see `AlignmentSums`.

    sum_v q (log pi_d - log pi_o) is read off the difference of the logits, which is 0 where a model bans a token.
    """
    log_q, log_d = log_softmax_rows(student, 1.0), log_softmax_rows(dpo, 1.0)
    kl_dpo = reverse_kl(log_q, log_d, DivergenceOptions())
    if other is None:
        return {"kl_dpo": kl_dpo}
    difference = logit_difference(dpo, other)
    constant = torch.logsumexp(dpo, -1) - torch.logsumexp(other, -1)
    log_ratio = torch.linalg.vecdot(log_q.exp_(), difference) - constant
    dpo_log_ratio = torch.linalg.vecdot(log_d.exp_(), difference) - constant
    return {
        "kl_dpo": kl_dpo,
        "kl_other": kl_dpo + log_ratio,  # log q - log pi_o = (log q - log pi_d) + (log pi_d - log pi_o)
        "reward": beta * log_ratio,
        "dpo_reward": beta * dpo_log_ratio,
    }


def _loss_block(
    student: Tensor, target: Teacher, row_weight: Tensor, contrast: Contrast, need_gradient: bool
) -> dict[str, Tensor]:
    """Values of a block of rows; its logits [n, V] are replaced by the gradient of the weighted loss, if wanted."""
    options = DivergenceOptions(contrast.temperature)
    if need_gradient:
        kl, gradient = divergence_value_and_gradient(student, target.logits, divergence="reverse_kl", options=options)
        torch.mul(gradient, (target.weight * row_weight).unsqueeze(-1), out=student)
    else:
        logits = (student, target.logits)
        kl = reverse_kl(*(log_softmax_rows(one, contrast.temperature) for one in logits), options)
    values = {"kl": kl, "weight": target.weight, "loss": target.weight * kl}
    return values | {"alpha": target.alpha, "tvd": target.tvd}


@torch.no_grad()
def _run(work: _Work, needs: Needs) -> tuple[Result, dict[str, Tensor]]:
    """Go once through all rows; return the gradients asked for and the values of the rows."""
    sides = [side for side in (work.student, work.dpo, work.other) if side is not None]
    task = Task(work.student, None, work.chunk)
    result = Result(task, needs)
    num_rows, columns = len(work.row_weight), work.num_columns
    values = {name: torch.empty_like(work.row_weight) for name in work.names}
    chunk = min(work.chunk, max(1, num_rows))
    buffers = [work.row_weight.new_empty(chunk, len(side.head)) for side in sides]
    with torch.autocast(work.student.hidden.device.type, enabled=False):
        for start in range(0, num_rows, chunk):
            stop = min(start + chunk, num_rows)
            logits = [buffer[: stop - start] for buffer in buffers]
            for side, out in zip(sides, logits, strict=True):
                _write_logits(side.hidden[start:stop], side.head, side.bias, out)
            for block in block_ranges(stop - start, columns, logits[0].device):
                rows = slice(start + block.start, start + block.stop)
                student, dpo, *others = (out[block, :columns] for out in logits)
                found = _block_values(work, rows, student, dpo, others[0] if others else None, needs.student)
                for name, value in found.items():
                    values[name][rows] = value
            if needs.student:
                gradient = logits[0]
                gradient[:, columns:] = 0.0  # padded rows of the head
                accumulate_student(task, result, gradient.to(work.student.head.dtype), start, stop)
    return result, values


def _block_values(
    work: _Work, rows: slice, student: Tensor, dpo: Tensor, other: Tensor | None, need_gradient: bool
) -> dict[str, Tensor]:
    """Values of a block of rows; its student logits become their gradient."""
    # before the loss, which overwrites the student's logits
    found = _metrics(student, dpo, other, work.contrast.beta) if work.want_metrics else {}
    target = teacher(dpo, other, work.contrast)
    return found | _loss_block(student, target, work.row_weight[rows], work.contrast, need_gradient)


class _AlignmentSum(torch.autograd.Function):
    """Runs the pass in the forward, gradients included; differentiable in the three tensors of the student."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, work: _Work
    ) -> tuple[Tensor, ...]:
        needed = ctx.needs_input_grad
        result, rows = _run(work, Needs(needed[0], needed[1], needed[2]))
        # Gradients only: a head gathered for the forward pass (ZeRO-3) is gone by the backward pass.
        ctx.save_for_backward(
            result.student_hidden,
            None if result.student_head is None else result.student_head.to(head.dtype),
            None if result.student_bias is None else result.student_bias.to(head.dtype),
        )
        ctx.mark_non_differentiable(*rows.values())
        return torch.dot(rows["loss"], work.row_weight), *rows.values()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *(None if saved is None else saved * grad_total for saved in ctx.saved_tensors), None
