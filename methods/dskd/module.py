"""The module that DSKD trains: the student, what reads the teacher, and the loss on the rows that carry a label.

Legend: B batch, n and m padded lengths of the student's and the teacher's sequences (equal for one tokenizer), N and M
their label positions, V vocabulary, d student's and D teacher's hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from tenfold.methods.dskd import objective
from tenfold.methods.dskd.config import DSKDConfig
from tenfold.methods.dskd.loss_parts import Loss, LossSettings, Mask
from tenfold.platform.data.positions import label_positions, next_labels
from tenfold.platform.losses.divergence import DivergenceOptions
from tenfold.platform.losses.fused_linear import linear_argmax, linear_cross_entropy_rows
from tenfold.platform.models.heads import head_of
from tenfold.platform.models.hidden import final_hidden
from tenfold.platform.models.sharding import gathered
from tenfold.platform.training.label_rows import check_whole_head
from tenfold.platform.training.module import TrainedModule
from torch import Tensor, nn


@dataclass(frozen=True)
class Reading:
    """What one model made of a micro-batch.

    Attributes:
        states: [B, T, X] last hidden states; None where only those of the label positions were kept.
        rows: [R, X] those of the R label positions.
        head: [V, X].
        bias: [V] of the head; None: it has none.
        input_ids: int64 [B, T].
        labels: int64 [B, T].
        targets: int64 [R] next tokens.
        prediction: int64 [R] argmax of the logits, where it is known already.
        is_generated: the student wrote the text itself, so that the targets are no gold labels.
    """

    states: Tensor | None
    rows: Tensor
    head: Tensor
    bias: Tensor | None
    input_ids: Tensor
    labels: Tensor
    targets: Tensor
    prediction: Tensor | None = None
    is_generated: bool = False

    def predicted(self, num_columns: int, chunk: int) -> Tensor:
        """Return the argmax over the tokenizer's entries, int64 [R]."""
        if self.prediction is not None:
            return self.prediction
        return linear_argmax(self.rows, self.head, bias=self.bias, num_columns=num_columns, chunk=chunk)

    def padded_states(self) -> Tensor:
        """Return [B, T, X]; zeros where the states were not kept."""
        if self.states is not None:
            return self.states
        padded = self.rows.new_zeros(*self.labels.shape, self.rows.shape[1])
        padded[label_positions(self.labels)] = self.rows
        return padded


class DistillationModule(TrainedModule):
    """Student with plain SFT or vanilla distillation; subclasses add what reads the teacher otherwise.

    Args:
        student: the trained model.
        config: DSKD's options.
        num_columns: entries of the student's tokenizer.
        num_teacher_columns: entries of the teacher's; None: the same tokenizer.
        teacher_head: W_t [V, D] with a cached teacher.
        teacher_bias: [V] of that head, where it has one.
        teacher: the frozen model itself, with a live teacher; kept out of this module's state.
    """

    def __init__(
        self,
        student: nn.Module,
        config: DSKDConfig,
        *,
        num_columns: int,
        num_teacher_columns: int | None = None,
        teacher_head: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        teacher: nn.Module | None = None,
    ):
        super().__init__(student)
        self._options = config
        self._teacher_columns = num_columns if num_teacher_columns is None else num_teacher_columns
        # in a tuple, so that the teacher's weights are neither trained nor saved with this module
        self._teacher = (teacher,)
        self.register_buffer("teacher_head", teacher_head, persistent=False)
        self.register_buffer("teacher_bias", teacher_bias, persistent=False)
        self._settings = LossSettings(
            divergence=config.divergence,
            options=DivergenceOptions(
                temperature=config.kd_temperature,
                teacher_temperature=config.teacher_temperature,
                skew_lambda=config.skew_lambda,
                adaptive_alpha=config.adaptive_alpha,
                js_beta=config.js_beta,
            ),
            kd_rate=config.kd_rate,
            num_columns=num_columns,
            chunk=config.loss_chunk_rows,
        )

    @contextlib.contextmanager
    def _heads(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield W_s and W_t, whole also under ZeRO-3; for setting up what depends on both."""
        with self._teacher_weights() as (teacher_head, _), self._student_weights() as (head, _), torch.no_grad():
            yield head, teacher_head

    @contextlib.contextmanager
    def _student_weights(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield W_s and its bias, whole also under ZeRO-3; outside the forward pass, which gathers by itself."""
        head, bias = head_of(self.exported)
        with gathered([head, bias]):
            yield head, bias

    @contextlib.contextmanager
    def _teacher_weights(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        if self.teacher_head is not None:
            yield self.teacher_head, self.teacher_bias
            return
        head, bias = head_of(self._live_teacher())
        with gathered([head, bias]):
            yield head.detach(), None if bias is None else bias.detach()

    def check_heads(self) -> None:
        """Make sure that the losses read what the models predict: the student, and a live teacher.

        Raises:
            ModelError: a model's logits are not its head applied to the last hidden state.
        """
        check_whole_head(self.exported)
        if self._teacher[0] is not None:
            check_whole_head(self._teacher[0])

    def _live_teacher(self) -> Any:
        teacher = self._teacher[0]
        return getattr(teacher, "module", teacher)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        generated: dict[str, Tensor] | None = None,
        **teaching: Tensor,
    ) -> dict[str, Any]:
        """Return loss and statistics; in eval mode the student's own next-token loss per row.

        Args:
            input_ids: int64 [B, n].
            attention_mask: [B, n].
            labels: int64 [B, n], -100 = not counted.
            num_items_in_batch: label tokens of the global batch.
            generated: on-policy: the batch that the divergences are taken on, with its own `num_items`; the cross
                entropy stays that of the data.
            **teaching: `teacher_hidden` [M, D] and `teacher_prediction` [M] with a cached teacher; `teacher_labels`,
                `teacher_input_ids`, `teacher_attention_mask` [B, m] with another tokenizer; pairs of positions.
        """
        student = self._read_student(input_ids, attention_mask, labels)
        if not self.training:
            return self._evaluation(student)
        items = self._items(student, num_items_in_batch)
        if not self._options.needs_teacher:
            loss = self._cross_entropy(student, items)
        elif generated is None:
            loss = self._taught(student, attention_mask, teaching, items, self._settings)
        else:
            loss = self._on_policy(student, items, generated)
        return {"loss": loss.total, "statistics": loss.parts}

    def _read_student(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Reading:
        states = final_hidden(self.exported, input_ids, attention_mask)
        # after the pass: under ZeRO-3 that gives back what a tied embedding shares with the head
        head, bias = head_of(self.exported)
        return Reading(states, states[label_positions(labels)], head, bias, input_ids, labels, next_labels(labels))

    @staticmethod
    def _items(student: Reading, given: Tensor | int | None) -> Tensor:
        """Return Z; 1 where nothing is counted, so that a step without any label is 0."""
        number = len(student.targets) if given is None else given
        return torch.as_tensor(number, device=student.rows.device).float().clamp(min=1.0)

    def _cross_entropy(self, student: Reading, items: Tensor) -> Loss:
        return objective.sft(
            student.rows, student.head, student.targets, items, self._settings.chunk, bias_V=student.bias
        )

    def _taught(
        self,
        student: Reading,
        attention_mask: Tensor,
        teaching: dict[str, Tensor],
        items: Tensor,
        settings: LossSettings,
    ) -> Loss:
        """(1 - alpha) CE + alpha KD on one batch, with the alpha of `settings`."""
        own = {"input_ids": student.input_ids, "attention_mask": attention_mask, "labels": student.labels}
        with self._read_teacher(own, teaching) as teacher:
            return self._distil(student, teacher, teaching, items, settings)

    @contextlib.contextmanager
    def _read_teacher(self, own: dict[str, Tensor], teaching: dict[str, Tensor]) -> Iterator[Reading]:
        """Yield what the teacher makes of the student's sequences `own`, or of its own ones in `teaching`."""
        ids, mask, labels = (
            teaching.get(f"teacher_{name}", own[name]) for name in ("input_ids", "attention_mask", "labels")
        )
        states, rows = None, teaching.get("teacher_hidden")
        if rows is None:
            # before the head is gathered: under ZeRO-3 a forward pass gives back what it shares with the head
            states = self._live_states(ids, mask)
            rows = states[label_positions(labels)]
        prediction = teaching.get("teacher_prediction")
        with self._teacher_weights() as (head, bias):
            yield Reading(states, rows.to(head.dtype), head, bias, ids, labels, next_labels(labels), prediction)

    def _on_policy(self, student: Reading, items: Tensor, generated: dict[str, Tensor]) -> Loss:
        """(1 - alpha) CE on the data + alpha KD on what the student generated (v2)."""
        alpha, batch = self._settings.kd_rate, dict(generated)
        ids, mask, labels = (batch.pop(name) for name in ("input_ids", "attention_mask", "labels"))
        own_items = self._items(student, batch.pop("num_items"))
        ce = self._cross_entropy(student, items)
        read = replace(self._read_student(ids, mask, labels), is_generated=True)
        kd = self._taught(read, mask, batch, own_items, replace(self._settings, kd_rate=1.0))
        parts = {f"on_policy_{name}": part for name, part in kd.parts.items() if name != "ce"}
        return Loss((1 - alpha) * ce.total + alpha * kd.total, ce.parts | parts)

    def _distil(
        self,
        student: Reading,
        teacher: Reading,
        teaching: dict[str, Tensor],
        items: Tensor,
        settings: LossSettings,
    ) -> Loss:
        return objective.vanilla_kd(
            student.rows,
            student.head,
            teacher.rows,
            teacher.head,
            student.targets,
            items,
            settings,
            student_bias_V=student.bias,
            teacher_bias_V=teacher.bias,
        )

    def _mask(self, default: Mask) -> Mask:
        """Return which rows L_stu counts."""
        return default if self._options.t2s_mask == "auto" else self._options.t2s_mask

    def counted(self, batch: dict[str, Tensor], *, is_generated: bool) -> dict[str, Tensor]:
        """Return what exact means over a step need of a batch before its first forward pass.

        Args:
            batch: as `forward` takes it, or its `generated`.
            is_generated: the latter.

        Returns:
            Nothing where every sum is divided by Z. Else what `forward` takes beside the batch; its `step_counts`,
            float [3] of label tokens, compared rows and those that L_stu counts, are of this batch and are to be
            replaced by their sums over all batches of the step of this kind.
        """
        return {}

    @torch.no_grad()
    def _live_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return final_hidden(self._live_teacher(), input_ids, attention_mask)

    @torch.no_grad()
    def _evaluation(self, student: Reading) -> dict[str, Any]:
        losses = linear_cross_entropy_rows(
            student.rows, student.head, student.targets, bias=student.bias, chunk=self._settings.chunk
        )
        positions = label_positions(student.labels)
        nll = losses.new_zeros(len(positions)).index_add_(0, positions.nonzero()[:, 0], losses)
        mean = losses.sum() / max(len(student.targets), 1)
        return {"loss": mean, "statistics": {}, "nll": nll, "num_labels": positions.sum(1)}
