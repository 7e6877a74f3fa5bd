"""A real HTTP server with real tiny models, in this process and without Ray."""

import socket
import threading
import time
from contextlib import contextmanager

import pytest


@contextmanager
def http_server(data):
    """Serve a configuration on a free loopback port; yields (base URL, LanguageService)."""
    import torch
    import uvicorn
    from tenfold.serve.api import create_app
    from tenfold.serve.config import parse_config
    from tenfold.serve.service import LanguageService

    torch.set_num_threads(1)
    service = LanguageService.load(parse_config(data), device="cpu")
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="session")
def start_http_server():
    """Return the context manager `http_server`."""
    return http_server
