"""Optuna, median stopping and the time budget on real Ray Tune, with trials that only report a curve."""

import os
import signal
import threading
import time
from pathlib import Path

import optuna
import pytest
import yaml
from mlflow import MlflowClient
from tenfold.methods import table
from tenfold.platform.errors import ClusterError
from tenfold.platform.experiment import load_experiment
from tenfold.platform.run import read_state
from tenfold.platform.storage import Storage
from tenfold.platform.tuning import study
from tenfold.platform.tuning.results import collect

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def curve_method(ray_session):
    """The method `curve`, here and in the trials."""
    import curve

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(table.METHODS, "curve", curve.ENTRY)
        patch.setattr(study, "run_trial", curve.run_trial)
        yield


@pytest.fixture
def place(tmp_path, tracking_uri):
    """A folder with a tracking store."""
    tracking_uri(tmp_path)
    return tmp_path


def swept(place, space, config=None, **sweep):
    content = {
        "name": "curves",
        "method": "curve",
        "config": config or {},
        "storage": str(place / "runs"),
        "tracking": {"uri": f"sqlite:///{place / 'mlflow.db'}"},
        "sweep": {"metric": "eval/loss", "mode": "min", "space": space, **sweep},
    }
    path = place / "curves.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_experiment(str(path))


def trials_of(place, loaded):
    return collect(Storage(place / "runs"), study.sweep_identity(loaded), loaded.experiment.sweep).trials


def starts(place, trial):
    return len(Storage(place / "runs").list(f"{trial.run_id}/starts"))


def in_mlflow(place):
    """Return run name -> status."""
    client = MlflowClient(f"sqlite:///{place / 'mlflow.db'}")
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    return {run.info.run_name: run.info.status for run in runs}


def interrupt_second_trial(place, loaded, gate):
    """Close the gate behind the first trial, and press Ctrl-C when the second has begun."""
    while not any(trial.status == "finished" for trial in trials_of(place, loaded)):
        time.sleep(0.1)
    gate.unlink()
    while not any(trial.status == "running" and starts(place, trial) for trial in trials_of(place, loaded)):
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)


def test_optuna_draws_by_the_seed_and_goes_on_after_an_interruption_without_repeating(place):
    gate = place / "gate"
    gate.touch()
    space = {"config.scale": {"loguniform": [0.1, 10.0]}, "config.sign": {"choice": [1, -1]}}
    loaded = swept(place, space, {"gate": str(gate)}, search="optuna", samples=3)
    watcher = threading.Thread(target=interrupt_second_trial, args=(place, loaded, gate), daemon=True)
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        study.run_sweep(loaded)
    watcher.join()
    begun = trials_of(place, loaded)
    assert [(trial.status, starts(place, trial)) for trial in begun] == [("finished", 1), ("running", 1)]
    assert [trial.values for trial in begun] == drawn_by_optuna(2)
    statuses = in_mlflow(place)
    assert [statuses[trial.run_id] for trial in begun] == ["FINISHED", "KILLED"]

    gate.touch()
    result = study.run_sweep(loaded)
    assert [trial.status for trial in result.trials] == ["finished"] * 3
    assert [starts(place, trial) for trial in result.trials] == [1, 2, 1]
    assert [trial.values for trial in result.trials[:2]] == drawn_by_optuna(2)
    assert len({trial.values["config.scale"] for trial in result.trials}) == 3
    expected = [trial.values["config.scale"] * trial.values["config.sign"] for trial in result.trials]
    assert [trial.value for trial in result.trials] == pytest.approx(expected)
    assert result.best.value == min(expected)
    assert set(in_mlflow(place).values()) == {"FINISHED"}


def drawn_by_optuna(count):
    """Return the first values of a study with the experiment's seed, drawn without Ray."""
    free = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=10))
    ranges = {
        "config.scale": optuna.distributions.FloatDistribution(0.1, 10.0, log=True),
        "config.sign": optuna.distributions.CategoricalDistribution([1, -1]),
    }
    return [free.ask(ranges).params for _ in range(count)]


def test_the_median_rule_stops_a_poor_trial_and_interrupts_no_other(place):
    curves = [[4.0, 3.0, 2.0], [4.0, 3.0, 1.0], [4.0, 3.0, 0.0], [4.0, 3.0, 2.5], [9.0, 8.0, 1.0], [9.0, 1.0, 1.0]]
    space = {"config.curve": {"grid": curves}}
    loaded = swept(place, space, {"seconds": 0.5}, scheduler="median", max_concurrent=2)
    result = study.run_sweep(loaded)
    status = {tuple(trial.values["config.curve"]): trial.status for trial in result.trials}
    assert status == {tuple(each): "stopped" if each[0] == 9.0 else "finished" for each in curves}
    assert [starts(place, trial) for trial in result.trials] == [1] * 6
    assert result.best.value == 0.0
    statuses = in_mlflow(place)
    assert statuses.pop(result.sweep_id) == "FINISHED"
    assert statuses == {t.run_id: "KILLED" if t.status == "stopped" else "FINISHED" for t in result.trials}


def test_a_spent_time_budget_ends_the_sweep_and_the_same_command_goes_on(tmp_path, tracking_uri):
    for budget in (25, 75, 225):  # on a busy machine the trials that can finish may need more
        place = tmp_path / str(budget)
        place.mkdir()
        tracking_uri(place)
        gate = place / "gate"
        space = {"config.gate": {"grid": [None, str(gate)]}, "seed": {"grid": [1, 2]}}
        loaded = swept(place, space, max_concurrent=2, time_budget_s=budget)
        begun = time.monotonic()
        result = study.run_sweep(loaded)
        assert time.monotonic() - begun >= budget  # nothing else ends it: the gate is closed
        by_gate = {None: "finished", str(gate): "running"}
        open_ones = [trial.status for trial in result.trials if trial.values["config.gate"] is None]
        if open_ones == ["finished"] * 2:
            break
    assert [trial.status for trial in result.trials] == [by_gate[t.values["config.gate"]] for t in result.trials]
    assert {trial.status for trial in result.trials} == {"finished", "running"}
    assert result.best.values["config.gate"] is None
    statuses = in_mlflow(place)
    assert statuses.pop(result.sweep_id) == "KILLED"
    assert statuses == {t.run_id: "FINISHED" if t.status == "finished" else "KILLED" for t in result.trials}
    assert read_state(Storage(place / "runs"), result.sweep_id, study.STATE)["status"] == "running"

    gate.touch()
    more = swept(place, space, max_concurrent=2, time_budget_s=500)
    whole = study.run_sweep(more)
    assert whole.sweep_id == result.sweep_id
    assert [trial.status for trial in whole.trials] == ["finished"] * 4
    again = {trial.run_id for trial in result.trials if trial.status == "running"}
    assert [starts(place, t) for t in whole.trials] == [2 if t.run_id in again else 1 for t in whole.trials]
    assert set(in_mlflow(place).values()) == {"FINISHED"}


def test_a_trial_whose_process_is_lost_fails_and_is_tried_again(place):
    present, late = place / "present", place / "late"
    present.touch()
    space = {"config.dies_without": {"grid": [str(present), str(late)]}}
    loaded = swept(place, space, max_concurrent=2)
    with pytest.raises(ClusterError, match=r"1 of 2 trials failed; .*late: .*process was lost"):
        study.run_sweep(loaded)
    late.touch()
    result = study.run_sweep(loaded)
    assert {Path(t.values["config.dies_without"]).name: starts(place, t) for t in result.trials} == {
        "present": 1,
        "late": 2,
    }
    assert set(in_mlflow(place).values()) == {"FINISHED"}
