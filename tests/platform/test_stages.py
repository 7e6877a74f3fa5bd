"""Stages: an MLflow run each below the run's own, done once, taken from the cache, gone on with, side by side."""

import threading

import pytest
from mlflow import MlflowClient
from tenfold.platform import stages
from tenfold.platform.context import RunContext
from tenfold.platform.experiment import Compute
from tenfold.platform.method import Outcome
from tenfold.platform.run import only_one
from tenfold.platform.stages import STATE, Stage, run_stage, run_stages
from tenfold.platform.storage import Storage
from tenfold.platform.tracking import Tracker


@pytest.fixture
def make_context(tmp_path):
    """Return a function that makes the context of a run in one storage and one MLflow store."""

    def make(run_id="one", seed=1, workers=1):
        uri = f"sqlite:///{tmp_path}/mlflow.db"
        tracker = Tracker.start(uri, "stages", run_id, spool=tmp_path / f"{run_id}.jsonl")
        top = Storage(tmp_path / "runs")
        storage, cache = Storage(top.uri_of(run_id)), Storage(top.uri_of("cache"))
        return RunContext(run_id, "method", seed, Compute(workers=workers), storage, cache, tracker)

    return make


class Work:
    """Counts its calls and fails as often as it is told to."""

    def __init__(self, failures=0):
        self.calls, self.failures, self.contexts = 0, failures, []

    def __call__(self, context):
        self.calls += 1
        self.contexts.append(context)
        context.storage.write_text(f"trace-{self.calls}", "")
        if self.calls <= self.failures:
            raise RuntimeError("lost")
        context.report({"train/loss": 0.5}, step=3)
        return Outcome({"eval/a": 2.0}, {"table": "table.json"}, "models/a")


def mlflow_run(context, run_id):
    return MlflowClient(context.tracker.uri).get_run(run_id)


def test_a_stage_is_a_run_below_the_methods_own(make_context):
    context = make_context()
    done = run_stage(context, Stage("dpo", {"beta": 0.1}, Work()))
    child = mlflow_run(context, done.mlflow_run_id)
    assert child.data.tags["mlflow.parentRunId"] == context.tracker.run_id
    assert child.info.experiment_id == mlflow_run(context, context.tracker.run_id).info.experiment_id
    assert child.info.status == "FINISHED"
    assert child.data.params == {"beta": "0.1", "seed": "1"}
    assert child.data.metrics == {"train/loss": 0.5, "eval/a": 2.0}
    assert mlflow_run(context, context.tracker.run_id).data.tags["tenfold.stage.dpo"] == done.mlflow_run_id
    assert done.model_folder == done.storage.uri_of("models/a")


def test_a_shared_stage_is_done_once_for_all_runs(make_context):
    work = Work()
    stage = Stage("dpo", {"beta": 0.1}, work, shared=True)
    first, second = run_stage(make_context("one"), stage), run_stage(make_context("two"), stage)
    assert work.calls == 1
    assert (first.reused, second.reused) == (False, True)
    assert second.outcome == first.outcome
    assert second.mlflow_run_id == first.mlflow_run_id
    assert second.storage.uri == first.storage.uri


@pytest.mark.parametrize("change", ["decides", "seed", "name"])
def test_whatever_decides_the_result_makes_another_stage(make_context, change):
    work = Work()
    run_stage(make_context("one"), Stage("dpo", {"beta": 0.1}, work, shared=True))
    other = Stage("reverse" if change == "name" else "dpo", {"beta": 0.2 if change == "decides" else 0.1}, work, True)
    run_stage(make_context("two", seed=2 if change == "seed" else 1), other)
    assert work.calls == 2


def test_a_stage_that_is_not_shared_stays_in_its_run(make_context):
    work = Work()
    stage = Stage("distil", {"r": 20}, work)
    one, two = run_stage(make_context("one"), stage), run_stage(make_context("two"), stage)
    assert work.calls == 2
    assert one.storage.uri != two.storage.uri
    assert run_stage(make_context("one"), stage).reused


def test_a_stage_that_failed_goes_on_in_its_folder_and_run(make_context):
    work = Work(failures=1)
    stage, context = Stage("dpo", {"beta": 0.1}, work, shared=True), make_context()
    with pytest.raises(RuntimeError, match="lost"):
        run_stage(context, stage)
    first = work.contexts[0].tracker.run_id
    assert mlflow_run(context, first).info.status == "FAILED"
    done = run_stage(make_context("two"), stage)
    assert done.mlflow_run_id == first
    assert mlflow_run(context, first).info.status == "FINISHED"
    assert done.storage.exists("trace-1")
    assert done.storage.exists("trace-2")


def test_an_unfinished_stage_of_another_mlflow_store_gets_a_new_run(make_context):
    work = Work(failures=1)
    stage, context = Stage("dpo", {}, work, shared=True), make_context()
    with pytest.raises(RuntimeError):
        run_stage(context, stage)
    storage = work.contexts[0].storage
    storage.write_text(STATE, storage.read_text(STATE).replace("mlflow.db", "other.db"))
    assert run_stage(context, stage).mlflow_run_id != work.contexts[0].tracker.run_id


def test_two_runs_that_need_one_stage_at_once_do_it_once(make_context, monkeypatch):
    calls, arrived = [], threading.Semaphore(0)

    def note_arrival(*arguments, **options):
        arrived.release()
        return only_one(*arguments, **options)

    def work(context):
        calls.append(context.run_id)
        for _ in range(2):
            assert arrived.acquire(timeout=60)
        return Outcome({})

    monkeypatch.setattr(stages, "only_one", note_arrival)

    stage = Stage("dpo", {}, work, shared=True)
    contexts = [make_context("one"), make_context("two")]
    threads = [threading.Thread(target=run_stage, args=(context, stage)) for context in contexts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def resources(monkeypatch, cpus):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": cpus})


@pytest.mark.parametrize(
    ("cpus", "workers", "together"), [(2.0, 1, True), (1.0, 1, False), (3.0, 2, False), (4.0, 2, True)]
)
def test_stages_go_side_by_side_only_where_there_is_room(make_context, monkeypatch, cpus, workers, together):
    resources(monkeypatch, cpus)
    meeting = threading.Barrier(2, timeout=60)
    events, threads = [], set()

    def work(context):
        threads.add(threading.get_ident())
        events.append("begin")
        if together:
            meeting.wait()
        events.append("end")
        return Outcome({})

    both = [Stage(name, {}, work) for name in ("dpo", "reverse")]
    run_stages(make_context(workers=workers), both, at_once=True)
    assert events == (["begin", "begin", "end", "end"] if together else ["begin", "end", "begin", "end"])
    # Also where two threads by chance did not meet.
    assert len(threads) == (2 if together else 1)


def test_results_come_in_the_order_of_the_stages_and_a_failure_lets_the_others_end(make_context, monkeypatch):
    resources(monkeypatch, 2.0)
    good, bad = Work(), Work(failures=1)
    context = make_context()
    with pytest.raises(RuntimeError, match="lost"):
        run_stages(context, [Stage("dpo", {}, bad), Stage("reverse", {}, good)], at_once=True)
    results = run_stages(context, [Stage("dpo", {}, bad), Stage("reverse", {}, good)], at_once=True)
    assert [result.reused for result in results] == [False, True]
    assert good.calls == 1
