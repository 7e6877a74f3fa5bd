"""The MLflow calls behind a tracker's records, and which of MLflow's answers are final."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tenfold.platform.tracking_spool import Spooled

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

# MLflow's limits: metrics, and parameters or tags, in one request; characters in a parameter and (ours) in a tag.
MAX_METRICS = 1000
MAX_PARAMS = 100
MAX_PARAM_CHARACTERS = 6000
MAX_TAG_CHARACTERS = 5000
# Answers that no second attempt changes. Everything else counts as "away": also a 400 or 404 without MLflow's own
# error body, which a proxy in front of a stopped server sends.
REFUSALS = {"INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"}


def deliver(client: MlflowClient, run_id: str, records: list[dict[str, Any]]) -> None:
    """Make the MLflow call for records of one kind; several records only when they are metrics."""
    from mlflow.entities import Metric, RunTag

    first = records[0]
    if first["op"] == "metrics":
        metrics = [
            Metric(name, value, record["time"], record["step"])
            for record in records
            for name, value in record["metrics"].items()
        ]
        for start in range(0, len(metrics), MAX_METRICS):
            client.log_batch(run_id, metrics=metrics[start : start + MAX_METRICS])
    elif first["op"] == "params":
        _deliver_params(client, run_id, first["params"])
    elif first["op"] == "tags":
        tags = [RunTag(key, value) for key, value in first["tags"].items()]
        for start in range(0, len(tags), MAX_PARAMS):
            client.log_batch(run_id, tags=tags[start : start + MAX_PARAMS])
    elif first["op"] == "artifact":
        client.log_artifact(run_id, first["file"], first["folder"] or None)
    elif first["status"] == "RUNNING":
        client.update_run(run_id, status="RUNNING")
    else:
        client.set_terminated(run_id, first["status"], first["time"])


def _deliver_params(client: MlflowClient, run_id: str, params: dict[str, str]) -> None:
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params
    changed = sorted(key for key, value in params.items() if known.get(key, value) != value)
    if changed:
        names = ", ".join(changed)
        logger.warning("MLflow keeps the first values of parameters that differ now: %s", names)
        client.set_tag(run_id, "tenfold.changed_params", names[:MAX_TAG_CHARACTERS])
    missing = [Param(key, value) for key, value in params.items() if key not in known]
    for start in range(0, len(missing), MAX_PARAMS):
        client.log_batch(run_id, params=missing[start : start + MAX_PARAMS])


def last_steps(client: MlflowClient, run_id: str) -> dict[str, int]:
    """Return the last step of every metric that a run has."""
    return {metric.key: metric.step for metric in client.get_run(run_id).data.to_proto().metrics}


def not_yet_logged(
    records: list[dict[str, Any]], logged: Mapping[str, int]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Leave out steps that were logged before they were done again; all that is logged comes in the order of steps.

    Args:
        records: of metrics, in order; those of work that may have been done before are marked `again`.
        logged: metric -> last step that MLflow has.

    Returns:
        The records to send, and the last steps when they have been sent.
    """
    known, kept = dict(logged), []
    for record in records:
        new = {
            name: value
            for name, value in record["metrics"].items()
            if not record.get("again") or record["step"] > known.get(name, -1)
        }
        if new:
            kept.append({**record, "metrics": new})
        known |= {name: max(record["step"], known.get(name, -1)) for name in new}
    return kept, known


def batches(spooled: list[Spooled]) -> Iterator[list[Spooled]]:
    """Group neighbouring metric records up to one request; every other record goes alone."""
    batch: list[Spooled] = []
    size = 0
    for kept in spooled:
        added = len(kept.record.get("metrics", ()))
        if batch and (kept.record["op"] != "metrics" or size + added > MAX_METRICS):
            yield batch
            batch, size = [], 0
        if kept.record["op"] != "metrics":
            yield [kept]
            continue
        batch.append(kept)
        size += added
    if batch:
        yield batch


def single(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Take records apart into single metrics, parameters and tags, so that one bad one costs only itself."""
    for record in records:
        content = {"metrics": "metrics", "params": "params", "tags": "tags"}.get(record["op"])
        if content is None:
            yield record
        else:
            yield from ({**record, content: {key: value}} for key, value in record[content].items())


def is_refusal(error: Exception) -> bool:
    """Tell whether MLflow (or its client) will never take this, as opposed to being away."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in REFUSALS
    # A file to send that is gone, or a value that cannot be encoded; a network failure is another kind of OSError.
    return isinstance(error, (FileNotFoundError, TypeError)) or (
        isinstance(error, ValueError) and not isinstance(error, OSError)
    )


def describe(record: dict[str, Any]) -> str:
    """Name a record's content for a warning."""
    content = record.get(record["op"], record.get("file", record.get("status")))
    return f"{record['op']} {', '.join(content) if isinstance(content, dict) else content}"


def storable(value: str) -> str:
    """Return text that every database takes: PostgreSQL refuses NUL, and UTF-8 has no half characters."""
    return value.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode("utf-8")


def cut(value: str, limit: int = MAX_PARAM_CHARACTERS, note: str = "see params.json") -> str:
    """Return the value, or its beginning and how long it was."""
    if len(value) <= limit:
        return value
    mark = f"... ({len(value)} characters, {note})"
    return value[: limit - len(mark)] + mark
