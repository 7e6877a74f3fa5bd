"""Killed workers, killed and interrupted drivers: a resumed run ends with the numbers of an undisturbed one."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml
from tenfold.platform.cli import main
from tenfold.platform.experiment import load_experiment
from tenfold.platform.run import find_run, run
from tenfold.platform.storage import Storage
from tenfold.platform.training.checkpoints import list_checkpoints

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS, WAIT_SECONDS = 12, 300
EXPERIMENT = {
    "base": str(Path(__file__).with_name("small_distillation.yaml")),
    "config": {"s2t_refresh_every": 3, "training": {"max_steps": STEPS, "save_steps": 2}},
}


@pytest.fixture(scope="module")
def place(ray_session, tmp_path_factory, tracking_uri):
    """A folder for all runs: what the teacher has read is shared."""
    folder = tmp_path_factory.mktemp("faults")
    tracking_uri(folder)
    with pytest.MonkeyPatch.context() as patch:
        # a report waits for it: long enough to kill something before the next checkpoints are there
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
        yield folder


def write_experiment(place, name):
    content = {
        "name": name,
        "storage": str(place / "runs"),
        "tracking": {"uri": f"sqlite:///{place / 'mlflow.db'}"},
        **EXPERIMENT,
    }
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def load(place, name):
    return load_experiment(str(write_experiment(place, name)), [])


def losses(place, run_id):
    """Return step -> loss; a step that was done twice must have given the same loss twice."""
    from mlflow import MlflowClient

    state = find_run(run_id, str(place / "runs")).state
    history = MlflowClient(state["mlflow_uri"]).get_metric_history(state["mlflow_run_id"], "train/loss")
    values = {}
    for metric in history:
        assert values.setdefault(metric.step, metric.value) == metric.value
    return values


def wait_for_step(place, run_id, step, *, attempt="attempt-", give_up=lambda: False):
    """Return when a checkpoint of at least `step` is complete."""
    storage = Storage(place / "runs" / run_id)
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end and not give_up():
        records = list_checkpoints(storage, "train/train")
        if any(record.step >= step and attempt in record.path for record in records):
            return
        time.sleep(0.05)
    raise TimeoutError(f"no checkpoint of step {step} in {run_id}")


def attempts(place, run_id):
    return [name for name in Storage(place / "runs" / run_id).list("train/train") if name.startswith("attempt-")]


@pytest.fixture(scope="module")
def undisturbed(place):
    result = run(load(place, "undisturbed"))
    found = losses(place, result.run_id)
    assert sorted(found) == list(range(1, STEPS + 1))
    assert attempts(place, result.run_id) == ["attempt-001"]
    return found, result.outcome.metrics


def training_workers():
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline())
    ]


def test_run_with_a_killed_worker_ends_by_itself_with_the_same_numbers(place, undisturbed, caplog):
    loaded, killed = load(place, "killed-worker"), []

    def kill():
        wait_for_step(place, loaded.run_id, 4)
        killed.append(training_workers()[-1])
        killed[0].kill()

    murderer = threading.Thread(target=kill)
    murderer.start()
    result = run(loaded)
    murderer.join()
    assert len(killed) == 1
    assert re.search(r"train: rank \d was lost: .*process has died.*2 more such losses are allowed", caplog.text)
    assert attempts(place, result.run_id) == ["attempt-001", "attempt-002"]
    assert losses(place, result.run_id) == undisturbed[0]
    assert result.outcome.metrics == undisturbed[1]


class Command:
    """`tenfold run` as a process of its own, on the test's cluster."""

    def __init__(self, place, path):
        import ray

        self.log = place / f"{path.stem}-{time.monotonic_ns()}.log"
        environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONUNBUFFERED": "1"}
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tenfold.platform.cli", "run", str(path)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=place,
            )

    def ended(self):
        return self.process.poll() is not None

    def wait(self):
        try:
            self.process.wait(WAIT_SECONDS)
        finally:
            self.process.kill()
        return self.process.returncode, self.log.read_text()


def test_killed_and_interrupted_commands_resume_and_end_with_the_same_numbers(place, undisturbed):
    path = write_experiment(place, "command")
    run_id = load_experiment(str(path), []).run_id

    first = Command(place, path)
    wait_for_step(place, run_id, 4, give_up=first.ended)
    first.process.send_signal(signal.SIGKILL)
    _, output = first.wait()
    assert f"starting run {run_id}" in output
    assert "starting at step 0" in output

    second = Command(place, path)
    wait_for_step(place, run_id, 6, attempt="attempt-002", give_up=second.ended)
    second.process.send_signal(signal.SIGINT)
    code, output = second.wait()
    assert code not in (0, -signal.SIGKILL)
    assert f"resuming run {run_id}" in output
    assert "resuming after step" in output
    assert find_run(run_id, str(place / "runs")).state["status"] == "running"

    result = run(load_experiment(str(path), []))  # what the command does, without its start-up
    assert attempts(place, run_id) == ["attempt-001", "attempt-002", "attempt-003"]
    assert losses(place, run_id) == undisturbed[0]
    assert result.outcome.metrics == undisturbed[1]


def test_mistake_found_by_one_rank_ends_the_command_at_once(place, undisturbed, monkeypatch, capsys):
    import faulty

    path = write_experiment(place, "mistake")
    monkeypatch.setattr("tenfold.methods.dskd.trainer.build_trainer", faulty.build)
    monkeypatch.setattr(sys, "argv", ["tenfold", "run", str(path)])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 2
    assert "error: config.teacher: rank 1 cannot use it" in capsys.readouterr().err
    assert attempts(place, load_experiment(str(path), []).run_id) == ["attempt-001"]
