"""One trial of a sweep: an ordinary run whose reports also go to Tune and stay in storage.

Tune's own way to go on after a crash unpickles files. Here a sweep that is started again begins a new Tune study with
the same seed, every trial first tells what it had told before, and its run resumes from its own checkpoint. Tune's
scheduler so sees the same reports again and decides as before.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tenfold.platform.storage import Storage

if TYPE_CHECKING:
    from tenfold.platform.experiment import LoadedExperiment

REPORTS, TRIAL = "reports", "trial.json"


def trial_run_id(sweep_id: str, trial: LoadedExperiment) -> str:
    """Return the id of a trial's run."""
    return f"{sweep_id}-{trial.identity}"


def trial_run_ids(top: Storage, sweep_id: str) -> list[str]:
    """Return the ids of a sweep's trials that have begun; those of a repeated sweep are SWEEP-2-HASH."""
    return [name for name in top.list() if name.rpartition("-")[0] == sweep_id and top.exists(f"{name}/{TRIAL}")]


def keep_error(top: Storage, run_id: str, values: Mapping[str, Any]) -> None:
    """Write down that a trial failed, where it could not do so itself."""
    path = f"{run_id}/{TRIAL}"
    if not (top.exists(path) and json.loads(top.read_text(path)).get("error")):
        lost = "its process was lost: out of memory, killed, or its node went down"
        top.write_text(path, json.dumps({"values": dict(values), "error": lost}))


@dataclass(frozen=True)
class TrialReports:
    """What a trial has reported to Tune.

    Attributes:
        uri: storage of the trial's run.
        metric: what the sweep optimises; reports without it are not for Tune.
    """

    uri: str
    metric: str

    def keep(self, metrics: Mapping[str, float], step: int) -> bool:
        """Store a report; False when Tune has no use for it, or had one of this step before a restart."""
        storage, path = Storage(self.uri), f"{REPORTS}/{step:010d}.json"
        if self.metric not in metrics or storage.exists(path):
            return False
        storage.write_text(path, json.dumps({**metrics, "step": step}))
        return True

    def report(self, metrics: Mapping[str, float], step: int) -> None:
        """Report from the trial's own process."""
        import ray.tune

        if self.keep(metrics, step):
            ray.tune.report({**metrics, "step": step})

    def kept(self) -> list[dict[str, float]]:
        """Return all reports, in order of their steps."""
        storage = Storage(self.uri)
        return [json.loads(storage.read_text(f"{REPORTS}/{name}")) for name in storage.list(REPORTS)]

    def callback(self) -> Any:
        """Return the Ray Train callback that hands what rank 0 reports on to Tune. Only inside a trial."""
        from ray.tune.integration.ray_train import TuneReportCallback

        reports = self

        class TrialCallback(TuneReportCallback):
            def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
                if reports.keep(metrics[0], int(metrics[0]["step"])):
                    super().after_report(run_context, metrics, None)

        return TrialCallback()


def run_trial(values: dict[str, Any], *, data: dict[str, Any], sweep_id: str, parent_run_id: str) -> None:
    """Run one trial to its end; called by Tune in a process of its own.

    Args:
        values: dotted option -> value, drawn by Tune.
        data: the resolved experiment, sweep included, with absolute storage and tracking addresses.
        sweep_id: names the trials' runs together with a hash of their configuration.
        parent_run_id: the sweep's MLflow run.
    """
    import ray.tune
    from tenfold.platform.errors import ConfigError
    from tenfold.platform.experiment import check_experiment
    from tenfold.platform.run import run
    from tenfold.platform.tuning.space import with_values

    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    base = check_experiment(data, "sweep")
    sweep = base.experiment.sweep
    assert sweep is not None
    loaded = with_values(base, values)
    run_id = trial_run_id(sweep_id, loaded)
    storage = Storage(Storage(loaded.experiment.storage).uri_of(run_id))
    reports = TrialReports(storage.uri, sweep.metric)
    storage.write_text(TRIAL, json.dumps({"values": values}))
    for metrics in reports.kept():
        ray.tune.report(metrics)
    try:
        measured = run(loaded, run_id=run_id, parent_run_id=parent_run_id, trial=reports).outcome.metrics
        if sweep.metric not in measured:
            raise ConfigError(f"sweep.metric = {sweep.metric!r}: the runs measure {', '.join(sorted(measured))}")
    except Exception as error:
        storage.write_text(TRIAL, json.dumps({"values": values, "error": str(error) or type(error).__name__}))
        raise
    ray.tune.report(dict(measured))
