"""One way to run a method: from the shell, in a Tune trial, in a submitted job."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from tenfold.platform.context import PlanContext, RunContext
from tenfold.platform.errors import ConfigError
from tenfold.platform.experiment import Experiment, LoadedExperiment, check_experiment, parse_experiment
from tenfold.platform.lease import leased
from tenfold.platform.method import Outcome, PlanSection
from tenfold.platform.models.cache import cache_folder
from tenfold.platform.storage import Storage
from tenfold.platform.tracking import Status, Tracker, absolute_uri, check_tracking
from tenfold.platform.tracking_store import file_store_path, sqlite_path
from tenfold.platform.training.deepspeed_config import deepspeed_config
from tenfold.platform.training.sizes import plan_sizes
from tenfold.platform.validation import did_you_mean

if TYPE_CHECKING:
    from tenfold.platform.tuning.trial import TrialReports

logger = logging.getLogger(__name__)

STATE = "run.json"
ENDED = ("finished", "stopped")  # stopped: by the scheduler of its sweep
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for what `ray job submit` starts
STATE_KEYS = {"status": str, "created": int | float}
RUN_KEYS = {**STATE_KEYS, "mlflow_run_id": str, "mlflow_uri": str}
STACK = ("tenfold", "torch", "ray", "deepspeed", "transformers", "datasets", "mlflow", "numpy")


@dataclass(frozen=True)
class RunResult:
    """A finished run: where it is and what it measured."""

    run_id: str
    uri: str
    mlflow_run_id: str
    outcome: Outcome
    method: str


def plan(loaded: LoadedExperiment) -> list[PlanSection]:
    """Check everything that can be known beforehand and describe the run; starts nothing.

    Raises:
        TenfoldError: the first thing that does not fit.
    """
    experiment = loaded.experiment
    if SUBMITTED in os.environ:
        check_job_addresses(experiment)
    storage = Storage(experiment.storage)
    storage.check_writable()
    uri = absolute_uri(experiment.tracking.uri, Path.cwd())
    check_tracking(uri)
    deepspeed_config(experiment.compute.deepspeed)
    compute = experiment.compute
    _, elastic = plan_sizes(loaded.config, compute)
    fewest, most = compute.min_workers, compute.max_workers
    workers = f"{most}" if fewest == most else f"{fewest} to {most}"
    state = read_state(storage, loaded.run_id, keys=RUN_KEYS)
    status = {None: "new", "running": "unfinished: it resumes", "finished": "finished: needs --new"}
    general = PlanSection(
        "run",
        (
            ("run", f"{loaded.run_id} ({status.get(state['status'] if state else None, 'unfinished: it resumes')})"),
            ("experiment", loaded.source),
            ("seed", str(experiment.seed)),
            ("storage", storage.uri_of(loaded.run_id)),
            ("tracking", uri),
            (
                "compute",
                f"{workers} worker(s) x {compute.cpus_per_worker:g} CPU, {compute.gpus_per_worker:g} GPU; "
                f"DeepSpeed {compute.deepspeed if isinstance(compute.deepspeed, str) else 'own configuration'}",
            ),
        ),
    )
    context = PlanContext(experiment.seed, compute, Storage(_cache_uri(storage)))
    return [general, *([elastic] if elastic else []), *loaded.method.plan(loaded.config, context)]


def check_job_addresses(experiment: Experiment) -> None:
    """Refuse relative addresses: the current folder of a submitted job is a copy that Ray deletes.

    Raises:
        ConfigError: storage or tracking.uri is relative.
    """
    storage, uri = experiment.storage.strip(), experiment.tracking.uri
    database = sqlite_path(uri) or file_store_path(uri)
    relative = [
        f"{key} = {given!r}"
        for key, given, path in (("storage", storage, storage), ("tracking.uri", uri, str(database or "/")))
        if "://" not in path and not path.startswith(("/", "~", "file:"))
    ]
    if relative:
        raise ConfigError(
            f"{' and '.join(relative)}: relative, and Ray deletes the folder that a submitted job runs in. "
            f"Give an absolute path that all nodes see, or a URI"
        )


def run(
    loaded: LoadedExperiment,
    *,
    new: bool = False,
    run_id: str | None = None,
    parent_run_id: str | None = None,
    trial: TrialReports | None = None,
) -> RunResult:
    """Run an experiment to its end, or resume it where it stopped. Ray must be connected.

    Args:
        loaded: a checked experiment.
        new: start afresh beside what an earlier run of the same experiment left.
        run_id: names the run; default: the experiment's name and identity.
        parent_run_id: MLflow run that this one belongs to (a sweep).
        trial: in a trial of a sweep, where its reports go. A trial that has ended returns what it had measured.

    Raises:
        ConfigError: the experiment has been run to its end already and `new` is not set.
        TenfoldError: whatever stopped the method; the run can be resumed.
    """
    experiment = loaded.experiment
    top = Storage(experiment.storage)
    top.check_writable()
    run_id = run_id or (free_id(top, loaded.run_id, STATE) if new else loaded.run_id)
    with only_one(top, run_id, wait=trial is not None):
        state = read_state(top, run_id, keys=RUN_KEYS)
        if trial is not None and state and state["status"] in ENDED:
            kept = outcome_in(state)
            return RunResult(run_id, top.uri_of(run_id), state["mlflow_run_id"], kept, experiment.method)
        refuse_ended(top, run_id, state)
        storage = Storage(top.uri_of(run_id))
        uri = absolute_uri(experiment.tracking.uri, Path.cwd())
        tracker = start_tracker(loaded, uri, run_id, storage, state, parent_run_id)
        logger.info("%s run %s", "resuming" if state else "starting", run_id)
        state = {
            "run_id": run_id,
            "status": "running",
            "method": experiment.method,
            "mlflow_run_id": tracker.run_id,
            "mlflow_uri": uri,
            "created": state["created"] if state else time.time(),
        }
        storage.write_text("experiment.yaml", yaml.safe_dump(loaded.resolved(), sort_keys=False))
        storage.write_text(STATE, json.dumps(state, indent=1))
        context = RunContext(
            run_id,
            experiment.method,
            experiment.seed,
            experiment.compute,
            storage,
            Storage(_cache_uri(top)),
            tracker,
            trial,
        )
        try:
            outcome = loaded.method.run(loaded.config, context)
        except BaseException as error:
            if trial is None:  # only its sweep knows why a trial ends
                tracker.finish(status_after(error))
            raise
        keep_outcome(outcome, tracker, storage, STATE, state)
    return RunResult(run_id, storage.uri, tracker.run_id, outcome, experiment.method)


def refuse_ended(top: Storage, run_id: str, state: Mapping[str, Any] | None) -> None:
    """Refuse to run again what has ended.

    Raises:
        ConfigError: the run's state says so.
    """
    if state and state["status"] in ENDED:
        raise ConfigError(
            f"run {run_id} is {state['status']} already ({top.uri_of(run_id)}). "
            f"Use --new to run it again beside it, or `tenfold evaluate {run_id}`"
        )


def keep_outcome(outcome: Outcome, tracker: Tracker, storage: Storage, file: str, state: Mapping[str, Any]) -> None:
    """Log what a run (or a stage) has measured, write it into its state and end its MLflow run."""
    tracker.log_metrics(outcome.metrics)
    ended = {
        "status": "finished",
        "metrics": dict(outcome.metrics),
        "artifacts": dict(outcome.artifacts),
        "model": outcome.model,
    }
    storage.write_text(file, json.dumps({**state, **ended}, indent=1))
    tracker.finish("FINISHED")


def outcome_in(state: Mapping[str, Any]) -> Outcome:
    """Return the outcome in the state of what has ended."""
    return Outcome(state["metrics"], state.get("artifacts", {}), state.get("model"))


@dataclass(frozen=True)
class FinishedRun:
    """A run found again in storage."""

    run_id: str
    storage: Storage
    state: dict[str, Any]
    loaded: LoadedExperiment

    @property
    def model_folder(self) -> str:
        """Address of the run's model.

        Raises:
            ConfigError: the run is unfinished or has no model.
        """
        if not self.state.get("model"):
            why = {"finished": "gave no model", "stopped": "was stopped early by its sweep and has no model"}.get(
                self.state["status"], "is not finished; run it again to resume"
            )
            raise ConfigError(f"run {self.run_id} {why}")
        return self.storage.uri_of(self.state["model"])


def find_run(reference: str, storage: str = "runs") -> FinishedRun:
    """Find a run by its id, the unique start of its id, or its folder.

    Raises:
        ConfigError: none or several fit; the message lists the runs there are.
    """
    if Path(reference, STATE).is_file():
        path = Path(reference).resolve()
        top, run_id = Storage(path.parent), path.name
    else:
        top = Storage(storage)
        known = [name for name in top.list() if top.exists(f"{name}/{STATE}")]
        fitting = [name for name in known if name == reference] or [
            name for name in known if name.startswith(reference)
        ]
        if len(fitting) != 1:
            several = f"several runs start so: {', '.join(fitting)}."
            raise ConfigError(
                f"{reference}: {several if fitting else f'no such run{did_you_mean(reference, known)}'} "
                f"Runs in {top.uri}: {', '.join(known) or 'none'}. Use --storage for another place"
            )
        run_id = fitting[0]
    own = Storage(top.uri_of(run_id))
    state = _checked_state(top, f"{run_id}/{STATE}", RUN_KEYS)
    source = own.uri_of("experiment.yaml")
    try:
        loaded = check_experiment(parse_experiment(own.read_text("experiment.yaml"), source), source)
    except (OSError, ValueError, ConfigError) as error:
        raise ConfigError(
            f"run {run_id}: its experiment cannot be used: {error}\nPut back {source}: MLflow has a copy, the "
            f"artifact experiment.yaml of run {state['mlflow_run_id']} in {state['mlflow_uri']}"
        ) from error
    return FinishedRun(run_id, own, state, loaded)


def newest_runs(start: str, count: int, storage: str = "runs") -> list[str]:
    """Return the ids of the `count` newest runs whose id begins with `start`, oldest first."""
    top = Storage(storage)
    known = [name for name in top.list() if name.startswith(start) and top.exists(f"{name}/{STATE}")]
    if len(known) < count:
        raise ConfigError(f"{start}: {len(known)} runs in {top.uri} start so, {count} were asked for")
    return sorted(known, key=lambda name: _checked_state(top, f"{name}/{STATE}", RUN_KEYS)["created"])[-count:]


def evaluate(found: FinishedRun) -> dict[str, float]:
    """Compute the method's metrics for a finished run's model again, and log them to its MLflow run."""
    experiment, model = found.loaded.experiment, found.model_folder
    top = found.storage.above()
    tracker = Tracker.attach(found.state["mlflow_uri"], found.state["mlflow_run_id"], spool_path(found.storage))
    context = RunContext(
        found.run_id,
        experiment.method,
        experiment.seed,
        experiment.compute,
        found.storage,
        Storage(_cache_uri(top)),
        tracker,
    )
    metrics = dict(found.loaded.method.evaluate(found.loaded.config, model, context))
    tracker.log_metrics(metrics)
    tracker.flush()
    return metrics


def status_after(error: BaseException) -> Status:
    """Return the MLflow status of what an exception has ended."""
    return "FAILED" if isinstance(error, Exception) else "KILLED"


def start_tracker(
    loaded: LoadedExperiment,
    uri: str,
    run_id: str,
    storage: Storage,
    state: dict[str, Any] | None,
    parent: str | None = None,
) -> Tracker:
    """Start the MLflow run of a run or a sweep, or go on with it, and log what it was started with.

    Args:
        loaded: the experiment.
        uri: absolute tracking URI.
        run_id: the run's or the sweep's id.
        storage: its folder.
        state: what an earlier start has written about itself.
        parent: MLflow run above it.
    """
    experiment = loaded.experiment
    if parent is None:  # a trial's sweep has used the store already; while it is away the trial waits
        check_tracking(uri)
    tracker = Tracker.start(
        uri,
        experiment.tracking.experiment or experiment.method,
        run_id,
        run_id=state["mlflow_run_id"] if state else None,
        parent_run_id=parent,
        tags={
            "tenfold.run": run_id,
            "tenfold.method": experiment.method,
            "tenfold.git": _git_commit(),
            "tenfold.storage": storage.uri,
            **{f"tenfold.version.{name}": importlib.metadata.version(name) for name in STACK},
            "tenfold.version.python": platform.python_version(),
        },
        artifact_root=None,
        spool=spool_path(storage),
    )
    tracker.log_params(flatten(loaded.resolved()))
    tracker.log_text(yaml.safe_dump(loaded.resolved(), sort_keys=False), "experiment.yaml")
    return tracker


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as dotted key -> value; lists stay values."""
    if not isinstance(data, dict):
        return {prefix: data}
    return {
        key: value
        for name, inner in data.items()
        for key, value in flatten(inner, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def spool_path(storage: Storage) -> Path:
    """Return the local file that keeps what MLflow could not be told.

    Of a run in a remote storage it lies in the user's cache: the current folder of a submitted job is deleted.
    """
    local = storage.local_path("mlflow-unsent.jsonl")
    place = hashlib.sha256(storage.root.encode()).hexdigest()[:8]
    return local or cache_folder() / "unsent" / f"{storage.name}-{place}.jsonl"


def _cache_uri(top: Storage) -> str:
    return top.uri_of("cache")


def read_state(
    top: Storage, run_id: str, name: str = STATE, keys: Mapping[str, Any] = STATE_KEYS
) -> dict[str, Any] | None:
    """Return what a run (or, by another file name, a sweep) has written about itself; None where there is none.

    Raises:
        ConfigError: the file cannot be read, or lacks one of `keys`.
    """
    path = f"{run_id}/{name}"
    return _checked_state(top, path, keys) if top.exists(path) else None


def _checked_state(top: Storage, path: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    problem = f"needs an object with {', '.join(keys)}"
    try:
        state = json.loads(top.read_text(path))
        if isinstance(state, dict) and all(isinstance(state.get(key), kind) for key, kind in keys.items()):
            return state
    except (OSError, ValueError) as error:
        problem = str(error)
    raise ConfigError(
        f"{top.uri_of(path)} cannot be used: {problem}. Put back a copy; or delete it and start the same experiment "
        f"again, which goes on from the checkpoints beside it, in a new MLflow run"
    )


def free_id(top: Storage, run_id: str, name: str) -> str:
    """Return `run_id` with the first number behind it that no run (or sweep) has taken."""
    number, free = 2, run_id
    while top.exists(f"{free}/{name}"):
        free, number = f"{run_id}-{number}", number + 1
    return free


@contextlib.contextmanager
def only_one(top: Storage, run_id: str, *, wait: bool = False) -> Iterator[None]:
    """Hold a run for as long as this process works on it: by a file lock, on a remote storage by a lease.

    Raises:
        ConfigError: another process holds it and `wait` is not set.
    """
    folder = top.local_path(run_id)
    if folder is None:
        with leased(top, run_id, wait=wait):
            yield
        return
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=-1 if wait else 0):
            yield
    except Timeout as error:
        raise ConfigError(f"run {run_id} is being worked on by another process; wait for it, or use --new") from error


def _git_commit() -> str:
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
            cwd=Path(__file__).parent,
        )
    except OSError:
        return "unknown"
    return result.stdout.strip() or "unknown"
