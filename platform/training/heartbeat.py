"""Heartbeats: every rank says about once a second how far it is, and hears whether the job should stop.

They go over one small Ray actor on the driver's node. A thread sends them, so that training never waits for it.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
ANSWER_SECONDS = 30.0
START = "start"  # before the Trainer's first event: models load
DONE = "done"  # after its last


@dataclass(frozen=True)
class Beat:
    """What a rank says about itself.

    Attributes:
        rank: its number.
        node_id: of Ray's node that it runs on.
        host: name of the machine.
        step: optimizer steps done.
        event: the last one of the Trainer, or START, or DONE.
        stepped: a step of this start is done; before that a compiler may be at work.
        idle_s: seconds since that event.
    """

    rank: int
    node_id: str
    host: str
    step: int
    event: str
    stepped: bool
    idle_s: float


class Pulse:
    """Keeps the newest beat of every rank and what the driver wishes; a Ray actor.

    An attempt is one start of a job: what workers of an earlier one still send is not heard.
    """

    def __init__(self) -> None:
        self._attempt = ""
        self._beats: dict[int, tuple[Beat, float]] = {}
        self._wish: str | None = None
        self._controller: Any = None

    def begin(self, attempt: str) -> None:
        """Forget what was before; a new attempt starts."""
        self._attempt, self._beats, self._wish, self._controller = attempt, {}, None, None

    def beat(self, attempt: str, beat: Beat) -> str | None:
        """Take a rank's beat; return the wish."""
        if attempt != self._attempt:
            return None
        self._beats[beat.rank] = (beat, time.monotonic())
        return self._wish

    def controlled_by(self, attempt: str, controller: Any) -> None:
        """Remember the handle of Ray Train's controller: who ends it ends its workers."""
        if attempt == self._attempt:
            self._controller = controller

    def ask_to_stop(self, attempt: str, reason: str) -> None:
        """Wish that the workers stop after a step, with a checkpoint."""
        if attempt == self._attempt:
            self._wish = reason

    def look(self) -> tuple[str, list[Beat], Any]:
        """Return the attempt, the newest beat of every rank, as old as it is now, and the controller."""
        now = time.monotonic()
        beats = [replace(beat, idle_s=beat.idle_s + now - heard) for beat, heard in self._beats.values()]
        return self._attempt, beats, self._controller


def start_pulse() -> Any:
    """Start the actor on this node, where the driver is; it ends with the driver.

    It may be started again by Ray: the next beats bring back what it knew, and the driver's watch says which attempt
    they are of.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(Pulse)  # type: ignore[call-overload]
    return actor.remote()


class Heart:
    """A rank's side: `event` says that something has happened, `wish` is what the driver wishes.

    Args:
        pulse: the actor; None beats for nobody.
        attempt: this start of the job.
        rank: this worker's number.
    """

    def __init__(self, pulse: Any, attempt: str, rank: int) -> None:
        self.wish: str | None = None
        self._pulse, self._attempt, self._rank = pulse, attempt, rank
        self._step, self._event, self._stepped, self._at = 0, START, False, time.monotonic()
        self._stop = threading.Event()
        self._host = socket.gethostname()
        if pulse is not None:
            import ray

            self._node_id = ray.get_runtime_context().get_node_id()
            self._thread = threading.Thread(target=self._run, name="heart", daemon=True)
            self._thread.start()

    def event(self, name: str, step: int) -> None:
        """Note progress."""
        self._stepped = self._stepped or (name == "on_step_end")
        self._step, self._event, self._at = step, name, time.monotonic()

    def close(self) -> None:
        """Say that this rank is done and beat no more."""
        self._event = DONE
        self._stop.set()
        if self._pulse is not None:
            self._pulse.beat.remote(self._attempt, self._beat())

    def _beat(self) -> Beat:
        idle = time.monotonic() - self._at
        return Beat(self._rank, self._node_id, self._host, self._step, self._event, self._stepped, idle)

    def _run(self) -> None:
        import ray

        while not self._stop.is_set():
            try:
                self.wish = ray.get(self._pulse.beat.remote(self._attempt, self._beat()), timeout=ANSWER_SECONDS)
            except Exception as error:  # the actor starts again, or the driver is gone and this process goes soon
                logger.debug("a heartbeat was not heard: %r", error)
            self._stop.wait(BEAT_SECONDS)
