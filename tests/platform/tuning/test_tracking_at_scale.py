"""An MLflow server on PostgreSQL: two training workers, a sweep and many processes write at once, over its restart."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from tenfold.methods import table
from tenfold.platform import tracking, tracking_store
from tenfold.platform.errors import TrackingError
from tenfold.platform.experiment import load_experiment
from tenfold.platform.run import run
from tenfold.platform.tracking import Tracker, check_tracking
from tenfold.platform.tracking_delivery import deliver
from tenfold.platform.tuning import study

TESTS = Path(__file__).parents[2]
WRITERS, TRIALS, AT_ONCE, STEPS = 20, 20, 5, 20
CURVE = [3.0, 2.0, 1.0]

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def database(free_port):
    """Return the URI of a PostgreSQL of this machine that ends with the tests of this file."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if not programs:
        pytest.skip("PostgreSQL's server is not installed: make postgres")
    owner = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    folder, port, password = Path(tempfile.mkdtemp(prefix="tf-pg-")), free_port(), secrets.token_hex(8)
    (folder / "password").write_text(password)
    if owner:  # its programs refuse to run as root
        for path in (folder, folder / "password"):
            shutil.chown(path, "postgres", "postgres")
    new = ["--username=tenfold", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"]
    subprocess.run(
        [programs[-1] / "initdb", *new, f"--pwfile={folder / 'password'}", f"--pgdata={folder / 'data'}"],
        check=True,
        capture_output=True,
        **owner,
    )
    settings = ["listen_addresses=127.0.0.1", f"unix_socket_directories={folder}", "fsync=off"]
    address = f"//tenfold:{password}@127.0.0.1:{port}/postgres"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [programs[-1] / "postgres", "-D", folder / "data", "-p", str(port), *(f"--{each}" for each in settings)],
            stdout=log,
            stderr=log,
            **owner,
        )
    try:
        while True:
            try:
                psycopg.connect(f"postgresql:{address}").close()
                break
            except psycopg.OperationalError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.05)
        yield f"postgresql+psycopg:{address}"
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def ask(database):
    """Return ask(SQL) -> rows of MLflow's tables."""
    with psycopg.connect(database.replace("+psycopg", ""), autocommit=True) as connection:
        yield lambda query: connection.execute(query).fetchall()


@pytest.fixture(scope="module")
def server(database, free_port, mlflow_server, tmp_path_factory):
    """Return an MLflow server on that database, which can be killed and started again."""

    class Server:
        folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
        uri = f"http://127.0.0.1:{port}"

        def start(self):
            self.running = mlflow_server(self.folder, self.port, database, workers=2)

        def kill(self):
            self.running.kill()

    own = Server()
    own.start()
    yield own
    own.kill()


@pytest.fixture
def tracker(server, tmp_path):
    return Tracker.start(server.uri, "tests", "a run", spool=tmp_path / "spool.jsonl")


def points(ask, run_id):
    """Return (metric, step) -> how often MLflow has it."""
    return Counter(ask(f"SELECT key, step FROM metrics WHERE run_uuid = '{run_id}'"))


def test_a_database_is_refused_as_tracking_uri_without_showing_its_password(database):
    with pytest.raises(TrackingError, match="mlflow server --backend-store-uri") as caught:
        check_tracking(database)
    assert database not in str(caught.value)


def test_points_that_were_stored_although_the_answer_came_too_late_are_there_once(tracker, ask, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "CALL_SECONDS", 0.001)
        patch.setattr(tracking, "RETRY_SECONDS", 0.0)
        for step in range(5):
            tracker.log_metrics({"loss": 1.0 + step, "nan": float("nan")}, step)
    assert (tmp_path / "spool.jsonl").exists()
    assert tracker.flush() == 0
    expected = {(key, step): 1 for key in ("loss", "nan") for step in range(5)}
    assert points(ask, tracker.run_id) == expected
    # any number of late requests may end at the same time
    records = [
        {"op": "metrics", "metrics": {"late": float(step)}, "step": step, "time": 1700000000000} for step in range(50)
    ]
    client = MlflowClient(tracker.uri)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: deliver(client, tracker.run_id, records), range(4)))
    assert points(ask, tracker.run_id) == expected | {("late", step): 1 for step in range(50)}


def test_a_run_whose_creation_was_answered_too_late_is_opened_once(server, ask, tmp_path, monkeypatch):
    create, late = MlflowClient.create_run, []

    def create_late(client, *arguments, **options):
        late.append(threading.Timer(0.5, create, (client, *arguments), options))
        late[0].start()
        raise MlflowException("API request failed with timeout exception")

    monkeypatch.setattr(MlflowClient, "create_run", create_late)
    monkeypatch.setattr(tracking_store, "PAUSE_SECONDS", 0.1)
    opened = Tracker.start(server.uri, "tests", "late", spool=tmp_path / "spool.jsonl")
    assert ask("SELECT run_uuid FROM runs WHERE name = 'late'") == [(opened.run_id,)]
    assert len(late) == 1


def test_text_that_postgresql_refuses_is_made_readable(tracker):
    tracker.set_tags({"odd": "a\0b\ud800"})
    tracker.log_params({"odd": "a\0b"})
    data = MlflowClient(tracker.uri).get_run(tracker.run_id).data
    assert data.tags["odd"] == r"a\x00b\ud800"
    assert data.params["odd"] == r"a\x00b"


def swept(place, uri):
    """Return a sweep of `curve`."""
    content = {
        "name": "curves",
        "method": "curve",
        "config": {"curve": CURVE, "gate": str(place / "gate")},
        "storage": str(place / "runs"),
        "tracking": {"uri": uri},
        "sweep": {
            "metric": "eval/loss",
            "mode": "min",
            "space": {"config.scale": {"grid": [float(number) for number in range(1, TRIALS + 1)]}},
            "max_concurrent": AT_ONCE,
        },
    }
    path = place / "curves.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_experiment(str(path))


def trained(place, uri):
    """Return a run of two training workers."""
    options = [
        f"storage={place / 'runs'}",
        f"tracking.uri={uri}",
        "config.objective=sft",
        "config.test_sets={}",
        f"config.training.max_steps={STEPS}",
        f"config.training.save_steps={STEPS}",
    ]
    return load_experiment(str(TESTS / "methods" / "dskd" / "contract.yaml"), options)


def restart_in_the_middle(server, ask, place):
    """Kill the server when writers, trials and training have begun, let all go on, and start it again."""
    begun = (
        "SELECT count(DISTINCT run_uuid) FROM metrics WHERE (key, step) IN "
        f"(('metric/0', 14), ('eval/loss', {len(CURVE) - 1}), ('train/loss', 1))"
    )
    end = time.monotonic() + 300
    try:
        while ask(begun)[0][0] < WRITERS + AT_ONCE + 1:
            assert time.monotonic() < end, f"only {ask(begun)[0][0]} of writers, trials and training have begun"
            time.sleep(0.1)
        server.kill()
    finally:
        (place / "gate").touch()  # all wait for it
    server.start()


def test_nothing_is_lost_or_doubled_with_many_writers_over_a_restart(ray_session, server, ask, tmp_path, monkeypatch):
    import curve

    monkeypatch.setitem(table.METHODS, "curve", curve.ENTRY)
    monkeypatch.setattr(study, "run_trial", curve.run_patient_trial)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 240.0)
    above = Tracker.start(server.uri, "writers", "above", spool=tmp_path / "above.jsonl")
    command = [sys.executable, str(Path(__file__).with_name("writers.py")), server.uri, above.run_id, str(tmp_path)]
    writers = subprocess.Popen([*command, str(WRITERS)], stdout=subprocess.PIPE, text=True)
    try:
        with ThreadPoolExecutor(2) as pool:
            restarted = pool.submit(restart_in_the_middle, server, ask, tmp_path)
            training = pool.submit(run, trained(tmp_path, server.uri))
            sweep = study.run_sweep(swept(tmp_path, server.uri))
            restarted.result()
            trained_run = training.result()
        written = json.loads(writers.communicate(timeout=300)[0])
    finally:
        writers.kill()
    above.finish("FINISHED")

    doubled = "SELECT run_uuid, key, step FROM metrics GROUP BY run_uuid, key, step HAVING count(*) > 1"
    assert ask(doubled) == []
    kept = [path for path in tmp_path.rglob("*.jsonl") if path.name != "responses.jsonl"]  # answers of the model
    assert kept == []
    assert set(ask("SELECT status FROM runs WHERE name NOT IN ('a run', 'late')")) == {("FINISHED",)}
    check_writers(ask, server, above, written)
    check_trials(ask, sweep)
    found = points(ask, trained_run.mlflow_run_id)
    assert [found["train/loss", step] for step in range(1, STEPS + 1)] == [1] * STEPS


def check_writers(ask, server, above, written):
    import writers

    assert all(was_kept for _, was_kept in written)
    below = f"SELECT run_uuid FROM tags WHERE key = 'mlflow.parentRunId' AND value = '{above.run_id}'"
    assert sorted(ask(below)) == sorted((run_id,) for run_id, _ in written)
    for number, (run_id, _) in enumerate(written):
        logged = ask(f"SELECT key, step, value FROM metrics WHERE run_uuid = '{run_id}' AND NOT is_nan")
        assert sorted(logged) == sorted(
            (f"metric/{metric}", step, writers.value(number, step, metric))
            for step in range(writers.STEPS)
            for metric in range(writers.METRICS)
        )
        nans = ask(f"SELECT step FROM metrics WHERE run_uuid = '{run_id}' AND key = 'nan' AND is_nan ORDER BY step")
        assert nans == [(step,) for step in range(writers.STEPS)]
        params = dict(ask(f"SELECT key, value FROM params WHERE run_uuid = '{run_id}'"))
        assert params == {f"param.{each}": str(number * each) for each in range(writers.PARAMS)}
        assert ask(f"SELECT value FROM tags WHERE run_uuid = '{run_id}' AND key = 'step'") == [("29",)]
        notes = {path.name: path.read_text() for path in server.folder.glob(f"artifacts/*/{run_id}/artifacts/notes/*")}
        assert notes == {f"{step}.txt": f"writer {number}, step {step}" for step in (9, 19, 29)}


def check_trials(ask, sweep):
    (above,) = ask(f"SELECT run_uuid FROM runs WHERE name = '{sweep.sweep_id}'")
    assert len(sweep.trials) == TRIALS
    for trial in sweep.trials:
        (own,) = ask(f"SELECT run_uuid FROM runs WHERE name = '{trial.run_id}'")
        parent = ask(f"SELECT value FROM tags WHERE run_uuid = '{own[0]}' AND key = 'mlflow.parentRunId'")
        assert parent == [above]
        logged = ask(
            f"SELECT step, value FROM metrics WHERE run_uuid = '{own[0]}' AND key = 'eval/loss' ORDER BY step"
        )
        scaled = [trial.values["config.scale"] * point for point in CURVE]
        assert logged == [(0, scaled[-1]), *enumerate(scaled, start=1)]
