"""Every form of a model reference; what is missing is said with everything that was tried."""

import importlib.resources
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tenfold.platform.errors import ModelError
from tenfold.platform.models.loading import load_causal_lm, load_tokenizer, model_digest, resolve
from tenfold.platform.models.manifest import write_manifest
from tenfold.platform.models.references import locate
from tenfold.platform.models.source import ModelSource


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_folder_is_found_from_the_current_directory_and_from_home(tiny_model_folder, monkeypatch):
    monkeypatch.chdir(tiny_model_folder.parent)
    assert resolve(tiny_model_folder.name) == tiny_model_folder
    assert resolve(f"./{tiny_model_folder.name}") == tiny_model_folder
    monkeypatch.setenv("HOME", str(tiny_model_folder.parent))
    assert resolve(f"~/{tiny_model_folder.name}") == tiny_model_folder
    assert resolve(ModelSource(model=str(tiny_model_folder))) == tiny_model_folder


def test_a_damaged_folder_with_a_manifest_is_not_resolved(tmp_path, tiny_model_folder):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    write_manifest(folder, flavor="causal-lm", method="m", name="n")
    assert resolve(str(folder)) == folder
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match=r"model.safetensors: not what was written"):
        resolve(str(folder))


def test_a_folder_must_have_the_digest_that_is_asked_for(tiny_model_folder):
    digest = model_digest(tiny_model_folder)
    assert resolve(str(tiny_model_folder), sha256=digest) == tiny_model_folder
    with pytest.raises(ModelError, match="expected"):
        resolve(ModelSource(model=str(tiny_model_folder), sha256="0" * 64))


@pytest.mark.parametrize(
    "reference", ["/no/such/folder", "./nothing", "a/b/c", "models/x.gguf", "", "name with spaces"]
)
def test_what_can_only_be_a_path_says_where_it_was_looked_for(reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = Path(reference).absolute()
    with pytest.raises(ModelError, match=r"there is no .*, and it is no hub name. Give a folder") as caught:
        resolve(reference)
    assert str(expected) in str(caught.value)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"model.pt is neither a folder nor a .gguf file"):
        resolve(str(tmp_path / "model.pt"))


def test_a_fresh_model_has_no_folder(tiny_model_folder):
    source = ModelSource(config={"model_type": "llama"}, tokenizer=str(tiny_model_folder))
    with pytest.raises(ModelError, match="a fresh model has no folder"):
        resolve(source)


def test_a_revision_is_only_for_hub_names(tiny_model_folder):
    with pytest.raises(ModelError, match="revision 'v1' is only for hub names"):
        resolve(str(tiny_model_folder), revision="v1")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (
            "package:no_such_package_here/x.gguf",
            r"package no_such_package_here is not installed.*no-such-package-here",
        ),
        ("package:json", "write package:MODULE/FILE"),
        ("package:a.b/x.gguf", "write package:MODULE/FILE"),
        ("package:json/../../../etc/passwd", "write package:MODULE/FILE"),
        ("package:json//etc/passwd", "write package:MODULE/FILE"),
        ("package:json/x.gguf", "package json has no .*x.gguf. GGUF files in it: none"),
        ("package:json/decoder.py", "neither a folder nor a .gguf file"),
        ("sample:", "no such model among the samples"),
        ("sample:models/none", "no such model among the samples"),
        ("sample:../platform", "no such model among the samples"),
        ("sample:/etc", "no such model among the samples"),
    ],
)
def test_packages_and_samples_say_what_is_missing(reference, message):
    with pytest.raises(ModelError, match=message):
        resolve(reference)


def test_a_sample_is_a_folder_of_the_installed_samples():
    root = Path(str(importlib.resources.files("tenfold.samples")))
    found = [path.parent for path in root.rglob("config.json")]
    for folder in found:
        assert locate(f"sample:{folder.relative_to(root).as_posix()}") == folder
    with pytest.raises(ModelError) as caught:
        locate("sample:none")
    assert all(folder.relative_to(root).as_posix() in str(caught.value) for folder in found)


# MLflow -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mlflow_store(tmp_path_factory, tiny_model_folder, tracking_uri):
    """An SQLite store with four runs: a pointer, a whole folder, an empty run, a strange one; two are registered."""
    from mlflow import MlflowClient

    root = tmp_path_factory.mktemp("mlflow store")
    uri = tracking_uri(root)
    client = MlflowClient(uri)
    experiment = client.create_experiment("models", artifact_location=(root / "artifacts").as_uri())
    runs = {name: client.create_run(experiment).info.run_id for name in ("pointer", "folder", "empty", "strange")}
    pointer = {"uri": str(tiny_model_folder), "digest": model_digest(tiny_model_folder), "flavor": "causal-lm"}
    client.log_dict(runs["pointer"], pointer, "model/pointer.json")
    client.log_artifacts(runs["folder"], str(tiny_model_folder), "model")
    client.log_text(runs["strange"], "x", "model/MLmodel")
    client.create_registered_model("student")
    client.create_model_version("student", f"runs:/{runs['pointer']}/model", run_id=runs["pointer"])
    source = f"{client.get_run(runs['folder']).info.artifact_uri}/model"
    client.create_model_version("student", source, run_id=runs["folder"])
    client.set_registered_model_alias("student", "champion", "1")
    return uri, runs, client


def test_a_runs_pointer_leads_to_its_folder(mlflow_store, tiny_model_folder):
    uri, runs, _ = mlflow_store
    assert resolve(f"runs:/{runs['pointer']}", tracking_uri=uri) == tiny_model_folder
    assert resolve(f"runs:/{runs['pointer']}/model", tracking_uri=uri) == tiny_model_folder


def test_a_runs_own_model_folder_is_used(mlflow_store, tiny_model_folder):
    uri, runs, _ = mlflow_store
    folder = resolve(f"runs:/{runs['folder']}", tracking_uri=uri)
    assert model_digest(folder) == model_digest(tiny_model_folder)


def test_registered_models_are_found_by_alias_and_version(mlflow_store, tiny_model_folder):
    uri, _, _ = mlflow_store
    assert resolve("models:/student@champion", tracking_uri=uri) == tiny_model_folder
    assert resolve("models:/student/1", tracking_uri=uri) == tiny_model_folder
    assert model_digest(resolve("models:/student/2", tracking_uri=uri)) == model_digest(tiny_model_folder)


def test_the_tracking_uri_of_the_process_is_the_default(mlflow_store, tiny_model_folder):
    import mlflow

    uri, runs, _ = mlflow_store
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        assert len(load_tokenizer(ModelSource(model=f"runs:/{runs['pointer']}"))) == 320
        assert load_causal_lm(ModelSource(model="models:/student@champion")).num_parameters() > 0
    finally:
        mlflow.set_tracking_uri(before)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("runs:/0123", "Run with id=0123 not found.*tracking.uri is the store that knows it"),
        ("models:/student@nobody", "alias nobody not found"),
        ("models:/student/9", "version=9.* not found"),
        ("models:/nobody/1", "not found"),
        ("models:/student", "write runs:/RUN_ID"),
        ("runs:/", "write runs:/RUN_ID"),
    ],
)
def test_what_mlflow_does_not_know_is_said_with_the_stores_address(mlflow_store, reference, message):
    uri, _, _ = mlflow_store
    with pytest.raises(ModelError, match=message):
        resolve(reference, tracking_uri=uri)


def test_a_run_without_a_usable_model_is_refused(mlflow_store):
    uri, runs, _ = mlflow_store
    for name in ("empty", "strange"):
        with pytest.raises(ModelError, match=r"has neither pointer.json nor config.json"):
            resolve(f"runs:/{runs[name]}", tracking_uri=uri)


def test_a_missing_database_is_not_created(tmp_path):
    with pytest.raises(ModelError, match=r"none.db\): there is no such database"):
        resolve("runs:/0123", tracking_uri=f"sqlite:///{tmp_path}/none.db")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_down_is_said_at_once():
    with pytest.raises(ModelError, match=r"127.0.0.1:9.*does not answer"):
        resolve("runs:/0123", tracking_uri="http://127.0.0.1:9")


@pytest.fixture
def pointed(mlflow_store, tmp_path, tiny_model_folder):
    """A run whose pointer leads to a folder that a test may change."""
    uri, runs, client = mlflow_store
    experiment = client.get_run(runs["pointer"]).info.experiment_id

    def make(**changes):
        folder = tmp_path / "model"
        if not folder.exists():
            shutil.copytree(tiny_model_folder, folder)
            write_manifest(folder, flavor="causal-lm", method="m", name="n")
        run = client.create_run(experiment).info.run_id
        client.log_dict(run, {"uri": str(folder), "digest": model_digest(folder), **changes}, "model/pointer.json")
        return folder, lambda: resolve(f"runs:/{run}", tracking_uri=uri)

    return make


def test_a_pointer_to_a_folder_that_is_gone_says_so(pointed):
    folder, use = pointed()
    assert use() == folder
    shutil.rmtree(folder)
    with pytest.raises(ModelError, match=f"its files were at {folder}, where there is no folder now"):
        use()


def test_a_pointer_to_a_model_that_was_replaced_says_so(pointed, tiny_llama):
    folder, use = pointed()
    tiny_llama(320, seed=9).save_pretrained(folder)
    write_manifest(folder, flavor="causal-lm", method="m", name="n")
    with pytest.raises(ModelError, match="The files were replaced since"):
        use()


def test_a_pointer_that_is_damaged_says_so(pointed):
    for change in ({"uri": None}, {"digest": 5}, {"digest": ""}):
        _, use = pointed(**change)
        with pytest.raises(ModelError, match=r"pointer.json is damaged"):
            use()


def test_a_pointer_to_remote_storage_is_copied_into_the_cache_once(pointed, tmp_path):
    import fsspec

    folder, _ = pointed()
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/models/remote", recursive=True)
    _, use = pointed(uri="memory://models/remote")
    try:
        local = use()
        assert local.is_relative_to(tmp_path / "cache")
        assert model_digest(local) == model_digest(folder)
        # the address itself is a reference as well
        assert resolve("memory://models/remote") == local
        memory.rm("/models", recursive=True)
        assert use() == local
        with pytest.raises(ModelError, match="memory://models/remote, which cannot be read"):
            resolve("memory://models/remote")
    finally:
        memory.store.clear()


@pytest.mark.slow
def test_models_behind_a_tracking_server_are_downloaded_once(tmp_path, tiny_model_folder, tracking_uri, free_port):
    from mlflow import MlflowClient

    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = [f"--backend-store-uri={tracking_uri(tmp_path)}", f"--artifacts-destination={tmp_path}/artifacts"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([*command, *store], stdout=log, stderr=log, start_new_session=True)
    uri = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                client = MlflowClient(uri)
                experiment = client.create_experiment("models")
                break
            except Exception:
                assert server.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.5)
        whole, pointer = (client.create_run(experiment).info.run_id for _ in range(2))
        client.log_artifacts(whole, str(tiny_model_folder), "model")
        content = {"uri": str(tiny_model_folder), "digest": model_digest(tiny_model_folder)}
        client.log_dict(pointer, content, "model/pointer.json")
        assert resolve(f"runs:/{pointer}", tracking_uri=uri) == tiny_model_folder
        folder = resolve(f"runs:/{whole}", tracking_uri=uri)
        assert folder.is_relative_to(tmp_path / "cache")
        assert model_digest(folder) == model_digest(tiny_model_folder)
        written = (folder / "model.safetensors").stat().st_mtime_ns
        assert resolve(f"runs:/{whole}", tracking_uri=uri) == folder
        assert (folder / "model.safetensors").stat().st_mtime_ns == written
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)
