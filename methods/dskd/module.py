"""The module that DSKD trains: the student, the projectors, and the loss on the rows that carry a label.

Legend: B batch, T padded length, N label positions, V vocabulary, d student's and D teacher's hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tenfold.methods.dskd import objective
from tenfold.methods.dskd.config import DSKDConfig
from tenfold.methods.dskd.projectors import inverse_gram, teacher_to_student
from tenfold.platform.data.positions import label_positions, next_labels
from tenfold.platform.losses.divergence import DivergenceOptions
from tenfold.platform.losses.fused_linear import linear_cross_entropy_rows
from tenfold.platform.models.hidden import final_hidden
from tenfold.platform.training.module import TrainedModule
from torch import Tensor, nn


@contextlib.contextmanager
def gathered(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Make whole parameters of what ZeRO-3 has sharded; does nothing for ordinary ones. All ranks must enter."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


class DistillationModule(TrainedModule):
    """Student and projectors with one of DSKD's objectives.

    Args:
        student: the trained model.
        config: DSKD's options.
        num_columns: entries of the shared tokenizer.
        teacher_head: W_t [V, D] with a cached teacher.
        teacher: the frozen model itself, with a live teacher; kept out of this module's state.
    """

    def __init__(
        self,
        student: nn.Module,
        config: DSKDConfig,
        *,
        num_columns: int,
        teacher_head: Tensor | None = None,
        teacher: nn.Module | None = None,
    ):
        super().__init__(student)
        self._options = config
        # in a tuple, so that the teacher's weights are neither trained nor saved with this module
        self._teacher = (teacher,)
        self.register_buffer("teacher_head", teacher_head, persistent=False)
        self._settings = objective.LossSettings(
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
        if config.objective in ("dual_space_v1", "dual_space_v2"):
            self._add_projectors()

    def _add_projectors(self) -> None:
        with self._teacher_weight() as teacher_head:
            student_head = self.exported.get_output_embeddings().weight
            with gathered([student_head]), torch.no_grad():
                D, d = teacher_head.shape[1], student_head.shape[1]
                self.t2s = nn.Linear(D, d, bias=self._options.objective == "dual_space_v1")
                if self._options.objective == "dual_space_v1":
                    self.s2t = nn.Linear(d, D)
                    return
                columns = self._settings.num_columns
                initial = teacher_to_student(student_head[:columns], teacher_head[:columns])
                with gathered([self.t2s.weight]):
                    self.t2s.weight.copy_(initial.T)
                # buffers, so that a resumed run goes on with the same projector between two refreshes
                self.register_buffer("inverse_gram", inverse_gram(teacher_head[:columns]).float(), persistent=False)
                self.register_buffer("s2t_matrix", torch.zeros(d, D))
                self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    @contextlib.contextmanager
    def _teacher_weight(self) -> Iterator[Tensor]:
        if self.teacher_head is not None:
            yield self.teacher_head
            return
        weight = self._live_teacher().get_output_embeddings().weight
        with gathered([weight]):
            yield weight.detach()

    def _live_teacher(self) -> Any:
        teacher = self._teacher[0]
        return getattr(teacher, "module", teacher)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        teacher_hidden: Tensor | None = None,
        teacher_prediction: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Any]:
        """Return loss and statistics; in eval mode the student's own next-token loss per row.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T].
            labels: int64 [B, T], -100 = not counted.
            teacher_hidden: [N, D] h_t at the label positions, with a cached teacher.
            teacher_prediction: int64 [N] argmax of z_t, with a cached teacher.
            num_items_in_batch: label tokens of the global batch.
        """
        positions, targets = label_positions(labels), next_labels(labels)
        hidden = final_hidden(self.exported, input_ids, attention_mask)[positions]
        head = self.exported.get_output_embeddings().weight
        if not self.training:
            return self._evaluation(hidden, head, targets, positions)
        items = torch.as_tensor(
            len(targets) if num_items_in_batch is None else num_items_in_batch, device=hidden.device
        ).float()
        if not self._options.needs_teacher:
            loss = objective.sft(hidden, head, targets, items, self._settings.chunk)
        else:
            with self._teacher_weight() as teacher_head:
                if teacher_hidden is None:
                    teacher_hidden = self._live_hidden(input_ids, attention_mask)[positions]
                teacher_hidden = teacher_hidden.to(teacher_head.dtype)
                loss = self._distil(hidden, head, teacher_hidden, teacher_head, teacher_prediction, targets, items)
        return {"loss": loss.total, "statistics": loss.parts}

    def _distil(
        self,
        hidden: Tensor,
        head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        teacher_prediction: Tensor | None,
        targets: Tensor,
        items: Tensor,
    ) -> objective.Loss:
        settings, options = self._settings, self._options
        if options.objective == "kl":
            return objective.vanilla_kd(hidden, head, teacher_hidden, teacher_head, targets, items, settings)
        projected_teacher = self.t2s(teacher_hidden.to(self.t2s.weight.dtype))
        if options.objective == "dual_space_v1":
            projected_student = self.s2t(hidden).to(teacher_head.dtype)
            return objective.dual_space_v1(
                hidden,
                head,
                teacher_hidden,
                teacher_head,
                projected_teacher,
                projected_student,
                targets,
                items,
                settings,
            )
        projected_student = (hidden @ self._current_s2t(head, teacher_head).to(hidden.dtype)).to(teacher_head.dtype)
        return objective.dual_space_v2(
            hidden,
            head,
            teacher_hidden,
            teacher_head,
            projected_teacher,
            projected_student,
            teacher_prediction,
            targets,
            items,
            settings,
            micro_batches=self.micro_batches,
            agreement_threshold=options.agreement_threshold,
            spaces=options.spaces,
        )

    @torch.no_grad()
    def _current_s2t(self, head: Tensor, teacher_head: Tensor) -> Tensor:
        """Return S = (W_s^T W_t)(W_t^T W_t)^{-1}, recomputed from the current student head (v2)."""
        if self.passes.item() % self._options.s2t_refresh_every == 0:
            columns = self._settings.num_columns
            cross = (head[:columns].T.to(teacher_head.dtype) @ teacher_head[:columns]).float()
            self.s2t_matrix.copy_(cross @ self.inverse_gram.float())
        self.passes += 1
        return self.s2t_matrix

    @torch.no_grad()
    def _live_hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return final_hidden(self._live_teacher(), input_ids, attention_mask)

    @torch.no_grad()
    def _evaluation(self, hidden: Tensor, head: Tensor, targets: Tensor, positions: Tensor) -> dict[str, Any]:
        losses = linear_cross_entropy_rows(hidden, head, targets, chunk=self._settings.chunk)
        rows = positions.nonzero()[:, 0]
        nll = losses.new_zeros(len(positions)).index_add_(0, rows, losses)
        counts = positions.sum(1)
        mean = losses.sum() / max(len(targets), 1)
        return {"loss": mean, "statistics": {}, "nll": nll, "num_labels": counts}
