"""The job of the chaos test: a toy that writes down what each step is trained on, and goes no further than it may.

`config`: `rows`, how many there are; `record`, a folder; `permit`, a file with the last step that may begin and the
seconds to wait in each (without it there is no waiting); `attempt`, what a training without Ray calls itself.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import toy_job
from tenfold.platform.training.trainer import Trainer

LOOK_SECONDS = 0.05


class ChaosTrainer(Trainer):
    """Records (attempt, rank, step, rows) before a step, and (attempt, step, loss) after it."""

    plan: dict[str, Any]
    attempt: str

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            step = self.state.global_step + 1
            self._record(step, rows=[row for batch in batches for row in batch["rows"].tolist()])
            self._wait(step)
            self.model.drift += 0.01
        return batches, items

    def log(self, logs, start_time=None):
        if "loss" in logs and self.args.process_index == 0:
            self._record(self.state.global_step, loss=logs["loss"])
        super().log(logs, start_time)

    def _record(self, step, **found):
        folder = Path(self.plan["record"])
        folder.mkdir(parents=True, exist_ok=True)
        who = {"attempt": self.attempt, "rank": self.args.process_index, "size": self.args.world_size}
        with (folder / f"{self.attempt}-{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps({**who, "step": step, **found}) + "\n")

    def _wait(self, step):
        if "permit" not in self.plan:
            return
        while True:
            last, pause = Path(self.plan["permit"]).read_text().split()
            if step <= int(last):
                time.sleep(float(pause))
                return
            time.sleep(LOOK_SECONDS)


def build(context):
    """Return the Trainer of a worker."""
    import ray.train

    trainer = toy_job.build(context, ChaosTrainer)
    trainer.attempt = context.config.get("attempt") or ray.train.get_context().get_experiment_name()
    return trainer


@dataclass
class Attempt:
    """What the workers of one start of the job have written down.

    Attributes:
        size: number of workers.
        rows: step -> rank -> rows, of every step that the rank has begun.
        losses: step -> loss, of every step that is done.
    """

    size: int
    rows: dict[int, dict[int, list[int]]] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)

    def whole_rows(self, step: int) -> list[int] | None:
        """Return the sorted rows of a step; None when not all ranks have begun it."""
        ranks = self.rows.get(step, {})
        return sorted(row for rows in ranks.values() for row in rows) if len(ranks) == self.size else None


def recorded(folder: Path) -> dict[str, Attempt]:
    """Return name -> attempt, oldest first; attempts that have begun no step are left out."""
    found: dict[str, Attempt] = {}
    for file in sorted(Path(folder).glob("*.jsonl")):
        for line in file.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):
                continue  # it is being written
            data = json.loads(line)
            attempt = found.setdefault(data["attempt"], Attempt(data["size"]))
            if "rows" in data:
                attempt.rows.setdefault(data["step"], {})[data["rank"]] = data["rows"]
            else:
                attempt.losses[data["step"]] = data["loss"]
    return dict(sorted(found.items()))
