"""Heartbeats and what is read from them, and stopping after a step."""

from types import SimpleNamespace

import pytest
from tenfold.platform.experiment import Compute, Workers
from tenfold.platform.training.heartbeat import DONE, START, Beat, Heart, Pulse
from tenfold.platform.training.room import Room
from tenfold.platform.training.stopping import HeartCallback, StopCallback
from tenfold.platform.training.watch import Watch, hang_message
from transformers import TrainerControl, TrainerState


def beat(rank, *, step=4, event="on_step_begin", stepped=True, idle_s=0.0):
    return Beat(rank, f"node{rank}", f"host{rank}", step, event, stepped, idle_s)


def watch_of(beats, size=2, **limits):
    compute = Compute(workers=size, **limits)
    found = Watch(None, "attempt-001", size, Room(compute, (size,), "train"), compute)
    found.all_started = len(beats) == size
    return found


def test_the_pulse_hears_only_the_workers_of_the_attempt_that_runs():
    pulse = Pulse()
    pulse.begin("attempt-002")
    assert pulse.beat("attempt-001", beat(0)) is None
    pulse.ask_to_stop("attempt-001", "resize")
    assert pulse.beat("attempt-002", beat(1)) is None
    pulse.ask_to_stop("attempt-002", "preemption")
    pulse.controlled_by("attempt-002", "controller")
    assert pulse.beat("attempt-002", beat(1)) == "preemption"
    attempt, beats, controller = pulse.look()
    assert (attempt, [found.rank for found in beats], controller) == ("attempt-002", [1], "controller")
    assert beats[0].idle_s >= 0
    pulse.begin("attempt-003")
    assert pulse.look() == ("attempt-003", [], None)


def test_the_worker_that_stopped_first_is_named_first():
    beats = [beat(0, step=4, idle_s=31), beat(1, step=3, idle_s=30), beat(2, step=4, idle_s=40, event=START)]
    told = hang_message([*beats, beat(3)], beats)
    assert told.startswith(
        "3 of 4 workers made no progress: rank 1 on host1 for 30 s (in step 4, after on_step_begin)"
    )
    assert told.index("rank 1") < told.index("rank 2 on host2 for 40 s (while starting)") < told.index("rank 0")
    assert "compute.hang_timeout_s" in told


def test_a_silent_worker_hangs_after_its_limit_and_one_that_is_done_never():
    limits = {"hang_timeout_s": 20, "start_timeout_s": 100}
    watch = watch_of([beat(0), beat(1)], **limits)
    assert watch._problem([beat(0, idle_s=19), beat(1)]) is None
    assert "rank 0 on host0" in watch._problem([beat(0, idle_s=21), beat(1)])
    assert watch._problem([beat(0, idle_s=99, stepped=False, event="on_train_begin"), beat(1)]) is None
    assert "rank 0 on host0" in watch._problem([beat(0, idle_s=101, stepped=False), beat(1)])
    assert watch._problem([beat(0, idle_s=1e6, event=DONE), beat(1)]) is None


def test_workers_that_do_not_start_are_found_with_what_was_asked_for(monkeypatch):
    monkeypatch.setattr("tenfold.platform.training.watch.describe_nodes", lambda: "here (0 of 2 CPU free)")
    watch = watch_of([beat(0)], start_timeout_s=50, cpus_per_worker=2)
    watch._begun -= 99
    assert watch._problem([beat(0)]) is None
    watch._begun -= 2
    told = watch._problem([beat(0)])
    assert told.startswith(
        "only 1 of 2 worker(s) with 2 CPU each started within 100 s (twice compute.start_timeout_s)"
    )
    assert "here (0 of 2 CPU free)" in told


def test_room_for_a_size_that_cannot_be_used_is_no_room(monkeypatch):
    free = {"workers": 3}
    monkeypatch.setattr("tenfold.platform.training.room.free_room", lambda cpus, gpus: free["workers"])
    room = Room(Compute(workers=Workers(min=1, max=4)), (1, 2, 4), "train")
    assert [room.largest(0), room.largest(1)] == [2, 4]
    free["workers"] = 0
    assert [room.largest(0), room.largest(2)] == [0, 2]
    assert (room.is_elastic, room.shares, room.largest_ever) == (True, 4, 4)


def test_more_workers_are_of_use_only_when_all_that_there_are_have_stepped():
    compute = Compute(workers=Workers(min=1, max=4))
    watch = Watch(None, "attempt-001", 2, Room(compute, (1, 2, 4), "train"), compute)
    assert not watch._may_grow([])  # they start: what they will take is still free
    assert not watch._may_grow([beat(0)])
    watch.all_started = True
    assert not watch._may_grow([beat(0), beat(1, stepped=False)])
    assert watch._may_grow([beat(0), beat(1)])
    watch.size = 4
    assert not watch._may_grow([beat(0), beat(1)])


def stopping(wish):
    heart = Heart(None, "attempt-001", 0)
    heart.wish = wish
    return StopCallback(heart), HeartCallback(heart), heart


def at(step, epoch=0.5, **strategies):
    arguments = {"world_size": 1, "device": "cpu", "eval_strategy": "no", "save_strategy": "steps", **strategies}
    return SimpleNamespace(**arguments), TrainerState(global_step=step, max_steps=10, epoch=epoch), TrainerControl()


def test_a_wish_ends_training_after_a_step_once_its_checkpoint_is_there():
    stop, _, _ = stopping("resize")
    arguments, state, control = at(3)
    stop.on_step_end(arguments, state, control)
    assert control.should_save
    assert not control.should_training_stop
    stop.on_save(arguments, state, control)
    assert control.should_training_stop
    assert stop.reason == "resize"
    # the epoch that is left in the middle
    control.should_save = control.should_evaluate = True
    stop.on_epoch_end(arguments, state, control)
    assert not any((control.should_save, control.should_evaluate, control.should_log))


def test_after_the_last_step_of_an_epoch_its_evaluation_comes_first():
    stop, _, _ = stopping("preemption")
    arguments, state, control = at(5, epoch=1.0, eval_strategy="epoch", save_strategy="epoch")
    stop.on_step_end(arguments, state, control)
    assert not control.should_save
    stop.on_epoch_end(arguments, state, control)
    assert control.should_save
    stop.on_save(arguments, state, control)
    assert control.should_training_stop


@pytest.mark.parametrize(("wish", "step"), [(None, 3), ("resize", 10)])
def test_without_a_wish_and_at_the_last_step_nothing_is_stopped(wish, step):
    stop, _, _ = stopping(wish)
    arguments, state, control = at(step)
    stop.on_step_end(arguments, state, control)
    stop.on_save(arguments, state, control)
    assert not any((control.should_save, control.should_training_stop))
    assert stop.reason is None


def test_every_event_of_the_trainer_is_progress():
    _, callback, heart = stopping(None)
    arguments, state, control = at(7)
    assert heart._event == START
    for name in ("on_train_begin", "on_substep_end", "on_prediction_step", "on_save"):
        getattr(callback, name)(arguments, state, control)
        assert (heart._event, heart._step, heart._stepped) == (name, 7, False)
    callback.on_step_end(arguments, state, control)
    assert heart._stepped
