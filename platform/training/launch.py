"""Start a training job on Ray Train, or pick up where an earlier start of it stopped."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tenfold.platform.errors import CheckpointError, ClusterError, StorageError, TenfoldError
from tenfold.platform.training.checkpoints import (
    ATTEMPT,
    DEFAULT_JOB,
    CheckpointRecord,
    attempt_folders,
    best_of,
    damage,
    list_checkpoints,
)
from tenfold.platform.training.curves import figure, training_log
from tenfold.platform.training.deepspeed_config import deepspeed_config
from tenfold.platform.training.heartbeat import start_pulse
from tenfold.platform.training.options import TrainingOptions
from tenfold.platform.training.room import Room, worker_resources
from tenfold.platform.training.sizes import usable_sizes
from tenfold.platform.training.universal import convert_on_cluster, discard, resume_point
from tenfold.platform.training.watch import ControllerHandle, Watch
from tenfold.platform.training.worker import WorkerContext, worker_loop

if TYPE_CHECKING:
    from tenfold.platform.context import RunContext

logger = logging.getLogger(__name__)

PLACEMENT_VARIABLE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
PLACEMENT_SECONDS = 60.0
MAX_CAUSE = 600  # characters of an error in a message; the whole is in a file


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
    name: str = DEFAULT_JOB


@dataclass(frozen=True)
class TrainingResult:
    """Where a finished job's best checkpoint is; the folder loads with `from_pretrained`."""

    best: CheckpointRecord


def train_job(context: RunContext, job: TrainingJob) -> TrainingResult:
    """Run a job to its end and return its checkpoints; a job that has ended is not run again.

    Lost and hanging workers and lost nodes are replaced, `compute.max_failures` times; an error of the program ends
    the job at once. A job with a range of workers takes as many as there is room for, and a notice that a node leaves
    makes it go on elsewhere: both from a checkpoint of the last step, and neither counts as a failure.

    Raises:
        ClusterError: too many losses, no room, or a worker's error that is no TenfoldError.
        TenfoldError: what a worker raised, as it was.
    """
    storage, folder = context.storage, f"train/{job.name}"
    done = f"{folder}/done.json"
    if storage.exists(done):
        logger.info("%s: already trained, using its checkpoints", job.name)
    else:
        _fit(context, job, folder)
        discard(storage, folder)
        storage.write_text(done, json.dumps({"job": job.name}))
    result = _result(context, job, folder)
    watched = job.options.metric_for_best
    context.log_figure(job.name, figure(training_log(storage, folder), watched, result.best.step))
    return result


def _fit(context: RunContext, job: TrainingJob, folder: str) -> None:
    """Start the job, again after every loss and for every change of size.

    Ray's own retries would repeat errors of the program as well, and its own elastic scaling starts workers again
    from the newest checkpoint, however old.
    """
    import ray
    import ray.train
    from ray.exceptions import RayError

    compute, losses, running = context.compute, 0, time.monotonic()
    sizes = usable_sizes(compute, job.options.gradient_accumulation_steps)
    pulse = start_pulse()
    try:
        with Room(compute, sizes, job.name) as room:
            while True:
                watch = _next_watch(context, job, folder, pulse, room)
                try:
                    if not _fit_once(context, job, folder, watch):
                        return
                    logger.info("%s: all workers have stopped after a step; going on from there", job.name)
                except (ray.train.TrainingFailedError, RayError) as error:
                    if _found_no_room(error):
                        if room.is_elastic and time.monotonic() - running < compute.start_timeout_s:
                            continue  # what was free has gone meanwhile: another size may fit
                        raise room.missing(watch.size) from error
                    losses += 1
                    if losses > compute.max_failures or not (watch.finding or is_loss(error)):
                        raise _explain(context, job, error, watch.finding) from error
                    logger.warning(
                        "%s: %s. Starting again from the newest checkpoint; %d more such losses are allowed",
                        job.name,
                        watch.finding or _first_cause(error),
                        compute.max_failures - losses,
                    )
                running = time.monotonic()
    finally:
        with contextlib.suppress(RayError, RuntimeError):  # Ray may be gone
            ray.kill(pulse)


def _next_watch(context: RunContext, job: TrainingJob, folder: str, pulse: Any, room: Room) -> Watch:
    """Choose the size of the next start, as soon as there is room for one."""
    earlier = attempt_folders(context.storage, folder)
    last = int(earlier[-1].removeprefix(ATTEMPT)) if earlier else 0
    size = room.wait() if room.is_elastic else room.largest_ever
    return Watch(pulse, f"{ATTEMPT}{last + 1:03d}", size, room, context.compute)


def _fit_once(context: RunContext, job: TrainingJob, folder: str, watch: Watch) -> bool:
    """Start the job once; return whether it has been stopped before its end."""
    import ray.train
    from ray.train.torch import TorchTrainer

    storage, compute = context.storage, context.compute
    resume = resume_point(
        storage, folder, watch.size, functools.partial(convert_on_cluster, cpus=compute.cpus_per_worker)
    )
    callbacks: list[Any] = [ControllerHandle(watch.pulse, watch.attempt)]
    if context.trial is not None:
        callbacks.append(context.trial.callback())
    payload = {
        "build": f"{job.build.__module__}:{job.build.__qualname__}",
        "config": job.config,
        "options": job.options.model_dump(mode="json"),
        "deepspeed": deepspeed_config(compute.deepspeed),
        "seed": context.seed,
        "storage": storage.uri,
        "job": folder,
        "attempt": watch.attempt,
        "resume_point": asdict(resume) if resume else None,
        "pulse": watch.pulse,
        "max_workers": compute.max_workers,
        "shares": watch.room.shares,
        "tracker": asdict(context.tracker.spec()),
        # several jobs of one MLflow run have the same metrics, and each begins with step 1
        "again": watch.attempt != f"{ATTEMPT}001" and list(storage.list("train")) == [job.name],
        "cpus_per_worker": compute.cpus_per_worker,
        "gpus_per_worker": compute.gpus_per_worker,
        "quiet": context.trial is not None,
    }
    trainer = TorchTrainer(
        worker_loop,
        train_loop_config=payload,
        scaling_config=ray.train.ScalingConfig(
            num_workers=watch.size, use_gpu=compute.gpus_per_worker > 0, resources_per_worker=worker_resources(compute)
        ),
        run_config=ray.train.RunConfig(
            name=watch.attempt,
            storage_path=f"{storage.root}/{folder}",
            storage_filesystem=storage.filesystem,
            failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
            callbacks=callbacks,
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]  # Train V2's
        ),
    )
    # Ray's own minute is short for new nodes; a job that can take another size does not wait longer
    patience = min(compute.start_timeout_s, PLACEMENT_SECONDS) if watch.room.is_elastic else compute.start_timeout_s
    os.environ[PLACEMENT_VARIABLE] = f"{patience:g}"
    with _interruptible(), watch:
        ended = trainer.fit().return_value  # type: ignore[attr-defined]  # Train V2's
    return bool(ended and ended.get("stopped"))


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Make Ctrl-C a KeyboardInterrupt again: Ray's handler stops the workers, leaves with exit code 0, and stays."""
    if threading.current_thread() is not threading.main_thread():
        yield  # as in a Tune trial; Ray installs no handler there
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        raise KeyboardInterrupt from stop
    finally:
        signal.signal(signal.SIGINT, before)


def is_loss(error: Exception) -> bool:
    """Say whether workers, nodes or the contact between them were lost: a new start may end well.

    What the training function itself raises is a TenfoldError, a RuntimeError or, for lost contact, a ConnectionError
    (see `worker_loop`). The failure of a rank that Ray cannot reach has a class of Ray's own.
    """
    import ray.train
    from ray.exceptions import RayError

    if isinstance(error, ray.train.PreemptionError):
        return True  # the node went before the workers had got to the end of a step
    failures = _failures(error)
    if failures:
        return any(not isinstance(failure, TenfoldError | RuntimeError) for failure in failures.values())
    return isinstance(getattr(error, "controller_failure", error), RayError)


def _found_no_room(error: Exception) -> bool:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError)


def _failures(error: Exception) -> dict[int, BaseException]:
    return getattr(error, "worker_failures", None) or {}


def _first_cause(error: Exception) -> str:
    """Return the cause in one line: a dead worker comes before the survivors that lost contact with it."""
    failures = _failures(error)
    order = sorted(failures, key=lambda rank: (isinstance(failures[rank], ConnectionError), rank))
    text = str(failures[order[0]] if order else error)
    if order and not isinstance(failures[order[0]], TenfoldError | RuntimeError | ConnectionError):
        # Ray's own, which says where the process was before it says what happened
        text = f"rank {order[0]} was lost: {text.strip().splitlines()[-1]}"
    text = " ".join(text.split())
    return text if len(text) <= MAX_CAUSE else f"{text[:MAX_CAUSE]} ..."


def _explain(context: RunContext, job: TrainingJob, error: Exception, finding: str | None = None) -> TenfoldError:
    """Put the first cause into one sentence and the whole trace into a file of the run.

    Args:
        context: the run's.
        job: which has failed.
        error: what Ray says.
        finding: why the watch has ended it.
    """
    for cause in (getattr(error, "controller_failure", None), *_failures(error).values()):
        if isinstance(cause, StorageError):
            return cause  # no trace can be stored either
    path = f"errors/{job.name}.txt"
    context.storage.write_text(path, str(error))
    failures = _failures(error)
    for rank in sorted(failures):
        cause = failures[rank]
        if isinstance(cause, TenfoldError):
            return cause
    return ClusterError(
        f"training {job.name!r} failed: {finding or _first_cause(error)}. The whole trace is in "
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
