"""Trains DSKD's module step by step: all batches of a step are made ready before its first forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tenfold.platform.training.trainer import Trainer

Batches = list[dict[str, Any]]


class StepTrainer(Trainer):
    """Checks the models' heads before the first step, and counts over a step what its exact means are divided by.

    Counts depend on the weights of the moment (which tokens agree), and those stay as they are within a step: what is
    counted before its forward passes holds for all of them, whatever the accumulation and the ranks.
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
        """Add the step's counts to the batches that need them."""
        found = []
        for batch in batches:
            read = self._prepare_inputs(batch.get("generated", batch))
            with self.accelerator.autocast():
                found.append(self.model.counted(read, is_generated="generated" in batch))
        kinds = ["generated" in batch for batch in batches]
        if not any(found):
            return batches
        sums = torch.zeros(2, 3, device=self.args.device)
        for kind, known in zip(kinds, found, strict=True):
            sums[int(kind)] += known["step_counts"]
        sums = self.accelerator.reduce(sums, reduction="sum")
        found = [known | {"step_counts": sums[int(kind)]} for kind, known in zip(kinds, found, strict=True)]
        return [
            {**batch, "generated": batch["generated"] | known} if kind else {**batch, **known}
            for batch, kind, known in zip(batches, kinds, found, strict=True)
        ]
