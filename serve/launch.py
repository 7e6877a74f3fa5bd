"""Start the language-model server on this machine or cluster, ask it something, stop it."""

from __future__ import annotations

import logging
import socket
import time
from typing import Any

from tenfold.platform.errors import ClusterError, ConfigError, TenfoldError
from tenfold.platform.paths import expanded
from tenfold.serve.config import Replicas, ServeConfig

logger = logging.getLogger(__name__)

APPLICATION = "language-models"
READY_SECONDS = 60.0  # from the last model loaded to the first answer through HTTP
ANSWER_SECONDS = 300.0
# The user's terminal shows what goes wrong, not every request.
QUIET = {"log_level": "WARNING"}
_connected_here = False


def run_server(config: ServeConfig, *, host: str = "127.0.0.1", port: int = 8000, blocking: bool) -> str:
    """Serve models over HTTP and return the address once they answer.

    Connects to Ray when this process is not connected yet. Models are fetched and checked here before anything starts.

    Args:
        config: what to serve; relative paths count from the current folder.
        host: interface to listen on; 0.0.0.0 lets other machines in, then set `api_keys`.
        port: TCP port.
        blocking: stay until interrupted, then stop the server.

    Returns:
        `http://HOST:PORT`; OpenAI's interface is under `/v1`.

    Raises:
        ModelError: a model is missing or damaged.
        ConfigError: the API keys cannot be read, or the engine is not installed.
        ClusterError: no Ray cluster, too little of it, the port is taken, or the models did not start.
    """
    global _connected_here
    import ray
    from ray import serve
    from tenfold.platform import cluster
    from tenfold.serve.app import build

    _quiet()
    config = _with_fixed_places(config)
    if config.api_keys is not None:
        config.api_keys.load()
    application = build(config.model_dump(mode="json", exclude_unset=True))
    connected_here = not ray.is_initialized()
    cluster.connect()
    if _serve_client() is not None and APPLICATION in serve.status().applications:
        if connected_here:
            cluster.shutdown()
        raise ClusterError(
            f"the application {APPLICATION!r} runs on this cluster already; stop it first (serve shutdown), or use it"
        )
    _connected_here = connected_here
    try:
        _check_capacity(config.replicas)
        url = _start_http(host, port)
        _deploy(application)
        _wait_until_ready(url)
        logger.info("serving %s at %s/v1", ", ".join(model.name for model in config.models), url)
        if blocking:
            _wait_for_interrupt()
    except BaseException:
        stop_server()
        raise
    if blocking:
        stop_server()
    return url


def _quiet() -> None:
    import ray.serve  # noqa: F401  (sets its logger's level when it is imported)

    for name in ("ray.serve", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)


def stop_server() -> None:
    """Stop what `run_server` started: the application, Serve when nothing else runs in it, the connection to Ray."""
    global _connected_here
    import ray
    from ray import serve
    from tenfold.platform import cluster

    if ray.is_initialized() and _serve_client() is not None:
        running = serve.status().applications
        if APPLICATION in running:
            serve.delete(APPLICATION)
        # a cluster of our own takes Serve with it: the controller's own shutdown ends in an error message
        if not running.keys() - {APPLICATION} and not (_connected_here and cluster.is_own()):
            serve.shutdown()
    if _connected_here:
        cluster.shutdown()
    _connected_here = False


def ask(base_url: str, model: str, prompt: str, *, api_key: str | None = None, max_tokens: int = 128) -> str:
    """Send one chat request and return the answer; the most probable token is taken at each place.

    Args:
        base_url: what `run_server` returned.
        model: a name that the server knows.
        prompt: the user's message.
        api_key: where the server wants one.
        max_tokens: longest answer.

    Raises:
        TenfoldError: the server does not answer, or refuses; with its message.
    """
    import httpx

    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    url = f"{base_url.rstrip('/')}/v1/chat/completions"
    try:
        response = httpx.post(url, json=body, headers=headers, timeout=ANSWER_SECONDS)
    except httpx.HTTPError as error:
        raise TenfoldError(f"{url}: no answer: {error!r}. Start the server with `tenfold serve`") from error
    if response.is_error:
        raise TenfoldError(f"{url}: {response.status_code}: {_message(response)}")
    return str(response.json()["choices"][0]["message"]["content"])


def _message(response: Any) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(response.text[:300])


def _with_fixed_places(config: ServeConfig) -> ServeConfig:
    """Return the configuration with absolute folders in place of references: replicas run in another folder.

    Raises:
        ModelError: a model is missing or damaged.
        ConfigError: a context is longer than its model's; vllm has no such architecture.
    """
    from tenfold.platform.models.architectures import architecture_module, stored_type
    from tenfold.platform.models.configuration import read_config
    from tenfold.platform.models.loading import resolve
    from tenfold.serve.generation import max_context

    models = []
    for model in config.models:
        logger.info("checking %s: %s", model.name, model.model)
        folder = resolve(model.source)
        if config.engine == "transformers":
            max_context(model, read_config(folder, trust_remote_code=model.trust_remote_code))
        elif architecture_module(stored_type(folder)) is not None:
            raise ConfigError(
                f"{model.name}: engine vllm has no {stored_type(folder)} model; use engine: transformers"
            )
        changes: dict[str, Any] = {"model": str(folder.absolute())}
        if model.tokenizer is not None and expanded(model.tokenizer).exists():
            changes["tokenizer"] = str(expanded(model.tokenizer).absolute())
        # They have been compared by now, and a converted file's digest is not that of its folder.
        changes |= {name: None for name in ("sha256", "revision") if getattr(model, name) is not None}
        models.append(model.model_copy(update=changes))
    update: dict[str, Any] = {"models": models}
    if config.api_keys is not None and config.api_keys.file is not None:
        place = str(expanded(config.api_keys.file).absolute())
        update["api_keys"] = config.api_keys.model_copy(update={"file": place})
    return config.model_copy(update=update)


def _check_capacity(replicas: Replicas) -> None:
    from tenfold.platform import cluster

    have = cluster.capacity()
    fit = have.room(replicas.cpus, replicas.gpus)
    if fit < replicas.min and have.autoscaler != "unknown":
        raise ClusterError(
            f"replicas.min = {replicas.min} of {replicas.cpus:g} CPU and {replicas.gpus:g} GPU each do not fit: the "
            f"cluster has {have.cpus:g} CPU and {have.gpus:g} GPU on {have.nodes} node(s), room for {fit}. Lower "
            f"replicas.min, cpus or gpus, or use a bigger cluster (RAY_ADDRESS=host:port)"
        )


def _start_http(host: str, port: int) -> str:
    """Start Serve's HTTP proxy, or make sure that the one there listens where it should."""
    from ray import serve

    client = _serve_client()
    if client is None:
        _check_port(host, port)
        serve.start(http_options={"host": host, "port": port}, logging_config=QUIET)
    elif (client.http_config.host, client.http_config.port) != (host, port):
        there = client.http_config
        raise ClusterError(
            f"Ray Serve of this cluster listens on {there.host}:{there.port} already, not on {host}:{port}. Use that "
            f"address, or stop it first (serve shutdown)"
        )
    return f"http://{'127.0.0.1' if host in ('0.0.0.0', '') else host}:{port}"


def _serve_client() -> Any:
    """Return the connection to this cluster's Serve, None where it does not run; Serve has no public call for it."""
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False)


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ClusterError(f"cannot listen on {host}:{port}: {error}. Choose another port") from error


def _deploy(application: Any) -> None:
    from ray import serve

    try:
        serve.run(application, name=APPLICATION, route_prefix="/", logging_config=QUIET)
    except RuntimeError as error:
        status = serve.status().applications.get(APPLICATION)
        reasons = [status.message, *(part.message for part in status.deployments.values())] if status else []
        reason = next((text for text in reversed(reasons) if text), str(error))
        raise ClusterError(f"the models did not start: {_first_cause(reason)}") from error


def _first_cause(text: str) -> str:
    """Return the message of an error of ours from a remote traceback, or else its last line."""
    _, found, message = text.rpartition("tenfold.platform.errors.")
    if found:
        return message.partition(": ")[2].strip()
    return text.strip().splitlines()[-1]


def _wait_until_ready(url: str) -> None:
    import httpx

    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            # Both engines have this path; before the application is there, Serve itself answers 404.
            status = httpx.get(f"{url}/v1/models", timeout=5).status_code
            if status in (httpx.codes.OK, httpx.codes.UNAUTHORIZED):
                return
        except httpx.HTTPError as error:
            logger.debug("%s: %r", url, error)
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{url}: the models are loaded, but nothing answers there. Serve's logs say why: "
                f"/tmp/ray/session_latest/logs/serve"
            )
        time.sleep(0.2)


def _wait_for_interrupt() -> None:
    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        logger.info("stopping: running answers are finished first")
