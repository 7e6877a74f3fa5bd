"""Training with everything on an S3 server that fails, and drivers that are killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tenfold.platform import lease
from tenfold.platform.errors import StorageError
from tenfold.platform.experiment import load_experiment
from tenfold.platform.models.export import export_model
from tenfold.platform.run import evaluate, find_run, run
from tenfold.platform.storage import Storage
from tenfold.platform.training.checkpoints import list_checkpoints
from tenfold.platform.training.launch import DEFAULT_JOB

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("own_cluster")]

STEPS, WAIT_SECONDS = 8, 300
JOB = f"train/{DEFAULT_JOB}"
EXPERIMENT = {
    "name": "remote",
    "base": str(Path(__file__).with_name("small_distillation.yaml")),
    "config": {"training": {"max_steps": STEPS, "save_steps": 1, "save_total_limit": STEPS}},
}


def steps_saved(storage):
    return [record.step for record in list_checkpoints(storage, JOB)]


def wait_until(condition, process, log):
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def test_a_run_on_s3_outlives_outages_and_a_killed_driver(s3, tmp_path, tracking_uri, monkeypatch):
    import ray

    uri = s3.uri()
    path = tmp_path / "remote.yaml"
    path.write_text(yaml.safe_dump({**EXPERIMENT, "storage": uri, "tracking": {"uri": tracking_uri(tmp_path)}}))
    run_id = load_experiment(str(path)).run_id
    top = Storage(uri)
    storage = Storage(top.uri_of(run_id))

    # the server fails while the ranks upload the checkpoint of step 2, and comes back after pyarrow has given up
    s3.close_at = lambda method, place: method == "PUT" and "checkpoint-00000002/" in place
    log = tmp_path / "first.log"
    with log.open("w") as output:
        first = subprocess.Popen(
            [sys.executable, "-m", "tenfold.platform.cli", "run", str(path)],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
            env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONUNBUFFERED": "1"},
        )
    try:
        wait_until(lambda: "does not answer; trying again" in log.read_text(), first, log)
        s3.is_open = True
        wait_until(lambda: steps_saved(storage)[:1] >= [3], first, log)
        assert "answers again after" in log.read_text()
        first.send_signal(signal.SIGKILL)
    finally:
        first.kill()
        first.wait()
    saved = steps_saved(storage)[0]
    assert saved < STEPS
    assert storage.list(JOB) == ["attempt-001"]

    # again, with less patience than the next outage lasts; the killed driver's lease is waited out
    monkeypatch.setattr(lease, "STALE_SECONDS", 12.0)
    impatient = load_experiment(str(path), [f"storage={uri}&patience=1"])
    assert impatient.run_id == run_id
    s3.close_at = lambda method, place: method == "PUT" and f"checkpoint-{STEPS - 1:08d}/" in place
    with pytest.raises(StorageError, match=r"no answer for \d+ s: .*same command goes on from the newest whole"):
        run(impatient)
    s3.is_open = True
    kept = steps_saved(storage)
    assert saved < kept[0] == STEPS - 2

    result = run(load_experiment(str(path)))
    last = [record.step for record in list_checkpoints(storage, JOB) if "attempt-003" in record.path]
    assert last == [STEPS, STEPS - 1]
    found = find_run(run_id, uri)
    assert found.state["status"] == "finished"
    assert (export_model(found.model_folder, tmp_path / "exported") / "model.safetensors").is_file()
    again = evaluate(found)
    assert again
    assert {name: result.outcome.metrics[name] for name in again} == pytest.approx(again)
    # what other runs share lies there as well, and no lease is left
    assert top.list("cache")
    assert not top.exists(f"{run_id}/{lease.LEASE}")
