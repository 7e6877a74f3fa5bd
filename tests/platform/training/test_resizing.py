"""2 workers, then 1, then 2 again train what 2 workers train: the same rows in every step, the same losses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tenfold.platform.storage import Storage
from tenfold.platform.training.checkpoints import CheckpointRecord, file_digests
from tenfold.platform.training.deepspeed_config import deepspeed_config
from tenfold.platform.training.options import TrainingOptions
from tenfold.platform.training.universal import discard, resume_point, to_universal, universal_path

pytestmark = [pytest.mark.slow]

SCRIPT = Path(__file__).with_name("training_ranks.py")
STAGES = ("zero0", "zero1", "zero2", "zero3")
# 10 rows by 2 are 5 micro-batches: an epoch has 3 steps of 2, the last of which takes rows from its beginning again
OPTIONS = TrainingOptions(
    num_train_epochs=2,
    per_device_train_batch_size=2,
    learning_rate=1e-2,
    weight_decay=0.5,  # of matrices only: a group of its own
    adam_epsilon=1e-3,  # with the default the sign of a gradient of 1e-9 would decide about whole updates
    logging_steps=1,
    eval_strategy="no",
    save_strategy="steps",
    save_steps=2,
)
# Sums of float32 numbers in another order: 2 ranks add 2 means of gradients, 1 rank accumulates them.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def job(base, stage, name, **more):
    folder = base / stage / name
    folder.mkdir(parents=True)
    return {
        "build": "toy_job:build",
        "config": {"rows": 10, "record": str(folder / "rows")},
        "options": OPTIONS.model_dump(mode="json"),
        "deepspeed": deepspeed_config(stage),
        "seed": 10,
        "max_workers": 2,
        "output": str(folder),
        "checkpoints": str(folder),
        **more,
    }


def train(base, jobs, ranks):
    (base / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run([sys.executable, str(SCRIPT), str(base / "jobs.json"), str(ranks)], check=True, timeout=600)


def resumed(base, stage, name, of, step, ranks):
    """Return a job that goes on on so many ranks from a checkpoint that others wrote."""
    path = f"{stage}/{of}/out/checkpoint-{step}"
    world_size = 3 - ranks
    record = CheckpointRecord(path, step, world_size, {}, file_digests(base / path))
    if any(file.endswith("_optim_states.pt") for file in record.files):
        to_universal(Storage(base), record)
        path = universal_path(record)
    point = {"path": path, "step": step, "universal": "universal" in path}
    return job(base, stage, name, resume=str(base / path), resume_point=point, shares=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder for every stage with `two`, undisturbed, `one`, which goes on after step 2, `again`, after step 4."""
    base = tmp_path_factory.mktemp("resizing")
    train(base, [job(base, stage, "two") for stage in STAGES], 2)
    train(base, [resumed(base, stage, "one", "two", 2, 1) for stage in STAGES], 1)
    train(base, [resumed(base, stage, "again", "one", 4, 2) for stage in STAGES], 2)
    return base


def recorded(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        import toy_job
    return toy_job.recorded(folder)[""]


def losses(folder):
    return json.loads((folder / "result.json").read_text())["losses"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_with_half_the_workers_and_with_all_again(trained, stage):
    two, one, again = (trained / stage / name for name in ("two", "one", "again"))
    # what a checkpoint brings with it comes first
    expected, found = torch.tensor(losses(two)), torch.tensor(losses(again))
    assert len(expected) == 6
    assert len(set(losses(two))) == 6
    torch.testing.assert_close(torch.tensor(losses(one)), expected, **CLOSE)
    torch.testing.assert_close(found, expected, **CLOSE)
    weights = load_file(two / "model.safetensors")
    for name, weight in load_file(again / "model.safetensors").items():
        torch.testing.assert_close(weight, weights[name], **CLOSE, msg=name)


@pytest.mark.parametrize("stage", STAGES)
def test_every_step_has_the_same_rows_on_one_worker_as_on_two(trained, stage):
    two, one, again = (recorded(trained / stage / name / "rows") for name in ("two", "one", "again"))
    assert sorted(two) == [1, 2, 3, 4, 5, 6]
    assert sorted(one) == [3, 4, 5, 6]
    assert sorted(again) == [5, 6]
    assert all(len(rows) == 4 for rows in two.values())
    # the last step of an epoch is filled up with rows of its beginning, the first of which are in step 1 and 4
    assert len({*two[1], *two[2], *two[3]}) == 10
    assert one == {step: two[step] for step in one}
    assert again == {step: two[step] for step in again}


def test_a_converted_checkpoint_is_kept_for_the_next_start_and_made_again_when_it_is_damaged(trained, tmp_path):
    storage, job = Storage(tmp_path), "train/toy"
    path = f"{job}/attempt-001/checkpoint-00000002"
    storage.upload(trained / "zero1" / "two" / "out" / "checkpoint-2", path)
    files = file_digests(storage.local_path(path))
    record = CheckpointRecord(path, 2, 2, {}, files)
    storage.write_text(f"{path}/checkpoint.json", json.dumps(record.__dict__))
    made = []

    def convert(storage, record):
        made.append(record.step)
        to_universal(storage, record)

    assert resume_point(storage, job, 2, convert).path == path
    assert not made
    point = resume_point(storage, job, 1, convert)
    assert point.universal
    assert point.step == 2
    assert resume_point(storage, job, 1, convert) == point
    assert made == [2]
    victim = next(storage.local_path(point.path).rglob("exp_avg.pt"))
    victim.write_bytes(b"damaged")
    assert resume_point(storage, job, 1, convert) == point
    assert made == [2, 2]
    assert storage.list(f"{job}/attempt-001") == ["checkpoint-00000002", "universal-00000002"]
    discard(storage, job)
    assert storage.list(f"{job}/attempt-001") == ["checkpoint-00000002"]
