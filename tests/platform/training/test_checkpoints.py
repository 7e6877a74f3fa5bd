"""Checkpoints in storage: which count, which are kept, which one a run goes on from."""

import pytest
from tenfold.platform.errors import ConfigError
from tenfold.platform.storage import Storage
from tenfold.platform.training.checkpoints import (
    MANIFEST,
    CheckpointRecord,
    best_of,
    checkpoint_name,
    damage,
    file_digests,
    list_checkpoints,
    newest_good,
    prune,
    write_manifest,
)

JOB = "train/train"


@pytest.fixture
def storage(tmp_path):
    return Storage(tmp_path)


def save(storage, step, *, attempt=1, nll=None, complete=True):
    """Write a checkpoint of two files and return its record."""
    path = f"{JOB}/attempt-{attempt:03d}/{checkpoint_name(step)}"
    storage.write_text(f"{path}/model.safetensors", f"weights {step} {attempt}")
    storage.write_text(f"{path}/global_step/rank_0.pt", f"state {step} {attempt}")
    metrics = {} if nll is None else {"eval/nll": nll}
    record = CheckpointRecord(path, step, 2, metrics, file_digests(storage.local_path(path)))
    if complete:
        write_manifest(storage, record)
    return record


def steps(records):
    return [record.step for record in records]


def test_digests_cover_files_in_subfolders(storage):
    assert sorted(save(storage, 1).files) == ["global_step/rank_0.pt", "model.safetensors"]


def test_list_is_newest_first_over_all_attempts_and_reads_back_what_was_written(storage):
    records = [save(storage, 2), save(storage, 10), save(storage, 4, attempt=2, nll=1.5)]
    found = list_checkpoints(storage, JOB)
    assert steps(found) == [10, 4, 2]
    assert found[1] == records[2]


def test_of_one_step_the_later_attempt_comes_first(storage):
    save(storage, 4)
    later = save(storage, 4, attempt=2)
    assert list_checkpoints(storage, JOB)[0] == later


def test_only_complete_checkpoints_count(storage):
    save(storage, 2)
    save(storage, 4, complete=False)
    storage.write_text(f"{JOB}/attempt-001/{checkpoint_name(6)}/{MANIFEST}", "{")
    storage.write_text(f"{JOB}/done.json", "{}")
    assert steps(list_checkpoints(storage, JOB)) == [2]


def test_a_job_that_never_started_has_no_checkpoints(storage):
    assert list_checkpoints(storage, JOB) == []
    assert newest_good(storage, JOB) is None


def test_whole_checkpoint_has_no_damage(storage):
    assert damage(storage, save(storage, 2)) is None


def test_changed_and_missing_files_are_named(storage):
    record = save(storage, 2)
    storage.write_text(f"{record.path}/model.safetensors", "something else")
    assert damage(storage, record).startswith("model.safetensors is not what was written (sha256 ")
    storage.delete(f"{record.path}/global_step/rank_0.pt")
    assert damage(storage, record) == "global_step/rank_0.pt is missing"


def test_newest_good_passes_over_damage(storage, caplog):
    good = save(storage, 2)
    bad = save(storage, 4)
    storage.write_text(f"{bad.path}/model.safetensors", "")
    assert newest_good(storage, JOB) == good
    assert "Falling back" in caplog.text


def record(step, **metrics):
    return CheckpointRecord("", step, 1, {f"eval/{name}": value for name, value in metrics.items()}, {})


def test_best_is_the_smallest_metric_and_the_later_of_equals():
    records = [record(8, nll=2.0), record(6, nll=1.0), record(4, nll=1.0), record(2)]
    assert best_of(records, "eval/nll").step == 6


def test_without_an_evaluation_the_newest_is_the_best():
    records = [CheckpointRecord("", step, 1, {"train/loss": 1.0 / step}, {}) for step in (4, 2)]
    assert best_of(records, "eval/nll").step == 4
    assert best_of([], "eval/nll") is None


def test_a_metric_that_no_evaluation_reports_is_an_error_with_those_it_does(storage):
    records = [record(4, nll=1.0, perplexity=2.7), record(2)]
    with pytest.raises(ConfigError, match=r"'eval/bleu': no checkpoint .* reports eval/nll, eval/perplexity"):
        best_of(records, "eval/bleu")
    kept = save(storage, 2, nll=1.0)
    with pytest.raises(ConfigError, match="eval/bleu"):
        prune(storage, JOB, keep_last=1, metric="eval/bleu")
    assert newest_good(storage, JOB) == kept


def test_prune_keeps_the_newest_steps_and_the_best_one(storage):
    for step, nll in [(2, 3.0), (4, 1.0), (6, 2.0), (8, 2.5), (10, 2.6)]:
        save(storage, step, nll=nll)
    prune(storage, JOB, keep_last=2, metric="eval/nll")
    assert steps(list_checkpoints(storage, JOB)) == [10, 8, 4]
    assert storage.list(f"{JOB}/attempt-001") == [checkpoint_name(step) for step in (4, 8, 10)]


def test_prune_removes_what_earlier_attempts_left_incomplete_but_nothing_that_may_be_arriving(storage):
    save(storage, 2)
    save(storage, 4, complete=False)
    save(storage, 4, attempt=2)
    save(storage, 6, attempt=2, complete=False)
    prune(storage, JOB, keep_last=2, metric="eval/nll")
    assert storage.list(f"{JOB}/attempt-001") == [checkpoint_name(2)]
    assert storage.list(f"{JOB}/attempt-002") == [checkpoint_name(4), checkpoint_name(6)]
