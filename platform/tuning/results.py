"""What a sweep measured: collected from the trials' own storage, as a table and as a picture."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tenfold.platform.experiment import Sweep
from tenfold.platform.figures import new_figure
from tenfold.platform.run import read_state
from tenfold.platform.storage import Storage
from tenfold.platform.tuning.space import label, short_names, show, varied
from tenfold.platform.tuning.trial import TRIAL, TrialReports, trial_run_ids

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        run_id: its run.
        label: its values, for people.
        values: swept option -> value.
        status: finished, stopped (early), running (interrupted) or failed.
        metrics: the final numbers, or those of the last report.
        reports: what it reported while it trained, by step.
        error: why it failed.
        value: the optimised metric; NaN where there is none.
    """

    run_id: str
    label: str
    values: dict[str, Any]
    status: str
    metrics: dict[str, float]
    reports: list[dict[str, float]]
    error: str | None
    value: float


@dataclass(frozen=True)
class Group:
    """Trials that differ in nothing but the seed.

    Attributes:
        values: the other swept options.
        trials: how many have a value.
        mean: of the optimised metric.
        deviation: sample standard deviation; NaN for one trial.
    """

    values: dict[str, Any]
    trials: int
    mean: float
    deviation: float


@dataclass(frozen=True)
class SweepResult:
    """All trials of a sweep, in the order they were begun."""

    sweep_id: str
    uri: str
    sweep: Sweep
    trials: list[Trial]

    @property
    def best(self) -> Trial | None:
        """The finished trial with the best value."""
        ended = [trial for trial in self.trials if trial.status == "finished" and not math.isnan(trial.value)]
        sign = 1 if self.sweep.mode == "min" else -1
        return min(ended, key=lambda trial: sign * trial.value, default=None)

    def groups(self) -> list[Group]:
        """Return mean and deviation over the seeds, best first; empty when the seed is not swept."""
        if "seed" not in self.sweep.space:
            return []
        found: dict[str, list[Trial]] = {}
        for trial in self.trials:
            if trial.status == "finished" and not math.isnan(trial.value):
                rest = {key: value for key, value in trial.values.items() if key != "seed"}
                found.setdefault(json.dumps(rest, sort_keys=True), []).append(trial)
        groups = [
            Group(
                json.loads(rest),
                len(trials),
                statistics.fmean(trial.value for trial in trials),
                statistics.stdev(trial.value for trial in trials) if len(trials) > 1 else math.nan,
            )
            for rest, trials in found.items()
        ]
        return sorted(groups, key=lambda group: group.mean, reverse=self.sweep.mode == "max")


def collect(top: Storage, sweep_id: str, sweep: Sweep) -> SweepResult:
    """Read the trials of a sweep from storage; those that have not begun are not there."""
    found = []
    for run_id in trial_run_ids(top, sweep_id):
        about = json.loads(top.read_text(f"{run_id}/{TRIAL}"))
        state = read_state(top, run_id) or {"status": "running"}
        reports = TrialReports(top.uri_of(run_id), sweep.metric).kept()
        metrics = state.get("metrics") or (reports[-1] if reports else {})
        # a trial that its scheduler stops may still see its workers go and write that down as an error
        error = None if state["status"] == "stopped" else about.get("error")
        trial = Trial(
            run_id,
            label(about["values"], sweep),
            about["values"],
            "failed" if error else state["status"],
            metrics,
            reports,
            error,
            float(metrics.get(sweep.metric, math.nan)),
        )
        found.append((state.get("created", math.inf), trial))
    return SweepResult(
        sweep_id, top.uri_of(sweep_id), sweep, [trial for _, trial in sorted(found, key=lambda f: f[0])]
    )


def table_csv(result: SweepResult) -> str:
    """Return one line per trial: run, status, swept values, all final metrics."""
    names = short_names(list(result.sweep.space))
    metrics = sorted({name for trial in result.trials for name in trial.metrics if "/" in name})
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["run", "status", *names.values(), *metrics])
    for trial in result.trials:
        row = [trial.run_id, trial.status, *(trial.values[key] for key in names)]
        writer.writerow([*row, *(trial.metrics.get(name, "") for name in metrics)])
    return stream.getvalue()


def figure(result: SweepResult) -> Figure:
    """Draw the optimised metric over training, and against every swept option that varies.

    Trials of one value of the first option have one colour; crosses are trials that were stopped early.
    """
    keys = varied(result.sweep) or list(result.sweep.space)
    names = short_names(keys)
    colours = _colours(result, keys[0])
    has_curves = any(len(trial.reports) > 1 for trial in result.trials)  # a method may report only at its end
    widths = [1.4] * has_curves + [1.0] * len(keys)
    drawn = new_figure(1.4 + 3.6 * sum(widths), 4.2)
    axes = list(drawn.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0])
    if has_curves:
        _draw_curves(axes[0], result, keys[0], names[keys[0]], colours)
    axes[0].set_ylabel(result.sweep.metric)
    for axis, key in zip(axes[has_curves:], keys, strict=True):
        _draw_option(axis, result, key, names[key], colours, keys[0])
    values = [trial.value for trial in result.trials if math.isfinite(trial.value)]
    if values and min(values) > 0 and max(values) > 5 * min(values):
        for axis in axes:
            axis.set_yscale("log")
    drawn.suptitle(result.sweep_id, fontsize=10)
    return drawn


def _draw_curves(axis: Axes, result: SweepResult, key: str, name: str, colours: dict[str, Any]) -> None:
    for trial in result.trials:
        steps = [report["step"] for report in trial.reports]
        values = [report[result.sweep.metric] for report in trial.reports]
        axis.plot(steps, values, ".-", color=colours[show(trial.values[key])], alpha=0.8)
        if trial.status == "stopped" and steps:
            axis.plot(steps[-1], values[-1], "x", color="black", markersize=8)
    for text, colour in colours.items():
        axis.plot([], [], color=colour, label=f"{name} = {text}")
    if any(trial.status == "stopped" for trial in result.trials):
        axis.plot([], [], "x", color="black", label="stopped early")
    axis.set(xlabel="step", title="by step")
    axis.legend(fontsize=8)


def _colours(result: SweepResult, key: str) -> dict[str, Any]:
    from matplotlib import colormaps

    texts = list(dict.fromkeys(show(trial.values[key]) for trial in result.trials))
    if len(texts) <= 10:
        return {text: colormaps["tab10"](i) for i, text in enumerate(texts)}
    return {text: colormaps["viridis"](i / (len(texts) - 1)) for i, text in enumerate(texts)}


def _draw_option(axis: Axes, result: SweepResult, key: str, name: str, colours: dict[str, Any], first: str) -> None:
    from matplotlib.ticker import NullFormatter

    dimension = result.sweep.space[key]
    ended = [trial for trial in result.trials if math.isfinite(trial.value)]
    numeric = dimension.choice is None and dimension.grid is None
    ticks = list(dict.fromkeys(show(value) for value in (dimension.grid or dimension.choice or ())))
    for trial in ended:
        at = trial.values[key] if numeric else ticks.index(show(trial.values[key]))
        marker = "x" if trial.status == "stopped" else "o"
        axis.plot(at, trial.value, marker, color=colours[show(trial.values[first])], alpha=0.8)
    if dimension.loguniform is not None:
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())
    if not numeric:
        axis.set_xticks(range(len(ticks)), ticks, rotation=30, ha="right")
        axis.margins(x=0.2)
    axis.set(xlabel=name, title=f"final {result.sweep.metric}")


def heat_map(result: SweepResult) -> Figure | None:
    """Draw the mean of the optimised metric over the first two grids of a sweep, +- its deviation over the rest.

    Returns:
        None where fewer than two options besides the seed have a grid of several values.
    """
    space = result.sweep.space
    keys = [key for key in varied(result.sweep) if space[key].grid is not None][:2]
    if len(keys) < 2:
        return None
    rows, columns = ([show(value) for value in space[key].grid or ()] for key in keys)
    cells: dict[tuple[str, str], list[float]] = {}
    for trial in result.trials:
        if math.isfinite(trial.value):
            cells.setdefault((show(trial.values[keys[0]]), show(trial.values[keys[1]])), []).append(trial.value)
    means = [
        [statistics.fmean(cells[row, column]) if (row, column) in cells else math.nan for column in columns]
        for row in rows
    ]
    drawn = new_figure(3.5 + 1.25 * len(columns), 1.8 + 0.45 * len(rows))
    axis = drawn.subplots()
    image = axis.imshow(means, cmap="viridis", aspect="auto")
    low, high = image.get_clim()
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            values = cells.get((row, column), [])
            if values:
                spread = f" \u00b1 {statistics.stdev(values):.3g}" if len(values) > 1 else ""
                dark = means[i][j] < (low + high) / 2
                axis.text(j, i, f"{means[i][j]:.3g}{spread}", ha="center", va="center", color="w" if dark else "k")
    names = short_names(keys)
    axis.set_xticks(range(len(columns)), columns, rotation=20, ha="right")
    axis.set_yticks(range(len(rows)), rows)
    axis.set(xlabel=names[keys[1]], ylabel=names[keys[0]], title=f"{result.sweep_id}: {result.sweep.metric}")
    drawn.colorbar(image, ax=axis)
    return drawn
