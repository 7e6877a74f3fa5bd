"""What will happen, and in which step: drawn from a seed before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

SAVED = 3  # steps between two checkpoints
GAP = 3  # steps between two events at least
SPAN = 6  # steps after the last one: until the next checkpoint is there, or workers have stopped

KILL_WORKER, KILL_NODE, ADD_NODE, DRAIN_NODE = "kill worker", "kill node", "add node", "drain node"
CUT_STORAGE, RESTART_MLFLOW = "cut storage", "restart MLflow"
LOSSES = (KILL_WORKER, KILL_NODE)  # after them steps are trained again


@dataclass(frozen=True)
class Planned:
    """One event.

    Attributes:
        number: from 1, in their order.
        kind: one of those above.
        step: it happens after this step has begun.
        delay_s: how long after.
        pick: which worker or node, as a share of those there are, 0 <= pick < 1.
        away_s: for how long a server is away at least.
    """

    number: int
    kind: str
    step: int
    delay_s: float
    pick: float
    away_s: float


def draw(seed: int, steps: int, rounds: int) -> list[Planned]:
    """Return a plan with every kind of event `rounds` times at least.

    There are two nodes; between two events that take one away, one is added.

    Raises:
        ValueError: the training is too short.
    """
    random = Random(seed)
    leaving = [KILL_NODE, DRAIN_NODE] * rounds
    random.shuffle(leaving)
    nodes = [kind for node in leaving for kind in (node, ADD_NODE)][:-1]
    kinds = [KILL_WORKER, CUT_STORAGE, RESTART_MLFLOW] * rounds + ["nodes"] * len(nodes)
    random.shuffle(kinds)
    kinds = [nodes.pop(0) if kind == "nodes" else kind for kind in kinds]
    needed = SAVED + GAP * len(kinds) + SPAN
    if steps < needed:
        raise ValueError(f"{rounds} round(s) are {len(kinds)} events, which need {needed} steps, not {steps}")
    # of those that are left over, some lie before each event
    free = sorted(random.randint(0, steps - needed) for _ in kinds)
    moments = [SAVED + 1 + GAP * place + more for place, more in enumerate(free)]
    return [
        Planned(number, kind, step, random.uniform(0, 1), random.random(), random.uniform(3, 8))
        for number, (kind, step) in enumerate(zip(kinds, moments, strict=True), 1)
    ]
