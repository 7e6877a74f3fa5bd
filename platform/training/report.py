"""The callback between Trainer and platform: metrics to MLflow, checkpoints and reports to Ray Train."""

from __future__ import annotations

import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed
from tenfold.platform.storage import Storage
from tenfold.platform.tracking import Tracker
from tenfold.platform.training.checkpoints import (
    DEFAULT_JOB,
    CheckpointRecord,
    checkpoint_name,
    file_digests,
    prune,
    write_manifest,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

RENAMED = {"loss": "train/loss", "learning_rate": "train/lr", "grad_norm": "train/grad_norm"}
DROPPED = ("epoch", "total_flos", "num_input_tokens_seen", "step")


def metric_names(logs: dict[str, Any]) -> dict[str, float]:
    """Rename transformers' metrics to the platform's: `train/...` and `eval/...`; keep only numbers."""
    renamed = {}
    for name, value in logs.items():
        if name in DROPPED or name.startswith("train_") or not isinstance(value, int | float):
            continue
        if name.startswith("eval_"):
            if not name.endswith(("_runtime", "_per_second", "_loss")):
                renamed[f"eval/{name.removeprefix('eval_')}"] = float(value)
        else:
            renamed[RENAMED.get(name, f"train/{name}")] = float(value)
    return renamed


class ReportCallback(TrainerCallback):
    """Runs on every rank, since Ray's `report` is a barrier; only rank 0 has a tracker and writes manifests.

    Args:
        storage: the run's storage.
        job: folder of the training job in it.
        attempt: folder of this start of the job.
        tracker: where metrics go; None on ranks above 0.
        keep_last: newest checkpoints to keep.
        best_metric: smaller is better; its checkpoint is kept as well.
        again: an earlier start may have logged the first steps of this one: they are logged once.
    """

    def __init__(
        self,
        storage: Storage,
        job: str,
        attempt: str,
        tracker: Tracker | None,
        *,
        keep_last: int,
        best_metric: str,
        again: bool = False,
    ):
        self._storage, self._job, self._attempt, self._tracker = storage, job, attempt, tracker
        self._keep_last, self._best_metric, self._again = keep_last, best_metric, again
        name = job.rpartition("/")[2]
        self._label = "" if name == DEFAULT_JOB else f"{name}: "
        self._metrics: dict[str, float] = {}
        self._evaluated_at = -1
        self._tokens_before, self._time_before = 0.0, time.monotonic()
        self._start: tuple[int, float] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clocks of speed and remaining time."""
        self._start = (state.global_step, time.monotonic())
        self._tokens_before, self._time_before = float(state.num_input_tokens_seen), time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log, evaluate and save at the last step, whatever the strategies say."""
        if state.global_step >= state.max_steps:
            control.should_log = True
            if args.eval_strategy != "epoch":
                control.should_evaluate = True
                control.should_save = args.save_strategy != "epoch"
        if control.should_save:
            # statistics are averaged since the last report: a resumed run must start with the same empty window
            control.should_log = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save at the end of training where evaluation goes by epochs; log with every checkpoint."""
        if state.global_step >= state.max_steps and args.eval_strategy == "epoch":
            control.should_save = True
        control.should_log = control.should_log or control.should_save

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Send training metrics to MLflow and say how far the training is."""
        metrics = metric_names(logs or {})
        if "train/loss" in metrics:
            now, tokens = time.monotonic(), float(state.num_input_tokens_seen)
            if now > self._time_before and tokens > self._tokens_before:
                metrics["train/tokens_per_s"] = (tokens - self._tokens_before) / (now - self._time_before)
            self._tokens_before, self._time_before = tokens, now
            self._metrics.update(metrics)
            self._say(state, metrics)
        if self._tracker is not None and metrics:
            self._tracker.log_metrics(metrics, step=state.global_step, again=self._again)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Report an evaluation to Ray; with a checkpoint due, `on_save` reports both at once."""
        self._metrics.update(metric_names(metrics or {}))
        self._evaluated_at = state.global_step
        if self._tracker is not None:
            shown = {name: value for name, value in self._metrics.items() if name.startswith("eval/")}
            values = " ".join(f"{k} {v:.4g}" for k, v in shown.items())
            logger.info("%sstep %d: %s", self._label, state.global_step, values)
        self._time_before = time.monotonic()  # evaluation time is not training time
        if not control.should_save:
            ray.train.report({**self._metrics, "step": state.global_step})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Upload this rank's files; when all ranks' have arrived, rank 0 writes the manifest and prunes."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        digests: list[Any] = [None] * args.world_size
        mine = file_digests(folder)
        if args.world_size > 1:
            torch.distributed.all_gather_object(digests, mine)
        else:
            digests = [mine]
        name = checkpoint_name(state.global_step)
        ray.train.report(
            {**self._metrics, "step": state.global_step},
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
            checkpoint_dir_name=name,
            # files on a disk are copied by Ray, whose ranks may fill one folder at the same time
            checkpoint_upload_fn=None if self._storage.is_local else self._upload,
        )
        if state.is_world_process_zero:
            # a checkpoint between two evaluations has none: the earlier one's must not make it the best
            is_evaluated = self._evaluated_at == state.global_step
            metrics = {k: v for k, v in self._metrics.items() if is_evaluated or not k.startswith("eval/")}
            record = CheckpointRecord(
                path=f"{self._job}/{self._attempt}/{name}",
                step=state.global_step,
                world_size=args.world_size,
                metrics={k: v for k, v in metrics.items() if math.isfinite(v)},
                files={path: digest for rank in digests for path, digest in rank.items()},
            )
            write_manifest(self._storage, record)
            prune(self._storage, self._job, keep_last=self._keep_last, metric=self._best_metric)
        shutil.rmtree(folder, ignore_errors=True)
        self._time_before = time.monotonic()

    def _upload(self, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """Copy this rank's files as every other file of a run is copied: Ray's own way has one try."""
        path = f"{self._job}/{self._attempt}/{name}"
        self._storage.upload(checkpoint.path, path)
        return ray.train.Checkpoint(f"{self._storage.root}/{path}", self._storage.filesystem)

    def _say(self, state: TrainerState, metrics: dict[str, float]) -> None:
        if self._tracker is None or self._start is None:
            return
        done, since = state.global_step - self._start[0], time.monotonic() - self._start[1]
        left = (state.max_steps - state.global_step) * since / max(done, 1)
        logger.info(
            "%sstep %d/%d loss %.4f lr %.2e%s, about %d:%02d left",
            self._label,
            state.global_step,
            state.max_steps,
            metrics["train/loss"],
            metrics.get("train/lr", math.nan),
            f" {metrics['train/tokens_per_s']:.0f} tokens/s" if "train/tokens_per_s" in metrics else "",
            *divmod(int(left), 60),
        )
