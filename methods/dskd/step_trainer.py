"""Trains DSKD's module step by step, with the exact means of `normaliser: global`."""

from __future__ import annotations

import torch
from tenfold.platform.training.step_trainer import Batches, StepTrainer


class DistillationTrainer(StepTrainer):
    """Counts over a step what its exact means are divided by.

    Counts depend on the weights of the moment (which tokens agree), and those stay as they are within a step: what is
    counted before its forward passes holds for all of them, whatever the accumulation and the ranks.
    """

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
