"""The picture of one training: losses and the watched metric by step, as the Trainer's own log has them."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from tenfold.platform.figures import new_figure
from tenfold.platform.storage import Storage
from tenfold.platform.training.checkpoints import list_checkpoints
from tenfold.platform.training.report import metric_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAINER_STATE = "trainer_state.json"  # transformers' name
NO_LOSS = ("train/lr", "train/grad_norm")


def training_log(storage: Storage, job: str) -> dict[str, list[tuple[int, float]]]:
    """Return metric -> (step, value) pairs of a job's whole training, over all its restarts.

    They come from the newest checkpoint, which carries the log of the attempts before it.
    """
    series: dict[str, list[tuple[int, float]]] = {}
    for record in list_checkpoints(storage, job)[:1]:
        state = json.loads(storage.read_text(f"{record.path}/{TRAINER_STATE}"))
        for entry in state["log_history"]:
            for name, value in metric_names(entry).items():
                series.setdefault(name, []).append((entry["step"], value))
    return series


def figure(series: dict[str, list[tuple[int, float]]], watched: str, best_step: int) -> Figure:
    """Draw all training losses (left) and the metric that chooses the checkpoint, with the chosen step (right).

    Args:
        series: metric -> (step, value) pairs.
        watched: the metric on the right.
        best_step: step of the checkpoint that is kept as the result.
    """
    drawn = new_figure(9, 3.8)
    left, right = drawn.subplots(1, 2)
    losses = [name for name in series if name.startswith("train/") and name not in NO_LOSS]
    for name in sorted(losses, key=lambda name: name != "train/loss"):  # the total lies below its parts
        _line(left, series[name], label=name.removeprefix("train/"), width=2.2 if name == "train/loss" else 1.2)
    left.set(xlabel="step", title="training")
    if losses:
        left.legend(fontsize=8)
    judged = series.get(watched, [])
    _line(right, judged, label=watched, width=1.8)
    chosen = [value for step, value in judged if step == best_step]
    if chosen:
        right.plot(best_step, chosen[-1], "*", color="black", markersize=12, label=f"kept: {chosen[-1]:.4g}")
    right.set(xlabel="step", title=f"validation: {watched}")
    if judged:
        right.legend(fontsize=8)
    return drawn


def _line(axis: Axes, pairs: list[tuple[int, float]], **style: Any) -> None:
    finite = [(step, value) for step, value in pairs if math.isfinite(value)]
    axis.plot(
        [step for step, _ in finite],
        [value for _, value in finite],
        marker="." if len(finite) < 40 else None,
        linewidth=style["width"],
        label=style["label"],
    )
