"""Start a training job on Ray Train, or pick up where an earlier start of it stopped."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tenfold.platform.errors import CheckpointError, ClusterError, TenfoldError
from tenfold.platform.training.checkpoints import CheckpointRecord, best_of, damage, list_checkpoints
from tenfold.platform.training.deepspeed_config import deepspeed_config
from tenfold.platform.training.options import TrainingOptions
from tenfold.platform.training.worker import WorkerContext, worker_loop

if TYPE_CHECKING:
    from tenfold.platform.context import RunContext

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingJob:
    """One training job of a method.

    Attributes:
        build: importable function that makes the Trainer on every worker.
        config: plain data (JSON) for it.
        options: steps, batches, learning rate, ...
        name: folder of the job in the run's storage; a method with several stages names each.
    """

    build: Callable[[WorkerContext], Any]
    config: dict[str, Any]
    options: TrainingOptions
    name: str = "train"


@dataclass(frozen=True)
class TrainingResult:
    """Where a finished job's best checkpoint is; the folder loads with `from_pretrained`."""

    best: CheckpointRecord


def train_job(context: RunContext, job: TrainingJob) -> TrainingResult:
    """Run a job to its end and return its checkpoints; a job that has ended is not run again.

    Raises:
        ClusterError: the workers failed more often than `compute.max_failures` allows.
        TenfoldError: what a worker raised, as it was.
    """
    storage, folder = context.storage, f"train/{job.name}"
    done = f"{folder}/done.json"
    if storage.exists(done):
        logger.info("%s: already trained, using its checkpoints", job.name)
    else:
        _fit(context, job, folder)
        storage.write_text(done, json.dumps({"job": job.name}))
    return _result(context, job, folder)


def _fit(context: RunContext, job: TrainingJob, folder: str) -> None:
    import ray.train
    from ray.train.torch import TorchTrainer

    storage, compute = context.storage, context.compute
    attempt = f"attempt-{len(storage.list(folder)) + 1:03d}"
    callbacks = []
    if context.in_trial:
        from ray.tune.integration.ray_train import TuneReportCallback

        callbacks.append(TuneReportCallback())
    resources = {"CPU": compute.cpus_per_worker}
    if compute.gpus_per_worker:
        resources["GPU"] = compute.gpus_per_worker
    payload = {
        "build": f"{job.build.__module__}:{job.build.__qualname__}",
        "config": job.config,
        "options": job.options.model_dump(mode="json"),
        "deepspeed": deepspeed_config(compute.deepspeed),
        "seed": context.seed,
        "storage": storage.uri,
        "job": folder,
        "attempt": attempt,
        "tracker": asdict(context.tracker.spec()),
        "cpus_per_worker": compute.cpus_per_worker,
        "gpus_per_worker": compute.gpus_per_worker,
    }
    trainer = TorchTrainer(
        worker_loop,
        train_loop_config=payload,
        scaling_config=ray.train.ScalingConfig(
            num_workers=compute.workers, use_gpu=compute.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=attempt,
            storage_path=f"{storage.root}/{folder}",
            storage_filesystem=storage.filesystem,
            failure_config=ray.train.FailureConfig(max_failures=compute.max_failures),
            callbacks=callbacks,
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _explain(context, job, error) from error


def _explain(context: RunContext, job: TrainingJob, error: Exception) -> TenfoldError:
    """Put the first cause into one sentence and the whole trace into a file of the run."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {}) or {}
    path = f"errors/{job.name}.txt"
    context.storage.write_text(path, str(error))
    for rank in sorted(failures):
        cause: BaseException | None = failures[rank]
        while cause is not None:
            if isinstance(cause, TenfoldError):
                return type(cause)(str(cause))
            cause = getattr(cause, "cause", None) or cause.__cause__
    first = (
        f"rank {min(failures)}: {str(failures[min(failures)]).strip().splitlines()[-1]}" if failures else str(error)
    )
    return ClusterError(
        f"training {job.name!r} failed ({len(failures)} worker(s)): {first}. The whole trace is in "
        f"{context.storage.uri_of(path)}. The same command resumes from the newest checkpoint."
    )


def _result(context: RunContext, job: TrainingJob, folder: str) -> TrainingResult:
    records = list_checkpoints(context.storage, folder)
    while (best := best_of(records, job.options.metric_for_best)) is not None:
        problem = damage(context.storage, best)
        if problem is None:
            return TrainingResult(best)
        logger.warning("checkpoint %s: %s. Taking the next best one.", context.storage.uri_of(best.path), problem)
        records.remove(best)
    raise CheckpointError(
        f"{context.storage.uri_of(folder)}: training has ended, but no whole checkpoint is there; run with --new"
    )
