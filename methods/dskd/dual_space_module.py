"""DSKD and DSKDv2 with one tokenizer: projectors between the two hidden spaces.

Legend as in `module`.
"""

from __future__ import annotations

from typing import Any

import torch
from tenfold.methods.dskd import objective
from tenfold.methods.dskd.module import DistillationModule, Reading, gathered
from tenfold.methods.dskd.projectors import inverse_gram, teacher_to_student
from torch import Tensor, nn


class DualSpaceV1(DistillationModule):
    """P and S are trained linear layers with bias (arXiv 2406.17328)."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        with self._heads() as (student_head, teacher_head):
            D, d = teacher_head.shape[1], student_head.shape[1]
            self.t2s = nn.Linear(D, d)
            self.s2t = nn.Linear(d, D)
            if self._options.projector_init == "pinv":
                columns = self._settings.num_columns
                fit_projector(self.t2s, student_head[:columns], teacher_head[:columns])

    def _distil(
        self,
        student: Reading,
        teacher: Reading,
        teaching: dict[str, Tensor],
        items: Tensor,
        settings: objective.LossSettings,
    ) -> objective.Loss:
        targets = student.targets
        if student.is_generated:
            # nobody wrote what the student generated: the teacher's prediction stands for the gold label
            targets = teacher.predicted(settings.num_columns, settings.chunk)
        return objective.dual_space_v1(
            student.rows,
            student.head,
            teacher.rows,
            teacher.head,
            self.t2s(teacher.rows.to(self.t2s.weight.dtype)),
            self.s2t(student.rows).to(teacher.head.dtype),
            targets,
            items,
            settings,
        )


class DynamicProjectors(DistillationModule):
    """v2's projectors: a trained P without bias that starts as a pseudo-inverse, and S, which follows the heads.

    S is no parameter: it is recomputed from the current student head (arXiv 2504.11426).
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        with self._heads() as (student_head, teacher_head):
            D, d = teacher_head.shape[1], student_head.shape[1]
            self.t2s = nn.Linear(D, d, bias=False)
            student_rows, teacher_rows = self._common_rows(student_head, teacher_head)
            if self._options.projector_init != "random":
                fit_projector(self.t2s, student_rows, teacher_rows)
            # buffers, so that a resumed run goes on with the same projector between two refreshes
            self.register_buffer("inverse_gram", inverse_gram(teacher_rows).float(), persistent=False)
            self.register_buffer("s2t_matrix", torch.zeros(d, D))
            self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def _common_rows(self, student_head: Tensor, teacher_head: Tensor) -> tuple[Tensor, Tensor]:
        """Return W_s[O_s] and W_t[O_t], the rows of the tokens that both vocabularies have."""
        columns = self._settings.num_columns
        kept = columns if self._options.topk_vocab == -1 else min(columns, self._options.topk_vocab)
        return student_head[:kept], teacher_head[:kept]

    @torch.no_grad()
    def _current_s2t(self, head: Tensor, teacher_head: Tensor) -> Tensor:
        """Return S = (W_s^T W_t)(W_t^T W_t)^{-1}, recomputed from the current student head (v2)."""
        if self.passes.item() % self._options.s2t_refresh_every == 0:
            student_rows, teacher_rows = self._common_rows(head, teacher_head)
            cross = (student_rows.T.to(teacher_rows.dtype) @ teacher_rows).float()
            self.s2t_matrix.copy_(cross @ self.inverse_gram.float())
        self.passes += 1
        return self.s2t_matrix

    def _project(self, student_rows: Tensor, teacher_rows: Tensor, head: Tensor, teacher_head: Tensor) -> Any:
        """Return h_t P and h_s S."""
        projected_teacher = self.t2s(teacher_rows.to(self.t2s.weight.dtype))
        matrix = self._current_s2t(head, teacher_head).to(student_rows.dtype)
        return projected_teacher, (student_rows @ matrix).to(teacher_head.dtype)


class DualSpaceV2(DynamicProjectors):
    """DSKDv2, one tokenizer (arXiv 2504.11426)."""

    def _distil(
        self,
        student: Reading,
        teacher: Reading,
        teaching: dict[str, Tensor],
        items: Tensor,
        settings: objective.LossSettings,
    ) -> objective.Loss:
        projected_teacher, projected_student = self._project(student.rows, teacher.rows, student.head, teacher.head)
        return objective.dual_space_v2(
            student.rows,
            student.head,
            teacher.rows,
            teacher.head,
            projected_teacher,
            projected_student,
            teacher.prediction,
            student.targets,
            items,
            settings,
            micro_batches=self.micro_batches,
            # no agreement mask on the student's own text (v2): no share is that small
            agreement_threshold=-1.0 if student.is_generated else self._options.agreement_threshold,
            spaces=self._options.spaces,
        )


@torch.no_grad()
def fit_projector(t2s: nn.Linear, student_rows: Tensor, teacher_rows: Tensor) -> None:
    """Set P = A_t A_s^+ (v2's initialisation), and a bias to 0."""
    initial = teacher_to_student(student_rows, teacher_rows)
    with gathered([t2s.weight] if t2s.bias is None else [t2s.weight, t2s.bias]):
        t2s.weight.copy_(initial.T)
        if t2s.bias is not None:
            t2s.bias.zero_()
