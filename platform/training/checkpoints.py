"""Checkpoints in run storage: a manifest written last, digests, the best and the last few, the newest good one.

A checkpoint is a folder `train/<job>/<attempt>/checkpoint-<step>` that all ranks filled through Ray Train. It counts
only once its manifest is there, and the manifest is written after every rank's files have arrived.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from tenfold.platform.errors import ConfigError
from tenfold.platform.storage import Storage

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
PREFIX = "checkpoint-"
DEFAULT_JOB = "train"  # the only training job of most methods
ATTEMPT = "attempt-"


@dataclass(frozen=True)
class CheckpointRecord:
    """What the manifest says.

    Attributes:
        path: folder relative to the run's storage.
        step: optimizer steps done.
        world_size: ranks that wrote it; ZeRO shards need the same number to resume.
        metrics: the newest evaluation at this step.
        files: path in the folder -> sha256 of its content.
    """

    path: str
    step: int
    world_size: int
    metrics: dict[str, float]
    files: dict[str, str]


def checkpoint_name(step: int) -> str:
    """Return the folder name of a step; names sort by step."""
    return f"{PREFIX}{step:08d}"


def file_digests(folder: Path) -> dict[str, str]:
    """Return relative path -> sha256 for every file below `folder`."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as stream:
                digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def write_manifest(storage: Storage, record: CheckpointRecord) -> None:
    """Declare a checkpoint complete."""
    storage.write_text(f"{record.path}/{MANIFEST}", json.dumps(asdict(record), indent=1))


def attempt_folders(storage: Storage, job: str) -> list[str]:
    """Return the names of a job's attempts, oldest first."""
    return [name for name in storage.list(job) if name.startswith(ATTEMPT)]


def list_checkpoints(storage: Storage, job: str) -> list[CheckpointRecord]:
    """Return the complete checkpoints of a job over all attempts, newest first."""
    records = []
    for attempt in attempt_folders(storage, job):
        for name in storage.list(f"{job}/{attempt}"):
            manifest = f"{job}/{attempt}/{name}/{MANIFEST}"
            if name.startswith(PREFIX) and storage.exists(manifest):
                try:
                    records.append(CheckpointRecord(**json.loads(storage.read_text(manifest))))
                except (ValueError, TypeError):
                    logger.warning("%s is damaged; its checkpoint is ignored", storage.uri_of(manifest))
    return sorted(records, key=lambda record: (record.step, record.path), reverse=True)


def damage(storage: Storage, record: CheckpointRecord) -> str | None:
    """Return what is wrong with a checkpoint's files, or None when all digests match."""
    for name, digest in record.files.items():
        path = f"{record.path}/{name}"
        if not storage.exists(path):
            return f"{name} is missing"
        found = storage.sha256(path)
        if found != digest:
            return f"{name} is not what was written (sha256 {found[:12]}, expected {digest[:12]})"
    return None


def newest_good(storage: Storage, job: str) -> CheckpointRecord | None:
    """Return the newest checkpoint whose files are whole; damaged ones are named in the log and passed over."""
    for record in list_checkpoints(storage, job):
        problem = damage(storage, record)
        if problem is None:
            return record
        logger.warning("checkpoint %s: %s. Falling back to the one before it.", storage.uri_of(record.path), problem)
    return None


def best_of(records: list[CheckpointRecord], metric: str) -> CheckpointRecord | None:
    """Return the checkpoint with the smallest `metric`; the newest where none was evaluated; None for no records.

    Raises:
        ConfigError: evaluations reported other metrics, and never this one.
    """
    judged = [record for record in records if metric in record.metrics]
    if judged:
        return min(judged, key=lambda record: (record.metrics[metric], -record.step))
    reported = sorted({name for record in records for name in record.metrics if name.startswith("eval/")})
    if reported:
        raise ConfigError(
            f"config.training.metric_for_best = {metric!r}: no checkpoint has a finite value of it. "
            f"Evaluation reports {', '.join(reported)}"
        )
    return records[0] if records else None


def prune(storage: Storage, job: str, *, keep_last: int, metric: str) -> None:
    """Delete all but the `keep_last` newest steps and the best one, and what earlier attempts left incomplete.

    Raises:
        ConfigError: `metric` is not what evaluation reports.
    """
    records = list_checkpoints(storage, job)
    steps = sorted({record.step for record in records}, reverse=True)[:keep_last]
    best = best_of(records, metric)
    kept = {record.path for record in records if record.step in steps or record is best}
    complete = {record.path for record in records}
    attempts = attempt_folders(storage, job)
    for attempt in attempts:
        for name in storage.list(f"{job}/{attempt}"):
            path = f"{job}/{attempt}/{name}"
            # of the newest attempt, files may still be arriving
            if name.startswith(PREFIX) and path not in kept and (path in complete or attempt != attempts[-1]):
                storage.delete(path)
