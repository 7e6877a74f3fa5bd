"""What a failed training becomes: retried or not, and the sentence that the user reads."""

from types import SimpleNamespace

import pytest
import ray.train
from ray.exceptions import RayActorError
from tenfold.platform.errors import CheckpointError, ClusterError
from tenfold.platform.storage import Storage
from tenfold.platform.training.launch import _explain, is_loss
from tenfold.platform.training.report import metric_names
from tenfold.platform.training.worker import is_complete, plain_error


class WorkerLost(Exception):
    """Stands for Ray's own class of an unreachable worker, which is not part of its interface."""


def group_error(**failures):
    return ray.train.WorkerGroupError("the whole trace", {int(rank[1:]): error for rank, error in failures.items()})


LOST, CONTACT = WorkerLost("the worker died"), ConnectionError("rank 0 on here: RuntimeError: gloo: closed by peer")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (group_error(r1=LOST), True),
        (group_error(r0=CONTACT), True),
        (group_error(r0=CONTACT, r1=LOST), True),
        (group_error(r0=RuntimeError("rank 0 on here: KeyError: 'a'")), False),
        (group_error(r1=CheckpointError("other world size")), False),
        (RayActorError(), True),
        (ray.train.ControllerError(RayActorError()), True),
        (ray.train.ControllerError(ValueError("a callback")), False),
    ],
)
def test_only_losses_are_started_again(error, expected):
    assert is_loss(error) is expected


def explain(tmp_path, error):
    return _explain(SimpleNamespace(storage=Storage(tmp_path)), SimpleNamespace(name="train"), error)


def test_platform_error_of_a_worker_is_told_as_it_was(tmp_path):
    error = explain(tmp_path, group_error(r0=RuntimeError("rank 0: also"), r1=CheckpointError("other world size")))
    assert type(error) is CheckpointError
    assert str(error) == "other world size"


def test_other_errors_are_told_in_one_sentence_and_the_trace_is_kept(tmp_path):
    error = explain(tmp_path, group_error(r1=RuntimeError("rank 1 on here: ValueError: first line\n  second line")))
    assert type(error) is ClusterError
    assert "rank 1 on here: ValueError: first line second line." in str(error)
    assert "resumes" in str(error)
    assert "the whole trace" in (tmp_path / "errors" / "train.txt").read_text()
    assert str(tmp_path / "errors" / "train.txt") in str(error)


def test_the_dead_worker_is_named_before_the_survivor_that_missed_it(tmp_path):
    lost = WorkerLost("A worker health check failed.\npid: 7\nits process has died")
    assert "failed: rank 1 was lost: its process has died." in str(explain(tmp_path, group_error(r0=CONTACT, r1=lost)))


def test_an_error_without_workers_is_told_and_long_ones_are_cut(tmp_path):
    text = str(explain(tmp_path, ray.train.ControllerError(ValueError("x" * 5000))))
    assert "xxx" in text
    assert len(text) < 1200


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Unpicklable("one", "two"), RuntimeError),
        (RuntimeError("shapes do not fit"), RuntimeError),
        (RuntimeError("[third_party/gloo/transport/tcp/pair.cc:553] Connection closed by peer"), ConnectionError),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp"), ConnectionError),
        (ConnectionResetError("reset"), ConnectionError),
        (TimeoutError("storage"), ConnectionError),
        (RayActorError(), ConnectionError),
        (FileNotFoundError("a.json"), RuntimeError),
    ],
)
def test_worker_errors_become_builtin_ones_that_keep_class_and_text(monkeypatch, error, kind):
    monkeypatch.setenv("RANK", "3")
    plain = plain_error(error)
    assert type(plain) is kind
    assert str(plain).startswith("rank 3 on ")
    assert f"{type(error).__name__}: {error}" in str(plain)


def test_metric_names_are_the_platforms_and_only_numbers_are_kept():
    logs = {
        "loss": 1.5,
        "learning_rate": 1e-4,
        "grad_norm": 2,
        "kd": 0.5,
        "eval_nll": 2.0,
        "eval_loss": 9.0,
        "eval_runtime": 1.0,
        "eval_samples_per_second": 3.0,
        "epoch": 1.0,
        "step": 4,
        "total_flos": 1.0,
        "train_runtime": 5.0,
        "note": "text",
    }
    expected = {"train/loss": 1.5, "train/lr": 1e-4, "train/grad_norm": 2.0, "train/kd": 0.5, "eval/nll": 2.0}
    assert metric_names(logs) == expected


@pytest.mark.parametrize(("step", "expected"), [(11, False), (12, True)])
def test_checkpoint_of_the_last_step_leaves_nothing_to_train(tmp_path, step, expected):
    from transformers.trainer_callback import TrainerState

    TrainerState(global_step=step, max_steps=12).save_to_json(str(tmp_path / "trainer_state.json"))
    assert is_complete(tmp_path) is expected
