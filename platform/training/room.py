"""How many workers a job starts with: as many as there is room for, asking an autoscaler for more."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Sequence
from typing import Any

from tenfold.platform.cluster_capacity import describe_nodes, free_room
from tenfold.platform.errors import ClusterError
from tenfold.platform.experiment import Compute
from tenfold.platform.training.sizes import shares

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
SETTLE_SECONDS = 15.0  # for the largest size: what ended gives back its cores, a lost node's replacement may come


class Room:
    """What a job may take from the cluster; a context, at whose end nothing is asked for any more.

    Args:
        compute: the job's.
        sizes: numbers of workers that it can use, smallest first.
        name: of the job, for messages.
    """

    def __init__(self, compute: Compute, sizes: Sequence[int], name: str) -> None:
        self._compute, self._sizes, self._name = compute, sizes, name
        self._requester: Any = None
        self._asked = 0

    def __enter__(self) -> Room:
        return self

    def __exit__(self, *error: object) -> None:
        self.ask(0)

    @property
    def largest_ever(self) -> int:
        """The largest number of workers that the job can use."""
        return self._sizes[-1]

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change."""
        return len(self._sizes) > 1

    @property
    def shares(self) -> int | None:
        """What the micro-batches of an epoch must be a multiple of; None for a fixed number of workers."""
        return shares(self._sizes) if self.is_elastic else None

    def wait(self) -> int:
        """Return the largest size that fits now, after a short wait for the largest of all.

        Raises:
            ClusterError: not even the smallest fits within `compute.start_timeout_s`.
        """
        smallest, largest = self._sizes[0], self._sizes[-1]
        start, said = time.monotonic(), False
        while True:
            fits = self.largest(0)
            waited = time.monotonic() - start
            if fits == largest or (fits and waited > SETTLE_SECONDS):
                self.ask(0)  # from here on Ray Train asks for these, and an autoscaler adds the two
                return fits
            if waited > self._compute.start_timeout_s:
                raise self.missing(smallest)
            if waited > SETTLE_SECONDS and not said:
                logger.info("%s: waiting for room for %s", self._name, self.asked(smallest))
                said = True
            self.ask(largest)
            time.sleep(LOOK_SECONDS)

    def missing(self, workers: int) -> ClusterError:
        """Return the error that there was no room for so many workers."""
        return ClusterError(
            f"{self._name}: no room for {self.asked(workers)} within {self._compute.start_timeout_s:g} s "
            f"(compute.start_timeout_s). The nodes: {describe_nodes()}. Wait until others have ended, add nodes, ask "
            "for less, or raise the limit; the same command goes on from the newest checkpoint"
        )

    def largest(self, running: int) -> int:
        """Return the largest size that fits; 0 where none does.

        Args:
            running: workers of this job that run now, whose room is the job's.
        """
        room = running + free_room(self._compute.cpus_per_worker, self._compute.gpus_per_worker)
        return max((size for size in self._sizes if size <= room), default=0)

    def ask(self, workers: int) -> None:
        """Ask an autoscaler for room for so many workers beyond those that run; 0 takes the wish back.

        The mechanism is that of Ray Train, whose workers ask by themselves for the room that they have. Wishes
        expire after three minutes, so that a dead driver's do not stay.
        """
        import ray.train
        from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
            TrainAutoscalingCoordinatorClient,
        )

        if not self.is_elastic:
            return  # Ray Train itself asks for a fixed number
        if workers:
            self._requester = self._requester or TrainAutoscalingCoordinatorClient(f"tenfold-{uuid.uuid4().hex}")
            scaling = ray.train.ScalingConfig(
                num_workers=workers,
                use_gpu=self._compute.gpus_per_worker > 0,
                resources_per_worker=worker_resources(self._compute),
            )
            if workers == self._asked:
                self._requester.maybe_send_resource_request(scaling, workers)  # now and then, so that it stays
            else:
                self._requester.send_resource_request(scaling, workers)
        elif self._requester is not None:
            self._requester.cancel_resource_request()
            self._requester = None
        self._asked = workers

    def asked(self, workers: int) -> str:
        """Return what so many workers take, for messages."""
        gpus = f" and {self._compute.gpus_per_worker:g} GPU" if self._compute.gpus_per_worker else ""
        return f"{workers} worker(s) with {self._compute.cpus_per_worker:g} CPU{gpus} each"


def worker_resources(compute: Compute) -> dict[str, float]:
    """Return what a worker reserves, as Ray names it."""
    resources = {"CPU": compute.cpus_per_worker}
    if compute.gpus_per_worker:
        resources["GPU"] = compute.gpus_per_worker
    return resources
