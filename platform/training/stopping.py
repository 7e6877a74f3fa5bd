"""Callbacks of a worker: its heartbeats, and stopping after a step that all ranks agree on, with a checkpoint."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed
from tenfold.platform.training.heartbeat import Heart
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

CHECK_SECONDS = 1.0  # between two agreements, about
MAX_STEPS = 100  # between two agreements: steps may become slower


class HeartCallback(TrainerCallback):
    """Tells the heart of every event of the Trainer.

    Args:
        heart: this rank's.
    """

    def __init__(self, heart: Heart) -> None:
        self._heart = heart


def _beating(name: str) -> Any:
    def told(
        self: HeartCallback, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._heart.event(name, state.global_step)

    return told


for _name in [name for name in vars(TrainerCallback) if name.startswith("on_") and name != "on_init_end"]:
    setattr(HeartCallback, _name, _beating(_name))


class StopCallback(TrainerCallback):
    """Ends training after a step, with a checkpoint of it, when the driver wishes so.

    The ranks must stop after the same step, and hear of the wish at different times: rank 0 decides. It tells the
    others after steps that all of them know beforehand, about a second apart, since telling costs a message each.

    Args:
        heart: this rank's.

    Attributes:
        reason: why training has ended early; None when it has not.
    """

    def __init__(self, heart: Heart) -> None:
        self.reason: str | None = None
        self._heart = heart
        self._wanted: str | None = None
        self._next = 0
        self._last = (0, time.monotonic())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Agree for the first time after the first step."""
        self._next, self._last = state.global_step + 1, (state.global_step, time.monotonic())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a checkpoint when the ranks have agreed to stop here; the last step ends training anyway."""
        if state.global_step < self._next or state.global_step >= state.max_steps:
            return
        self._agree(args, state)
        # evaluation and checkpoint of a whole epoch come when it ends
        epoch_ends = state.epoch is not None and state.epoch == int(state.epoch)
        if self._wanted and not (epoch_ends and "epoch" in (args.eval_strategy, args.save_strategy)):
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End training: the checkpoint is there."""
        if self._wanted:
            self.reason = self._wanted
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the checkpoint of a whole epoch; one that is left in the middle is neither evaluated nor kept again."""
        if self.reason:
            control.should_log = control.should_evaluate = control.should_save = False
        elif self._wanted:
            control.should_save = True

    def _agree(self, args: TrainingArguments, state: TrainerState) -> None:
        step, now = state.global_step, time.monotonic()
        seconds = (now - self._last[1]) / max(step - self._last[0], 1)
        wish = self._heart.wish
        decided = [int(wish is not None), min(max(int(CHECK_SECONDS / max(seconds, 1e-6)), 1), MAX_STEPS)]
        if args.world_size > 1:
            told = torch.tensor(decided, device=args.device)
            torch.distributed.broadcast(told, src=0)
            decided = told.tolist()
        self._last, self._next = (step, now), step + decided[1]
        if decided[0]:
            self._wanted = wish or "stop"
