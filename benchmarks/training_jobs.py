"""The same training job in a bare loop, in a Trainer, and as the platform runs it, for benchmarks/training.py.

All take the same rows in the same order, BATCH of them a step, and are timed by windows of several steps; the first
window warms up.
"""

import json
import multiprocessing
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from reporting import median
from training_steps import SEED, Batches, States, StepProcess, Work, timed, training_rows

BATCH = 16  # 8 rows on each of the demo's 2 workers


@dataclass(frozen=True)
class Schedule:
    """Steps of a job: `windows` times `steps` of them."""

    windows: int
    steps: int

    def batches(self, window: int, part: int = 0, parts: int = 1) -> Batches:
        """Return the rows of each step of a window; with `parts` ranks those of rank `part`, as Trainer deals them."""
        size = BATCH // parts
        first = range(window * self.steps, (window + 1) * self.steps)
        return [range(step * BATCH + part * size, step * BATCH + (part + 1) * size) for step in first]


@dataclass
class JobTimes:
    """Speed of a job in each window, warm-up included.

    Attributes:
        rates: tokens per second.
        start_s: seconds from the call to the first step, where they were taken.
        first_loss: mean loss of the first window, where it was taken.
    """

    rates: list[float] = field(default_factory=list)
    start_s: float | None = None
    first_loss: float | None = None

    def rate(self) -> float:
        """Return the median without the first window."""
        return median(self.rates[1:])


def window_tokens(states: States, schedule: Schedule) -> list[int]:
    """Return the tokens of each window."""
    lengths = training_rows(states.config())["length"]
    return [
        sum(lengths[row] for rows in schedule.batches(window) for row in rows) for window in range(schedule.windows)
    ]


def bare_loops(states: States, schedule: Schedule, tokens: list[int]) -> tuple[JobTimes, JobTimes]:
    """Time one bare loop on one core, and two at once on a core each that share the rows and exchange nothing.

    The second is what two workers reach with nothing to send, to wait for or to run beside them. Each updates all
    weights, while ZeRO-2 shares that work, so it is no strict bound.
    """
    work = Work("tenfold", "kl", "cached", 1, states)
    single, double = JobTimes(), JobTimes()
    with ExitStack() as stack:
        processes = [stack.enter_context(StepProcess(work)) for _ in range(2)]
        for process in processes:
            process.finish()
        for window in range(schedule.windows):
            seconds, _ = processes[0].ask(timed, schedule.batches(window))
            single.rates.append(tokens[window] / seconds)
            for part, process in enumerate(processes):
                process.begin(timed, schedule.batches(window, part, 2))
            double.rates.append(tokens[window] / max(process.finish()[0] for process in processes))
    return single, double


def job_config(states: States, schedule: Schedule, workers: int) -> Any:
    """Return the demo's options for a job of this schedule: rows in order, no evaluation before the end."""
    training = {
        "per_device_train_batch_size": BATCH // workers,
        "train_sampling_strategy": "sequential",
        "max_steps": schedule.windows * schedule.steps,
        "logging_steps": schedule.steps,
        "eval_strategy": "no",
        "save_strategy": "no",
    }
    # json.dumps: a bare `no` is YAML's False
    changes = [f"config.training.{key}={json.dumps(value)}" for key, value in training.items()]
    return states.config("kl", "config.data.max_validation_rows=16", *changes)


def job_payload(states: States, config: Any) -> dict[str, Any]:
    """Return what DSKD's `build_trainer` reads."""
    return {
        "dskd": config.model_dump(mode="json"),
        "cache": states.cache,
        "alignment": "none",
        "states": states.folder,
    }


def trainer_alone(states: States, schedule: Schedule, tokens: list[int]) -> JobTimes:
    """Time the platform's Trainer on one core without DeepSpeed and Ray, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        ends = pool.apply(_train_alone, (states, schedule))
    seconds = [stop - start for start, stop in pairwise(ends)]
    return JobTimes([count / taken for count, taken in zip(tokens, seconds, strict=True)])


def _train_alone(states: States, schedule: Schedule) -> list[float]:
    """Return when training began and when each window ended."""
    torch.set_num_threads(1)
    from tenfold.platform.training.worker import make_trainer
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step % schedule.steps == 0:
                ends.append(time.perf_counter())

    config = job_config(states, schedule, 1)
    with tempfile.TemporaryDirectory() as folder:
        payload = {
            "build": "tenfold.methods.dskd.trainer:build_trainer",
            "config": job_payload(states, config),
            "options": config.training.model_dump(mode="json"),
            "deepspeed": None,
            "seed": SEED,
            "gpus_per_worker": 0,
        }
        trainer = make_trainer(payload, 0, 1, Path(folder))
        trainer.add_callback(Clock())
        trainer.train()
    return ends


def platform_job(states: States, schedule: Schedule, tokens: list[int], workers: int) -> JobTimes:
    """Time a training job of the platform: Ray Train, DeepSpeed ZeRO-2, one core a worker. Ray must be connected.

    The speed is what the job logs as `train/tokens_per_s`.
    """
    from mlflow import MlflowClient
    from tenfold.methods.dskd.trainer import build_trainer
    from tenfold.platform.context import RunContext
    from tenfold.platform.experiment import Compute
    from tenfold.platform.storage import Storage
    from tenfold.platform.tracking import Tracker
    from tenfold.platform.training.launch import TrainingJob

    config = job_config(states, schedule, workers)
    with tempfile.TemporaryDirectory(prefix="tenfold-benchmark-") as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        tracker = Tracker.start(uri, "benchmark", f"workers-{workers}", spool=Path(folder) / "unsent.jsonl")
        context = RunContext(
            f"workers-{workers}",
            "dskd",
            SEED,
            Compute(workers=workers, cpus_per_worker=1, deepspeed="zero2", max_failures=0),
            Storage(Path(folder) / "run"),
            Storage(states.cache),
            tracker,
        )
        called = time.time()
        context.train(TrainingJob(build_trainer, job_payload(states, config), config.training))
        tracker.finish("FINISHED")
        client = MlflowClient(uri)
        history = client.get_metric_history(tracker.run_id, "train/tokens_per_s")
        losses = client.get_metric_history(tracker.run_id, "train/loss")
    points = sorted(history, key=lambda point: point.step)
    steps = [point.step for point in points]
    if steps != [(window + 1) * schedule.steps for window in range(schedule.windows)]:
        raise RuntimeError(f"{workers} worker(s): train/tokens_per_s was logged at steps {steps}")
    rates = [point.value for point in points]
    began = points[0].timestamp / 1000 - tokens[0] / rates[0]
    return JobTimes(rates, began - called, min(losses, key=lambda point: point.step).value)
