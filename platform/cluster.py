"""Connecting to Ray, and finding out whether a run fits before anything is started.

Ray Train retries an impossible request for ever, and `ray.init` waits minutes for a dead address; both are caught here.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import stat
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tenfold.platform.deadline import run_with_deadline
from tenfold.platform.errors import ClusterError

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 8.0  # each for the port and for the answer; ray.init itself then gives up after 20 s
LOCAL_OBJECT_STORE_BYTES = 4 * 2**30  # only small objects pass through it; Ray's own default takes 30 % of the memory
SMALLEST_OBJECT_STORE_BYTES = 128 * 2**20
LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
UNLIMITED_NODES = 10**6
# Said by Ray at every start; nothing follows from it for the user of a local cluster.
HARMLESS_LINES = ("Token authentication is enabled for this Ray cluster",)
HARMLESS_WARNINGS = ("Tip: In future versions of Ray, Ray will no longer override accelerator visible devices",)


@dataclass(frozen=True)
class NodeShape:
    """Nodes of one size: how many there are, or how many an autoscaler may add."""

    cpus: float
    gpus: float
    count: int = 1

    def room(self, cpus: float, gpus: float) -> int:
        """Return how many workers of this size fit on one such node."""
        fits = [have / need for have, need in ((self.cpus, cpus), (self.gpus, gpus)) if need > 0]
        return math.floor(min(fits) + 1e-9) if fits else UNLIMITED_NODES


@dataclass(frozen=True)
class Capacity:
    """What a cluster has in total, whatever is in use now.

    Attributes:
        cpus: CPU cores of all nodes that are alive.
        gpus: GPUs of all nodes that are alive.
        memory_bytes: memory that Ray counts for tasks.
        nodes: number of nodes that are alive.
        autoscaler_max: {"CPU": ..., "GPU": ...} that the autoscaler may reach; None without one or when unknown.
        autoscaler: whether there is one, and whether its limits are known.
        shapes: the nodes that are alive.
        growth: the node types of a known autoscaler, with the largest number of each.
        growth_nodes: largest number of nodes of all types together.
    """

    cpus: float
    gpus: float
    memory_bytes: int
    nodes: int
    autoscaler_max: dict[str, float] | None = None
    autoscaler: Literal["none", "known", "unknown"] = "none"
    shapes: tuple[NodeShape, ...] = ()
    growth: tuple[NodeShape, ...] = ()
    growth_nodes: int = 0

    def room(self, cpus: float, gpus: float) -> int:
        """Return how many workers of this size fit, each whole on one node, after growing as far as is known."""
        now = sum(shape.count * shape.room(cpus, gpus) for shape in self.shapes)
        return max(now, sum(_largest_first(self.growth, self.growth_nodes, lambda shape: shape.room(cpus, gpus))))


@dataclass(frozen=True)
class NodeFacts:
    """One node of the connected cluster."""

    address: str
    hostname: str
    cpus: float
    gpus: float
    memory_bytes: int
    is_head: bool


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
    target = cluster_address(address)
    if target is None:
        _start_local(num_cpus, include_dashboard)
    else:
        _join(target)
    _protect_token()


def shutdown() -> None:
    """Disconnect; ends a cluster that `connect` started."""
    import ray

    if ray.is_initialized():
        ray.shutdown()
    _set_loopback(False)


def capacity() -> Capacity:
    """Return what the connected cluster has, and may grow to.

    Raises:
        ClusterError: this process is not connected.
    """
    import ray

    if not ray.is_initialized():
        raise ClusterError("not connected to Ray; call tenfold.platform.cluster.connect() first")
    alive = [node for node in ray.nodes() if node["Alive"]]
    shapes = tuple(NodeShape(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)) for node in alive)
    memory = int(sum(node["Resources"].get("memory", 0) for node in alive))
    kind, growth, limit = _autoscaler(alive)
    return Capacity(
        cpus=sum(shape.cpus for shape in shapes),
        gpus=sum(shape.gpus for shape in shapes),
        memory_bytes=memory,
        nodes=len(alive),
        autoscaler_max=_growth_total(growth, limit) if kind == "known" else None,
        autoscaler=kind,
        shapes=shapes,
        growth=growth,
        growth_nodes=limit,
    )


def local_capacity(num_cpus: int | None = None) -> Capacity:
    """Return what a cluster started by `connect` on this machine would have; starts nothing."""
    import psutil
    from ray._private.accelerators import get_accelerator_manager_for_resource
    from ray._private.utils import get_num_cpus

    manager = get_accelerator_manager_for_resource("GPU")
    gpus = float(manager.get_current_node_num_accelerators()) if manager else 0.0
    cpus = float(num_cpus if num_cpus is not None else get_num_cpus())
    return Capacity(cpus, gpus, psutil.virtual_memory().available, 1, shapes=(NodeShape(cpus, gpus),))


def node_facts() -> list[NodeFacts]:
    """Return the nodes of the connected cluster that are alive, the head first."""
    import ray

    facts = [
        NodeFacts(
            address=node["NodeManagerAddress"],
            hostname=node["NodeManagerHostname"],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
            memory_bytes=int(node["Resources"].get("memory", 0)),
            is_head="node:__internal_head__" in node["Resources"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(facts, key=lambda fact: (not fact.is_head, fact.address))


def check_capacity(
    workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    *,
    concurrent: int = 1,
    available: Capacity | None = None,
) -> Capacity:
    """Make sure that a run fits the cluster when nothing else runs on it.

    Args:
        workers: training processes of one run; the smallest number for an elastic run.
        cpus_per_worker: cores each reserves.
        gpus_per_worker: GPUs each reserves.
        concurrent: runs at the same time (trials of a sweep).
        available: what to check against; None asks the connected cluster.

    Returns:
        The capacity it was checked against. When an autoscaler of unknown limits would have to add nodes, a warning
        says so instead of an error.

    Raises:
        ClusterError: it can never fit: what was asked, what there is, and what to change.
    """
    have = available if available is not None else capacity()
    room = have.room(cpus_per_worker, gpus_per_worker)
    if room >= workers * concurrent:
        return have
    asked = _asked(workers, cpus_per_worker, gpus_per_worker, concurrent)
    there = _there(have)
    if have.autoscaler == "unknown":
        logger.warning(
            "the run asks for %s; %s. Its autoscaler's limits are not known here: the run waits until nodes are added",
            asked,
            there,
        )
        return have
    advice = _advice(have, room, workers, cpus_per_worker, gpus_per_worker, concurrent)
    raise ClusterError(f"the run asks for {asked}; {there}, so {room} such worker(s) fit. {advice}")


def _quantity(value: float) -> str:
    return f"{value:g}"


def _asked(workers: int, cpus: float, gpus: float, concurrent: int) -> str:
    each = f"{_quantity(cpus)} CPU" + (f" and {_quantity(gpus)} GPU" if gpus else "")
    total = workers * concurrent
    runs = f"{concurrent} runs at a time of " if concurrent > 1 else ""
    sum_text = f"{_quantity(total * cpus)} CPU" + (f" and {_quantity(total * gpus)} GPU" if gpus else "")
    return f"{runs}{workers} worker(s) with {each} each ({sum_text} together)"


def _there(have: Capacity) -> str:
    text = f"the cluster has {_quantity(have.cpus)} CPU and {_quantity(have.gpus)} GPU on {have.nodes} node(s)"
    if have.autoscaler_max is not None:
        most = ", ".join(f"{_quantity(value)} {name}" for name, value in sorted(have.autoscaler_max.items()))
        return f"{text} and may grow to {most}"
    return text


def _advice(have: Capacity, room: int, workers: int, cpus: float, gpus: float, concurrent: int) -> str:
    choices = []
    if room >= workers:
        choices.append(f"sweep.max_concurrent={room // workers}")
    if room >= concurrent:
        choices.append(f"compute.workers={room // concurrent}")
    if not room:
        shapes = have.shapes + have.growth
        most_gpus = max((shape.gpus for shape in shapes), default=0.0)
        most_cpus = max((shape.cpus for shape in shapes), default=0.0)
        if gpus > most_gpus:
            choices.append(f"compute.gpus_per_worker={_quantity(most_gpus)}")
        if cpus > most_cpus > 0:
            choices.append(f"compute.cpus_per_worker={_quantity(most_cpus)}")
    choices.append("a bigger cluster (RAY_ADDRESS=host:port)")
    return f"Use {' or '.join(choices)}"


def _largest_first(shapes: Iterable[NodeShape], limit: int, value: Any) -> list[float]:
    """Return count * value of node types, the most valuable first, until `limit` nodes are used."""
    found = []
    for shape in sorted(shapes, key=value, reverse=True):
        count = min(shape.count, limit)
        limit -= count
        found.append(count * value(shape))
    return found


def _growth_total(growth: tuple[NodeShape, ...], limit: int) -> dict[str, float]:
    return {
        "CPU": sum(_largest_first(growth, limit, lambda shape: shape.cpus)),
        "GPU": sum(_largest_first(growth, limit, lambda shape: shape.gpus)),
    }


def _autoscaler(nodes: list[dict[str, Any]]) -> tuple[Literal["none", "known", "unknown"], tuple[NodeShape, ...], int]:
    """Return whether the cluster grows, its node types and its largest number of nodes.

    Ray has no public call for this. Known are: clusters that report their node groups to Ray, and a driver on the head
    node (as submitted jobs are), where the autoscaler's configuration file is read. Elsewhere nodes that carry a node
    group's label were made by a launcher, which may add more.
    """
    from ray._private.state import state

    config = state.get_cluster_config()
    if config is not None and config.node_group_configs:
        groups = tuple(
            NodeShape(
                float(group.resources.get("CPU", 0)),
                float(group.resources.get("GPU", 0)),
                group.max_count if group.max_count >= 0 else UNLIMITED_NODES,
            )
            for group in config.node_group_configs
        )
        return "known", groups, sum(group.count for group in groups)
    path = _autoscaling_config()
    if path is not None:
        return _read_autoscaling_config(path)
    if any(node.get("Labels", {}).get("ray.io/node-group") for node in nodes):
        return "unknown", (), 0
    return "none", (), 0


def _autoscaling_config() -> Path | None:
    """Return the configuration file of the autoscaler process of our cluster, when it runs on this machine."""
    import psutil
    import ray

    mine = f"--gcs-address={ray.get_runtime_context().gcs_address}"
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if mine not in command or not any(part.endswith("monitor.py") for part in command):
            continue
        for part in command:
            if part.startswith("--autoscaling-config="):
                return Path(part.partition("=")[2]).expanduser()
    return None


def _read_autoscaling_config(path: Path) -> tuple[Literal["known", "unknown"], tuple[NodeShape, ...], int]:
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        head = config["head_node_type"]
        # Ray's own defaults: two workers in all, and as many of each type; the head's type adds no workers.
        limit = int(config.get("max_workers", 2))
        growth = []
        for name, node_type in config["available_node_types"].items():
            resources = node_type["resources"]
            count = node_type.get("max_workers", 0 if name == head else limit) + (name == head)
            growth.append(NodeShape(float(resources["CPU"]), float(resources.get("GPU", 0)), int(count)))
        return "known", tuple(growth), limit + 1
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        logger.debug("%s: the autoscaler's limits cannot be read: %r", path, error)
        return "unknown", (), 0


def _join(target: str) -> None:
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
        ray.init(address=target, logging_level=logging.WARNING, log_to_driver=True)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        raise ClusterError(
            f"Ray address {target!r}: the cluster refused this program: {' '.join(str(error).split())[:300]}. If it "
            f"uses token authentication, set RAY_AUTH_MODE=token and copy its ~/.ray/auth_token here; the versions of "
            f"Ray and Python must be the cluster's"
        ) from error


def _start_local(num_cpus: int | None, include_dashboard: bool | None) -> None:
    import ray

    _set_loopback(True)
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

    size = min(LOCAL_OBJECT_STORE_BYTES, int(psutil.virtual_memory().available * 0.2))
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
    return Path(given).expanduser() if given else Path.home() / ".ray" / "auth_token"


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
    source = logging.getLogger("ray._private.authentication.authentication_token_setup")
    if _is_news not in source.filters:
        source.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(line in record.getMessage() for line in HARMLESS_LINES)
