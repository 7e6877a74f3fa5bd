"""Every method of the table goes through config, two steps, save, resume and evaluate, with real Ray and DeepSpeed."""

import json
import math
from pathlib import Path

import pytest
from tenfold.platform.errors import ConfigError
from tenfold.platform.experiment import load_experiment
from tenfold.platform.method import method_names
from tenfold.platform.models.manifest import verify_manifest
from tenfold.platform.run import evaluate, find_run, plan, run
from tenfold.platform.storage import Storage
from tenfold.platform.training.checkpoints import list_checkpoints

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


@pytest.mark.parametrize("name", method_names())
def test_method_runs_saves_resumes_and_evaluates(name, tmp_path, tracking_uri):
    own = [f"storage={tmp_path / 'runs'}", f"tracking.uri={tracking_uri(tmp_path)}"]
    loaded = load_experiment(str(Path(__file__).parent / name / "contract.yaml"), own)
    assert plan(loaded)
    result = run(loaded)
    assert all(math.isfinite(value) for value in result.outcome.metrics.values())
    storage, job = last_training(Storage(result.uri))
    records = list_checkpoints(storage, job)
    assert [record.step for record in records] == [2, 1]
    verify_manifest(Storage(result.uri).local_path(result.outcome.model))

    with pytest.raises(ConfigError, match="finished already"):
        run(loaded)

    # An interrupted run: the newest checkpoint is damaged, so it resumes from the one before and ends the same.
    storage.delete(f"{job}/done.json")
    storage.delete("models")
    for place, name in ((Storage(result.uri), "run.json"), (storage, "stage.json")):
        if place.exists(name):
            place.write_text(name, json.dumps(json.loads(place.read_text(name)) | {"status": "running"}))
    weights = storage.local_path(records[0].path) / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:100])
    again = run(loaded)
    assert again.outcome.metrics == result.outcome.metrics
    resumed = [r for r in list_checkpoints(storage, job) if "attempt-001" not in r.path]
    assert [record.step for record in resumed] == [2]
    assert (storage.local_path(resumed[0].path) / "model.safetensors").read_bytes() == before

    measured = evaluate(find_run(result.run_id, str(tmp_path / "runs")))
    assert measured == pytest.approx({name: result.outcome.metrics[name] for name in measured}, rel=1e-6)


def last_training(storage):
    """Return storage and folder of the last training job: the run's own, or that of its last stage."""
    stages = storage.list("stages") if storage.exists("stages") else []
    home = Storage(storage.uri_of(f"stages/{stages[-1]}")) if stages else storage
    (job,) = home.list("train")
    return home, f"train/{job}"
