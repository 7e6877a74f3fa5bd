"""DSKD and DSKDv2 with one tokenizer: projectors between the two hidden spaces.

Legend as in `module`.
"""

from __future__ import annotations

from typing import Any

import torch
from tenfold.methods.dskd import objective
from tenfold.methods.dskd.loss_parts import Loss, LossSettings, Mask, StepCounts, best_tokens
from tenfold.methods.dskd.module import DistillationModule, Reading
from tenfold.methods.dskd.projectors import inverse_gram, teacher_to_student
from tenfold.platform.data.positions import next_labels
from tenfold.platform.models.sharding import gathered
from torch import Tensor, nn
from torch.nn.functional import linear


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
        settings: LossSettings,
    ) -> Loss:
        mask, targets, prediction = self._mask("none"), student.targets, None
        if student.is_generated or mask == "agreement":
            prediction = teacher.predicted(settings.num_columns, settings.chunk)
        if student.is_generated and prediction is not None:
            # nobody wrote what the student generated: the teacher's prediction stands for the gold label
            targets = prediction
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
            mask=mask,
            teacher_prediction_N=prediction,
            student_bias_V=student.bias,
            teacher_bias_V=teacher.bias,
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
        """Return S = (W_s^T W_t)(W_t^T W_t)^{-1} of the current student head (v2); computed once if that is frozen."""
        passes = int(self.passes.item())
        if passes == 0 or (head.requires_grad and passes % self._options.s2t_refresh_every == 0):
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

    @torch.no_grad()
    def counted(self, batch: dict[str, Tensor], *, is_generated: bool) -> dict[str, Tensor]:
        """See the base class. The weights stay as they are within a step, so that the counts hold for its passes.

        The student does not run for it, and what is found out here is passed on: the teacher's states, its
        predictions, and which rows L_stu counts.
        """
        if self._options.normaliser == "local":
            return {}
        targets, mask = next_labels(batch["labels"]), self._step_mask(is_generated)
        with (
            self._read_teacher(batch, batch) as teacher,
            self._student_weights() as (head, bias),
            gathered([self.t2s.weight]),
        ):
            prediction = teacher.predicted(self._teacher_columns, self._settings.chunk)
            rows, reference = self._compared(teacher.rows, prediction, targets, mask, batch)
            found = {"teacher_hidden": teacher.rows, "teacher_prediction": prediction}
            if mask != "none" and self._options.spaces != "teacher":
                # not the layer itself: this is outside the forward pass, whose order of layers ZeRO-3 records
                projected = linear(rows.to(self.t2s.weight.dtype), self.t2s.weight)
                found["t2s_matching"] = best_tokens(projected, head, bias, self._settings) == reference
        matching = found["t2s_matching"].sum() if "t2s_matching" in found else 0
        found["step_counts"] = torch.tensor([len(targets), len(reference), matching], device=targets.device).float()
        return found

    def _step_mask(self, is_generated: bool) -> Mask:
        return self._mask("agreement")

    def _compared(
        self, teacher_rows: Tensor, prediction: Tensor, targets: Tensor, mask: Mask, batch: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the teacher's states that are compared, and the tokens that these rows are masked by."""
        return teacher_rows, targets if mask == "gold" else prediction

    @staticmethod
    def _step_counts(teaching: dict[str, Tensor], items: Tensor) -> StepCounts | None:
        """Return the counts of the whole step, where `counted` was asked for them."""
        if "step_counts" not in teaching:
            return None
        labels, pairs, matching = teaching["step_counts"]
        return StepCounts(pairs, matching, items / labels.clamp(min=1), teaching.get("t2s_matching"))


class DualSpaceV2(DynamicProjectors):
    """DSKDv2, one tokenizer (arXiv 2504.11426)."""

    def _distil(
        self,
        student: Reading,
        teacher: Reading,
        teaching: dict[str, Tensor],
        items: Tensor,
        settings: LossSettings,
    ) -> Loss:
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
            agreement_threshold=self._options.agreement_threshold,
            spaces=self._options.spaces,
            mask=self._step_mask(student.is_generated),
            counts=self._step_counts(teaching, items),
            student_bias_V=student.bias,
            teacher_bias_V=teacher.bias,
        )

    def _step_mask(self, is_generated: bool) -> Mask:
        # no agreement mask on the student's own text (v2)
        return self._mask("none" if is_generated else "agreement")


@torch.no_grad()
def fit_projector(t2s: nn.Linear, student_rows: Tensor, teacher_rows: Tensor) -> None:
    """Set P = A_t A_s^+ (v2's initialisation), and a bias to 0."""
    initial = teacher_to_student(student_rows, teacher_rows)
    with gathered([t2s.weight, t2s.bias]):
        t2s.weight.copy_(initial.T)
        if t2s.bias is not None:
            t2s.bias.zero_()
