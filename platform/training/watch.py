"""The driver's watch over a running job: workers that hang or never start, nodes that leave, room for more workers."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback
from tenfold.platform.cluster_capacity import describe_nodes, draining_nodes
from tenfold.platform.experiment import Compute
from tenfold.platform.training.heartbeat import ANSWER_SECONDS, DONE, START, Beat
from tenfold.platform.training.room import Room

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
JOIN_SECONDS = 5.0
ACTOR_SECONDS = 300.0  # until the pulse has started
GROW_SECONDS = 30.0  # room must be free so long: another job may only be starting again
GROWN, PREEMPTED = "resize", "preemption"


class ControllerHandle(ControllerCallback):
    """Gives the handle of Ray Train's controller to the pulse: the only way to end a job from outside."""

    def __init__(self, pulse: Any, attempt: str) -> None:
        self._pulse, self._attempt = pulse, attempt

    def on_controller_start_worker_group(self, *, scaling_config: Any, num_workers: int) -> dict[str, str] | None:
        """Tell, just before workers start."""
        import ray

        self._pulse.controlled_by.remote(self._attempt, ray.get_runtime_context().current_actor)
        return None


class Watch:
    """Looks at one start of a job once a second, from a thread, for as long as the context lasts.

    Args:
        pulse: the actor that hears the ranks.
        attempt: this start.
        size: workers of this start.
        room: where more may fit.
        compute: time limits.

    Attributes:
        attempt, size, room, pulse: as given.
        all_started: whether all workers have got to work.
        finding: why the job was ended; None when it was not.
    """

    def __init__(self, pulse: Any, attempt: str, size: int, room: Room, compute: Compute) -> None:
        self.finding: str | None = None
        self.pulse, self.attempt, self.size, self.room, self._compute = pulse, attempt, size, room, compute
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._begun = time.monotonic()
        self.all_started = False
        self._wish: str | None = None
        self._controller: Any = None
        self._room_since: float | None = None

    def __enter__(self) -> Watch:
        import ray

        ray.get(self.pulse.begin.remote(self.attempt), timeout=ACTOR_SECONDS)
        self._begun = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join(JOIN_SECONDS)

    def _run(self) -> None:
        while not self._done.wait(LOOK_SECONDS):
            try:
                self._look()
            except Exception as error:  # Ray or the actor does not answer now; the next look may tell more
                logger.debug("the watch saw nothing: %r", error)

    def _look(self) -> None:
        import ray

        attempt, beats, controller = ray.get(self.pulse.look.remote(), timeout=ANSWER_SECONDS)
        if attempt != self.attempt:  # it was started again
            self.pulse.begin.remote(self.attempt)
            return
        self._controller = controller or self._controller
        self.all_started = self.all_started or len(beats) == self.size
        problem = self._problem(beats)
        if problem is not None and self._controller is not None and not self._done.is_set():
            self.finding = problem
            self._done.set()
            end_job(self._controller)
        elif self._wish is None:
            self._look_at_nodes(beats)
            # before the first steps Ray may not know yet what this start has taken
            if self._wish is None and self._may_grow(beats):
                self._look_for_room()
        else:
            self._ask(self._wish)

    def _problem(self, beats: Sequence[Beat]) -> str | None:
        limit = 2 * self._compute.start_timeout_s  # for room, of which Ray tells, and then for the processes
        if self.all_started:
            late = [beat for beat in beats if beat.idle_s > self._limit(beat)]
            return hang_message(beats, late) if late else None
        if time.monotonic() - self._begun <= limit:
            return None
        return (
            f"only {len(beats)} of {self.room.asked(self.size)} started within {limit:g} s (twice "
            f"compute.start_timeout_s). The nodes: {describe_nodes()}. Look for nodes that lack tenfold or whose "
            "disks are full, ask for less, or raise the limit"
        )

    def _limit(self, beat: Beat) -> float:
        if beat.event == DONE:
            return math.inf
        if beat.stepped:
            return self._compute.hang_timeout_s
        # models load and compilers work before the first step
        return max(self._compute.hang_timeout_s, self._compute.start_timeout_s)

    def _look_at_nodes(self, beats: Sequence[Beat]) -> None:
        leaving = draining_nodes()
        if hosts := sorted({beat.host for beat in beats if beat.node_id in leaving}):
            logger.warning(
                "%s will be taken away: stopping after this step, with a checkpoint, and going on elsewhere",
                ", ".join(hosts),
            )
            self._ask(PREEMPTED)

    def _may_grow(self, beats: Sequence[Beat]) -> bool:
        """Say whether more workers are of use: before the first steps, the room of those that start is still free."""
        return self.size < self.room.largest_ever and self.all_started and all(beat.stepped for beat in beats)

    def _look_for_room(self) -> None:
        larger, now = self.room.largest(self.size), time.monotonic()
        if larger <= self.size:
            self._room_since = None
            self.room.ask(self.room.largest_ever - self.size)
            return
        self._room_since = self._room_since or now
        if now - self._room_since >= GROW_SECONDS:
            logger.info("there is room for %d workers instead of %d: changing over after this step", larger, self.size)
            self._ask(GROWN)

    def _ask(self, reason: str) -> None:
        self._wish = reason
        self.pulse.ask_to_stop.remote(self.attempt, reason)


def end_job(controller: Any) -> None:
    """End a job from outside: its workers, stuck or not, go, and what they reserved is free again.

    Ray Train's own way ends the controller last. One that does not answer, since it waits for workers to start, is
    killed; Ray then finds out after a while that nobody needs its reservation.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError

    try:
        ray.get(controller.abort.remote(), timeout=ANSWER_SECONDS)
    except RayActorError:
        return
    except GetTimeoutError:
        ray.kill(controller)


def hang_message(beats: Sequence[Beat], late: Sequence[Beat]) -> str:
    """Say which ranks on which machines made no progress, those that stopped first before the others."""
    told = []
    for beat in sorted(late, key=lambda beat: (beat.step, -beat.idle_s)):
        where = "while starting" if beat.event == START else f"in step {beat.step + 1}, after {beat.event}"
        told.append(f"rank {beat.rank} on {beat.host} for {beat.idle_s:.0f} s ({where})")
    return (
        f"{len(late)} of {len(beats)} workers made no progress: {'; '.join(told)}. The first one named is where to "
        "look: a stuck disk or network, code that waits. If they only were slow, raise compute.hang_timeout_s"
    )
