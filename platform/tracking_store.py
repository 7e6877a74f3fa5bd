"""Where MLflow keeps its runs: making the address absolute, and finding out early that it cannot be used."""

from __future__ import annotations

import getpass
import logging
import os
import re
import socket
import sqlite3
import tempfile
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tenfold.platform.deadline import run_with_deadline
from tenfold.platform.errors import TrackingError
from tenfold.platform.paths import expanded
from tenfold.platform.tracking_delivery import is_refusal

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

CONNECT_SECONDS = 4.0
ANSWER_SECONDS = 5.0
LOCK_SECONDS = 5.0
START_SECONDS = 60.0  # making a new database takes several seconds
PATIENCE_SECONDS = 300.0  # for a server that is restarted while trials and stages of a long run begin
PAUSE_SECONDS = 1.0  # between two tries
LATE_SECONDS = 10.0  # a server may still carry out a request whose answer we no longer wait for
OPENED_TAG = "tenfold.opened"
DATABASES = ("postgresql", "mysql", "mssql")
SQLITE_ADVICE = "Use a database file (tracking.uri=sqlite:///mlflow.db) or a server (tracking.uri=http://HOST:5000)"


def set_short_timeouts() -> None:
    """Make MLflow's HTTP client of this process give up soon: its defaults retry for minutes inside a training step.

    Values that the user has set stay.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "4")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")


def absolute_uri(uri: str, base: Path) -> str:
    """Return a tracking URI that means the same in every working directory.

    Args:
        uri: `sqlite:///runs.db` and plain or `file:` folders are made absolute; all else is returned as it is.
        base: the folder that relative paths start from.
    """
    database = sqlite_path(uri)
    if database is not None:
        query = uri.partition("?")[2]
        absolute = (base / expanded(database)).resolve()
        return f"{uri.partition(':///')[0]}:///{absolute}" + (f"?{query}" if query else "")
    folder = file_store_path(uri)
    if folder is not None:
        return (base / expanded(folder)).resolve().as_uri()
    return uri


def sqlite_path(uri: str) -> Path | None:
    """Return the database file of a `sqlite:///` URI; None for other URIs and for databases in memory."""
    if not uri.startswith("sqlite"):
        return None
    name = uri.partition(":///")[2].partition("?")[0]
    return Path(name) if name and name != ":memory:" else None


def file_store_path(uri: str) -> Path | None:
    """Return the folder when the URI names one (MLflow's old file store), else None."""
    if uri.startswith("file:"):
        return Path(urllib.parse.unquote(urllib.parse.urlparse(uri).path))
    if "://" in uri or uri.split(":")[0] in ("databricks", "databricks-uc", "uc"):
        return None
    return Path(uri)


def without_password(uri: str) -> str:
    """Return the URI as it may be printed."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", uri)


def one_line(error: object) -> str:
    """Return an error's message without line breaks, at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def check_tracking(uri: str) -> None:
    """Find out, within 10 seconds, whether runs can be written to an MLflow store.

    Nothing is left behind: a missing database is not created.

    Args:
        uri: an MLflow tracking URI, absolute where it names a file (`absolute_uri`).

    Raises:
        TrackingError: the server is down, is no MLflow server or refuses; the database or its folder is not writable;
            the kind of store is not supported. The message says what to do.
    """
    shown = f"tracking.uri = {without_password(uri)!r}"
    if not uri.strip():
        raise TrackingError(f"tracking.uri is empty. {SQLITE_ADVICE}")
    database = sqlite_path(uri)
    if database is not None:
        _check_database(database, shown)
    elif uri.startswith("sqlite"):
        raise TrackingError(f"{shown}: a database in memory is not seen by the workers. {SQLITE_ADVICE}")
    elif (folder := file_store_path(uri)) is not None:
        _check_file_store(folder, shown)
    elif uri.startswith(DATABASES):
        raise TrackingError(
            f"{shown}: every worker would hold connections to the database and put artifacts into a folder of its "
            "own. Start mlflow server --backend-store-uri with this address and --artifacts-destination, and give "
            "tracking.uri=http://HOST:5000"
        )
    else:
        _check_server(uri, shown)


def _check_file_store(folder: Path, shown: str) -> None:
    if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() not in ("true", "1"):
        raise TrackingError(
            f"{shown}: MLflow 3 no longer keeps runs in a plain folder. {SQLITE_ADVICE}; to go on with an old folder, "
            f"set the environment variable MLFLOW_ALLOW_FILE_STORE=true"
        )
    _check_folder(folder, shown)


def _check_folder(folder: Path, shown: str) -> None:
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is not a folder")
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"tenfold")
    except OSError as error:
        raise TrackingError(
            f"{shown}: {folder} cannot be written: {error}. Change its permissions or give another place. "
            f"{SQLITE_ADVICE}"
        ) from error


def _check_database(database: Path, shown: str) -> None:
    _check_folder(database.parent, shown)
    if not database.exists():
        return
    if not database.is_file():
        raise TrackingError(f"{shown}: {database} is not a file. {SQLITE_ADVICE}")
    try:
        address = f"file:{urllib.parse.quote(str(database))}?mode=rw"
        connection = sqlite3.connect(address, uri=True, timeout=LOCK_SECONDS, isolation_level=None)
        try:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise TrackingError(
            f"{shown}: {database} cannot be used: {error}. If it is locked, end the program that holds it; if it is "
            f"read-only or not an SQLite database, give another file"
        ) from error


def _check_server(uri: str, shown: str) -> None:
    advice = (
        "Start the server (mlflow server --backend-store-uri sqlite:////PATH/mlflow.db), correct tracking.uri, "
        "or use tracking.uri=sqlite:///mlflow.db"
    )
    parts = urllib.parse.urlparse(uri)
    try:
        if parts.scheme in ("http", "https") and not _uses_proxy(parts):
            address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
            run_with_deadline(lambda: _knock(address), CONNECT_SECONDS, f"connecting to {address[0]}:{address[1]}")
        set_short_timeouts()
        from mlflow import MlflowClient

        run_with_deadline(
            lambda: MlflowClient(uri).search_experiments(max_results=1), ANSWER_SECONDS, "asking for its experiments"
        )
    except Exception as error:
        text = one_line(error)
        if re.search(r"\b401\b|UNAUTHENTICATED", text):
            advice = "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        elif "Invalid Host header" in text:
            advice = f"Start the server with --allowed-hosts {parts.netloc}"
        raise TrackingError(f"{shown}: the MLflow store does not answer as it should: {text}. {advice}") from error


def _uses_proxy(parts: urllib.parse.ParseResult) -> bool:
    host = parts.hostname or ""
    return parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host)


def _knock(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=CONNECT_SECONDS):
        pass


def until_answered(uri: str, function: Callable[[], Result], seconds: float, what: str) -> Result:
    """Run a function of an MLflow client, and again while a server is away or too busy to answer.

    Args:
        uri: the store; only with a server is there anything to wait for.
        function: called without arguments, possibly several times.
        seconds: longest wait in all.
        what: names the work in errors.

    Raises:
        Exception: the last error, when the time is over; what the server refuses, at once.
    """
    end, said = time.monotonic() + seconds, False
    while True:
        try:
            return run_with_deadline(function, max(end - time.monotonic(), PAUSE_SECONDS), what)
        except Exception as error:
            final = isinstance(error, TrackingError) or is_refusal(error) or _is_unknown_here(error)
            if final or not uri.startswith("http") or time.monotonic() + PAUSE_SECONDS > end:
                raise
            if not said:
                shown = without_password(uri)
                logger.warning("%s: MLflow (%s) does not answer: %s. Trying for %g s", what, shown, error, seconds)
                said = True
        time.sleep(PAUSE_SECONDS)


def _is_unknown_here(error: Exception) -> bool:
    return getattr(error, "error_code", "") in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED")


def open_run(
    uri: str,
    experiment: str,
    run_name: str,
    run_id: str | None,
    parent_run_id: str | None,
    artifact_root: str | None,
) -> str:
    """Create a run (and its experiment), or make sure that an earlier one is there; returns its id.

    However often a busy server has to be asked, it ends up with one run. A run below another one belongs to work that
    has begun: it waits `PATIENCE_SECONDS` for the server, others `START_SECONDS`. Arguments: see `Tracker.start`.

    Raises:
        TrackingError: MLflow cannot be used, or the run or experiment is missing or deleted.
    """
    set_short_timeouts()
    database = sqlite_path(uri)
    if database is not None:
        artifact_root = artifact_root or (database.parent / "mlartifacts").as_uri()
    tags = {"mlflow.user": _user(), "mlflow.source.name": "tenfold", OPENED_TAG: uuid.uuid4().hex}
    if parent_run_id is not None:
        tags["mlflow.parentRunId"] = parent_run_id
    asked: float | None = None

    def open_it() -> str:
        nonlocal asked
        from mlflow import MlflowClient

        client = MlflowClient(uri)
        if run_id is not None:
            return _existing_run(client, run_id)
        owner = _experiment_id(client, experiment, artifact_root)
        while asked is not None:  # an earlier try may have made it, or may still do so
            found = client.search_runs([owner], f"tags.`{OPENED_TAG}` = '{tags[OPENED_TAG]}'", max_results=1)
            if found:
                return found[0].info.run_id
            if time.monotonic() > asked + LATE_SECONDS:
                break
            time.sleep(PAUSE_SECONDS)
        asked = time.monotonic()
        return client.create_run(owner, run_name=run_name, tags=tags).info.run_id

    try:
        if database is not None:
            database.parent.mkdir(parents=True, exist_ok=True)
        seconds = START_SECONDS if parent_run_id is None else PATIENCE_SECONDS
        return until_answered(uri, open_it, seconds, "opening the MLflow run")
    except TrackingError:
        raise
    except Exception as error:
        raise TrackingError(
            f"tracking.uri = {without_password(uri)!r}: cannot open a run in experiment {experiment!r}: "
            f"{one_line(error)}. `tenfold doctor` checks the store"
        ) from error


def _existing_run(client: MlflowClient, run_id: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise TrackingError(
            f"MLflow has no run {run_id}, which this run should go on with. Point tracking.uri at the store that has "
            f"it, or start afresh with --new"
        ) from error
    if run.info.lifecycle_stage == "deleted":
        raise TrackingError(f"MLflow run {run_id} was deleted. Restore it in MLflow, or start afresh with --new")
    return run_id


def _experiment_id(client: MlflowClient, name: str, artifact_root: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=artifact_root)
        except MlflowException as error:
            found = client.get_experiment_by_name(name)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"MLflow experiment {name!r} was deleted. Restore it (mlflow experiments restore --experiment-id "
            f"{found.experiment_id}) or give another name with tracking.experiment=..."
        )
    return found.experiment_id


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return "unknown"
