"""Runs a sweep: Ray Tune around `tenfold.platform.run`, one MLflow run above those of the trials."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tenfold.platform.errors import ClusterError, ConfigError
from tenfold.platform.experiment import Experiment, LoadedExperiment, Sweep, check_experiment
from tenfold.platform.method import PlanSection
from tenfold.platform.run import (
    ENDED,
    free_id,
    only_one,
    plan,
    read_state,
    spool_path,
    start_tracker,
    status_after,
)
from tenfold.platform.run import STATE as RUN_STATE
from tenfold.platform.storage import Storage
from tenfold.platform.tracking import Status, Tracker, absolute_uri
from tenfold.platform.tuning.results import SweepResult, collect, figure, heat_map, table_csv
from tenfold.platform.tuning.space import check_space, label, show, trial_count, tune_space, with_values
from tenfold.platform.tuning.trial import TrialReports, keep_error, run_trial, trial_run_id

logger = logging.getLogger(__name__)

STATE = "sweep.json"


def sweep_identity(loaded: LoadedExperiment) -> str:
    """Return the sweep's id: the experiment's name and a hash of its configuration and its sweep section.

    The time budget does not count: with more of it the same sweep goes on.
    """
    sweep = loaded.experiment.sweep
    content = [loaded.identity, sweep.model_dump(mode="json", exclude={"time_budget_s"}) if sweep else None]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    return f"{loaded.experiment.name}-{digest}"


def plan_sweep(loaded: LoadedExperiment) -> list[PlanSection]:
    """Check every point of the sweep that can be known beforehand and describe the study; starts nothing.

    Raises:
        TenfoldError: the first trial that does not fit.
    """
    grid = check_space(loaded)
    sections = [plan(each) for each in grid]
    sweep = _sweep_of(loaded.experiment)
    if sweep.search == "optuna":
        _import_optuna()
    described = "\n".join(
        f"{key}: " + next(f"{kind} {value}" for kind, value in dimension.model_dump(exclude_none=True).items())
        for key, dimension in sweep.space.items()
    )
    study = PlanSection(
        "sweep",
        (
            ("sweep", sweep_identity(loaded)),
            ("trials", f"{trial_count(sweep)}, {sweep.max_concurrent} at a time; below is the first one"),
            ("space", described),
            ("search", f"{sweep.search}, seed {loaded.experiment.seed}; scheduler {sweep.scheduler}"),
            ("goal", f"{'smallest' if sweep.mode == 'min' else 'largest'} {sweep.metric}"),
        ),
    )
    first, *rest = sections[0]
    return [study, PlanSection(first.title, tuple(row for row in first.rows if row[0] != "run")), *rest]


def run_sweep(loaded: LoadedExperiment, *, new: bool = False) -> SweepResult:
    """Run a sweep to its end, or go on with one that was interrupted. Ray must be connected.

    Trials that failed are tried again, finished ones are not. Every trial is a run of its own, found by its id. When
    the time budget is spent, the result has what there is, and the same command goes on with the rest.

    Args:
        loaded: a checked experiment with a sweep section.
        new: start afresh beside what an earlier sweep of the same experiment left.

    Raises:
        ConfigError: no sweep section, invalid points, or the sweep has ended already and `new` is not set.
        ClusterError: trials failed; what the others measured is kept, and the same command tries those again.
    """
    check_space(loaded)
    experiment = loaded.experiment
    top = Storage(experiment.storage)
    sweep_id = sweep_identity(loaded)
    if new:
        sweep_id = free_id(top, sweep_id, STATE)
    with only_one(top, sweep_id):
        state = read_state(top, sweep_id, STATE)
        refuse_finished_sweep(top, sweep_id, state)
        return _Study(loaded, top, sweep_id, state).run()


def refuse_finished_sweep(top: Storage, sweep_id: str, state: Mapping[str, Any] | None) -> None:
    """Refuse to repeat a sweep.

    Raises:
        ConfigError: its state says that it has finished.
    """
    if state and state["status"] == "finished":
        raise ConfigError(f"sweep {sweep_id} is finished already ({top.uri_of(sweep_id)}). Use --new to repeat it")


@dataclass(frozen=True)
class _Study:
    loaded: LoadedExperiment
    top: Storage
    sweep_id: str
    state: dict[str, Any] | None

    def run(self) -> SweepResult:
        """Start or resume Tune, then collect what the trials measured."""
        experiment = self.loaded.experiment
        storage = Storage(self.top.uri_of(self.sweep_id))
        uri = absolute_uri(experiment.tracking.uri, Path.cwd())
        resolved = self.loaded.resolved() | {"storage": self.top.uri}
        resolved["tracking"] = {**resolved["tracking"], "uri": uri}
        # with absolute addresses: trials run in other processes
        base = check_experiment(resolved, self.sweep_id)
        tracker = start_tracker(base, uri, self.sweep_id, storage, self.state)
        tracker.set_tags({"tenfold.sweep": self.sweep_id})
        storage.write_text("experiment.yaml", yaml.safe_dump(resolved, sort_keys=False))
        state = {"sweep_id": self.sweep_id, "mlflow_run_id": tracker.run_id, "mlflow_uri": uri}
        state["created"] = self.state["created"] if self.state else time.time()
        storage.write_text(STATE, json.dumps(state | {"status": "running"}, indent=1))
        logger.info("%s sweep %s", "going on with" if self.state else "starting", self.sweep_id)
        sweep, began = _sweep_of(experiment), time.monotonic()
        try:
            ended = self._fit(base, tracker)
            spent = sweep.time_budget_s is not None and time.monotonic() - began >= sweep.time_budget_s
            result = collect(self.top, self.sweep_id, sweep)
            self._keep(result, storage, tracker)
        except BaseException as error:
            tracker.finish(status_after(error))
            raise
        failed = [trial for trial in result.trials if trial.error]
        total = trial_count(sweep)
        if ended < total and not spent:
            tracker.finish("KILLED")
            raise KeyboardInterrupt
        if failed:
            tracker.finish("FAILED")
            raise ClusterError(
                f"{len(failed)} of {len(result.trials)} trials failed; the first: {failed[0].label}: "
                f"{failed[0].error}\n"
                f"The others' results are in {storage.uri}. The same command tries the failed trials again"
            )
        if ended < total:
            logger.warning(
                "the time budget of %g s is spent: %d of %d trials ended; the same command goes on with the others",
                sweep.time_budget_s,
                ended,
                total,
            )
            tracker.finish("KILLED")
            return result
        storage.write_text(STATE, json.dumps(state | {"status": "finished"}, indent=1))
        tracker.finish("FINISHED")
        return result

    def _fit(self, base: LoadedExperiment, tracker: Tracker) -> int:
        """Run Tune; return how many trials ended."""
        from ray import tune

        sweep = _sweep_of(self.loaded.experiment)
        # our own callback says how it goes; the new output prints boxes whatever the verbosity
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
        # our own callback names a missing metric; Tune would stop the whole study for it
        os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
        trainable = tune.with_parameters(
            run_trial, data=base.resolved(), sweep_id=self.sweep_id, parent_run_id=tracker.run_id
        )
        progress = _progress(base, self.sweep_id)
        tune.Tuner(
            # A trial only waits for its training workers, which reserve what they need. Its own reservation must not
            # be empty, and any share of a CPU would keep workers from filling a machine.
            tune.with_resources(trainable, {"CPU": 0, "memory": 1 << 20}),
            param_space=tune_space(sweep),
            tune_config=tune.TuneConfig(
                metric=sweep.metric,
                mode=sweep.mode,
                scheduler=_scheduler(sweep),
                search_alg=self._search(sweep),
                num_samples=sweep.samples,
                max_concurrent_trials=sweep.max_concurrent if sweep.search == "optuna" else None,
                time_budget_s=sweep.time_budget_s,
            ),
            run_config=tune.RunConfig(
                name=f"tune-{time.strftime('%Y%m%d-%H%M%S')}",
                storage_path=f"{self.top.root}/{self.sweep_id}",
                storage_filesystem=self.top.filesystem,
                verbose=0,
                callbacks=[progress],
            ),
        ).fit()
        return len(progress.ended)

    def _search(self, sweep: Sweep) -> Any:
        from ray.tune.search.basic_variant import BasicVariantGenerator

        seed = self.loaded.experiment.seed
        if sweep.search == "random":
            # it does not heed TuneConfig's max_concurrent_trials
            return BasicVariantGenerator(max_concurrent=sweep.max_concurrent, random_state=seed)
        _import_optuna()
        from ray.tune.search.optuna import OptunaSearch

        # What had begun comes first and takes nothing from the generator: with the same seed the rest would repeat it.
        before = [trial.values for trial in collect(self.top, self.sweep_id, sweep).trials]
        return OptunaSearch(seed=seed + len(before), points_to_evaluate=before)

    def _keep(self, result: SweepResult, storage: Storage, tracker: Tracker) -> None:
        """Write table, picture and the best trial's experiment."""
        csv = table_csv(result)
        storage.write_text("results.csv", csv)
        tracker.log_text(csv, "results.csv")
        if any(trial.reports for trial in result.trials):
            tracker.log_figure("sweep.png", figure(result))
        by_grid = heat_map(result)
        if by_grid is not None:
            tracker.log_figure("heat_map.png", by_grid)
        draw = getattr(self.loaded.method, "sweep_figures", None)
        for name, drawn in (draw(result.trials) if draw is not None else {}).items():
            tracker.log_figure(f"{name}.png", drawn)
        best = result.best
        if best is not None:
            tracker.log_metrics({f"best/{result.sweep.metric}": best.value})
            tracker.set_tags({"tenfold.best_run": best.run_id})
            text = yaml.safe_dump(with_values(self.loaded, best.values).resolved(), sort_keys=False)
            storage.write_text("best.yaml", text)
            tracker.log_text(text, "best.yaml")


def _sweep_of(experiment: Experiment) -> Sweep:
    if experiment.sweep is None:
        raise ConfigError(f"{experiment.name}: has no sweep section")
    return experiment.sweep


def _import_optuna() -> None:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("sweep.search = 'optuna' needs optuna: pip install 'tenfold[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _scheduler(sweep: Sweep) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

    if sweep.scheduler == "asha":
        # time is counted in reports; the last rung lies beyond any training's number of evaluations
        longest = sweep.grace_period * sweep.reduction_factor**8
        return ASHAScheduler(max_t=longest, grace_period=sweep.grace_period, reduction_factor=sweep.reduction_factor)
    if sweep.scheduler == "median":
        # It would pause a trial whenever another one waits for its process: a new start for nothing.
        return MedianStoppingRule(
            time_attr="training_iteration",
            grace_period=sweep.grace_period,
            min_time_slice=math.inf,  # type: ignore[arg-type]
        )
    return FIFOScheduler()


def _progress(base: LoadedExperiment, sweep_id: str) -> Any:
    """Return a Tune callback that says how the trials go, and marks those that the scheduler stops."""
    from ray import tune

    sweep, total = _sweep_of(base.experiment), trial_count(_sweep_of(base.experiment))
    top = Storage(base.experiment.storage)

    class Progress(tune.Callback):
        def __init__(self) -> None:
            self.ended: set[str] = set()

        def on_trial_result(
            self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            if sweep.metric in result:
                logger.info(
                    "%s: report %d, %s %s",
                    label(trial.config, sweep),
                    result["training_iteration"],
                    sweep.metric,
                    show(float(result[sweep.metric])),
                )

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            self.ended.add(trial.trial_id)
            stopped = self._mark_stopped(trial)
            word = "stopped early" if stopped else "finished"
            logger.info("%s: %s (%d of %d trials)", label(trial.config, sweep), word, len(self.ended), total)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            self.ended.add(trial.trial_id)
            logger.error("%s: failed (%d of %d trials)", label(trial.config, sweep), len(self.ended), total)
            keep_error(top, trial_run_id(sweep_id, with_values(base, trial.config)), trial.config)
            self._close(trial, "FAILED")

        def on_experiment_end(self, trials: Any, **info: Any) -> None:
            for trial in trials:
                if trial.trial_id not in self.ended:
                    self._close(trial, "KILLED")

        def _mark_stopped(self, trial: Any) -> bool:
            """Say whether the scheduler stopped a trial; write that down when it has just done so."""
            run_id = trial_run_id(sweep_id, with_values(base, trial.config))
            state = read_state(top, run_id)
            if state is None or state["status"] in ENDED:
                return bool(state) and state["status"] == "stopped"
            self._close(trial, "KILLED", {"tenfold.stopped": f"early, by {sweep.scheduler}"})
            last = TrialReports(top.uri_of(run_id), sweep.metric).kept()[-1:]
            metrics = {key: value for report in last for key, value in report.items() if "/" in key}
            stopped = state | {"status": "stopped", "metrics": metrics}
            top.write_text(f"{run_id}/{RUN_STATE}", json.dumps(stopped, indent=1))
            return True

        def _close(self, trial: Any, status: Status, tags: Mapping[str, str] | None = None) -> None:
            """End a trial's MLflow run, where it has one that has not ended by itself."""
            run_id = trial_run_id(sweep_id, with_values(base, trial.config))
            state = read_state(top, run_id)
            if state is not None and state["status"] not in ENDED:
                spool = spool_path(Storage(top.uri_of(run_id)))
                tracker = Tracker.attach(state["mlflow_uri"], state["mlflow_run_id"], spool)
                if tags:
                    tracker.set_tags(tags)
                tracker.finish(status)

    return Progress()
