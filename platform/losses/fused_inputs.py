"""Checks of what the fused losses are given, and the selection of the rows that count."""

from collections.abc import Sequence

import torch
from tenfold.platform.losses.chunked_rows import Side, TargetTerm
from torch import Tensor

IGNORED = -100
"""Target of a row that does not count."""

_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def make_side(name: str, hidden: Tensor, head: Tensor, bias: Tensor | None) -> Side:
    """Pair hidden states [N, D] with the head [V, D] and bias [V] that read them, cast as autocast would.

    Raises:
        ValueError: shapes or dtypes do not fit, naming `name`.
    """
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1] or head.shape[0] == 0:
        raise ValueError(
            f"{name}: hidden states have shape {tuple(hidden.shape)}, the head {tuple(head.shape)}. "
            "Needed are [rows, size] and [vocabulary, size] with the same size: select the counted positions first."
        )
    if bias is not None and bias.shape != head.shape[:1]:
        raise ValueError(
            f"{name}: the bias has shape {tuple(bias.shape)}; a head of shape {tuple(head.shape)} needs "
            f"{head.shape[0]} entries."
        )
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, head, bias = hidden.to(dtype), head.to(dtype), None if bias is None else bias.to(dtype)
    given = [tensor.dtype for tensor in (hidden, head, bias) if tensor is not None]
    if len(set(given)) != 1 or given[0] not in _DTYPES:
        raise ValueError(
            f"{name}: hidden states, head and bias are {', '.join(map(str, given))}. One dtype is needed: bfloat16, "
            "float32 or float64. (float16 cannot hold the gradient of a single logit.)"
        )
    return Side(hidden, head, bias)


def cut_head(head: Tensor, bias: Tensor | None, num_columns: int | None) -> tuple[Tensor, Tensor | None]:
    """Keep the head's first num_columns rows, all of them if it is None.

    Raises:
        ValueError: the head has fewer rows.
    """
    if num_columns is None or num_columns == head.shape[0]:
        return head, bias
    if not 1 <= num_columns <= head.shape[0]:
        raise ValueError(f"num_columns is {num_columns}; a head of shape {tuple(head.shape)} has 1..{head.shape[0]}.")
    return head[:num_columns], None if bias is None else bias[:num_columns]


def compared_columns(student_head: Tensor, teacher_head: Tensor, num_columns: int | None) -> int:
    """Return the number of vocabulary columns that a divergence of the two heads compares.

    Raises:
        ValueError: num_columns is None and the vocabularies differ, or it exceeds one of them.
    """
    shapes = f"student head has shape {tuple(student_head.shape)}, teacher head {tuple(teacher_head.shape)}"
    if student_head.ndim != 2 or teacher_head.ndim != 2:
        raise ValueError(f"{shapes}; both must be [vocabulary, hidden size].")
    student_rows, teacher_rows = student_head.shape[0], teacher_head.shape[0]
    if num_columns is None and student_rows != teacher_rows:
        raise ValueError(
            f"{shapes}: the vocabularies differ. If both have the same tokenizer, set num_columns to its size."
        )
    if num_columns is not None and not 1 <= num_columns <= min(student_rows, teacher_rows):
        raise ValueError(f"num_columns is {num_columns}; {shapes}, which allows 1..{min(student_rows, teacher_rows)}.")
    return student_rows if num_columns is None else num_columns


def check_chunk(chunk: int) -> None:
    """Raise ValueError unless the number of rows per chunk is positive."""
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it is a number of rows and must be at least 1.")


def row_weight(name: str, weight: Tensor | None, side: Side) -> Tensor:
    """Return one constant weight for each of the side's rows, [N] float32 or wider; ones if none are given.

    Raises:
        ValueError: the weights have another shape.
    """
    hidden = side.hidden
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if weight is None:
        return torch.ones(hidden.shape[0], dtype=dtype, device=hidden.device)
    if weight.shape != hidden.shape[:1]:
        raise ValueError(
            f"the row weights of {name} have shape {tuple(weight.shape)}; hidden states of shape "
            f"{tuple(hidden.shape)} need {hidden.shape[0]} weights."
        )
    return weight.detach().to(device=hidden.device, dtype=dtype)


def target_term(name: str, side: Side, targets: Tensor, weight: Tensor | None) -> TargetTerm:
    """Return the cross entropy term of the side's rows, in which ignored rows have the weight 0.

    Raises:
        ValueError: targets or weights do not fit the rows, or a target is outside the vocabulary.
    """
    if targets.shape != side.hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"{name}: {targets.dtype} of shape {tuple(targets.shape)} given; torch.int64 of shape "
            f"{tuple(side.hidden.shape[:1])} is needed, one target for each row of the hidden states."
        )
    is_counted = targets != IGNORED
    vocabulary = side.head.shape[0]
    wrong = targets[is_counted & ((targets < 0) | (targets >= vocabulary))]
    if wrong.numel() > 0:
        raise ValueError(
            f"{name}: {wrong[0].item()} is outside the vocabulary of {vocabulary} entries. "
            f"Use {IGNORED} for rows that do not count."
        )
    weights = row_weight(name, weight, side)
    return TargetTerm(targets.clamp(min=0), weights.masked_fill(~is_counted, 0.0))


def live_rows(weights: Sequence[Tensor]) -> Tensor | None:
    """Return the indices of the rows with any weight, None if that is all of them."""
    is_live = torch.stack([weight != 0 for weight in weights]).any(0)
    rows = is_live.nonzero().squeeze(-1)
    return None if rows.numel() == is_live.numel() else rows


def select_side(side: Side, rows: Tensor | None) -> Side:
    """Keep only these rows; differentiable. None keeps all without a copy."""
    return side if rows is None else Side(side.hidden.index_select(0, rows), side.head, side.bias)


def select_targets(term: TargetTerm | None, rows: Tensor | None) -> TargetTerm | None:
    """Keep only these rows of a term, if there is one."""
    return term if term is None or rows is None else TargetTerm(term.targets[rows], term.weight[rows])
