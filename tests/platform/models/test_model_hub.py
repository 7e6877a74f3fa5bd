"""Downloads from a Hugging Face hub, here a small HTTP server: what comes, what does not, and interruptions."""

import json
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from tenfold.platform.errors import ModelError
from tenfold.platform.models import hub
from tenfold.platform.models.loading import load_causal_lm, model_digest, resolve
from tenfold.platform.models.source import ModelSource


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download needs: one repository, one commit."""

    commit = "1" * 40
    folder: Path
    broken: set[str]
    asked: list[str]

    def do_HEAD(self):
        self.answer(head=True)

    def do_GET(self):
        self.answer(head=False)

    def log_message(self, *_):
        pass

    def answer(self, head):
        path = self.path.partition("?")[0]
        files = sorted(entry.name for entry in self.folder.iterdir())
        if path in ("/api/models/tiny/llama", "/api/models/tiny/llama/revision/main"):
            return self.send_json(
                {"id": "tiny/llama", "sha": self.commit, "siblings": [{"rfilename": n} for n in files]}
            )
        if path == f"/api/models/tiny/llama/tree/{self.commit}":
            return self.send_json(
                [{"type": "file", "path": n, "size": (self.folder / n).stat().st_size, "oid": n} for n in files]
            )
        name = path.removeprefix(f"/tiny/llama/resolve/{self.commit}/")
        if name not in files:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound" if "/api/" in path else "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if not head:
            self.asked.append(name)
        content = (self.folder / name).read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{name}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not head:
            # A broken file ends in mid-transfer.
            self.wfile.write(content[: len(content) // 2] if name in self.broken else content)
        return None

    def send_json(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub_server(tmp_path, monkeypatch, tiny_model_folder):
    import huggingface_hub

    folder = shutil.copytree(tiny_model_folder, tmp_path / "served")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling_mine.py").write_text("raise RuntimeError")
    handler = type("TinyHub", (Hub,), {"folder": folder, "broken": set(), "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    handler.endpoint = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_hub_model_comes_without_pickles_and_code(hub_server, tiny_model_folder):
    folder = hub.download("tiny/llama", endpoint=hub_server.endpoint)
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in tiny_model_folder.iterdir()}
    assert not {"pytorch_model.bin", "modeling_mine.py"} & set(hub_server.asked)
    assert model_digest(folder) == model_digest(tiny_model_folder)
    assert load_causal_lm(ModelSource(model=str(folder))).num_parameters() > 0


def test_a_plan_downloads_no_weights_and_trusted_code_comes_along(hub_server):
    folder = hub.download("tiny/llama", weights=False, endpoint=hub_server.endpoint)
    assert (folder / "config.json").is_file()
    assert "model.safetensors" not in hub_server.asked
    hub.download("tiny/llama", code=True, endpoint=hub_server.endpoint)
    assert "modeling_mine.py" in hub_server.asked


def test_an_interrupted_download_is_not_used_and_goes_on_later(hub_server, monkeypatch, tiny_model_folder):
    import huggingface_hub

    hub_server.broken.add("model.safetensors")
    with pytest.raises(ModelError, match="tiny/llama: not usable from the Hugging Face hub"):
        hub.download("tiny/llama", endpoint=hub_server.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="not usable from the Hugging Face hub"):
        hub.download("tiny/llama", endpoint=hub_server.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub_server.broken.clear()
    folder = hub.download("tiny/llama", endpoint=hub_server.endpoint)
    assert model_digest(folder) == model_digest(tiny_model_folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.download("tiny/llama", endpoint=hub_server.endpoint) == folder


def test_an_unknown_hub_model_is_said_with_the_folder_that_was_tried(hub_server, tmp_path, monkeypatch):
    import huggingface_hub

    with pytest.raises(ModelError, match="nobody/nothing: not usable from the Hugging Face hub: RepositoryNotFound"):
        hub.download("nobody/nothing", endpoint=hub_server.endpoint)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"no folder .*/nobody/nothing; .*HF_HUB_OFFLINE") as caught:
        resolve("nobody/nothing", revision="v1")
    assert "revision v1" in str(caught.value)
