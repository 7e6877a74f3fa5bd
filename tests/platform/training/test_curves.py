"""The picture of a training: the whole log, restarts included, and the step that was kept."""

import json
import math

from tenfold.platform.storage import Storage
from tenfold.platform.training.checkpoints import CheckpointRecord, write_manifest
from tenfold.platform.training.curves import figure, training_log


def checkpoint(storage, attempt, step, history):
    path = f"train/train/attempt-{attempt:03d}/checkpoint-{step:08d}"
    storage.write_text(f"{path}/trainer_state.json", json.dumps({"log_history": history}))
    write_manifest(storage, CheckpointRecord(path, step, 1, {}, {}))


def test_the_log_is_that_of_the_newest_checkpoint_which_holds_the_attempts_before_it(tmp_path):
    storage = Storage(tmp_path)
    first = [{"step": 1, "epoch": 0.5, "loss": 3.0, "ce": 4.0}, {"step": 1, "eval_nll": 2.5, "eval_runtime": 9.0}]
    checkpoint(storage, 1, 1, first)
    checkpoint(storage, 2, 2, [*first, {"step": 2, "loss": 2.0, "ce": 3.0}, {"step": 2, "eval_nll": 2.25}])
    assert training_log(storage, "train/train") == {
        "train/loss": [(1, 3.0), (2, 2.0)],
        "train/ce": [(1, 4.0), (2, 3.0)],
        "eval/nll": [(1, 2.5), (2, 2.25)],
    }


def test_losses_are_on_the_left_and_the_kept_step_is_marked_on_the_right():
    series = {
        "train/ce": [(1, 4.0), (2, math.nan)],
        "train/loss": [(1, 3.0), (2, 2.0)],
        "train/lr": [(1, 0.1), (2, 0.1)],
        "eval/nll": [(1, 2.25), (2, 2.5)],
    }
    left, right = figure(series, "eval/nll", best_step=1).axes
    assert [line.get_label() for line in left.lines] == ["loss", "ce"]
    assert list(left.lines[1].get_xdata()) == [1]  # a number that is none leaves a gap
    assert list(right.lines[0].get_ydata()) == [2.25, 2.5]
    assert (right.lines[1].get_xdata()[0], right.lines[1].get_ydata()[0]) == (1, 2.25)


def test_a_training_without_evaluation_has_a_picture_too():
    left, right = figure({"train/loss": [(1, 3.0)]}, "eval/nll", best_step=1).axes
    assert len(left.lines) == 1
    assert all(not len(line.get_xdata()) for line in right.lines)
