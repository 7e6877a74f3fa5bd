"""What can happen: each event acts, waits for what follows from it, and says so in a sentence."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
from chaos_plan import (
    ADD_NODE,
    CUT_STORAGE,
    DRAIN_NODE,
    KILL_NODE,
    KILL_WORKER,
    RESTART_MLFLOW,
    Planned,
)
from chaos_scene import Scene

PREEMPTION = 2  # Ray's reason for draining
NOTICE_SECONDS = 300.0  # longer than all that a loaded machine takes for a step


def chosen(things: Sequence[Any], pick: float) -> Any:
    """Return one of several."""
    return things[int(pick * len(things))]


def kill_worker(scene: Scene, planned: Planned) -> str:
    name, attempt, _ = scene.progress()

    def all_workers() -> list[psutil.Process] | None:
        found = scene.training_workers()
        return sorted(found, key=lambda process: process.pid) if len(found) == attempt.size else None

    victim = chosen(scene.wait(all_workers, f"{attempt.size} workers"), planned.pick)
    victim.kill()
    return f"one of {attempt.size} workers gone; {new_start(scene, name)}"


def kill_node(scene: Scene, planned: Planned) -> str:
    name = scene.progress()[0]
    processes = scene.kill_node(chosen(scene.nodes, planned.pick))
    return f"{processes} processes gone; {new_start(scene, name)}"


def add_node(scene: Scene, planned: Planned) -> str:
    name = scene.progress()[0]
    scene.add_nodes(1)
    scene.go_on()
    return new_start(scene, name)


def drain_node(scene: Scene, planned: Planned) -> str:
    import ray

    name = scene.progress()[0]
    node = chosen(scene.nodes, planned.pick)
    deadline = time.time() + NOTICE_SECONDS
    client = ray._raylet.GcsClient(address=scene.cluster.address)
    accepted, why = client.drain_node(node.node_id, PREEMPTION, "taken back", int(deadline * 1000))
    if not accepted:
        raise RuntimeError(f"Ray does not drain the node: {why}")
    scene.go_on()
    told = new_start(scene, name)
    left = time.time() < deadline
    scene.end_node(node)
    return f"{told}, {'before' if left else 'after'} the end of the notice"


def cut_storage(scene: Scene, planned: Planned) -> str:
    name, _, step = scene.progress()
    refused, begun = scene.s3.refused, time.monotonic()
    scene.s3.is_open = False
    scene.go_on()
    try:
        scene.wait(
            lambda: scene.s3.refused > refused and time.monotonic() - begun >= planned.away_s, "request to the store"
        )
    finally:
        scene.s3.is_open = True
    away, refused = time.monotonic() - begun, scene.s3.refused - refused

    def saved_since() -> int | None:
        newest = scene.newest_checkpoint()
        return newest if newest >= step else None

    saved = scene.wait(saved_since, "checkpoint after the cut")
    same = "the same workers" if scene.progress()[0] == name else "other workers"
    return f"away for {away:.1f} s, {refused} requests refused; {same} went on, next checkpoint: step {saved}"


def restart_mlflow(scene: Scene, planned: Planned) -> str:
    begun = time.monotonic()
    scene.stop_mlflow()
    scene.go_on()
    scene.wait(
        lambda: scene.spool.pending() and time.monotonic() - begun >= planned.away_s, "metric that MLflow did not get"
    )
    scene.permit(0, 0)  # no step until it is there: that takes as long as the machine is busy
    scene.start_mlflow()
    kept = len(scene.spool.unsent())
    return f"away for {time.monotonic() - begun:.1f} s; training went on, {kept} records kept in the meantime"


def new_start(scene: Scene, name: str) -> str:
    """Wait for the start after the one of this name; say where it goes on, and with how many workers."""
    _, attempt, _ = scene.attempt_after(name)
    return f"{attempt.size} worker(s) go on after step {min(attempt.rows) - 1}"


EVENTS: dict[str, Callable[[Scene, Planned], str]] = {
    KILL_WORKER: kill_worker,
    KILL_NODE: kill_node,
    ADD_NODE: add_node,
    DRAIN_NODE: drain_node,
    CUT_STORAGE: cut_storage,
    RESTART_MLFLOW: restart_mlflow,
}
