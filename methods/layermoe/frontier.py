"""What a sweep shows: added parameters and losses on new and old languages of every setting, and which are beaten."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tenfold.methods.layermoe.plots import ParetoRow, pareto_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from tenfold.platform.tuning.results import Trial

# Swept options that name a kind of model; what else is swept is written beside the point.
KINDS = ("config.strategy", "config.allocation.order")
NEW, OLD, ADDED = "eval/new/nats_per_byte", "eval/old/nats_per_byte", "eval/added_parameters"


def frontier_rows(trials: Sequence[Trial]) -> list[ParetoRow]:
    """Return a row for each setting, in the mean over its seeds; trials without these measures are left out."""
    constant = {key for key in trials[0].values if len({str(t.values[key]) for t in trials}) == 1} if trials else set()
    settings: dict[tuple[str, str], list[dict[str, float]]] = {}
    for trial in trials:
        if not {NEW, OLD, ADDED} <= trial.metrics.keys():
            continue
        kind = " ".join(str(trial.values[key]) for key in KINDS if key in trial.values)
        rest = {key: value for key, value in trial.values.items() if key not in {*KINDS, *constant, "seed"}}
        name = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in rest.items())
        settings.setdefault((kind or name, name or kind), []).append(trial.metrics)
    return [
        ParetoRow(name, kind, *(statistics.fmean(each[key] for each in metrics) for key in (ADDED, NEW, OLD)))
        for (kind, name), metrics in settings.items()
    ]


def sweep_figures(trials: Sequence[Trial]) -> dict[str, Figure]:
    """Return the picture of added parameters against both losses; nothing where fewer than two settings have them."""
    rows = frontier_rows(trials)
    return {"pareto": pareto_figure(rows, unit="nats per byte")} if len(rows) > 1 else {}
