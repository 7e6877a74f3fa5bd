"""What a Ray cluster has and may grow to, and whether a run fits it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tenfold.platform.errors import ClusterError
from tenfold.platform.hardware import available_memory
from tenfold.platform.paths import expanded

logger = logging.getLogger(__name__)

UNLIMITED_NODES = 10**6
Autoscaler = Literal["none", "known", "unknown"]


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
        fixed: the nodes that a known autoscaler never removes.
        growth: the node types it adds, with the largest number of each.
        growth_nodes: largest number of added nodes of all types together.
    """

    cpus: float
    gpus: float
    memory_bytes: int
    nodes: int
    autoscaler_max: dict[str, float] | None = None
    autoscaler: Autoscaler = "none"
    shapes: tuple[NodeShape, ...] = ()
    fixed: tuple[NodeShape, ...] = ()
    growth: tuple[NodeShape, ...] = ()
    growth_nodes: int = 0

    def room(self, cpus: float, gpus: float) -> int:
        """Return how many workers of this size fit, each whole on one node, after growing as far as is known."""

        def room(shape: NodeShape) -> float:
            return shape.room(cpus, gpus)

        now = sum(shape.count * shape.room(cpus, gpus) for shape in self.shapes)
        return max(now, int(self.most(room)))

    def most(self, value: Callable[[NodeShape], float]) -> float:
        """Return the largest sum of `value` over the nodes that a known autoscaler may have at one time."""
        total = sum(shape.count * value(shape) for shape in self.fixed)
        left = self.growth_nodes
        for shape in sorted(self.growth, key=value, reverse=True):
            count = min(shape.count, left)
            left -= count
            total += count * value(shape)
        return total


_Limits = tuple[tuple[NodeShape, ...], tuple[NodeShape, ...], int]


@dataclass(frozen=True)
class NodeFacts:
    """One node of the connected cluster."""

    address: str
    hostname: str
    cpus: float
    gpus: float
    memory_bytes: int
    is_head: bool


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
    have = Capacity(
        cpus=sum(shape.cpus for shape in shapes),
        gpus=sum(shape.gpus for shape in shapes),
        memory_bytes=memory,
        nodes=len(alive),
        shapes=shapes,
    )
    return _with_autoscaler(have, alive)


def local_capacity(num_cpus: int | None = None) -> Capacity:
    """Return what a cluster started by `connect` on this machine would have; starts nothing."""
    from ray._private.accelerators import get_accelerator_manager_for_resource
    from ray._private.utils import get_num_cpus

    manager = get_accelerator_manager_for_resource("GPU")
    gpus = float(manager.get_current_node_num_accelerators()) if manager else 0.0
    cpus = float(num_cpus if num_cpus is not None else get_num_cpus())
    return Capacity(cpus, gpus, available_memory(), 1, shapes=(NodeShape(cpus, gpus),))


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


def free_room(cpus: float, gpus: float) -> int:
    """Return how many workers of this size fit beside what runs on the cluster now; draining nodes take none."""
    from ray._private.state import available_resources_per_node, state

    draining = state.get_draining_nodes()
    free = [have for node, have in available_resources_per_node().items() if node not in draining]
    return sum(NodeShape(have.get("CPU", 0.0), have.get("GPU", 0.0)).room(cpus, gpus) for have in free)


def draining_nodes() -> dict[str, int]:
    """Return the nodes that leave soon: id -> when, in milliseconds since 1970; 0 where that is not known."""
    from ray._private.state import state

    return dict(state.get_draining_nodes())


def describe_nodes() -> str:
    """Return what every node that is alive has, and has free, for messages."""
    import ray
    from ray._private.state import available_resources_per_node

    free, leaving = available_resources_per_node(), draining_nodes()
    told = []
    for node in ray.nodes():
        if node["Alive"]:
            has, left = node["Resources"], free.get(node["NodeID"], {})
            parts = [f"{_quantity(left.get(k, 0))} of {_quantity(has[k])} {k}" for k in ("CPU", "GPU") if has.get(k)]
            state = ", leaving" if node["NodeID"] in leaving else ""
            told.append(f"{node['NodeManagerHostname']} ({' and '.join(parts) or 'no CPU'} free{state})")
    return ", ".join(told) or "no node is alive"


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
        shapes = have.shapes + tuple(shape for shape in have.growth if shape.count)
        most_gpus = max((shape.gpus for shape in shapes), default=0.0)
        most_cpus = max((shape.cpus for shape in shapes), default=0.0)
        if gpus > most_gpus:
            choices.append(f"compute.gpus_per_worker={_quantity(most_gpus)}")
        if cpus > most_cpus > 0:
            choices.append(f"compute.cpus_per_worker={_quantity(most_cpus)}")
    choices.append("a bigger cluster (RAY_ADDRESS=host:port)")
    return f"Use {' or '.join(choices)}"


def _with_autoscaler(have: Capacity, nodes: list[dict[str, Any]]) -> Capacity:
    """Add what is known about the cluster's autoscaler.

    Ray has no public call for this. Known are: clusters that report their node groups to Ray, and a driver on the head
    node (as submitted jobs are), where the autoscaler's configuration file is read. Elsewhere nodes that carry a node
    group's label were made by a launcher, which may add more.
    """
    from ray._private.state import state

    config = state.get_cluster_config()
    path = _autoscaling_config()
    if config is not None and config.node_group_configs:
        groups = tuple(
            NodeShape(
                float(group.resources.get("CPU", 0)),
                float(group.resources.get("GPU", 0)),
                group.max_count if group.max_count >= 0 else UNLIMITED_NODES,
            )
            for group in config.node_group_configs
        )
        limits: _Limits | None = ((), groups, sum(group.count for group in groups))
    elif path is not None:
        limits = read_autoscaling_config(path)
    elif any(node.get("Labels", {}).get("ray.io/node-group") for node in nodes):
        limits = None
    else:
        return have
    if limits is None:
        return replace(have, autoscaler="unknown")
    fixed, growth, growth_nodes = limits
    known = replace(have, autoscaler="known", fixed=fixed, growth=growth, growth_nodes=growth_nodes)
    most = {"CPU": known.most(lambda shape: shape.cpus), "GPU": known.most(lambda shape: shape.gpus)}
    return replace(known, autoscaler_max=most)


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
                return expanded(part.partition("=")[2])
    return None


def read_autoscaling_config(path: Path) -> _Limits | None:
    """Return (fixed nodes, node types that are added, how many of all types together) of an autoscaler's YAML file.

    None when the file cannot be read or leaves resources to be found out by the cloud.
    """
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        head = config["head_node_type"]
        # Ray's own defaults: two workers in all, and as many of each type; the head's type adds no workers.
        limit = int(config.get("max_workers", 2))
        fixed, growth = [], []
        for name, node_type in config["available_node_types"].items():
            cpus, gpus = float(node_type["resources"]["CPU"]), float(node_type["resources"].get("GPU", 0))
            if name == head:
                fixed.append(NodeShape(cpus, gpus))
            count = int(node_type.get("max_workers", 0 if name == head else limit))
            growth.append(NodeShape(cpus, gpus, count))
        return tuple(fixed), tuple(growth), limit
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        logger.debug("%s: the autoscaler's limits cannot be read: %r", path, error)
        return None
