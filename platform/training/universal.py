"""Going on with another number of workers: DeepSpeed's universal checkpoints, made once and kept while needed.

ZeRO splits the optimizer's state over the workers that write a checkpoint; its universal form has every weight's state
whole. It lies beside the checkpoint that it is made from, in `universal-<step>`, with a manifest like a checkpoint's.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tenfold.platform.errors import CheckpointError
from tenfold.platform.storage import Storage
from tenfold.platform.training.checkpoints import (
    MANIFEST,
    CheckpointRecord,
    attempt_folders,
    damage,
    file_digests,
    newest_good,
    write_manifest,
)

logger = logging.getLogger(__name__)

FOLDER = "universal-"
SHARD = "_optim_states.pt"  # how DeepSpeed's files with one worker's share of the optimizer's state end
# of a checkpoint, besides the random numbers and what is converted
KEPT = ("trainer_state.json", "scheduler.pt", "buffers.safetensors", "optimizer_groups.json")
SWAPPED = "offloaded_tensors/"  # what ZeRO-Infinity had on a disk


@dataclass(frozen=True)
class ResumePoint:
    """What a job goes on from.

    Attributes:
        path: folder in the run's storage.
        step: optimizer steps done.
        universal: it is in the form that fits any number of workers.
    """

    path: str
    step: int
    universal: bool


def resume_point(
    storage: Storage, job: str, size: int, convert: Callable[[Storage, CheckpointRecord], None]
) -> ResumePoint | None:
    """Return what `size` workers go on from: the newest whole checkpoint, converted where others wrote it.

    Args:
        storage: the run's.
        job: folder of the training job in it.
        size: number of workers.
        convert: does `to_universal`, here or elsewhere.

    Raises:
        CheckpointError: it cannot be converted.
    """
    record = newest_good(storage, job)
    if record is None:
        return None
    if record.world_size == size or not any(name.endswith(SHARD) for name in record.files):
        return ResumePoint(record.path, record.step, universal=False)
    target = universal_path(record)
    discard(storage, job, keep=target)
    if not _is_there(storage, target):
        logger.info(
            "checkpoint of step %d is of %d worker(s): converting it for %d", record.step, record.world_size, size
        )
        convert(storage, record)
    return ResumePoint(target, record.step, universal=True)


def universal_path(record: CheckpointRecord) -> str:
    """Return where the universal form of a checkpoint lies."""
    return f"{record.path.rpartition('/')[0]}/{FOLDER}{record.step:08d}"


def discard(storage: Storage, job: str, keep: str | None = None) -> None:
    """Delete the universal checkpoints of a job but one: their checkpoints are still there."""
    for attempt in attempt_folders(storage, job):
        for name in storage.list(f"{job}/{attempt}"):
            path = f"{job}/{attempt}/{name}"
            if name.startswith(FOLDER) and path != keep:
                storage.delete(path)


def _is_there(storage: Storage, path: str) -> bool:
    if not storage.exists(f"{path}/{MANIFEST}"):
        return False
    try:
        return damage(storage, CheckpointRecord(**json.loads(storage.read_text(f"{path}/{MANIFEST}")))) is None
    except (ValueError, TypeError):
        return False


def convert_on_cluster(storage: Storage, record: CheckpointRecord, cpus: float) -> None:
    """Convert a checkpoint in a Ray task: the driver's machine may be small.

    Args:
        storage: the run's.
        record: the checkpoint.
        cpus: cores that the task reserves; there is room for what a worker takes.

    Raises:
        CheckpointError: it cannot be converted.
    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    task = ray.remote(
        num_cpus=min(cpus, 1),
        max_calls=1,  # torch and DeepSpeed go with the process
        # a trial of a sweep reserves next to nothing for itself
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=None),  # type: ignore[arg-type]
    )(_convert)
    try:
        ray.get(task.remote(storage.uri, asdict(record)))
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, CheckpointError) else _failed(storage, record, error) from error


def _convert(uri: str, record: dict[str, Any]) -> None:
    to_universal(Storage(uri), CheckpointRecord(**record))


def to_universal(storage: Storage, record: CheckpointRecord) -> None:
    """Write the universal form of a checkpoint beside it; the manifest comes last.

    It holds what resuming reads: the state of optimizer and schedule, the place in the data, random numbers, buffers.
    DeepSpeed reads its own files for it, one worker's share at a time.

    Raises:
        CheckpointError: it cannot be converted.
    """
    if any(SWAPPED in name for name in record.files):
        raise CheckpointError(
            f"checkpoint {storage.uri_of(record.path)} was written by {record.world_size} workers with optimizer "
            f"state on disks (nvme), which fits no other number; use compute.workers={record.world_size}"
        )
    with tempfile.TemporaryDirectory(prefix="tenfold-universal-") as scratch:
        source = storage.download(record.path, Path(scratch) / "checkpoint")
        result = Path(scratch) / "universal"
        result.mkdir()
        tag = (source / "latest").read_text(encoding="utf-8").strip()
        try:
            _run_converter(source / tag, result / f"{tag}_universal")
        except Exception as error:  # whatever DeepSpeed meets in its files
            raise _failed(storage, record, error) from error
        for name in record.files:
            if name in KEPT or name.startswith("rng_state"):
                shutil.copyfile(source / name, result / name)
        target = universal_path(record)
        storage.delete(target)
        storage.upload(result, target)
        write_manifest(storage, CheckpointRecord(target, record.step, 0, {}, file_digests(result)))


def _run_converter(source: Path, target: Path) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.checkpoint import ds_to_universal

    options = SimpleNamespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)


def _failed(storage: Storage, record: CheckpointRecord, error: Exception) -> CheckpointError:
    cause = " ".join(str(error).split())[-300:] or type(error).__name__
    return CheckpointError(
        f"checkpoint {storage.uri_of(record.path)} was written by {record.world_size} workers and cannot be converted "
        f"for another number: {cause}. Use compute.workers={record.world_size}, or start afresh with --new"
    )
