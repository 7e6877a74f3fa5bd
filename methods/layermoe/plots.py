"""Pictures of an expansion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tenfold.methods.layermoe.similarity import Similarity
from tenfold.platform.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people tell apart.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F3C8D", "#A6761D")
MARKERS = "osD^vP*X"
BASE = "#9aa3ad"
PAIR = "#d5dae0"
INK = "#2b2f36"


def similarity_figure(similarity: Similarity) -> Figure:
    """Draw how alike languages look to each layer: the paper's means, and every pair in grey behind them."""
    layers = np.arange(len(similarity.combined))
    figure = new_figure(_width(len(layers)), 4.0)
    axes = figure.subplots()
    for number, values in enumerate(similarity.pairs.values()):
        axes.plot(layers, values, color=PAIR, lw=0.9, zorder=1, label="each pair" if number == 0 else None)
    lines = (
        (similarity.nn, r"new and new, $S_{nn}$", PALETTE[0], "s", 1.4),
        (similarity.no, r"new and old, $S_{no}$", PALETTE[1], "^", 1.4),
        (similarity.combined, r"combined, $S$", INK, "o", 2.2),
    )
    for values, label, colour, marker, width in lines:
        if values is not None:
            axes.plot(layers, values, color=colour, lw=width, marker=marker, ms=4, label=label, zorder=2)
    axes.set_ylabel("mean cosine of token vectors")
    axes.set_title(f"Similarity by layer: new {_names(similarity.new)}; old {_names(similarity.old) or 'none'}")
    axes.legend(frameon=False, fontsize=9)
    _by_layer(axes, len(layers))
    return figure


def allocation_figure(
    experts: Sequence[Sequence[int]],
    *,
    expansions: Sequence[str] = (),
    classifier_layers: Sequence[int] = (),
    similarity: Sequence[float] | NDArray[np.float64] | None = None,
) -> Figure:
    """Draw the experts of every layer as a stack: the original FFN, then those of each expansion.

    Args:
        experts: by layer, the number of new experts of every expansion (`config.layermoe["experts"]`).
        expansions: what to call them, such as their languages; default: by number.
        classifier_layers: are marked.
        similarity: S, [L]: drawn in a row above.
    """
    layers, rounds = len(experts), len(experts[0])
    figure = new_figure(_width(layers), 4.0 if similarity is None else 5.2)
    if similarity is None:
        axes = figure.subplots()
    else:
        above, axes = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2.4))
        above.plot(range(layers), similarity, color=INK, lw=1.6, marker="o", ms=3.5)
        above.set_ylabel("similarity $S$")
        above.spines[["top", "right"]].set_visible(False)
        above.grid(axis="y", color="#eceff2")
    stacks = [("original FFN", BASE, np.ones(layers))]
    for number in range(rounds):
        name = expansions[number] if number < len(expansions) else f"expansion {number + 1}"
        stacks.append((name, PALETTE[number % len(PALETTE)], np.array([row[number] for row in experts])))
    height = np.zeros(layers)
    for name, colour, counts in stacks:
        label = f"{name}: {int(counts.sum())}"
        axes.bar(range(layers), counts, bottom=height, color=colour, width=0.78, label=label, zorder=2)
        height += counts
    for layer, total in enumerate(height.astype(int)):
        axes.text(layer, total + 0.02 * height.max(), str(total), ha="center", va="bottom", fontsize=8, color=INK)
    if classifier_layers:
        low = [-0.045 * height.max()] * len(classifier_layers)
        label = f"classifier: {len(classifier_layers)}"
        axes.plot(classifier_layers, low, ls="", marker="^", ms=5.5, color=PALETTE[5], label=label, clip_on=False)
    axes.set_ylim(-0.09 * height.max() if classifier_layers else 0, 1.1 * height.max())
    axes.set_ylabel("experts")
    (axes if similarity is None else above).set_title(
        f"{int(height.sum())} experts on {layers} layers, {int(height.sum()) - layers} of them new"
    )
    handles, labels = axes.get_legend_handles_labels()
    if classifier_layers:  # lines come before bars
        handles, labels = handles[1:] + handles[:1], labels[1:] + labels[:1]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    _by_layer(axes, layers)
    axes.yaxis.get_major_locator().set_params(integer=True)
    return figure


def routing_figure(
    load: Mapping[str, Sequence[Sequence[float]]], *, old: Sequence[str] = (), classifier_layers: Sequence[int] = ()
) -> Figure:
    """Draw which experts the tokens of each language go to: a row a language, layers across, experts upwards.

    Args:
        load: language -> by layer the share of the routed slots that each expert got; expert 0 is the original FFN. A
            layer without routing may be empty, or have one entry.
        old: languages that the model knew; they come first.
        classifier_layers: are marked.
    """
    languages = [*(name for name in load if name in old), *(name for name in load if name not in old)]
    layers = len(next(iter(load.values())))
    tallest = max(max(len(shares), 1) for rows in load.values() for shares in rows)
    row_height = max(0.75, 0.17 * tallest)
    figure = new_figure(_width(layers) + 1.0, row_height * len(languages) + 1.5)
    parts = figure.subplots(len(languages), 1, sharex=True, squeeze=False)[:, 0]
    image = None
    for axes, language in zip(parts, languages, strict=True):
        grid = np.full((tallest, layers), np.nan)
        for layer, shares in enumerate(load[language]):
            if len(shares) > 1:
                grid[: len(shares), layer] = shares
        axes.set_facecolor("#f1f3f5")
        image = axes.pcolormesh(
            np.arange(layers + 1) - 0.5,
            np.arange(tallest + 1) - 0.5,
            grid,
            cmap="YlGnBu",
            vmin=0,
            vmax=1,
            edgecolors="white",
            linewidth=0.6,
        )
        axes.set_yticks([0, tallest - 1] if tallest > 1 else [0])
        axes.set_ylabel(language, rotation=0, ha="right", va="center", labelpad=14, fontweight="bold", fontsize=10)
        axes.tick_params(length=0)
        axes.axhline(0.5, color=INK, lw=0.8)
        axes.spines[:].set_visible(False)
        if language in old:
            axes.yaxis.label.set_color(PALETTE[0])
    known = "; blue: known languages" if old else ""
    parts[0].set_title(f"Where tokens go, by layer and expert (0: original FFN{known})", fontsize=11)
    _by_layer(parts[-1], layers, grid=False)
    if classifier_layers:
        low = [-0.5 - 0.12 * tallest] * len(classifier_layers)
        parts[-1].scatter(classifier_layers, low, marker="^", s=28, color=PALETTE[5], clip_on=False)
        parts[-1].set_xlabel("layer (triangles: classifier)")
        parts[-1].tick_params(axis="x", pad=9)
    figure.colorbar(image, ax=list(parts), label="share of routed slots", fraction=0.025, pad=0.015)
    return figure


class ParetoRow(NamedTuple):
    """One trained model.

    Attributes:
        name: written next to its point.
        kind: decides colour and marker: allocation or strategy.
        added: parameters that it has more than the model before.
        new_loss: loss on the new languages.
        old_loss: loss on the old languages.
    """

    name: str
    kind: str
    added: float
    new_loss: float
    old_loss: float


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Return the points that no other beats: none is as good in every coordinate and better in one. Small is good.

    Returns:
        Their indices, by rising coordinates. Of equal points all are there, one with nan never.
    """
    able = [index for index, point in enumerate(points) if not any(map(math.isnan, point))]

    def beats(other: Sequence[float], point: Sequence[float]) -> bool:
        return tuple(other) != tuple(point) and all(a <= b for a, b in zip(other, point, strict=True))

    kept = [index for index in able if not any(beats(points[other], points[index]) for other in able)]
    return sorted(kept, key=lambda index: tuple(points[index]))


def pareto_figure(rows: Sequence[ParetoRow], *, unit: str = "nats per byte") -> Figure:
    """Draw the loss on new and on old languages over the added parameters.

    A hollow point is beaten by another in parameters and both losses together. The dashed line is the front of the
    models with added parameters in the panel's two coordinates. Both axes show these models; a model without added
    parameters that lies far outside their losses sits at the edge, with its loss.
    """
    figure = new_figure(11.0, 4.8)
    parts = figure.subplots(1, 2)
    for axes, side in zip(parts, ("new", "old"), strict=True):
        _pareto_panel(axes, rows, [row.new_loss if side == "new" else row.old_loss for row in rows])
        axes.set_ylabel(f"loss on {side} languages ({unit})")
    handles, labels = parts[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 8), frameon=False, fontsize=9)
    return figure


def _pareto_panel(axes: Axes, rows: Sequence[ParetoRow], losses: Sequence[float]) -> None:
    scale, suffix = _scale(max(row.added for row in rows))
    grown = [(row.added / scale, loss) for row, loss in zip(rows, losses, strict=True) if row.added > 0]
    low, high = _limits([loss for _, loss in grown] or losses, losses)
    places = _clipped(losses, low, high)
    points = [(row.added / scale, place) for row, place in zip(rows, places, strict=True)]
    if grown:
        front = [grown[index] for index in pareto_front(grown)]
        axes.step(*zip(*front, strict=True), where="post", color=INK, lw=1, ls="--", zorder=1, label="front")
    unbeaten = set(pareto_front([(row.added, row.new_loss, row.old_loss) for row in rows]))
    for number, kind in enumerate(dict.fromkeys(row.kind for row in rows)):
        own = [index for index, row in enumerate(rows) if row.kind == kind]
        colour, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
        axes.scatter(
            [points[index][0] for index in own],
            [points[index][1] for index in own],
            s=60,
            zorder=3,
            marker=marker,
            facecolors=[colour if index in unbeaten else "white" for index in own],
            edgecolors=colour,
            lw=1.5,
        )
        axes.scatter([], [], s=60, marker=marker, color=colour, label=kind)
    margin = 0.09 * (high - low)
    axes.set_ylim(min([*places, low]) - margin, max([*places, high]) + margin)
    axes.margins(x=0.14)
    texts = [
        row.name if low <= loss <= high else f"{row.name}: {loss:.2f}, {'above' if loss > high else 'below'}"
        for row, loss in zip(rows, losses, strict=True)
    ]
    _label(axes, points, texts)
    axes.set_xlabel(f"added parameters{suffix}")
    axes.grid(color="#eceff2")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _limits(inside: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    """Return losses between which an axis shows all of `inside`, and of the others what is not far away."""
    low, high = min(inside), max(inside)
    reach = 0.75 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = max(low - reach, min(losses)), min(high + reach, max(losses))
    return (low, high) if low < high else (low - reach, high + reach)


def _clipped(losses: Sequence[float], low: float, high: float) -> list[float]:
    """Return where to draw the losses: those outside just beyond the limit, one after the other in their order."""
    step = 0.06 * (high - low)
    above, below = sorted({loss for loss in losses if loss > high}), sorted({loss for loss in losses if loss < low})
    edge = {loss: high + step * (rank + 1) for rank, loss in enumerate(above)}
    edge |= {loss: low - step * (rank + 1) for rank, loss in enumerate(reversed(below))}
    return [edge.get(loss, loss) for loss in losses]


def _label(axes: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str]) -> None:
    """Write a text to the right of each point, moved up until it covers no other text, as far as one can tell."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    width, height = 340.0, 280.0  # points on paper of a panel, about
    taken: list[tuple[float, float, float]] = []
    for index in sorted(range(len(points)), key=lambda index: points[index][1]):
        x = (points[index][0] - left) / (right - left) * width
        y = (points[index][1] - low) / (high - low) * height
        size = 4.6 * len(texts[index])
        moved = y
        while any(abs(moved - b) < 9 and x < a + c + 3 and a < x + size + 3 for a, b, c in taken):
            moved += 1
        taken.append((x, moved, size))
        place = (6, moved - y + 3)
        axes.annotate(texts[index], points[index], place, textcoords="offset points", fontsize=8, color=INK, zorder=4)


def _by_layer(axes: Axes, layers: int, *, grid: bool = True) -> None:
    step = max(1, math.ceil(layers / 32))
    axes.set_xticks(range(0, layers, step))
    axes.tick_params(axis="x", labelsize=9)
    axes.set_xlim(-0.6, layers - 0.4)
    axes.set_xlabel("layer")
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(axis="y", color="#eceff2", zorder=0)
        axes.set_axisbelow(True)


def _width(layers: int) -> float:
    return min(max(6.5, 0.32 * layers + 1.5), 16.0)


def _names(languages: Sequence[str]) -> str:
    return ", ".join(languages)


def _scale(largest: float) -> tuple[float, str]:
    """Return what to divide by, and its name."""
    for scale, name in ((1e9, " (billions)"), (1e6, " (millions)"), (1e3, " (thousands)")):
        if largest >= scale:
            return scale, name
    return 1.0, ""
