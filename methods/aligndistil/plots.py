"""Pictures of an alignment run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tenfold.platform.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_TOKENS = 60  # more are not legible


def token_figure(pieces: Sequence[str], row: Mapping[str, Any]) -> Figure:
    """Draw how the teacher sees an answer token by token.

    Args:
        pieces: the answer's tokens as text.
        row: `alpha`, `weight` (beta_0 / alpha) and `kl_teacher` by token (`scoring.divergences`).

    Returns:
        Three rows of bars over the first tokens: how far the DPO models' contrast is extrapolated, the weight of the
        token's loss, and what is left of it.
    """
    shown = min(len(pieces), MAX_TOKENS)
    figure = new_figure(max(5.0, 0.22 * shown + 1.5), 6.0)
    parts = figure.subplots(3, 1, sharex=True)
    series = (
        ("alpha", r"extrapolation $\alpha_t$", "linear"),
        ("weight", r"weight $\beta_t$", "log"),
        ("kl_teacher", "KL to the teacher (nats)", "linear"),
    )
    for axes, (name, label, scale) in zip(parts, series, strict=True):
        axes.bar(range(shown), row[name][:shown], color="#3b6ea5")
        axes.set_yscale(scale)
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    more = f" (first {shown} of {len(pieces)} tokens)" if shown < len(pieces) else ""
    parts[0].set_title(f"An answer of the policy{more}")
    texts = [piece.replace("\n", "\\n").replace(" ", "\N{OPEN BOX}").replace("$", r"\$") for piece in pieces[:shown]]
    parts[-1].set_xticks(range(shown), texts, rotation=90)
    return figure
