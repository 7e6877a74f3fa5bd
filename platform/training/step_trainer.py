"""A Trainer in which all batches of an optimizer step are made ready before its first forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tenfold.platform.training.trainer import Trainer

Batches = list[dict[str, Any]]


class StepTrainer(Trainer):
    """Checks the models' heads before the first step, and lets subclasses see a whole step at once.

    What depends on the weights of the moment (generated text, counts that exact means are divided by) is made in
    `prepare_step`: the weights stay as they are within a step, whatever the accumulation and the ranks.
    """

    _heads_are_checked = False

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """Return the batches of the next step's forward passes, made ready, and the label tokens of the data.

        Raises:
            ModelError: before the first step: a model's logits are not its head applied to the last hidden state.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and not self._heads_are_checked:
            self.model.check_heads()
            self._heads_are_checked = True
        return self.prepare_step(batches), num_items

    def prepare_step(self, batches: Batches) -> Batches:
        """Return what this rank's forward passes of one step are given; by default the batches themselves."""
        return batches
