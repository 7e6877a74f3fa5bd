"""What every training worker runs: settle the device, find the checkpoint, build the method's Trainer, train."""

from __future__ import annotations

import importlib
import logging
import os
import re
import socket
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.platform.errors import TenfoldError
from tenfold.platform.storage import Storage
from tenfold.platform.training.options import TrainingOptions
from tenfold.platform.training.sizes import accumulation_at

if TYPE_CHECKING:
    from tenfold.platform.training.trainer import Trainer
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

MIN_LR_RATE = 0.1  # of the peak, at the end of cosine_with_min_lr (AlignDistil, arXiv 2503.02832)

# torch.distributed raises plain RuntimeErrors when a peer or the network is gone; they name the back-end.
LOST_CONTACT = re.compile("gloo|nccl", re.IGNORECASE)


@dataclass(frozen=True)
class WorkerContext:
    """What a method's `build` function gets on every worker.

    Attributes:
        config: the plain data that the job was given.
        options: the job's training options.
        arguments: ready for a Trainer, DeepSpeed settings included. They exist before `build` runs, so that models
            loaded in it are sharded at once under ZeRO-3.
        seed: the experiment's seed.
        rank: this worker's number, from 0.
        world_size: number of workers.
        deepspeed: the DeepSpeed configuration.
    """

    config: dict[str, Any]
    options: TrainingOptions
    arguments: TrainingArguments
    seed: int
    rank: int
    world_size: int
    deepspeed: dict[str, Any]


def worker_loop(payload: dict[str, Any]) -> dict[str, Any]:
    """Train one job on this worker; runs inside Ray Train.

    Args:
        payload: plain data from `launch.train_job`.

    Returns:
        The last step, and why training has `stopped` before its end, if it has (rank 0's is the job's return value).

    Raises:
        TenfoldError: as it was raised.
        ConnectionError: contact with another worker was lost; started again, the same job may end well.
        RuntimeError: any other error, as text.
    """
    try:
        settle_process(payload)
        return _train(payload)
    except TenfoldError:
        raise
    except Exception as error:
        raise plain_error(error) from error


def plain_error(error: Exception) -> Exception:
    """Return an error with the same text that reaches the driver whatever its class was: many cannot be unpickled."""
    from ray.exceptions import RayError

    text = f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}: {type(error).__name__}: {error}"
    lost = isinstance(error, ConnectionError | TimeoutError | RayError) or (
        isinstance(error, RuntimeError) and LOST_CONTACT.search(str(error)) is not None
    )
    return ConnectionError(text) if lost else RuntimeError(text)


def _train(payload: dict[str, Any]) -> dict[str, Any]:
    import ray.train
    from tenfold.platform.tracking import Tracker
    from tenfold.platform.training.heartbeat import Heart
    from tenfold.platform.training.report import ReportCallback
    from tenfold.platform.training.stopping import HeartCallback, StopCallback
    from tenfold.platform.training.universal import ResumePoint

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    heart = Heart(payload["pulse"], payload["attempt"], rank)
    storage = Storage(payload["storage"])
    tracker = Tracker.attach(**payload["tracker"]) if rank == 0 else None
    options = TrainingOptions.model_validate(payload["options"])
    resume = ResumePoint(**payload["resume_point"]) if payload["resume_point"] else None
    with tempfile.TemporaryDirectory(prefix="tenfold-train-") as scratch:
        folder = storage.download(resume.path, Path(scratch) / "resume") if resume else None
        if resume is not None and folder is not None and is_complete(folder):
            return {"step": resume.step}
        trainer = make_trainer(payload, rank, world_size, Path(scratch))
        stop = StopCallback(heart)
        trainer.add_callback(HeartCallback(heart))
        trainer.add_callback(stop)  # before the report, which logs what is saved
        trainer.add_callback(
            ReportCallback(
                storage,
                payload["job"],
                payload["attempt"],
                tracker,
                keep_last=options.save_total_limit,
                best_metric=options.metric_for_best,
                again=payload["again"],
            )
        )
        if rank == 0:
            logger.info("%s", f"resuming after step {resume.step}" if resume else "starting at step 0")
        trainer.train(resume_from_checkpoint=str(folder) if folder else None)
        if tracker is not None:
            tracker.flush()
        heart.close()
        return {"step": trainer.state.global_step, "stopped": stop.reason}


def is_complete(checkpoint: Path) -> bool:
    """Say whether a checkpoint is of the last step: transformers would go on for one more."""
    from transformers.trainer_callback import TrainerState

    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return state.global_step >= state.max_steps


def make_trainer(payload: dict[str, Any], rank: int, world_size: int, scratch: Path) -> Trainer:
    """Return the method's Trainer for this rank; its own files go below `scratch`."""
    import transformers

    options = TrainingOptions.model_validate(payload["options"])
    # made before the models, so that these are sharded while they load under ZeRO-3
    arguments = _training_arguments(payload, options, world_size, scratch / "out")
    build = _import(payload["build"])
    trainer = build(
        WorkerContext(payload["config"], options, arguments, payload["seed"], rank, world_size, payload["deepspeed"])
    )
    trainer.remove_callback(transformers.PrinterCallback)  # ReportCallback says the same, once
    trainer.shares, trainer.planned_accumulation = payload.get("shares"), options.gradient_accumulation_steps
    return trainer


def settle_process(payload: dict[str, Any]) -> None:
    """Set logging, threads and DeepSpeed's device for a worker process; before anything imports deepspeed."""
    logging.basicConfig(
        # trials of a sweep run side by side: the sweep itself says how they go
        level=logging.WARNING if payload.get("quiet") or int(os.environ.get("RANK", "0")) else logging.INFO,
        format="%(message)s",
        stream=sys.stdout,
        force=True,
    )
    for noisy in ("transformers", "deepspeed", "DeepSpeed", "accelerate", "alembic", "mlflow", "httpx", "ray"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # said by libraries about each other at every start
    warnings.filterwarnings("ignore", category=FutureWarning)
    import torch

    on_cpu = payload["gpus_per_worker"] == 0
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(max(1, int(payload["cpus_per_worker"])))
    import deepspeed.ops
    import transformers
    from deepspeed.utils import logger as deepspeed_logger
    from ray.train.v2._internal.execution import context as ray_reports

    deepspeed_logger.setLevel(logging.WARNING)
    ray_reports.logger.setLevel(logging.WARNING)  # named after its file: the level of "ray" does not reach it
    transformers.utils.logging.disable_progress_bar()  # one for every checkpoint
    if on_cpu:
        # DeepSpeed would ask a C++ compiler which of its kernels it can build. Only the shared-memory all-reduce would
        # be used here: compiled at first use (a minute), for the work that gloo does.
        deepspeed.ops.__compatible_ops__ = {}


def _training_arguments(
    payload: dict[str, Any], options: TrainingOptions, world_size: int, folder: Path
) -> TrainingArguments:
    from transformers import TrainingArguments

    schedule = options.lr_scheduler_type
    accumulation = accumulation_at(
        world_size, options.gradient_accumulation_steps, payload.get("max_workers", world_size)
    )
    return TrainingArguments(
        output_dir=str(folder),
        deepspeed=_deepspeed(payload),
        use_cpu=payload["gpus_per_worker"] == 0,
        seed=payload["seed"],
        data_seed=payload["seed"],
        lr_scheduler_type="constant" if schedule == "cosine_to_floor" else schedule,
        lr_scheduler_kwargs={"min_lr_rate": MIN_LR_RATE} if schedule == "cosine_with_min_lr" else None,
        report_to="none",
        disable_tqdm=True,
        log_level="warning",
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        label_names=["labels"],
        include_num_input_tokens_seen="non_padding",
        average_tokens_across_devices=True,
        prediction_loss_only=False,
        save_total_limit=None,
        **{**options.arguments(), "gradient_accumulation_steps": accumulation},
    )


def _deepspeed(payload: dict[str, Any]) -> dict[str, Any]:
    """Return the DeepSpeed configuration; it says how the checkpoint to resume from is to be read."""
    config = payload["deepspeed"]
    if not (payload.get("resume_point") or {}).get("universal"):
        return config
    return {**config, "checkpoint": {**config.get("checkpoint", {}), "load_universal": True}}


def _import(reference: str) -> Any:
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)
