import os
import uuid
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem
from tenfold.platform.errors import ConfigError
from tenfold.platform.storage import Storage


@pytest.fixture(params=["folder", "file uri", "fsspec"])
def storage(request, tmp_path):
    if request.param == "folder":
        return Storage(tmp_path / "runs")
    if request.param == "file uri":
        return Storage((tmp_path / "runs").as_uri())
    return Storage(f"memory://bucket-{uuid.uuid4().hex}/runs")


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    (folder / "deep").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "deep" / "weights.bin").write_bytes(bytes(range(256)) * 1000)
    return folder


def test_text_is_read_back_and_replaced(storage):
    path = storage.join("run-1", "state.json")
    assert not storage.exists(path)
    storage.write_text(path, "one")
    storage.write_text(path, "zwei \u20ac")
    assert storage.read_text(path) == "zwei \u20ac"
    assert storage.exists(path)
    assert storage.exists("run-1")
    assert storage.list("run-1") == ["state.json"]


def test_names_are_listed_sorted_and_a_missing_folder_is_empty(storage):
    for name in ("b", "a", "c"):
        storage.write_text(f"run/{name}/x", "")
    assert storage.list("run") == ["a", "b", "c"]
    assert storage.list("absent") == []


def test_reading_what_is_missing_raises_file_not_found(storage, tmp_path):
    with pytest.raises(FileNotFoundError):
        storage.read_text("absent.json")
    with pytest.raises(FileNotFoundError, match="absent"):
        storage.download("absent", tmp_path / "x")


def test_files_and_folders_are_deleted_and_missing_ones_ignored(storage):
    storage.write_text("run/a/x", "")
    storage.write_text("run/b", "")
    storage.delete("run/a")
    storage.delete("run/b")
    storage.delete("run/never")
    assert storage.list("run") == []


@pytest.mark.parametrize("path", ["", ".", "run/.."])
def test_the_root_is_never_deleted(storage, path):
    with pytest.raises(ConfigError, match="never deleted"):
        storage.delete(path)


@pytest.mark.parametrize("parts", [("..", "x"), ("/etc/passwd",), ("run", "/etc"), ("run", "../../x")])
def test_paths_outside_the_root_are_refused(storage, parts):
    with pytest.raises(ConfigError, match="is outside"):
        storage.join(*parts)


def test_a_folder_survives_upload_and_download(storage, source, tmp_path):
    storage.upload(source, "run/checkpoint")
    copy = storage.download("run/checkpoint", tmp_path / "copy")
    assert (copy / "config.json").read_text() == "{}"
    assert (copy / "deep" / "weights.bin").read_bytes() == (source / "deep" / "weights.bin").read_bytes()


def test_an_upload_replaces_files_of_the_same_name_and_keeps_others(storage, source):
    storage.write_text("run/model/config.json", "old")
    storage.write_text("run/model/extra.txt", "stays")
    storage.upload(source, "run/model")
    assert storage.read_text("run/model/config.json") == "{}"
    assert storage.list("run/model") == ["config.json", "deep", "extra.txt"]


def test_uploading_a_missing_folder_is_an_error(storage, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        storage.upload(tmp_path / "absent", "run/model")


def test_a_download_replaces_an_older_copy(tmp_path, source):
    storage = Storage(f"memory://bucket-{uuid.uuid4().hex}")
    storage.upload(source, "model")
    stale = tmp_path / "copy"
    stale.mkdir()
    (stale / "old.txt").write_text("old")
    assert storage.download("model", stale) == stale
    assert sorted(path.name for path in stale.iterdir()) == ["config.json", "deep"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "source"]


def test_a_single_file_is_downloaded(tmp_path):
    storage = Storage(f"memory://bucket-{uuid.uuid4().hex}")
    storage.write_text("run/state.json", "x")
    assert storage.download("run/state.json", tmp_path / "state.json").read_text() == "x"


def test_a_local_storage_answers_with_the_path_itself(tmp_path, source):
    storage = Storage(source)
    assert storage.local_path("deep") == source / "deep"
    assert storage.download("deep", tmp_path / "unused") == source / "deep"
    assert not (tmp_path / "unused").exists()
    assert Storage("memory://x").local_path("deep") is None


def test_relative_folders_and_file_uris_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Storage("runs").uri == str(tmp_path / "runs")
    assert Storage(tmp_path.as_uri() + "/runs").uri == str(tmp_path / "runs")
    assert Storage("runs").uri_of("a/b") == str(tmp_path / "runs/a/b")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Storage("~/runs").uri == str(tmp_path / "runs")


def test_uris_keep_their_scheme():
    storage = Storage("memory://bucket/runs/")
    assert storage.uri == "memory://bucket/runs"
    assert storage.uri_of("run/model") == "memory://bucket/runs/run/model"


def test_pyarrow_finds_the_same_files(storage):
    storage.write_text("run/state.json", "x")
    info = storage.filesystem.get_file_info(f"{storage.root}/run/state.json")
    assert info.is_file
    assert info.size == 1


def test_an_interrupted_write_leaves_the_old_text_and_no_rubbish(tmp_path, monkeypatch):
    storage = Storage(tmp_path)
    storage.write_text("state.json", "old")

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        storage.write_text("state.json", "new")
    assert storage.read_text("state.json") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_unfinished_copies_are_not_listed(tmp_path):
    storage = Storage(tmp_path)
    (tmp_path / ".model.k2j3").mkdir()
    storage.write_text("model/x", "")
    assert storage.list() == ["model"]


def test_a_writable_storage_passes_the_check_and_keeps_no_trace(storage, tmp_path):
    storage.check_writable()
    assert storage.list() == []
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("place", ["/proc/tenfold", "/sys/tenfold/runs"])
def test_a_read_only_place_is_an_error_that_names_it(place):
    with pytest.raises(ConfigError, match=rf"storage = '{place}': cannot be written: .*storage=\.\.\."):
        Storage(place).check_writable()


def test_a_folder_below_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be written"):
        Storage(tmp_path / "file" / "runs").check_writable()


def test_a_read_only_uri_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="/proc/tenfold"):
        Storage("file:///proc/tenfold").check_writable()


@pytest.mark.parametrize("uri", ["nonsense://x/y", "", "  ", "reference://x", "~nobody_such/x", "a\0b"])
def test_what_is_no_storage_is_an_error_with_examples(uri):
    with pytest.raises(ConfigError, match="s3://bucket/runs"):
        Storage(uri)


def test_a_server_that_does_not_answer_is_an_error_with_the_cause():
    with pytest.raises(ConfigError, match=r"storage = 'ftp://127.0.0.1:1/y': \[Errno \d+\] Connection refused\. Give"):
        Storage("ftp://127.0.0.1:1/y")


@pytest.mark.parametrize("uri", ["file:runs", "file://host/runs", "x://runs"])
def test_a_uri_never_becomes_a_folder_below_the_current_one(uri):
    with pytest.raises(ConfigError, match=f"storage = '{uri}': .*file:///data/runs"):
        Storage(uri)


def test_a_local_storage_uses_the_local_file_system(tmp_path):
    assert isinstance(Storage(tmp_path).filesystem, LocalFileSystem)
    assert Storage(str(tmp_path)).root == str(Path(tmp_path).resolve())
