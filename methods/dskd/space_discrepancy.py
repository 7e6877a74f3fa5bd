"""DSKD's simulation of two output spaces (arXiv 2406.17328): does a student come closer through one shared head?

Random teacher states keep their place; the student's states are moved by gradient descent until the divergence between
the two softmax distributions is small. With separate heads each side's distribution comes from its own head. With a
shared head the student's reads both sides, as in DSKD's student space, without a gradient from the teacher's side.
Measured at the end: the divergence, and how alike the states are arranged (`structure_distance`, cosine form; the
other one is ruled here by teacher states whose inner products happen to cancel, as they lie around the origin).

    python -m tenfold.methods.dskd.space_discrepancy --classes 10000 --steps 1000 --output FOLDER

Legend: N states, d their size, V classes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from tenfold.methods.dskd.structure_distance import cosine_distance
from tenfold.platform.losses.divergence import DIVERGENCES, divergence_rows
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Simulated:
    """The end of one simulation.

    Attributes:
        divergence: its name.
        head: separate or shared.
        start: mean divergence before the first step.
        end: after the last one, nats.
        structure: structure distance between student and teacher states at the end.
        student: [N][d] states at the end.
        teacher: [N][d] states.
    """

    divergence: str
    head: str
    start: float
    end: float
    structure: float
    student: list[list[float]]
    teacher: list[list[float]]


def simulate(
    divergence: str,
    head: str,
    *,
    states: int = 100,
    classes: int = 10_000,
    size: int = 2,
    steps: int = 1_000,
    learning_rate: float = 1.0,
    seed: int = 0,
) -> Simulated:
    """Move the student's states; the same seed draws the same start for every divergence and head.

    Teacher: h ~ 2 N(0, 1), e ~ N(0, 1). Student: h ~ N(0, 1) + 3, e ~ N(0, 1). Plain SGD on the student's states and
    head, on the divergence's mean over the states, with its numbers at their defaults and temperature 1.

    Args:
        divergence: a name of `DIVERGENCES`.
        head: separate or shared.
        states: N.
        classes: V.
        size: d.
        steps: of gradient descent.
        learning_rate: its rate.
        seed: of the draw.

    Raises:
        ValueError: an unknown head or divergence.
    """
    if head not in ("separate", "shared"):
        raise ValueError(f"head = {head!r}; needs separate or shared")
    draw = torch.Generator().manual_seed(seed)
    teacher_Nd = 2 * torch.randn(states, size, generator=draw)
    teacher_head_Vd = torch.randn(classes, size, generator=draw)
    student_Nd = (torch.randn(states, size, generator=draw) + 3).requires_grad_()
    student_head_Vd = torch.randn(classes, size, generator=draw).requires_grad_()

    def distance() -> Tensor:
        read_by = teacher_head_Vd if head == "separate" else student_head_Vd.detach()
        logits = student_Nd @ student_head_Vd.T, teacher_Nd @ read_by.T
        return divergence_rows(*logits, divergence=divergence).mean()

    optimizer = torch.optim.SGD([student_Nd, student_head_Vd], lr=learning_rate)
    start = distance().item()
    for _ in range(steps):
        optimizer.zero_grad()
        distance().backward()
        optimizer.step()
    end, moved = distance().item(), student_Nd.detach()
    structure = cosine_distance(moved, teacher_Nd)
    return Simulated(divergence, head, start, end, structure, moved.tolist(), teacher_Nd.tolist())


def figure(results: list[Simulated]) -> Figure:
    """Draw the states at the end: a row of two plots for each divergence, separate and shared head."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(result.divergence for result in results))
    picture = Figure(figsize=(8, 3 * len(names)), layout="constrained")
    axes = picture.subplots(len(names), 2, squeeze=False)
    for result in results:
        axis = axes[names.index(result.divergence)][int(result.head == "shared")]
        for label, points in (("teacher", result.teacher), ("student", result.student)):
            axis.scatter([point[0] for point in points], [point[1] for point in points], s=8, label=label)
        axis.set_title(
            f"{result.divergence}, {result.head}: {result.end:.3f}, structure {result.structure:.3f}", fontsize=9
        )
        axis.legend(fontsize=7)
    return picture


def main() -> None:
    """Run the command line."""
    import typer

    typer.run(_command)


def _command(
    divergence: Annotated[list[str] | None, "all if none is given"] = None,
    states: int = 100,
    classes: int = 10_000,
    steps: int = 1_000,
    learning_rate: float = 1.0,
    seed: int = 0,
    output: Path = Path("space_discrepancy"),
) -> None:
    """Compare separate heads with a shared one for every divergence; writes a table, OUTPUT.json and OUTPUT.png."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    torch.set_num_threads(1)  # the tensors are small: several threads would mostly wait for each other
    console = Console()
    plan = [(name, head) for name in divergence or DIVERGENCES for head in ("separate", "shared")]
    results = [
        simulate(name, head, states=states, classes=classes, steps=steps, learning_rate=learning_rate, seed=seed)
        for name, head in track(plan, "simulating", console=console)
    ]
    table = Table(title=f"{states} states, {classes} classes, {steps} steps at rate {learning_rate:g}, seed {seed}")
    for column in ("divergence", "head", "before", "after", "structure distance"):
        table.add_column(column, justify="left" if column in ("divergence", "head") else "right")
    for result in results:
        numbers = (result.start, result.end, result.structure)
        table.add_row(result.divergence, result.head, *(f"{number:.3f}" for number in numbers))
    console.print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps([asdict(result) for result in results]))
    figure(results).savefig(output.with_suffix(".png"), dpi=100)
    console.print(f"written: {output.with_suffix('.json')}, {output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
