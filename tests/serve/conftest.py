"""A real HTTP server with real tiny models, in this process and without Ray."""

import asyncio
import shutil
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import openai
import pytest

LIMITS = {
    "max_body_bytes": 4000,
    "max_messages": 4,
    "default_max_tokens": 12,
    "max_running": 4,
    "max_waiting": 2,
    "stream_interval_s": 0,
}


@contextmanager
def http_server(data):
    """Serve a configuration on a free loopback port; yields (base URL, LanguageService)."""
    import torch
    import uvicorn
    from tenfold.serve.api import create_app
    from tenfold.serve.config import parse_config
    from tenfold.serve.service import LanguageService

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    service = LanguageService.load(parse_config(data), device="cpu")
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        deadline = time.monotonic() + 120
        while not server.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.started
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def start_http_server():
    """Return the context manager `http_server`."""
    return http_server


@pytest.fixture(scope="module")
def base_folder(tiny_model_folder, tmp_path_factory):
    """Return the tiny model without its chat template."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.fixture(scope="module")
def server(start_http_server, tiny_model_folder, base_folder):
    models = [
        {"name": "tiny", "model": str(tiny_model_folder)},
        {"name": "base", "model": str(base_folder), "max_context": 64},
        {"name": "stories", "model": "sample:models/stories260K"},
    ]
    with start_http_server({"models": models, "limits": LIMITS}) as started:
        yield started


@pytest.fixture(scope="module")
def url(server):
    return server[0]


@pytest.fixture(scope="module")
def engines(server):
    return {name: model.engine for name, model in server[1].models.items()}


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="not needed", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def limits():
    """Return the limits of `server`."""
    return LIMITS


@pytest.fixture(scope="session")
def wait_until():
    """Return wait_until(condition, seconds=120), which fails when the condition does not come true in that time."""

    def wait(condition, seconds=120):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.05)

    return wait


@pytest.fixture(scope="session")
def hang_up():
    """Return hang_up(url, body, is_running, headers=None): asks for a completion and leaves once the model is at work.

    A request that leaves earlier ends in the queue and counts as none. It says whether the request was left: on a busy
    machine it may be answered before it was seen at work.
    """

    async def ask_and_leave(url, body, is_running, headers):
        async with httpx.AsyncClient(headers=headers, timeout=120) as client:
            request = asyncio.create_task(client.post(f"{url}/v1/completions", json=body))
            while not await asyncio.to_thread(is_running):
                if request.done():
                    return False
                await asyncio.sleep(0.001)
            left = request.cancel()
            await asyncio.gather(request, return_exceptions=True)
            return left

    return lambda url, body, is_running, headers=None: asyncio.run(ask_and_leave(url, body, is_running, headers))


@pytest.fixture(scope="session")
def post():
    """Return post(url, body, path="completions") -> response, for what the client would not send."""

    with httpx.Client(timeout=120) as client:
        yield lambda url, body, path="completions": client.post(f"{url}/v1/{path}", json=body)
