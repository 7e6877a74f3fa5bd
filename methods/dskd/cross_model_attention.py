"""Cross-model attention (CMA): tokens of two different tokenizers read each other (DSKD, arXiv 2406.17328).

Legend: B batch, n and m padded lengths of the student's and the teacher's sequences, d and D their hidden sizes, V_s
and V_t rows of their embeddings, N and M label positions of the batch (row by row, left to right). T stands for n or
m, V for V_s or V_t, X for a size of features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tenfold.platform.data.positions import IGNORED
from torch import Tensor
from torch.nn.functional import embedding

# Added to the scores of masked pairs. A row that is masked everywhere is moved as a whole and stays finite.
_MASKED_SCORE = -100_000.0


@dataclass(frozen=True)
class Sequences:
    """What one model read, shifted: position i holds the i-th token and predicts labels[:, i].

    Attributes:
        hidden: h [B, T, X], last hidden states after the final norm.
        input_ids: x int64 [B, T], `ids[:, :-1]`.
        labels: y int64 [B, T], `ids[:, 1:]`, -100 = not counted.
        embedding: E [V, X], input embedding; a constant.
    """

    hidden: Tensor
    input_ids: Tensor
    labels: Tensor
    embedding: Tensor

    @property
    def mask(self) -> Tensor:
        """Label positions, bool [B, T]."""
        return self.labels != IGNORED

    def embedded_tokens(self) -> tuple[Tensor, Tensor]:
        """Embeddings [B, T, X] of the current and of the next token; masked positions read row 0."""
        rows = self.embedding.detach()
        current, following = (ids.masked_fill(~self.mask, 0) for ids in (self.input_ids, self.labels))
        return embedding(current, rows), embedding(following, rows)


def normalise(values_BTX: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """N(x) = x / std(x), one unbiased standard deviation over all entries of the micro-batch.

    Args:
        values_BTX: x.
        mask_BT: take the deviation over these positions only. None counts all, padding included, as the official code
            does: a sample's loss then depends on its neighbours and on the padding.

    Returns:
        [B, T, X]; x itself where there is no deviation to divide by (fewer than two entries, or all equal).
    """
    counted = (values_BTX if mask_BT is None else values_BTX[mask_BT]).to(_wide(values_BTX))
    if counted.numel() < 2:
        return values_BTX
    std = counted.std()
    return (values_BTX / torch.where(std > 0, std, 1.0)).to(values_BTX.dtype)


def attention_scores(query_BnX: Tensor, key_BmX: Tensor, student_mask_Bn: Tensor, teacher_mask_Bm: Tensor) -> Tensor:
    """A = Q k^T / sqrt(X), -100000 on pairs of which one is no label position; [B, n, m] float32 or wider."""
    wide = _wide(query_BnX)
    with torch.autocast(query_BnX.device.type, enabled=False):
        scores = query_BnX.to(wide) @ key_BmX.to(wide).mT / math.sqrt(key_BmX.shape[-1])
    allowed = student_mask_Bn[:, :, None] & teacher_mask_Bm[:, None, :]
    return scores + _MASKED_SCORE * (~allowed).to(wide)


def cross_model_attention(
    student: Sequences,
    teacher: Sequences,
    query: Callable[[Tensor], Tensor],
    t2s: Callable[[Tensor], Tensor],
    s2t: Callable[[Tensor], Tensor],
    *,
    masked_std: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return what both readings give at the label positions: only these rows need to meet a head.

    The student's query is its current and next token's embedding, not normalised; the teacher's key is the same of the
    teacher, normalised after the concatenation; the values are P(N(h_t) + N(E_t[next])) and S(h_s). One score matrix
    serves both directions. The label of a position is part of its query: that is intended. Gradients reach the three
    projectors and the student's hidden states, never an embedding or the teacher.

    Args:
        student: its sequences, [B, n].
        teacher: its sequences of the same samples, [B, m].
        query: Q, [..., 2d] -> [..., 2D].
        t2s: P, [..., D] -> [..., d].
        s2t: S, [..., d] -> [..., D].
        masked_std: take N's deviation over label positions only. The result then depends on nothing but the label
            positions (unless a sample has none on one side), so that states of these alone will do.

    Returns:
        t2s hidden states [N, d] at the student's label positions, and s2t hidden states [M, D] at the teacher's.
    """
    mask = teacher.mask if masked_std else None
    current, following = teacher.embedded_tokens()
    key = normalise(torch.cat([current, following], dim=-1), mask)
    teacher_value = t2s(normalise(teacher.hidden.detach(), mask) + normalise(following, mask))
    student_value = s2t(student.hidden)
    queries = query(torch.cat(student.embedded_tokens(), dim=-1))
    scores_Bnm = attention_scores(queries, key, student.mask, teacher.mask)
    to_student = scores_Bnm.softmax(dim=2).to(teacher_value.dtype) @ teacher_value
    to_teacher = scores_Bnm.softmax(dim=1).mT.to(student_value.dtype) @ student_value
    return to_student[student.mask], to_teacher[teacher.mask]


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
