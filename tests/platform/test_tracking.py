import json
import logging
import math
import pickle
import sqlite3
import sys
import time
from pathlib import Path

import pytest
from tenfold.platform import tracking
from tenfold.platform.deadline import run_with_deadline
from tenfold.platform.errors import TrackingError
from tenfold.platform.tracking import Tracker, check_tracking
from tenfold.platform.tracking_delivery import batches
from tenfold.platform.tracking_spool import Spool, Spooled


@pytest.fixture(scope="module")
def store(tmp_path_factory, tracking_uri):
    """Return the URI of an MLflow database in which there is an experiment."""
    uri = tracking_uri(tmp_path_factory.mktemp("store"))
    Tracker.start(uri, "made", "first", spool=tmp_path_factory.mktemp("spool") / "spool.jsonl").finish("FINISHED")
    return uri


@pytest.fixture
def tracker(store, tmp_path):
    return Tracker.start(store, "tests", "a run", tags={"tenfold.kind": "test"}, spool=tmp_path / "spool.jsonl")


@pytest.fixture
def client(store):
    from mlflow import MlflowClient

    return MlflowClient(store)


def history(client, run_id, name):
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]


def lock(store) -> sqlite3.Connection:
    connection = sqlite3.connect(store.removeprefix("sqlite:///"), isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    return connection


def test_a_run_gets_tags_and_artifacts_next_to_the_database(tracker, client, store):
    run = client.get_run(tracker.run_id)
    folder = Path(store.removeprefix("sqlite:///")).parent
    assert run.info.artifact_uri == f"{(folder / 'mlartifacts').as_uri()}/{tracker.run_id}/artifacts"
    assert run.data.tags["tenfold.kind"] == "test"
    assert run.info.run_name == "a run"
    assert run.info.status == "RUNNING"


def test_a_child_run_names_its_parent(tracker, client, store, tmp_path):
    child = Tracker.start(store, "tests", "child", parent_run_id=tracker.run_id, spool=tmp_path / "child.jsonl")
    assert client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == tracker.run_id


def test_metrics_keep_their_steps_and_the_last_value(tracker, client):
    for step in range(3):
        tracker.log_metrics({"train/loss": 3.0 - step}, step)
    assert history(client, tracker.run_id, "train/loss") == [(0, 3.0), (1, 2.0), (2, 1.0)]


def test_steps_that_are_done_again_after_a_loss_are_logged_once(tracker, client, store, tmp_path):
    for step in range(1, 5):
        tracker.log_metrics({"train/loss": 1.0 / step, "once": step}, step)
    later = Tracker.attach(store, tracker.run_id, tmp_path / "later.jsonl")
    for step in range(3, 7):
        later.log_metrics({"train/loss": 10.0 + step, "new": step}, step, again=True)
    tracker.log_metrics({"train/loss": 99.0}, 2)  # whoever does not say that it is again logs what it wants
    found = sorted(history(client, tracker.run_id, "train/loss"))
    assert found == [(1, 1.0), (2, 1 / 2), (2, 99.0), (3, 1 / 3), (4, 1 / 4), (5, 15.0), (6, 16.0)]
    assert history(client, tracker.run_id, "new") == [(step, step) for step in range(3, 7)]


def test_steps_that_are_done_again_while_mlflow_is_away_are_logged_once(tracker, client, store, tmp_path, monkeypatch):
    spool = tmp_path / "spool.jsonl"
    tracker.log_metrics({"train/loss": 1.0}, 1)
    monkeypatch.setattr(tracking, "CALL_SECONDS", 0.6)
    held = lock(store)
    for step in (2, 3):
        tracker.log_metrics({"train/loss": float(step)}, step)
    later = Tracker.attach(store, tracker.run_id, spool)  # the process before was lost with what it had kept
    for step in (2, 3, 4):
        later.log_metrics({"train/loss": 10.0 + step}, step, again=True)
    held.close()
    assert later.flush() == 0
    later.log_metrics({"train/loss": 15.0}, 5, again=True)
    assert history(client, tracker.run_id, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 14.0), (5, 15.0)]


def test_non_finite_metrics_do_not_lose_the_batch(tracker, client):
    tracker.log_metrics({"nan": math.nan, "up": math.inf, "down": -math.inf, "fine": 0.5}, 1)
    metrics = client.get_run(tracker.run_id).data.metrics
    assert math.isnan(metrics["nan"])
    assert metrics["up"] == sys.float_info.max
    assert metrics["down"] == -sys.float_info.max
    assert metrics["fine"] == 0.5


def test_a_refused_metric_costs_only_itself_and_is_said_once(tracker, client, caplog):
    for step in range(2):
        tracker.log_metrics({"good": 1.0 + step, "bad?name": 2.0, "text": "no number"}, step)
    assert history(client, tracker.run_id, "good") == [(0, 1.0), (1, 2.0)]
    assert sum("refused metrics bad?name" in record.message for record in caplog.records) == 1
    tracker.finish("FINISHED")
    assert "2 records were refused" in caplog.text


def test_resuming_logs_only_missing_params_and_names_those_that_differ(tracker, client, store, tmp_path, caplog):
    tracker.log_params({"config.lr": 0.1, "config.steps": 5})
    tracker.finish("FAILED")
    resumed = Tracker.start(store, "tests", "a run", run_id=tracker.run_id, spool=tmp_path / "spool.jsonl")
    resumed.log_params({"config.lr": 0.2, "config.steps": 5, "config.new": True})
    run = client.get_run(tracker.run_id)
    assert resumed.run_id == tracker.run_id
    assert run.info.status == "RUNNING"
    assert run.data.params == {"config.lr": "0.1", "config.steps": "5", "config.new": "True"}
    assert run.data.tags["tenfold.changed_params"] == "config.lr"
    assert "config.lr" in caplog.text


def test_more_params_than_one_request_takes_are_all_logged(tracker, client):
    tracker.log_params({f"config.p{i}": i for i in range(250)})
    assert len(client.get_run(tracker.run_id).data.params) == 250


def test_a_long_param_is_cut_visibly_and_kept_whole_as_an_artifact(tracker, client, tmp_path):
    tracker.log_params({"config.text": "x" * 7000})
    value = client.get_run(tracker.run_id).data.params["config.text"]
    assert len(value) == 6000
    assert value.endswith("... (7000 characters, see params.json)")
    whole = json.loads(Path(client.download_artifacts(tracker.run_id, "params.json", str(tmp_path))).read_text())
    assert whole == {"config.text": "x" * 7000}


def test_figures_and_text_become_artifacts(tracker, client, tmp_path):
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot([1, 2, 3])
    tracker.log_figure("loss.png", figure)
    tracker.log_text("name: demo\n", "config/resolved.yaml")
    (tmp_path / "notes.txt").write_text("note")
    tracker.log_file(tmp_path / "notes.txt", "extra")
    plot = Path(client.download_artifacts(tracker.run_id, "plots/loss.png", str(tmp_path)))
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [item.path for item in client.list_artifacts(tracker.run_id, "config")] == ["config/resolved.yaml"]
    assert [item.path for item in client.list_artifacts(tracker.run_id, "extra")] == ["extra/notes.txt"]


def test_a_model_pointer_holds_address_digest_and_lineage(tracker, client, tmp_path):
    tracker.log_model_pointer("s3://b/m", "ab12", flavor="causal-lm", metrics={"ppl": 3.5}, parents=["runs:/1"])
    pointer = json.loads(
        Path(client.download_artifacts(tracker.run_id, "model/pointer.json", str(tmp_path))).read_text()
    )
    assert pointer == {
        "uri": "s3://b/m",
        "digest": "ab12",
        "flavor": "causal-lm",
        "metrics": {"ppl": 3.5},
        "parents": ["runs:/1"],
    }
    tags = client.get_run(tracker.run_id).data.tags
    assert json.loads(tags["tenfold.parents"]) == ["runs:/1"]
    assert tags["tenfold.model"] == "s3://b/m"


def test_a_worker_attaches_with_the_pickled_spec(tracker, client):
    worker = pickle.loads(pickle.dumps(tracker.spec())).attach()  # noqa: S301 (our own bytes, as Ray does it)
    worker.log_metrics({"from_worker": 1.0}, 7)
    assert history(client, tracker.run_id, "from_worker") == [(7, 1.0)]


def test_resuming_a_run_that_is_gone_is_an_error_with_advice(store, tmp_path, tracker, client):
    with pytest.raises(TrackingError, match=r"no run 0{32}.*--new"):
        Tracker.start(store, "tests", "x", run_id="0" * 32, spool=tmp_path / "spool.jsonl")
    client.delete_run(tracker.run_id)
    with pytest.raises(TrackingError, match=r"was deleted.*--new"):
        Tracker.start(store, "tests", "x", run_id=tracker.run_id, spool=tmp_path / "spool.jsonl")


def test_a_deleted_run_costs_metrics_but_never_raises(tracker, client, caplog):
    client.delete_run(tracker.run_id)
    for step in range(3):
        tracker.log_metrics({"a": 1.0, "b": 2.0}, step)
    assert sum("refused metrics a, b" in record.message for record in caplog.records) == 1


def test_a_locked_database_delays_a_step_once_and_loses_nothing(tracker, client, store, caplog, tmp_path, monkeypatch):
    assert tracking.CALL_SECONDS < 5
    tracker.log_metrics({"loss": 0.0}, 0)
    waits = []

    def noting(function, seconds, what):
        waits.append(seconds)
        return run_with_deadline(function, seconds, what)

    monkeypatch.setattr(tracking, "run_with_deadline", noting)
    monkeypatch.setattr(tracking, "CALL_SECONDS", 1.0)
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 600.0)
    connection = lock(store)
    for step in range(1, 50):
        tracker.log_metrics({"loss": float(step), "nan": math.nan}, step)
    tracker.set_tags({"stage": "late"})
    tracker.log_text("kept", "note.txt")
    connection.close()
    assert waits == [1.0]
    assert sum("is away" in record.message for record in caplog.records) == 1
    assert str(tmp_path / "spool.jsonl") in caplog.text
    assert tracker.flush() == 0
    assert history(client, tracker.run_id, "loss") == [(step, float(step)) for step in range(50)]
    assert client.get_run(tracker.run_id).data.tags["stage"] == "late"
    assert [item.path for item in client.list_artifacts(tracker.run_id)] == ["note.txt"]
    tracker.finish("FINISHED")
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    assert list(tmp_path.iterdir()) == []


def test_the_next_call_after_the_pause_sends_what_was_kept(tracker, client, store, monkeypatch):
    monkeypatch.setattr(tracking, "CALL_SECONDS", 1.0)
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.2)
    connection = lock(store)
    tracker.log_metrics({"loss": 1.0}, 1)
    connection.close()
    monkeypatch.setattr(tracking, "CALL_SECONDS", 60.0)
    time.sleep(0.3)
    tracker.log_metrics({"loss": 2.0}, 2)
    assert history(client, tracker.run_id, "loss") == [(1, 1.0), (2, 2.0)]


def test_what_stays_unsent_is_said_at_the_end_with_the_file_and_sent_on_resume(
    client, store, tmp_path, caplog, free_port, monkeypatch
):
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 1.0)
    spool = tmp_path / "spool.jsonl"
    owner = Tracker.start(store, "tests", "unlucky", spool=tmp_path / "owner.jsonl")
    away = Tracker.attach(f"http://127.0.0.1:{free_port()}", owner.run_id, spool)
    away.log_params({"seed": 10})
    away.log_metrics({"loss": 1.0}, 1)
    away.finish("FAILED")
    assert f"did not get 3 records of run {owner.run_id}. They are kept in {spool}" in caplog.text

    resumed = Tracker.start(store, "tests", "unlucky", run_id=owner.run_id, spool=spool)
    run = client.get_run(owner.run_id)
    assert run.data.params == {"seed": "10"}
    assert run.data.metrics == {"loss": 1.0}
    assert run.info.status == "RUNNING"
    resumed.finish("FINISHED")
    assert not spool.exists()


def test_an_unwritable_spool_moves_to_the_temporary_folder(tmp_path, monkeypatch, caplog, free_port):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    away = Tracker.attach(f"http://127.0.0.1:{free_port()}", "ab12", Path("/proc/tenfold/spool.jsonl"))
    away.log_metrics({"loss": 1.0}, 1)
    assert away.flush(1.0) == 1
    assert (tmp_path / "tenfold-ab12.jsonl").exists()
    assert "/proc/tenfold" in caplog.text


def test_a_record_that_can_be_kept_nowhere_is_said_to_be_lost(tmp_path, monkeypatch, caplog, free_port):
    monkeypatch.setattr("tempfile.tempdir", "/proc/nowhere")
    away = Tracker.attach(f"http://127.0.0.1:{free_port()}", "ab12", Path("/proc/tenfold/spool.jsonl"))
    away.log_metrics({"loss": 1.0}, 1)
    away.finish("FINISHED")
    assert "metrics loss is lost" in caplog.text
    assert "2 could not be kept" in caplog.text


def test_a_spool_keeps_order_and_skips_a_damaged_line(tmp_path, caplog):
    spool = Spool(tmp_path / "spool.jsonl")
    spool.append({"op": "metrics", "metrics": {"a": math.nan}})
    with spool.path.open("a") as file:
        file.write('{"op": "metr\n')
    spool.append({"op": "tags", "tags": {"b": "1"}})
    with spool.path.open("a") as file:
        file.write('{"op": "still being wri')
    unsent = spool.unsent()
    assert [kept.record["op"] for kept in unsent] == ["metrics", "tags"]
    assert math.isnan(unsent[0].record["metrics"]["a"])
    assert "damaged record" in caplog.text
    spool.mark_sent(unsent[0])
    assert [kept.record["op"] for kept in Spool(spool.path).unsent()] == ["tags"]


def test_only_one_sender_at_a_time_has_the_spool(tmp_path):
    first, second = Spool(tmp_path / "spool.jsonl"), Spool(tmp_path / "spool.jsonl")
    with first.sending() as mine:
        assert mine
        with second.sending() as also_mine:
            assert not also_mine
    with second.sending() as mine:
        assert mine


def test_a_spool_with_unsent_records_is_never_removed(tmp_path):
    spool = Spool(tmp_path / "spool.jsonl")
    spool.append({"op": "metrics", "metrics": {"a": 1.0}})
    spool.remove()
    assert spool.pending()


def test_neighbouring_metric_records_share_a_request_up_to_its_limit():
    sizes = [600, 300, 200, 1]
    kept = [Spooled({"op": "metrics", "metrics": {f"m{i}": 0.0 for i in range(size)}}, size) for size in sizes]
    kept.insert(3, Spooled({"op": "tags", "tags": {"a": "b"}}, 0))
    assert [[one.end for one in batch] for batch in batches(kept)] == [[600, 300], [200], [0], [1]]


@pytest.mark.slow
def test_a_server_that_is_killed_and_comes_back_has_everything_in_order(
    tmp_path, caplog, free_port, tracking_uri, mlflow_server
):
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

    caplog.set_level(logging.INFO, logger="tenfold")
    port = free_port()
    uri, own_store = f"http://127.0.0.1:{port}", tracking_uri(tmp_path)
    server = mlflow_server(tmp_path, port, own_store)
    try:
        check_tracking(uri)
        tracker = Tracker.start(uri, "outage", "run", spool=tmp_path / "spool.jsonl")
        tracker.log_metrics({"loss": 0.0, "bad": math.inf, "nan": math.nan}, 0)
        server.kill()
        begin = time.monotonic()
        for step in range(1, 30):
            tracker.log_metrics({"loss": float(step)}, step)
        tracker.log_figure("loss.png", Figure())
        assert time.monotonic() - begin < 90  # 4.5 s for each of the calls would be more than two minutes
        assert "is away" in caplog.text

        server = mlflow_server(tmp_path, port, own_store)
        assert tracker.flush() == 0
        tracker.log_metrics({"loss": 30.0}, 30)
        tracker.finish("FINISHED")
        client = MlflowClient(uri)
        assert history(client, tracker.run_id, "loss") == [(step, float(step)) for step in range(31)]
        assert [item.path for item in client.list_artifacts(tracker.run_id, "plots")] == ["plots/loss.png"]
        run = client.get_run(tracker.run_id)
        assert run.info.status == "FINISHED"
        assert math.isnan(run.data.metrics["nan"])
        assert not (tmp_path / "spool.jsonl").exists()
    finally:
        server.kill()
