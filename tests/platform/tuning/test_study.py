"""A sweep on real Ray Tune and Ray Train: early stopping, failed trials, going on where it stopped."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from tenfold.platform.errors import ClusterError, ConfigError
from tenfold.platform.experiment import check_experiment, load_experiment
from tenfold.platform.storage import Storage
from tenfold.platform.tuning.study import run_sweep, sweep_identity

TESTS = Path(__file__).parents[2]
ROWS = TESTS.parent / "samples" / "instruct" / "short_instructions.json"
STEPS = 6  # training goes on while Tune decides: so many that no trial is at its end when it is stopped

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def test_a_sweep_stops_poor_trials_early_and_goes_on_after_failures(tmp_path, tracking_uri):
    present, late = tmp_path / "present.json", tmp_path / "late.json"
    shutil.copy(ROWS, present)
    loaded = load_experiment(
        str(TESTS / "methods" / "dskd" / "contract.yaml"),
        [
            f"storage={tmp_path / 'runs'}",
            f"tracking.uri={tracking_uri(tmp_path)}",
            "compute.workers=1",
            "config.objective=sft",
            f"config.training={{max_steps: {STEPS}, logging_steps: 1, eval_strategy: steps, eval_steps: 1}}",
            "config.training.save_steps=1",
            "config.training.save_strategy=steps",
            "sweep={metric: eval/nll, mode: min, scheduler: asha, reduction_factor: 2}",
            f"sweep.space={{config.data.train.0.path: {{grid: [{present}, {late}]}}, "
            "config.training.learning_rate: {grid: [1.0e-2, 1.0e-9]}}",
        ],
    )
    with pytest.raises(ClusterError, match=r"2 of 4 trials failed; .*late\.json.*no such file"):
        run_sweep(loaded)
    storage = Storage(tmp_path / "runs")
    assert _statuses(storage) == {(str(present), 1e-2): "finished", (str(present), 1e-9): "stopped"}

    shutil.copy(ROWS, late)
    result = run_sweep(loaded)
    assert {trial.status for trial in result.trials} == {"finished", "stopped"}
    assert {trial.values["config.training.learning_rate"] for trial in result.trials if trial.status == "stopped"} == {
        1e-9
    }
    assert len(result.trials) == 4
    for trial in result.trials:  # none was trained twice
        assert storage.list(f"{trial.run_id}/train/train")[0] == "attempt-001"
        assert "attempt-002" not in storage.list(f"{trial.run_id}/train/train")
        steps = [report["step"] for report in trial.reports]
        assert steps == list(range(1, len(steps) + 1))
        assert (len(steps) == STEPS) == (trial.status == "finished")
    assert result.best.values["config.training.learning_rate"] == 1e-2
    with pytest.raises(ConfigError, match="finished already"):
        run_sweep(loaded)

    best = check_experiment(yaml.safe_load(storage.read_text(f"{result.sweep_id}/best.yaml")), "best")
    assert best.config.training.learning_rate == 1e-2
    _check_tracking(tmp_path, result)


def _statuses(storage):
    found = {}
    for name in storage.list():
        if storage.exists(f"{name}/run.json"):
            values = json.loads(storage.read_text(f"{name}/trial.json"))["values"]
            status = json.loads(storage.read_text(f"{name}/run.json"))["status"]
            if status != "running":
                found[tuple(values.values())] = status
    return found


def _check_tracking(tmp_path, result):
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    by_name = {run.info.run_name: run for run in runs}
    above = by_name.pop(result.sweep_id)
    assert above.info.status == "FINISHED"
    assert above.data.metrics["best/eval/nll"] == pytest.approx(result.best.value)
    pictures = [file.path for file in client.list_artifacts(above.info.run_id, "plots")]
    assert pictures == ["plots/heat_map.png", "plots/sweep.png"]
    assert len(by_name) == 4
    for trial in result.trials:
        own = by_name[trial.run_id]
        assert own.data.tags["mlflow.parentRunId"] == above.info.run_id
        assert own.info.status == ("FINISHED" if trial.status == "finished" else "KILLED")


def test_two_sweeps_of_one_experiment_have_different_names():
    first = load_experiment("dskd/sweep_seeds")
    assert sweep_identity(first) != sweep_identity(load_experiment("dskd/sweep_seeds", ["sweep.max_concurrent=2"]))
