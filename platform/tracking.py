"""One MLflow run per training: the driver owns it, workers re-attach to it by id.

Training never waits for MLflow: a call takes at most `CALL_SECONDS`, and what cannot be delivered is kept in a file
and sent in order when MLflow is back. Attaching again after a restart goes on with the same run and the same file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tenfold.platform.deadline import run_with_deadline
from tenfold.platform.errors import TrackingError
from tenfold.platform.tracking_delivery import (
    MAX_TAG_CHARACTERS,
    batches,
    cut,
    deliver,
    describe,
    is_refusal,
    last_steps,
    not_yet_logged,
    single,
    storable,
)
from tenfold.platform.tracking_spool import Spool
from tenfold.platform.tracking_store import (
    PATIENCE_SECONDS,
    PAUSE_SECONDS,
    START_SECONDS,
    absolute_uri,
    check_tracking,
    one_line,
    open_run,
    set_short_timeouts,
    until_answered,
    without_password,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

__all__ = ["Tracker", "TrackerSpec", "absolute_uri", "check_tracking"]

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

CALL_SECONDS = 4.5  # longest wait inside a training step; SQLite alone would wait 20 s for a lock
FINISH_SECONDS = 30.0
MIN_CALL_SECONDS = 0.5  # with less time left no request is begun
RETRY_SECONDS = 15.0  # pause after a failure before MLflow is asked again
MAX_ARTIFACT_BYTES = 64 * 2**20  # a slow link must carry it within FINISH_SECONDS


@dataclass(frozen=True)
class TrackerSpec:
    """What a worker needs to write to the driver's run; plain data.

    Attributes:
        uri: MLflow tracking URI, absolute.
        run_id: MLflow's id of the run.
        spool: file for what cannot be sent.
    """

    uri: str
    run_id: str
    spool: Path

    def attach(self) -> Tracker:
        """Return a tracker for this run in this process."""
        return Tracker.attach(self.uri, self.run_id, self.spool)


class Tracker:
    """Writes to one MLflow run. Made by `start` (driver) or `attach` (worker); safe to share between threads."""

    def __init__(self, uri: str, run_id: str, spool: Path) -> None:
        self.uri = uri
        self.run_id = run_id
        self._spool = Spool(Path(spool).absolute())
        self._lock = threading.RLock()
        self._client_made: MlflowClient | None = None
        self._retry_at = -math.inf
        self._away = False
        self._refused = 0
        self._refusals_said: set[str] = set()
        self._lost = 0
        self._logged: dict[str, int] | None = None  # metric -> last step that MLflow has; None when not known

    @classmethod
    def start(
        cls,
        uri: str,
        experiment: str,
        run_name: str,
        *,
        run_id: str | None = None,
        parent_run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
        artifact_root: str | None = None,
        spool: Path,
    ) -> Tracker:
        """Create a run, or go on with one, on the driver.

        Args:
            uri: MLflow tracking URI; relative files are taken from the current directory.
            experiment: made when missing.
            run_name: shown in MLflow.
            run_id: an earlier run to go on with; None creates one.
            parent_run_id: nests the new run below another (trials below their study).
            tags: set on the run, also when it is resumed.
            artifact_root: URI for the artifacts of a new experiment. Default: `mlartifacts/` next to an SQLite
                database, the server's own choice otherwise.
            spool: file for what cannot be sent; records left in it by an earlier process are sent.

        Raises:
            TrackingError: MLflow cannot be used, or has no such run.
        """
        uri = absolute_uri(uri, Path.cwd())
        set_short_timeouts()
        opened = open_run(uri, experiment, run_name, run_id, parent_run_id, artifact_root)
        tracker = cls.attach(uri, opened, spool)
        if run_id is not None:
            # After what the earlier process left, which may end with its status.
            tracker._submit({"op": "status", "status": "RUNNING"})
        if tags:
            tracker.set_tags(tags)
        return tracker

    @classmethod
    def attach(cls, uri: str, run_id: str, spool: Path) -> Tracker:
        """Return a tracker for an existing run; works while MLflow is away, never raises because of it."""
        set_short_timeouts()
        # Its traceback for a locked database says no more than our warning does.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        tracker = cls(uri, run_id, spool)
        try:
            run_with_deadline(tracker._client, START_SECONDS, "opening the MLflow store")
        except Exception as error:
            tracker._note_away(error)
        with tracker._lock:
            tracker._drain(CALL_SECONDS)
        return tracker

    def child(
        self, run_name: str, *, run_id: str | None = None, tags: Mapping[str, str] | None = None, spool: Path
    ) -> Tracker:
        """Create a run below this one, in the same experiment, or go on with one; see `start`.

        Raises:
            TrackingError: MLflow cannot be used, or has no such run.
        """

        def experiment() -> str:
            client = self._client()
            return str(client.get_experiment(client.get_run(self.run_id).info.experiment_id).name)

        try:
            name = until_answered(self.uri, experiment, PATIENCE_SECONDS, "asking MLflow for the experiment")
        except Exception as error:
            raise TrackingError(
                f"tracking.uri = {without_password(self.uri)!r}: cannot open a run below {self.run_id}: "
                f"{one_line(error)}"
            ) from error
        return Tracker.start(
            self.uri, name, run_name, run_id=run_id, parent_run_id=self.run_id, tags=tags, spool=spool
        )

    def spec(self) -> TrackerSpec:
        """Return what a worker needs to attach."""
        return TrackerSpec(self.uri, self.run_id, self._spool.path)

    def log_params(self, flat: Mapping[str, Any]) -> None:
        """Log parameters that the run does not have yet.

        MLflow never changes a parameter: one that differs is left, warned about and named in the tag
        `tenfold.changed_params`. Longer values than MLflow takes are cut, say so, and the whole is the artifact
        `params.json`.

        Args:
            flat: dotted key -> value; values are logged as text.
        """
        values = {key: storable(str(value)) for key, value in flat.items()}
        limited = {key: cut(value) for key, value in values.items()}
        self._submit({"op": "params", "params": limited})
        if limited != values:
            self.log_dict(values, "params.json")

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None, *, again: bool = False) -> None:
        """Log numbers of one step.

        NaN is kept as NaN; MLflow's SQL stores show infinity as the largest float. A value that is no number is left
        out with a warning, the others are logged.

        Args:
            metrics: name -> value; names may hold letters, digits and `_-. :/`.
            step: optimizer step; None counts as 0.
            again: steps may have been logged by a process whose work was lost; MLflow keeps what it has of them.
        """
        numbers: dict[str, float] = {}
        for name, value in metrics.items():
            try:
                numbers[name] = float(value)
            except (TypeError, ValueError):
                logger.warning("metric %s = %r is not a number; left out", name, value)
        if numbers:
            record = {"op": "metrics", "metrics": numbers, "step": int(step or 0), "time": int(time.time() * 1000)}
            self._submit({**record, "again": True} if again else record)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; an earlier value is replaced. Values are text of at most 5,000 characters, longer ones are cut."""
        limited = {key: cut(storable(str(value)), MAX_TAG_CHARACTERS, "cut") for key, value in tags.items()}
        self._submit({"op": "tags", "tags": limited})

    def log_text(self, text: str, artifact_file: str) -> None:
        """Store text as an artifact, e.g. `report.md` or `config/resolved.yaml`."""
        path = Path(artifact_file)
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / path.name
            source.write_text(text, encoding="utf-8", errors="backslashreplace")
            self._submit_artifact(source, path.parent.as_posix())

    def log_dict(self, content: Mapping[str, Any] | Sequence[Any], artifact_file: str) -> None:
        """Store plain data as a JSON artifact."""
        self.log_text(json.dumps(content, indent=2, default=str), artifact_file)

    def log_file(self, path: str | Path, artifact_path: str = "") -> None:
        """Store a file of at most 64 MiB in the artifacts' folder `artifact_path`; models are logged as pointers."""
        self._submit_artifact(Path(path), artifact_path)

    def log_figure(self, name: str, figure: Figure) -> None:
        """Store a matplotlib figure as the PNG artifact `plots/NAME`."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / Path(name).with_suffix(".png").name
            figure.savefig(source, dpi=120, bbox_inches="tight")
            self._submit_artifact(source, "plots")

    def log_model_pointer(
        self,
        folder_uri: str,
        digest: str,
        *,
        flavor: str,
        metrics: Mapping[str, float],
        parents: Sequence[str] = (),
    ) -> None:
        """Record where the run's model is, without copying or registering it.

        Args:
            folder_uri: absolute address of the model folder.
            digest: sha256 over the model's files.
            flavor: kind of model, as in its manifest.
            metrics: the model's scores.
            parents: references of the models it was made from; also the tag `tenfold.parents`.
        """
        pointer = {"uri": folder_uri, "digest": digest, "flavor": flavor, "metrics": dict(metrics)}
        self.log_dict({**pointer, "parents": list(parents)}, "model/pointer.json")
        tags = {"tenfold.model": folder_uri, "tenfold.model_digest": digest, "tenfold.flavor": flavor}
        self.set_tags({**tags, "tenfold.parents": json.dumps(list(parents))})

    def flush(self, seconds: float | None = None) -> int:
        """Send what is kept, as workers do at their end; returns the number of unsent records.

        Args:
            seconds: longest time to go on trying while a server is away or too busy; default `FINISH_SECONDS`.
        """
        end = time.monotonic() + (FINISH_SECONDS if seconds is None else seconds)
        with self._lock:
            while True:
                self._retry_at = -math.inf
                self._drain(end - time.monotonic())
                unsent = len(self._spool.unsent())
                if not unsent or time.monotonic() + PAUSE_SECONDS > end:
                    return unsent
                time.sleep(PAUSE_SECONDS)

    def finish(self, status: Status) -> None:
        """End the run: last attempt to send what is kept, then the status; says what is still unsent and where."""
        self._submit({"op": "status", "status": status, "time": int(time.time() * 1000)})
        unsent = self.flush()
        where = without_password(self.uri)
        if unsent:
            logger.warning(
                "MLflow (%s) did not get %d records of run %s. They are kept in %s and sent when the run is resumed "
                "or evaluated again",
                where,
                unsent,
                self.run_id,
                self._spool.path,
            )
        else:
            self._spool.remove()
        if self._refused or self._lost:
            logger.warning(
                "MLflow run %s: %d records were refused by %s and %d could not be kept; their content is lost",
                self.run_id,
                self._refused,
                where,
                self._lost,
            )

    def _client(self) -> MlflowClient:
        if self._client_made is None:
            from mlflow import MlflowClient

            self._client_made = MlflowClient(self.uri)
        return self._client_made

    def _submit_artifact(self, source: Path, folder: str) -> None:
        with contextlib.suppress(OSError):  # a file that is gone is refused below, with its reason
            size = source.stat().st_size
            if size > MAX_ARTIFACT_BYTES:
                logger.warning(
                    "%s has %d bytes, MLflow gets files up to %d: left out. It would hold up all that comes after it",
                    source,
                    size,
                    MAX_ARTIFACT_BYTES,
                )
                return
        self._submit({"op": "artifact", "folder": "" if folder == "." else folder}, source)

    def _submit(self, record: dict[str, Any], source: Path | None = None) -> None:
        """Send one record now, or keep it behind those that wait already."""
        with self._lock:
            if not self._spool.pending() and time.monotonic() >= self._retry_at:
                direct = {**record, "file": str(source)} if source is not None else record
                if self._send([direct], CALL_SECONDS):
                    return
            if self._keep(record, source):
                self._drain(CALL_SECONDS)

    def _keep(self, record: dict[str, Any], source: Path | None) -> bool:
        try:
            self._spool.append(record, source)
        except OSError as error:
            # A worker's node may lack the run's folder.
            other = Spool(Path(tempfile.gettempdir()) / f"tenfold-{self.run_id}.jsonl")
            if self._spool.path != other.path and not self._spool.pending():
                logger.warning("%s cannot be written (%s); using %s", self._spool.path, error, other.path)
                self._spool = other
                return self._keep(record, source)
            self._lost += 1
            logger.warning("%s is lost: MLflow is away and it cannot be kept: %s", describe(record), error)
            return False
        return True

    def _drain(self, seconds: float) -> None:
        """Send kept records in order until all are sent, MLflow is away, or the time is over."""
        end = time.monotonic() + seconds
        if time.monotonic() < self._retry_at or not self._spool.pending():
            return
        with self._spool.sending() as mine:
            if not mine:
                return
            sent, self._logged = 0, None  # another process may have logged more
            for batch in batches(self._spool.unsent()):
                left = end - time.monotonic()
                if left < MIN_CALL_SECONDS or not self._send([kept.record for kept in batch], left):
                    break
                try:
                    self._spool.mark_sent(batch[-1])
                except OSError as error:
                    logger.warning("%s: cannot note what was sent, it will be sent again: %s", self._spool.path, error)
                    break
                sent += len(batch)
            if sent:
                logger.info("MLflow got %d records that had been kept", sent)

    def _send(self, records: list[dict[str, Any]], seconds: float) -> bool:
        """Deliver records of one kind in one request; False when MLflow is away. Refused records count as done."""
        try:
            self._logged = run_with_deadline(lambda: self._deliver(records), seconds, "sending to MLflow")
        except Exception as error:
            self._logged = None
            if not is_refusal(error):
                self._note_away(error)
                return False
            parts = list(single(records))
            if len(parts) > 1 and not _run_is_gone(error):
                end = time.monotonic() + seconds
                return all(self._send([part], max(MIN_CALL_SECONDS, end - time.monotonic())) for part in parts)
            self._refused += len(records)
            content = describe(records[0])
            if content not in self._refusals_said:
                logger.warning("MLflow refused %s, said once: %s", content, one_line(error))
                self._refusals_said.add(content)
        self._away = False
        return True

    def _deliver(self, records: list[dict[str, Any]]) -> dict[str, int] | None:
        """Deliver records of one kind but steps that MLflow has already; return the last steps that it has now."""
        logged = self._logged
        if any(record.get("again") for record in records):
            logged = last_steps(self._client(), self.run_id) if logged is None else logged
            records, logged = not_yet_logged(records, logged)
        if records:
            deliver(self._client(), self.run_id, records)
        return logged

    def _note_away(self, error: Exception) -> None:
        self._retry_at = time.monotonic() + RETRY_SECONDS
        if not self._away:
            logger.warning(
                "MLflow (%s) is away: %s. Training goes on; records are kept in %s and sent when it is back",
                without_password(self.uri),
                one_line(error),
                self._spool.path,
            )
        self._away = True


def _run_is_gone(error: Exception) -> bool:
    return getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST" or "'active' state" in str(error)
