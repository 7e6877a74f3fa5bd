"""Storage on a real S3 server: everything that works on a disk, and a server that fails for a while."""

import pickle
import signal
import threading
import time

import pytest
from pyarrow.fs import FileSelector
from tenfold.platform import lease, patience
from tenfold.platform.errors import ConfigError, StorageError
from tenfold.platform.models.folder import fetch_folder
from tenfold.platform.run import only_one, spool_path
from tenfold.platform.storage import Storage


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    (folder / "deep").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "empty").write_text("")
    (folder / "deep" / "weights.bin").write_bytes(bytes(range(256)) * 4000)
    return folder


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_folders_and_addresses_work_as_on_a_disk(s3, source, tmp_path):
    storage = Storage(s3.uri())
    storage.check_writable()
    assert storage.list() == []
    storage.write_text("run/state.json", "one")
    storage.write_text("run/state.json", "zwei \u20ac")
    assert storage.read_text("run/state.json") == "zwei \u20ac"
    storage.upload(source, "run/model")
    assert storage.list("run") == ["model", "state.json"]
    assert storage.list("run/model") == ["config.json", "deep", "empty"]
    assert content(storage.download("run/model", tmp_path / "copy")) == content(source)
    # the address of a folder is a storage of its own, with the same server
    model = Storage(storage.uri_of("run/model"))
    assert model.read_text("config.json") == "{}"
    assert model.above().list() == ["model", "state.json"]
    assert storage.relative(model.uri) == "run/model"
    assert model.name == "model"
    storage.delete("run/model")
    assert storage.list("run") == ["state.json"]
    with pytest.raises(FileNotFoundError):
        storage.read_text("run/model/config.json")
    assert spool_path(model).is_absolute()
    assert spool_path(model) != spool_path(storage)


def test_a_folder_without_sub_folders_is_downloaded(s3, source, tmp_path):
    storage = Storage(s3.uri())
    storage.upload(source / "deep", "model")
    assert content(storage.download("model", tmp_path / "copy")) == content(source / "deep")
    (tmp_path / "fetched").mkdir()
    fetch_folder(Storage(storage.uri_of("model")), tmp_path / "fetched")
    assert content(tmp_path / "fetched") == content(source / "deep")


def test_the_endpoint_may_come_from_the_environment(s3, monkeypatch):
    uri = s3.uri()
    Storage(uri).write_text("x", "there")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3.address}")
    plain = Storage(uri.partition("?")[0])
    assert plain.uri == uri.partition("?")[0]
    assert plain.read_text("x") == "there"


@pytest.mark.parametrize("query", ["patience=soon", "patience=-1", "nonsense=1"])
def test_a_wrong_option_of_the_uri_is_one_error(query):
    with pytest.raises(ConfigError, match=f"storage = 's3://bucket/runs.{query}'"):
        Storage(f"s3://bucket/runs?{query}")


def test_a_bucket_that_does_not_exist_cannot_be_written(s3):
    with pytest.raises(ConfigError, match=r"cannot be written.*NO_SUCH_BUCKET"):
        Storage(s3.uri().replace("bucket-", "other-")).check_writable()


def test_a_server_that_is_down_at_the_start_is_an_error_without_waiting_for_it(s3):
    storage = Storage(s3.uri())
    s3.is_open = False
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"cannot be written.*503"):
        storage.check_writable()
    assert time.monotonic() - began < patience.PATIENCE_SECONDS / 4


@pytest.fixture
def quick(monkeypatch):
    """Have pauses as short as a test's."""
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(patience, "LONGEST_PAUSE", 0.2)


def opened_when(s3, condition):
    """Open the gate as soon as a condition holds."""

    def wait():
        while not condition():
            time.sleep(0.02)
        s3.is_open = True

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_an_upload_survives_a_server_that_fails_in_its_middle(s3, source, tmp_path, quick, caplog):
    storage = Storage(s3.uri())
    s3.close_at = lambda method, path: method == "PUT" and path.endswith("weights.bin")
    opened_when(s3, lambda: "does not answer; trying again" in caplog.text)
    storage.upload(source, "model")
    assert "answers again after" in caplog.text
    assert content(storage.download("model", tmp_path / "copy")) == content(source)


def test_what_ray_writes_is_tried_again_in_every_process(s3, quick, caplog):
    storage = Storage(s3.uri())
    filesystem = pickle.loads(pickle.dumps(storage.filesystem))  # noqa: S301 (as Ray sends it)
    assert filesystem == storage.filesystem
    s3.is_open = False
    opened_when(s3, lambda: "does not answer; trying again" in caplog.text)
    with filesystem.open_output_stream(f"{storage.root}/ray/snapshot.json") as stream:
        stream.write(b"{}")
    assert storage.read_text("ray/snapshot.json") == "{}"
    filesystem.create_dir(f"{storage.root}/ray/checkpoint")
    [info] = filesystem.get_file_info(FileSelector(f"{storage.root}/ray", allow_not_found=True))[:1]
    assert info.base_name == "checkpoint"
    with filesystem.open_input_stream(f"{storage.root}/ray/snapshot.json") as stream:
        assert stream.read() == b"{}"


def test_a_server_that_stays_away_is_one_error_that_says_how_to_go_on(s3, quick):
    storage = Storage(s3.uri(patience=0.1))
    s3.is_open = False
    with pytest.raises(StorageError, match=r"no answer for \d+ s: .*HTTP status 503.*same command goes on"):
        storage.filesystem.create_dir(f"{storage.root}/x")


@pytest.mark.parametrize("error", [FileNotFoundError("x"), PermissionError("x"), OSError("AWS Error ACCESS_DENIED")])
def test_what_no_waiting_mends_is_raised_at_once(error):
    def fail():
        raise error

    with pytest.raises(type(error)):
        patience.patiently(fail, 60, "place")


def test_two_processes_do_not_work_on_one_run(s3, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.2)
    top = Storage(s3.uri())
    with only_one(top, "run"):
        second = only_one(top, "run")
        with pytest.raises(ConfigError, match=r"run run is being worked on by another process \(process \d+ on "):
            second.__enter__()
        with only_one(top, "other"):
            pass
    with only_one(top, "run"):
        pass
    assert top.list("run") == []
    assert not top.exists("run/.lease.json")


def test_the_run_of_a_process_that_is_gone_is_taken_over(s3, monkeypatch, caplog):
    caplog.set_level("INFO", "tenfold")
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.5)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.1)
    top = Storage(s3.uri())
    top.write_text("run/.lease.json", '{"owner": "gone", "host": "elsewhere", "pid": 7, "beats": 3}')
    with only_one(top, "run"):
        assert "process 7 on elsewhere is gone; going on with its work" in caplog.text
        assert "gone" not in top.read_text("run/.lease.json")


def test_whoever_waits_gets_the_run_after_its_owner(s3, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.2)
    top, order = Storage(s3.uri()), []

    def second():
        with only_one(top, "run", wait=True):
            order.append("second")

    thread = threading.Thread(target=second)
    with only_one(top, "run"):
        thread.start()
        thread.join(1.5)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]


@pytest.fixture(params=["Ctrl-C is heard", "Ctrl-C is not heard"])
def stop_signals(request):
    """Let this process hear both signals, or SIGTERM alone, as what a shell starts in the background does."""

    def stop(number, frame):
        raise KeyboardInterrupt

    heard = stop if request.param == "Ctrl-C is heard" else signal.SIG_IGN
    before = signal.signal(signal.SIGINT, heard), signal.signal(signal.SIGTERM, stop)
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])


def test_a_process_whose_run_was_taken_stops(s3, monkeypatch, stop_signals):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.1)
    top = Storage(s3.uri())

    def work():
        with only_one(top, "run"):
            top.write_text("run/.lease.json", '{"owner": "another"}')
            time.sleep(30)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert "another" in top.read_text("run/.lease.json")
