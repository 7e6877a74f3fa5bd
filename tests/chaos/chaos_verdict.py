"""What must hold after all that has happened.

The history of the final model: attempt k did the steps from its first one up to that before the first one of the next
attempt, which went on from its checkpoint. What attempt k did beyond that is lost, and trained again.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chaos_job import Attempt, recorded
from chaos_plan import ADD_NODE, DRAIN_NODE, LOSSES, Planned
from chaos_scene import Reference

# Each change of the number of workers adds float32 numbers in another order. What that does to a loss is measured: by
# the same training on 1 and on 2 workers, undisturbed. A disturbed one changes several times, in other steps.
TIMES = 10.0
LEAST = 1e-6  # relative; some units of float32's last place (6e-8)
MOST = 1e-4  # more than this no order of summation explains


@dataclass
class Happened:
    """An event that was played.

    Attributes:
        planned: what was to happen.
        at_s: seconds since the training was started.
        step: that the workers had begun.
        size: number of workers before.
        attempt: start of the job that it met.
        told: what followed.
    """

    planned: Planned
    at_s: float
    step: int
    size: int
    attempt: str
    told: str


@dataclass
class Step:
    """A step of the final model's history: who did it, on what, and with which loss."""

    attempt: str
    size: int
    rows: list[int] | None
    loss: float


@dataclass
class Verdict:
    """Claims and whether they hold, with the numbers behind them.

    Attributes:
        claims: sentence -> what speaks against it; empty where it holds.
        history: step -> what the final model was trained on.
        repeated: (attempt, step, loss) of what was lost and trained again.
        tolerance: relative difference of losses that is allowed.
        order_effect: largest relative difference between losses of 1 and 2 undisturbed workers.
        largest_difference: the same between the disturbed and the undisturbed training.
        final: loss of the last step, disturbed and undisturbed.
    """

    claims: dict[str, list[str]] = field(default_factory=dict)
    history: dict[int, Step] = field(default_factory=dict)
    repeated: list[tuple[str, int, float]] = field(default_factory=list)
    tolerance: float = math.nan
    order_effect: float = math.nan
    largest_difference: float = math.nan
    final: tuple[float, float] = (math.nan, math.nan)

    @property
    def failed(self) -> list[str]:
        """What does not hold."""
        return [f"{claim}: {'; '.join(against[:5])}" for claim, against in self.claims.items() if against]

    def plain(self) -> dict[str, Any]:
        """Return it as data for JSON."""
        return asdict(self)


def relative(found: float, expected: float) -> float:
    """Return the relative difference."""
    return abs(found - expected) / abs(expected)


def history_of(attempts: dict[str, Attempt]) -> tuple[dict[int, Step], list[tuple[str, int, float]], list[str]]:
    """Return the final model's steps, what was lost of it, and where the chain of attempts has gaps."""
    history: dict[int, Step] = {}
    gaps: list[str] = []
    names, before = list(attempts), 0
    for place, name in enumerate(names):
        attempt = attempts[name]
        first = min(attempt.rows)
        if first > before + 1:
            gaps.append(f"{name} begins with step {first} after step {before}")
        last = max(attempt.rows)
        if place + 1 < len(names):
            last = min(last, min(attempts[names[place + 1]].rows) - 1)
        for step in range(first, last + 1):
            loss = attempt.losses.get(step, math.nan)
            history[step] = Step(name, attempt.size, attempt.whole_rows(step), loss)
        before = last
    lost = [
        (name, step, loss)
        for name, attempt in attempts.items()
        for step, loss in sorted(attempt.losses.items())
        if step not in history or history[step].attempt != name
    ]
    return history, lost, gaps


def judge(
    records: Path,
    two: Reference,
    one: Reference,
    happened: list[Happened],
    steps: int,
    checkpoint: Path,
    logged: list[tuple[int, float]],
    status: str,
    unsent: int,
) -> Verdict:
    """Compare what has been trained with the undisturbed training.

    Args:
        records: folder of what the workers have written down.
        two: undisturbed, on as many workers as there are nodes.
        one: undisturbed, on one.
        happened: all events.
        steps: of the training.
        checkpoint: folder of the last checkpoint.
        logged: MLflow's history of the loss: (step, value).
        status: of the MLflow run.
        unsent: records that MLflow has not got.
    """
    attempts = recorded(records)
    verdict, every = Verdict(), list(range(1, steps + 1))
    verdict.history, verdict.repeated, gaps = history_of(attempts)
    history, claims = verdict.history, verdict.claims
    verdict.order_effect = max(relative(one.losses[step], two.losses[step]) for step in every)
    verdict.tolerance = max(TIMES * verdict.order_effect, LEAST)
    claims["the order of summation explains little"] = (
        [] if verdict.tolerance <= MOST else [f"undisturbed, 1 and 2 workers differ by {verdict.order_effect:.1e}"]
    )

    claims["the final model's history has each step once"] = gaps + (
        [] if list(history) == every else [f"its steps are {list(history)}"]
    )
    claims["each of its steps was trained on the rows of the undisturbed step"] = [
        f"step {step} ({found.attempt}): {found.rows} instead of {two.rows[step]}"
        for step, found in history.items()
        if found.rows != two.rows[step]
    ]
    claims["a lost step had been begun on the rows on which it was trained again"] = [
        f"step {step} of {name}: {found} instead of {two.rows[step]}"
        for name, attempt in attempts.items()
        for step in attempt.rows
        if (found := attempt.whole_rows(step)) and found != two.rows[step]
    ]
    claims["a lost step had the loss that it had again"] = [
        f"step {step} of {name}: {loss} and {history[step].loss}"
        for name, step, loss in verdict.repeated
        if relative(loss, history[step].loss) > verdict.tolerance
    ]
    differences = {step: relative(found.loss, two.losses[step]) for step, found in history.items()}
    verdict.largest_difference = max(differences.values())
    if steps in history:
        verdict.final = (history[steps].loss, two.losses[steps])
    claims["all losses, the last one included, are those of the undisturbed training"] = [
        f"step {step}: {history[step].loss} instead of {two.losses[step]}"
        for step, difference in differences.items()
        if not difference <= verdict.tolerance
    ]
    claims["so are the weights"] = _weights(checkpoint, two, one)
    claims["the last checkpoint remembers each step once, with its loss"] = _memory(checkpoint, history)

    claims["adding and draining a node repeat no step"] = [
        f"{event.planned.kind} in {event.attempt}: step {step} was trained again"
        for event in happened
        if event.planned.kind in (ADD_NODE, DRAIN_NODE)
        for name, step, _ in verdict.repeated
        if name == event.attempt
        and not any(other.attempt == name and other.planned.kind in LOSSES for other in happened)
    ]
    claims["MLflow has the loss of each step once"] = _logged_once(logged, every)
    claims["it is a loss that the step had"] = [
        f"step {step}: {value}"
        for step, value in logged
        if not any(value == attempt.losses.get(step) for attempt in attempts.values())
    ]
    claims["the MLflow run is finished, and nothing is left to send"] = (
        [] if (status, unsent) == ("FINISHED", 0) else [f"{status}, {unsent} unsent"]
    )
    return verdict


def _logged_once(logged: list[tuple[int, float]], every: list[int]) -> list[str]:
    found = [step for step, _ in logged]
    missing = [step for step in every if step not in found]
    several = sorted({step for step in found if found.count(step) > 1})
    return [f"missing: {missing}"] * bool(missing) + [f"several times: {several}"] * bool(several)


def _weights(checkpoint: Path, two: Reference, one: Reference) -> list[str]:
    """Compare weights as losses are compared: with what the order of summation does to them."""
    from safetensors.torch import load_file

    found, expected, other = (load_file(f / "model.safetensors") for f in (checkpoint, two.folder, one.folder))
    against = []
    for name, weight in expected.items():
        size = weight.abs().max().item()
        allowed = max(TIMES * (other[name] - weight).abs().max().item(), LEAST * size)
        difference = (found[name] - weight).abs().max().item()
        if not difference <= allowed:
            against.append(f"{name}: {difference:.1e}, allowed are {allowed:.1e}")
    return against


def _memory(checkpoint: Path, history: dict[int, Step]) -> list[str]:
    entries = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    remembered = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    expected = [(step, found.loss) for step, found in sorted(history.items())]
    wrong = [f"{a} instead of {b}" for a, b in zip(remembered, expected, strict=False) if a != b]
    return wrong + ([] if len(remembered) == len(expected) else [f"{len(remembered)} entries"])
