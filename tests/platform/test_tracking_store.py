import socket
import sqlite3
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from tenfold.platform import tracking_store
from tenfold.platform.errors import TrackingError
from tenfold.platform.tracking import absolute_uri, check_tracking


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "mlflow.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE runs (id TEXT)")
    return path


@pytest.mark.parametrize(
    ("given", "absolute"),
    [
        ("sqlite:///mlflow.db", "sqlite:////base/mlflow.db"),
        ("sqlite:///../x/y.db?timeout=3", "sqlite:////x/y.db?timeout=3"),
        ("sqlite+pysqlite:///a.db", "sqlite+pysqlite:////base/a.db"),
        ("sqlite:////srv/mlflow.db", "sqlite:////srv/mlflow.db"),
        ("mlruns", "file:///base/mlruns"),
        ("file:mlruns", "file:///base/mlruns"),
        ("http://head:5000", "http://head:5000"),
        ("postgresql://me:pw@db/mlflow", "postgresql://me:pw@db/mlflow"),
        ("databricks", "databricks"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
    ],
)
def test_relative_stores_become_absolute_and_others_stay(given, absolute):
    assert absolute_uri(given, Path("/base")) == absolute


def test_a_server_that_is_down_is_an_error_within_ten_seconds_that_names_it(free_port):
    import mlflow  # noqa: F401 (its import is not part of the time)

    assert tracking_store.CONNECT_SECONDS + tracking_store.ANSWER_SECONDS < 10
    uri = f"http://127.0.0.1:{free_port()}"
    begin = time.monotonic()
    with pytest.raises(TrackingError, match=r"Start the server.*sqlite:///mlflow.db") as caught:
        check_tracking(uri)
    assert time.monotonic() - begin < 60
    assert uri in str(caught.value)


def test_a_server_that_never_answers_is_an_error_within_ten_seconds(monkeypatch):
    import mlflow  # noqa: F401 (its import is not part of the time)

    assert tracking_store.CONNECT_SECONDS + tracking_store.ANSWER_SECONDS < 10
    monkeypatch.setattr(tracking_store, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        with pytest.raises(TrackingError, match="does not answer"):
            check_tracking(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - begin < 60


def test_a_web_server_that_is_not_mlflow_is_an_error():
    class Quiet(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(TrackingError, match="failed with error code 501"):
            check_tracking(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def test_an_unwritable_folder_is_an_error_that_names_it():
    with pytest.raises(TrackingError, match=r"/proc/tenfold cannot be written.*another place"):
        check_tracking("sqlite:////proc/tenfold/mlflow.db")


def test_a_folder_below_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(TrackingError, match="cannot be written"):
        check_tracking(f"sqlite:///{tmp_path}/file/mlflow.db")


def test_a_file_that_is_no_database_is_an_error(tmp_path):
    (tmp_path / "mlflow.db").write_text("plain text, not a database at all" * 100)
    with pytest.raises(TrackingError, match="file is not a database"):
        check_tracking(f"sqlite:///{tmp_path}/mlflow.db")


def test_a_database_that_stays_locked_is_an_error(database, monkeypatch):
    monkeypatch.setattr(tracking_store, "LOCK_SECONDS", 0.2)
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(TrackingError, match=r"database is locked.*end the program"):
            check_tracking(f"sqlite:///{database}")
    finally:
        connection.close()


def test_the_check_of_a_usable_database_leaves_no_trace(tmp_path, database):
    before = database.read_bytes()
    check_tracking(f"sqlite:///{database}")
    check_tracking(f"sqlite:///{tmp_path}/new/mlflow.db")
    assert list(tmp_path.iterdir()) == [database]
    assert database.read_bytes() == before


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "mlruns", "./mlruns"])
def test_a_plain_folder_is_refused_with_advice(uri, monkeypatch):
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(TrackingError, match=r"plain folder.*tracking.uri=sqlite:///mlflow.db"):
        check_tracking(uri)


def test_a_plain_folder_is_taken_where_mlflow_is_told_to(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    check_tracking(tmp_path.as_uri())


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:", " "])
def test_stores_that_workers_cannot_share_are_refused(uri):
    with pytest.raises(TrackingError, match=r"tracking\.uri=sqlite:///mlflow\.db"):
        check_tracking(uri)


def test_errors_never_show_a_password(free_port):
    port = free_port()
    with pytest.raises(TrackingError) as caught:
        check_tracking(f"http://me:secret@127.0.0.1:{port}")
    assert "secret" not in str(caught.value)
    assert "me:***@" in str(caught.value)
