"""Connecting to Ray, and finding out whether a run fits before anything is started.

Ray Train retries an impossible request for ever, and `ray.init` waits minutes for a dead address: both are caught
before.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
import warnings
from pathlib import Path

from tenfold.platform.cluster_capacity import Capacity, capacity, check_capacity, local_capacity, node_facts
from tenfold.platform.deadline import run_with_deadline
from tenfold.platform.errors import ClusterError
from tenfold.platform.hardware import available_memory
from tenfold.platform.paths import expanded

__all__ = [
    "Capacity",
    "capacity",
    "check_capacity",
    "cluster_address",
    "connect",
    "is_own",
    "local_capacity",
    "node_facts",
    "shutdown",
    "token_path",
]

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 4.0  # each for the port and for the answer; ray.init itself then gives up after 20 s
LOCAL_OBJECT_STORE_BYTES = 4 * 2**30  # only small objects pass through it; Ray's own default takes 30 % of the memory
SMALLEST_OBJECT_STORE_BYTES = 128 * 2**20
LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
# Said by Ray at every start; nothing follows from it for the user of a local cluster.
HARMLESS_LINES = (
    "Token authentication is enabled for this Ray cluster",
    "Setting accelerator to CPU",  # DeepSpeed's, where there is no GPU
)
HARMLESS_WARNINGS = ("Tip: In future versions of Ray, Ray will no longer override accelerator visible devices",)
_own = False  # whether `connect` started the cluster


def cluster_address(address: str | None = None) -> str | None:
    """Return the address of the cluster that `connect` would join, or None when it would start a local one.

    In this order: the argument, RAY_ADDRESS, a cluster that `ray start` left running on this machine.
    """
    given = address or os.environ.get("RAY_ADDRESS")
    if given == "local":
        return None
    if given and given != "auto":
        return given
    from ray._private.utils import read_ray_address

    found = read_ray_address()
    # A machine that went down leaves its file behind.
    if found and _port_answers(found):
        return found
    if given == "auto":
        raise ClusterError(
            "RAY_ADDRESS = 'auto': no Ray cluster runs on this machine. Start one with ray start --head"
        )
    return None


def connect(*, address: str | None = None, num_cpus: int | None = None, include_dashboard: bool | None = None) -> None:
    """Connect to Ray; does nothing when this process is connected already.

    Args:
        address: `host:port` of a cluster. None takes RAY_ADDRESS, then a cluster running on this machine, then starts
            one that ends with this process and listens on the loopback interface only.
        num_cpus: cores that a cluster started here offers; None offers all. Says nothing to an existing cluster.
        include_dashboard: None starts it where it is installed. Only for a cluster started here.

    Raises:
        ClusterError: the address does not answer or refuses us, within 30 seconds, or no cluster could be started.
    """
    import ray

    if ray.is_initialized():
        return
    _quiet()
    # Relative paths of an experiment mean the same to drivers, trials and workers.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    # numba compiles no code that prints once progress bars have put their own function in place of print
    os.environ.setdefault("RAY_TQDM_PATCH_PRINT", "0")
    target = cluster_address(address)
    if target is None:
        _start_local(num_cpus, include_dashboard)
    else:
        # Only a cluster that Ray finds by itself makes it look for a token by itself.
        given = address or os.environ.get("RAY_ADDRESS")
        _join(target, target if given not in (None, "", "auto") else None)
    _protect_token()


def is_own() -> bool:
    """Say whether the cluster was started by this process and ends with it."""
    return _own


def shutdown() -> None:
    """Disconnect; ends a cluster that `connect` started."""
    global _own
    import ray

    if ray.is_initialized():
        ray.shutdown()
    _own = False
    _set_loopback(False)


def _join(target: str, init_address: str | None) -> None:
    import ray

    if target.startswith(("http://", "https://")):
        raise ClusterError(
            f"RAY_ADDRESS = {target!r} is the address for `ray job submit`, not for a driver. Submit the command with "
            f"ray job submit --address {target} -- tenfold ..., or give host:port of the cluster (port 6379)"
        )
    if target.startswith("ray://"):
        raise ClusterError(
            f"RAY_ADDRESS = {target!r}: Ray Client cannot drive training. Submit the command with ray job submit, or "
            f"start it on a node of the cluster with RAY_ADDRESS=host:6379"
        )
    advice = "Start the cluster (ray start --head), correct RAY_ADDRESS, or unset it to use this machine alone"
    if not _port_answers(target):
        raise ClusterError(f"Ray address {target!r}: nothing listens there. {advice}")
    try:
        run_with_deadline(lambda: _speaks_grpc(target), CONNECT_SECONDS + 1, f"greeting {target}")
    except Exception as error:
        raise ClusterError(f"Ray address {target!r}: what listens there is not a Ray cluster. {advice}") from error
    try:
        ray.init(address=init_address, logging_level=logging.WARNING, log_to_driver=True)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        raise ClusterError(
            f"Ray address {target!r}: the cluster refused this program: {' '.join(str(error).split())[:300]}. If it "
            f"uses token authentication, set RAY_AUTH_MODE=token and copy its ~/.ray/auth_token here; the versions of "
            f"Ray and Python must be the cluster's"
        ) from error


def _start_local(num_cpus: int | None, include_dashboard: bool | None) -> None:
    global _own
    import ray

    _set_loopback(True)
    # watches for machines that a cloud takes back
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=include_dashboard,
            dashboard_host="127.0.0.1",
            object_store_memory=_object_store_bytes(),
            logging_level=logging.WARNING,
            log_to_driver=True,
        )
    except Exception as error:
        _set_loopback(False)
        raise ClusterError(
            f"a local Ray cluster did not start: {' '.join(str(error).split())[:300]}. `tenfold doctor` checks this "
            f"machine; Ray's own logs are in /tmp/ray/session_latest/logs"
        ) from error
    _own = True


def _set_loopback(enabled: bool) -> None:
    """Make a cluster started here use 127.0.0.1: Ray otherwise listens on every interface.

    Ray does so by itself only on Windows and macOS; this is its switch. A value that the user has set stays.
    """
    from ray._private import ray_constants

    given = os.environ.get(LOOPBACK_VARIABLE)
    if enabled and given is None:
        os.environ[LOOPBACK_VARIABLE] = "0"
        ray_constants.ENABLE_RAY_CLUSTER = False
    elif not enabled and given == "0":
        del os.environ[LOOPBACK_VARIABLE]
        ray_constants.ENABLE_RAY_CLUSTER = True


def _object_store_bytes() -> int | None:
    """Return a size that shared memory can hold; None leaves it to Ray where there is too little of it."""
    import psutil

    size = min(LOCAL_OBJECT_STORE_BYTES, int(available_memory() * 0.2))
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = min(size, int(psutil.disk_usage(str(shared)).free * 0.9))
    return size if size >= SMALLEST_OBJECT_STORE_BYTES else None


def _port_answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        number = int(port)
    except ValueError as error:
        raise ClusterError(f"Ray address {address!r}: needs host:port, e.g. head-node:6379") from error
    try:
        with socket.create_connection((host.strip("[]"), number), timeout=CONNECT_SECONDS):
            return True
    except OSError:
        return False


def _speaks_grpc(address: str) -> None:
    """Make sure that gRPC can connect. With TLS between nodes the certificates are Ray's matter."""
    if os.environ.get("RAY_USE_TLS", "0") not in ("0", "", "false", "False"):
        return
    import grpc

    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(timeout=CONNECT_SECONDS)


def token_path() -> Path:
    """Return the file with Ray's authentication token (it may be missing)."""
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return expanded(given) if given else Path.home() / ".ray" / "auth_token"


def _protect_token() -> None:
    """Make the token readable by its owner alone: Ray writes it for everyone."""
    path = token_path()
    try:
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) & 0o077:
            path.chmod(0o600)
    except OSError as error:
        logger.warning("%s can be read by other users and its mode cannot be changed: %s", path, error)


def _quiet() -> None:
    """Drop the lines that Ray says at every start."""
    for text in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=text)
    for name in ("ray._private.authentication.authentication_token_setup", "DeepSpeed"):
        source = logging.getLogger(name)
        if _is_news not in source.filters:
            source.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(line in record.getMessage() for line in HARMLESS_LINES)
