"""The spatial application with a quick analyser: a real HTTP server in this process, jobs in a thread, no Ray."""

import json
import socket
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

ANALYSER = "kmeans_analyser:KMeansAnalyser"


class ThreadJobs:
    """Runs what waits, one job after the other, as the tasks of Ray would."""

    def __init__(self, config):
        from tenfold.serve.spatial.jobs import JobStore

        self.config, self.store = config, JobStore(config.storage)
        self.paused = False
        self.wakes = 0
        self._news, self._end = threading.Event(), False
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self):
        self._thread.start()

    def wake(self):
        self.wakes += 1
        self._news.set()

    def stop(self):
        self._end = True
        self._news.set()
        self._thread.join(20)

    def _work(self):
        from tenfold.serve.spatial.analyser import load_analyser
        from tenfold.serve.spatial.running import run_job

        while not self._end:
            for job_id in [] if self.paused else self.store.unfinished():
                run_job(self.store, load_analyser(self.config.method), job_id, self.config)
            self._news.wait(0.05)
            self._news.clear()


@pytest.fixture(scope="session", autouse=True)
def analyser_path():
    """Let this process and those it starts import the quick analyser."""
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)
    yield folder
    sys.path.remove(folder)


@contextmanager
def spatial_server(data):
    """Serve on a free loopback port below /spatial; yields (client, service, jobs)."""
    import uvicorn
    from fastapi import FastAPI
    from tenfold.serve.spatial.api import create_app
    from tenfold.serve.spatial.config import parse_spatial_config
    from tenfold.serve.spatial.service import SpatialService

    config = parse_spatial_config({"method": ANALYSER, **data})
    jobs = ThreadJobs(config)
    service = SpatialService(config, jobs)
    app = create_app(service)
    outer = FastAPI(lifespan=app.router.lifespan_context)
    outer.mount("/spatial", app)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(outer, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        deadline = time.monotonic() + 120
        while not server.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.started
        base = f"http://127.0.0.1:{listener.getsockname()[1]}/spatial"
        with httpx.Client(base_url=base, timeout=120) as client:
            yield client, service, jobs
    finally:
        jobs.stop()
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="session")
def start_spatial_server():
    """Return the context manager `spatial_server`."""
    return spatial_server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = tmp_path_factory.mktemp("model")
    (model / "model.json").write_text(json.dumps({"n_domains": 1, "domain": "7"}))
    data = {
        "storage": str(tmp_path_factory.mktemp("storage")),
        "models": [{"id": "seven", "path": str(model)}],
        "limits": {
            "max_upload_bytes": 2_000_000,
            "max_cells": 2000,
            "max_unpacked_bytes": 20_000_000,
            "max_values": 2_000_000,
            "predict_cells": 200,
            "max_jobs_per_client": 2,
            "retry_after_s": 3,
        },
        "replicas": {"processes": 2, "memory_gb": 4},
    }
    with spatial_server(data) as started:
        yield started


@pytest.fixture(scope="module")
def client(server):
    return server[0]


@pytest.fixture(scope="module")
def jobs(server):
    return server[2]


@pytest.fixture(scope="session")
def make_section(tmp_path_factory):
    """Return make_section(num_cells=150, change=None, **options) -> path of a .h5ad."""
    from tenfold.methods.gates.synthetic import synthetic_section

    def make(num_cells=150, num_genes=40, seed=0, change=None):
        adata = synthetic_section(num_cells, num_genes, num_domains=3, seed=seed)
        if change is not None:
            adata = change(adata) or adata
        path = tmp_path_factory.mktemp("section") / "section.h5ad"
        adata.write_h5ad(path)
        return path

    return make


@pytest.fixture(scope="session")
def submit():
    """Return submit(client, path, params=None, **more) -> response."""

    def send(client, path, params=None, part="file", name=None, headers=None):
        data = {} if params is None else {"params": json.dumps(params)}
        with Path(path).open("rb") as file:
            files = {part: (name or Path(path).name, file, "application/octet-stream")}
            return client.post("/v1/jobs", files=files, data=data, headers=headers)

    return send


@pytest.fixture(scope="session")
def wait_for():
    """Return wait_for(client, job_id, *statuses, seconds=120) -> status answer."""

    def wait(client, job_id, *statuses, seconds=120, headers=None):
        statuses = statuses or ("done", "failed", "cancelled")
        deadline = time.monotonic() + seconds
        while True:
            answer = client.get(f"/v1/jobs/{job_id}", headers=headers).json()
            if answer.get("status") in statuses:
                return answer
            assert time.monotonic() < deadline, answer
            time.sleep(0.05)

    return wait


@pytest.fixture(scope="session")
def unpack_view():
    """Return a reader of the packed view, written from its description: bytes -> (arrays, cell ids)."""

    def unpack(body):
        size = int.from_bytes(body[:4], "little")
        header = json.loads(body[4 : 4 + size])
        start = 4 + size

        def piece(place):
            return body[start + place["offset"] : start + place["offset"] + place["length"]]

        arrays = {name: np.frombuffer(piece(place), place["dtype"]) for name, place in header["arrays"].items()}
        return arrays, json.loads(piece(header["ids"])), header["n"]

    return unpack
