"""Whether a job fits on any node: a task of Ray that fits nowhere waits for ever, and says nothing."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from tenfold.platform.errors import ClusterError
from tenfold.serve.spatial.config import GIBIBYTE, Jobs
from tenfold.serve.spatial.jobs import JobStore

if TYPE_CHECKING:
    from tenfold.platform.cluster_capacity import Capacity, NodeFacts

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 30.0  # a worker starts in seconds


def check_room(jobs: Jobs) -> None:
    """Make sure that a job fits on a node of the connected cluster while nothing else runs there.

    Where an autoscaler may add nodes of unknown size, a warning says so instead.

    Raises:
        ClusterError: it can never fit.
    """
    from tenfold.platform.cluster_capacity import capacity, node_facts

    have = capacity()
    problem = no_room(jobs, have, node_facts())
    if problem is None:
        return
    if have.autoscaler == "unknown":
        logger.warning("%s; jobs wait until the autoscaler adds a node that is large enough", problem)
        return
    raise ClusterError(
        f"{problem}, and jobs would wait for ever. Lower jobs.cpus, jobs.gpus or jobs.memory_gb, or add a node that "
        "is large enough"
    )


def no_room(jobs: Jobs, have: Capacity, nodes: Sequence[NodeFacts]) -> str | None:
    """Say why a job fits on no node; None where it fits.

    Args:
        jobs: what a job takes.
        have: cores and GPUs of the nodes that are there or that an autoscaler may add.
        nodes: those that are there, with their memory.
    """
    memory = (jobs.memory_gb or 0) * GIBIBYTE
    fits_now = any(node.cpus >= jobs.cpus and node.gpus >= jobs.gpus and node.memory_bytes >= memory for node in nodes)
    # Of nodes that an autoscaler may add, the memory is not known.
    if fits_now or (have.autoscaler == "known" and have.room(jobs.cpus, jobs.gpus)):
        return None
    there = sorted({(node.cpus, node.gpus, node.memory_bytes / GIBIBYTE) for node in nodes}, reverse=True)
    sizes = " or ".join(f"{cpus:g} CPU, {gpus:g} GPU and {memory:.1f} GiB" for cpus, gpus, memory in there[:3])
    asked = ", ".join(f"jobs.{name} = {value:g}" for name, value in _taken(jobs).items())
    return f"{asked}: no node is that large; there are nodes of {sizes or 'no size at all'}"


class Waiting:
    """Tells clients why their jobs wait, when all of them wait and none runs.

    Args:
        store: the jobs.
        jobs: what each takes.
    """

    def __init__(self, store: JobStore, jobs: Jobs) -> None:
        self._store = store
        units = {"cpus": "CPU", "gpus": "GPU", "memory_gb": "GiB"}
        free = " and ".join(f"{value:g} {units[name]}" for name, value in _taken(jobs).items())
        self._stage = f"waiting for a node with {free} free"
        self._since: float | None = None

    def look(self, job_ids: Collection[str], now: float) -> None:
        """Look at the jobs whose tasks have been started.

        Args:
            job_ids: the jobs.
            now: a clock's seconds.
        """
        states = [(job_id, self._store.state(job_id)) for job_id in job_ids]
        queued = [job_id for job_id, state in states if state is not None and state.status == "queued"]
        if not queued or len(queued) < len(states):
            self._since = None
            return
        self._since = now if self._since is None else self._since
        if now - self._since < PATIENCE_SECONDS:
            return
        untold = [job_id for job_id in queued if self._store.progress(job_id).get("stage") != self._stage]
        for job_id in untold:
            logger.warning("job %s is %s, and no job runs; other work holds the nodes", job_id, self._stage)
            self._store.tell(job_id, {"stage": self._stage})


def _taken(jobs: Jobs) -> dict[str, float]:
    taken = {"cpus": jobs.cpus, "gpus": jobs.gpus, "memory_gb": jobs.memory_gb}
    return {name: value for name, value in taken.items() if value}
