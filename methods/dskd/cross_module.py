"""DSKD with two tokenizers, and its competitors: what reads the teacher's positions, and where they come from.

Legend as in `module`; K pairs of positions.
"""

from __future__ import annotations

from typing import Any

import torch
from tenfold.methods.dskd import baselines, cross_vocabulary
from tenfold.methods.dskd.cross_model_attention import Sequences, cross_model_attention
from tenfold.methods.dskd.dual_space_module import DynamicProjectors, fit_projector
from tenfold.methods.dskd.loss_parts import Loss, LossSettings, Mask
from tenfold.methods.dskd.module import DistillationModule, Reading
from tenfold.platform.data.positions import IGNORED, label_positions
from tenfold.platform.models.sharding import gathered
from torch import Tensor, nn


class CrossModelAttention(DistillationModule):
    """DSKD v1 with cross-model attention: three trained linear layers P, S and Q (arXiv 2406.17328).

    Args:
        overlap: O_s and O_t, entries that both vocabularies have; read for a pseudo-inverse start only.
        teacher_embedding: E_t [V_t, D] with a cached teacher.
        t2s_id: [V_t] the student's label for a teacher's token, -1 = none; read for on-policy passes only.
    """

    def __init__(
        self,
        *args: Any,
        overlap: tuple[Tensor, Tensor],
        teacher_embedding: Tensor | None = None,
        t2s_id: Tensor | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.register_buffer("t2s_id", t2s_id, persistent=False)
        self.register_buffer("teacher_embedding", teacher_embedding, persistent=False)
        with self._heads() as (student_head, teacher_head):
            D, d = teacher_head.shape[1], student_head.shape[1]
            self.t2s = nn.Linear(D, d)
            self.s2t = nn.Linear(d, D)
            self.query = nn.Linear(2 * d, 2 * D)
            if self._options.projector_init == "pinv":
                fit_projector(self.t2s, student_head[overlap[0]], teacher_head[overlap[1]])

    def _distil(
        self,
        student: Reading,
        teacher: Reading,
        teaching: dict[str, Tensor],
        items: Tensor,
        settings: LossSettings,
    ) -> Loss:
        dtype, their_embedding = self.t2s.weight.dtype, self._teacher_inputs()
        with gathered([their_embedding]):
            t2s, s2t = cross_model_attention(
                self._shifted(student, self.exported.get_input_embeddings().weight, dtype),
                self._shifted(teacher, their_embedding, dtype),
                self.query,
                self.t2s,
                self.s2t,
                masked_std=self._options.cma_std == "masked",
            )
        return cross_vocabulary.dual_space_v1_cma(
            student.rows,
            student.head,
            teacher.rows,
            teacher.head,
            t2s,
            s2t.to(teacher.head.dtype),
            self._predicted_labels(student, teacher, teaching) if student.is_generated else student.targets,
            items,
            settings,
            self._teacher_columns,
            mask=self._mask("gold"),
            passes=self.micro_batches if student.is_generated else None,
            student_bias_V=student.bias,
            teacher_bias_V=teacher.bias,
        )

    def _predicted_labels(self, student: Reading, teacher: Reading, teaching: dict[str, Tensor]) -> Tensor:
        """Return the teacher's predictions at aligned positions as the student's tokens [N], -100 = none."""
        own, _, labels = cross_vocabulary.labelled_pairs(
            teaching["student_pairs"],
            teaching["teacher_pairs"],
            teacher.predicted(self._teacher_columns, self._settings.chunk),
            self.t2s_id,
        )
        return torch.full_like(student.targets, IGNORED).index_copy(0, own, labels)

    def _teacher_inputs(self) -> Tensor:
        if self.teacher_embedding is not None:
            return self.teacher_embedding
        return self._live_teacher().get_input_embeddings().weight

    @staticmethod
    def _shifted(read: Reading, embedding: Tensor, dtype: torch.dtype) -> Sequences:
        states = read.padded_states()[:, :-1].to(dtype)
        return Sequences(states, read.input_ids[:, :-1], read.labels[:, 1:], embedding.to(dtype))


class ExactAlignment(DynamicProjectors):
    """DSKDv2 with exact token alignment (arXiv 2504.11426).

    Args:
        overlap: O_s and O_t, entries that both vocabularies have.
        t2s_id: [V_t] the student's label for a teacher's token, -1 = none.
    """

    def __init__(self, *args: Any, overlap: tuple[Tensor, Tensor], t2s_id: Tensor, **kwargs: Any):
        self._overlap = overlap
        super().__init__(*args, **kwargs)
        self.register_buffer("t2s_id", t2s_id, persistent=False)

    def _common_rows(self, student_head: Tensor, teacher_head: Tensor) -> tuple[Tensor, Tensor]:
        own, theirs = (ids.to(student_head.device) for ids in self._overlap)
        return student_head[own], teacher_head[theirs]

    def _distil(
        self,
        student: Reading,
        teacher: Reading,
        teaching: dict[str, Tensor],
        items: Tensor,
        settings: LossSettings,
    ) -> Loss:
        prediction = teacher.predicted(self._teacher_columns, settings.chunk)
        own, theirs, labels = self._labelled_pairs(prediction, teaching)
        rows = teacher.rows[theirs]
        projected_teacher, projected_student = self._project(student.rows[own], rows, student.head, teacher.head)
        return cross_vocabulary.dual_space_v2_eta(
            student.rows,
            student.head,
            rows,
            teacher.head,
            projected_teacher,
            projected_student,
            own,
            labels,
            student.targets,
            items,
            settings,
            self._teacher_columns,
            micro_batches=self.micro_batches,
            agreement_threshold=self._options.agreement_threshold,
            spaces=self._options.spaces,
            mask=self._mask("agreement"),
            counts=self._step_counts(teaching, items),
            student_bias_V=student.bias,
            teacher_bias_V=teacher.bias,
        )

    def _labelled_pairs(self, prediction: Tensor, teaching: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return cross_vocabulary.labelled_pairs(
            teaching["student_pairs"], teaching["teacher_pairs"], prediction, self.t2s_id
        )

    def _compared(
        self, teacher_rows: Tensor, prediction: Tensor, targets: Tensor, mask: Mask, batch: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        own, theirs, labels = self._labelled_pairs(prediction, batch)
        return teacher_rows[theirs], targets[own] if mask == "gold" else labels


class OverlapKD(DistillationModule):
    """One divergence over the common entries, at aligned positions (KDFlow, arXiv 2603.01875).

    Args:
        overlap: O_s and O_t.
    """

    def __init__(self, *args: Any, overlap: tuple[Tensor, Tensor], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._overlap = overlap

    def _distil(
        self,
        student: Reading,
        teacher: Reading,
        teaching: dict[str, Tensor],
        items: Tensor,
        settings: LossSettings,
    ) -> Loss:
        own, theirs = (ids.to(student.rows.device) for ids in self._overlap)
        return cross_vocabulary.overlap_kd(
            student.rows,
            student.head,
            teacher.rows[teaching["teacher_pairs"]],
            teacher.head[theirs],
            teaching["student_pairs"],
            own,
            student.targets,
            items,
            settings,
            student_bias_V=student.bias,
            teacher_overlap_bias_v=None if teacher.bias is None else teacher.bias[theirs],
        )


class ULD(DistillationModule):
    """Universal logit distillation (arXiv 2402.12030)."""

    def _distil(
        self,
        student: Reading,
        teacher: Reading,
        teaching: dict[str, Tensor],
        items: Tensor,
        settings: LossSettings,
    ) -> Loss:
        own, theirs = baselines.uld_pairs(
            label_positions(student.labels).sum(1), label_positions(teacher.labels).sum(1)
        )
        return baselines.uld(
            student.rows,
            student.head,
            teacher.rows,
            teacher.head,
            own,
            theirs,
            student.targets,
            items,
            settings,
            self._teacher_columns,
            student_bias_V=student.bias,
            teacher_bias_V=teacher.bias,
        )


class MinED(DistillationModule):
    """Minimum edit distance (FuseLLM, arXiv 2401.10491).

    Args:
        student_to_teacher: [V_s], the teacher's token whose logit a student's token gets, -1 = none.
    """

    def __init__(self, *args: Any, student_to_teacher: Tensor, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_buffer("student_to_teacher", student_to_teacher, persistent=False)

    def _distil(
        self,
        student: Reading,
        teacher: Reading,
        teaching: dict[str, Tensor],
        items: Tensor,
        settings: LossSettings,
    ) -> Loss:
        rows, bias = baselines.mined_teacher_head(teacher.head, self.student_to_teacher, teacher.bias)
        return baselines.mined(
            student.rows,
            student.head,
            teacher.rows,
            rows,
            bias,
            teaching["teacher_position"],
            student.targets,
            items,
            settings,
            student_bias_V=student.bias,
        )
