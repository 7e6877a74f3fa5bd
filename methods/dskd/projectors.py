"""Projectors between the two hidden spaces (DSKDv2, arXiv 2504.11426, projector initialisation).

Legend: V vocabulary, d student's and D teacher's hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_CONDITION = 1e10


def solve_gram(head_VX: Tensor, cross_XY: Tensor) -> Tensor:
    """Return (W^T W)^{-1} C in float64 by Cholesky; by the pseudo-inverse where the Gram matrix is near singular.

    Args:
        head_VX: W, [V, X].
        cross_XY: C, [X, Y].

    Returns:
        [X, Y] float64.
    """
    gram = head_VX.double().T @ head_VX.double()
    values = torch.linalg.eigvalsh(gram)
    if values[0] > 0 and values[-1] / values[0] <= MAX_CONDITION:
        return torch.cholesky_solve(cross_XY.double(), torch.linalg.cholesky(gram))
    return torch.linalg.pinv(gram, hermitian=True) @ cross_XY.double()


def teacher_to_student(student_head_Vd: Tensor, teacher_head_VD: Tensor) -> Tensor:
    """Return P [D, d] = A_t A_s^+, for which h_t W_t^T ~ (h_t P) W_s^T (v2); float64.

    With A = W^T this is W_t^T W_s (W_s^T W_s)^{-1}: no [V, d] pseudo-inverse is formed.
    """
    cross = student_head_Vd.double().T @ teacher_head_VD.double()
    return solve_gram(student_head_Vd, cross).T.contiguous()


def student_to_teacher(student_head_Vd: Tensor, teacher_head_VD: Tensor) -> Tensor:
    """Return S [d, D] = A_s A_t^+, the constant projector of student states (v2); float64."""
    cross = teacher_head_VD.double().T @ student_head_Vd.double()
    return solve_gram(teacher_head_VD, cross).T.contiguous()


def inverse_gram(head_VX: Tensor) -> Tensor:
    """Return (W^T W)^{-1} [X, X] in float64: with it S = (W_s^T W_t) (W_t^T W_t)^{-1} is one product a step."""
    return solve_gram(head_VX, torch.eye(head_VX.shape[1], dtype=torch.float64, device=head_VX.device))
