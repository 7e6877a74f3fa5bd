"""The timeline of a chaos run for people: a table, a figure, and all numbers as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from chaos_plan import (
    ADD_NODE,
    CUT_STORAGE,
    DRAIN_NODE,
    KILL_NODE,
    KILL_WORKER,
    RESTART_MLFLOW,
    Planned,
)
from chaos_scene import Reference
from chaos_verdict import Happened, Verdict, relative
from rich.console import Console
from rich.table import Table

COLOURS = {
    KILL_WORKER: "#d62728",
    KILL_NODE: "#8c1515",
    ADD_NODE: "#2ca02c",
    DRAIN_NODE: "#ff7f0e",
    CUT_STORAGE: "#9467bd",
    RESTART_MLFLOW: "#17becf",
}


def show_plan(plan: list[Planned]) -> None:
    """Print what will happen."""
    table = Table(title="planned")
    for name in ("no.", "event", "in step", "after s", "which (share)", "away s"):
        table.add_column(name, justify="left" if name == "event" else "right")
    for event in plan:
        away = f"{event.away_s:.1f}" if event.kind in (CUT_STORAGE, RESTART_MLFLOW) else ""
        which = "" if away or event.kind == ADD_NODE else f"{event.pick:.2f}"
        table.add_row(str(event.number), event.kind, str(event.step), f"{event.delay_s:.2f}", which, away)
    Console().print(table)


def show_timeline(happened: list[Happened], verdict: Verdict | None) -> None:
    """Print what has happened, and what holds of it."""
    console = Console()
    table = Table(title="happened")
    for name in ("no.", "s", "step", "workers", "event", "consequence"):
        table.add_column(name, justify="left" if name in ("event", "consequence") else "right", overflow="fold")
    for event in happened:
        number, kind = event.planned.number, event.planned.kind
        table.add_row(str(number), f"{event.at_s:.0f}", str(event.step), str(event.size), kind, event.told)
    console.print(table)
    if verdict is None:
        return
    for claim, against in verdict.claims.items():
        console.print(f"{'FAILED' if against else 'holds '}  {claim}", *against[:5], sep="\n        ", markup=False)
    console.print(
        f"final loss {verdict.final[0]:.9f}, undisturbed {verdict.final[1]:.9f}; largest relative difference of a "
        f"step's loss {verdict.largest_difference:.1e}, allowed {verdict.tolerance:.1e} (the order of summation "
        f"alone, on 1 and 2 undisturbed workers: {verdict.order_effect:.1e}); {len(verdict.repeated)} steps lost and "
        "trained again",
        markup=False,
    )


def write_json(path: Path, seed: int, plan: list[Planned], happened: list[Happened], verdict: Verdict) -> None:
    """Write all numbers."""
    found = {
        "seed": seed,
        "plan": [asdict(event) for event in plan],
        "happened": [asdict(event) for event in happened],
        "verdict": verdict.plain(),
    }
    path.write_text(json.dumps(found, indent=1))


def write_figure(path: Path, seed: int, happened: list[Happened], verdict: Verdict, two: Reference) -> None:
    """Draw losses, their differences and the number of workers, by step, with the events."""
    from matplotlib.lines import Line2D
    from tenfold.platform.figures import new_figure

    steps = list(verdict.history)
    figure = new_figure(13, 8.5)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[5, 2, 1.4])
    losses = [verdict.history[step].loss for step in steps]
    top.plot(steps, [two.losses[step] for step in steps], color="0.75", linewidth=5, label="undisturbed, 2 workers")
    top.plot(steps, losses, color="black", linewidth=1, marker=".", markersize=5, label="disturbed: final history")
    if verdict.repeated:
        _, lost, values = zip(*verdict.repeated, strict=True)
        top.plot(
            lost, values, "o", color="#d62728", markersize=10, fillstyle="none", label="done, lost, and trained again"
        )
    top.set_ylabel("loss")
    lines = top.legend(loc="upper right", framealpha=1)
    top.add_artist(lines)

    floor = 1e-9
    middle.semilogy(
        steps,
        [max(relative(verdict.history[step].loss, two.losses[step]), floor) for step in steps],
        color="black",
        linewidth=1,
        marker=".",
    )
    middle.axhline(verdict.tolerance, color="#d62728", linestyle="--", linewidth=1)
    middle.text(steps[0], verdict.tolerance, "allowed", color="#d62728", fontsize=9, verticalalignment="bottom")
    middle.set_ylim(floor / 2, verdict.tolerance * 8)
    middle.set_ylabel("relative difference\n(equal: at the bottom)")

    sizes = [verdict.history[step].size for step in steps]
    bottom.step(steps, sizes, where="mid", color="black")
    bottom.fill_between(steps, sizes, step="mid", color="0.85")
    bottom.set_ylim(0, max(sizes) + 0.5)
    bottom.set_yticks(range(max(sizes) + 1))
    bottom.set_ylabel("workers")
    bottom.set_xlabel("optimizer step")

    places: dict[int, int] = {}
    for event in happened:
        row = places[event.step] = places.get(event.step, -1) + 1
        for axes in (top, middle, bottom):
            axes.axvline(event.step + 0.12 * row, color=COLOURS[event.planned.kind], linewidth=1.5, alpha=0.8)
        top.annotate(
            str(event.planned.number),
            (event.step, 1.02 + 0.05 * row),
            xycoords=("data", "axes fraction"),
            color="white",
            fontsize=9,
            fontweight="bold",
            horizontalalignment="center",
            bbox={"boxstyle": "round,pad=0.2", "color": COLOURS[event.planned.kind]},
        )
    kinds = [Line2D([], [], color=colour, linewidth=4, label=kind) for kind, colour in COLOURS.items()]
    figure.legend(handles=kinds, loc="outside lower center", ncols=len(kinds), frameon=False)
    held = "all claims hold" if not verdict.failed else f"{len(verdict.failed)} claims failed"
    figure.suptitle(f"chaos: seed {seed}, {len(happened)} events in {len(steps)} steps; {held}")
    figure.savefig(path, dpi=110)
