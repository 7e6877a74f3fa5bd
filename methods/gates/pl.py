"""Pictures of an analysis, as matplotlib figures; scanpy's own plots work on the same keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tenfold.platform.errors import DataError
from tenfold.platform.figures import new_figure
from tenfold.platform.validation import did_you_mean

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people tell apart, then lighter and darker kin for more domains.
PALETTE = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#F0E442",
    "#000000",
    "#8DD3C7",
    "#7F3C8D",
    "#A6761D",
    "#B3B3B3",
    "#66A61E",
    "#E7298A",
    "#1B4F72",
    "#FDBF6F",
    "#B2DF8A",
    "#FB9A99",
    "#CAB2D6",
    "#5C4033",
)
MISSING = "#DDDDDD"
MAX_LEGEND = 24


def colours(number: int) -> list[str]:
    """Return colours for domains 0, 1, ...; they repeat after 20."""
    return [PALETTE[index % len(PALETTE)] for index in range(number)]


def set_colours(adata: AnnData, key: str = "gates") -> None:
    """Store the colours where scanpy's plots look for them: `uns["gates_domain_colors"]`."""
    for name in (f"{key}_domain", f"{key}_domain_refined"):
        if name in adata.obs:
            adata.uns[f"{name}_colors"] = np.array(colours(len(adata.obs[name].cat.categories)))


def spatial(
    adata: AnnData,
    color: str | Sequence[str] = "gates_domain",
    *,
    spatial_key: str = "spatial",
    size: float | None = None,
    columns: int = 3,
) -> Figure:
    """Draw the tissue once for each colour; sections (`obs["section"]`) one below the other.

    Args:
        adata: the section.
        color: columns of obs or genes.
        spatial_key: key of obsm; its first two dimensions are drawn, with equal scales. The y axis points down where
            the section came with an image (`uns["spatial"]`).
        size: area of a spot in points^2; default: by their number.
        columns: panels in a row.

    Raises:
        DataError: nothing of this name is there.
    """
    names = [color] if isinstance(color, str) else list(color)
    sections = _sections(adata)
    panels = [(name, section) for section in sections for name in names]
    across = min(columns, len(panels)) if len(sections) == 1 else len(names)
    drawn, axes = _panels(len(panels), across)
    where = np.asarray(adata.obsm[spatial_key], dtype=np.float64)[:, :2]
    for axis, (name, section) in zip(axes, panels, strict=True):
        chosen = np.ones(adata.n_obs, bool) if section is None else (adata.obs["section"] == section).to_numpy()
        _scatter(axis, where[chosen], _values(adata, name, chosen), size)
        axis.set_title(name if section is None else f"{section}: {name}", fontsize=10)
        axis.set_aspect("equal")
        if "spatial" in adata.uns:
            axis.invert_yaxis()
    return drawn


def umap(adata: AnnData, color: str | Sequence[str] = "gates_domain", *, key: str = "gates") -> Figure:
    """Draw the UMAP of the embedding (`tl.umap`) once for each colour."""
    if f"X_{key}_umap" not in adata.obsm:
        raise DataError(f"obsm['X_{key}_umap'] is missing: run tl.umap first")
    names = [color] if isinstance(color, str) else list(color)
    drawn, axes = _panels(len(names), min(3, len(names)))
    where = np.asarray(adata.obsm[f"X_{key}_umap"])
    for axis, name in zip(axes, names, strict=True):
        _scatter(axis, where, _values(adata, name, np.ones(adata.n_obs, bool)), None)
        axis.set_title(f"UMAP: {name}", fontsize=10)
    return drawn


def loss(adata: AnnData, *, key: str = "gates") -> Figure:
    """Draw the training loss by epoch: each value is the mean since the one before."""
    stored = adata.uns.get(key, {})
    values = np.asarray(stored.get("loss", []))
    if not len(values):
        raise DataError(f"uns['{key}']['loss'] is empty: this method trains no network")
    drawn, (axis,) = _panels(1, 1)
    axis.set_axis_on()
    axis.plot(stored["loss_epoch"], values, color=PALETTE[0])
    axis.set(xlabel="epoch", ylabel="loss", title="training")
    return drawn


def agreement(adata: AnnData, truth: str = "truth", *, key: str = "gates") -> Figure:
    """Draw how the cells of every true class fall into the domains, as shares of the class."""
    import pandas as pd

    counts = pd.crosstab(adata.obs[truth], adata.obs[f"{key}_domain"])
    shares = counts.div(counts.sum(axis=1).clip(lower=1), axis=0)
    drawn, (axis,) = _panels(1, 1)
    drawn.set_size_inches(3.5 + 0.42 * shares.shape[1], 1.5 + 0.32 * shares.shape[0])
    axis.set_axis_on()
    image = axis.imshow(shares.to_numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(shares.shape[1]), list(shares.columns))
    axis.set_yticks(range(shares.shape[0]), [str(name)[:30] for name in shares.index])
    axis.set(xlabel="domain", ylabel="true class", title="share of a class in each domain, %")
    for (row, column), share in np.ndenumerate(shares.to_numpy()):
        if share >= 0.05:
            axis.text(
                column,
                row,
                f"{100 * share:.0f}",
                ha="center",
                va="center",
                fontsize=7,
                color="w" if share > 0.6 else "k",
            )
    drawn.colorbar(image, ax=axis)
    return drawn


def neighbours(adata: AnnData, *, key: str = "gates") -> Figure:
    """Draw how many neighbours the cells have in each graph."""
    names = [name for name in ("spatial", "expression") if f"{key}_{name}_connectivities" in adata.obsp]
    drawn, axes = _panels(len(names), len(names))
    for axis, name in zip(axes, names, strict=True):
        degrees = np.diff(adata.obsp[f"{key}_{name}_connectivities"].indptr)
        axis.set_axis_on()
        axis.hist(degrees, bins=list(np.arange(degrees.max(initial=1) + 2) - 0.5), color=PALETTE[0], rwidth=0.9)
        axis.set(xlabel="neighbours", ylabel="cells", title=f"{name} graph")
    return drawn


def _panels(number: int, across: int) -> tuple[Figure, list[Axes]]:
    down = -(-number // across)
    drawn = new_figure(4.6 * across, 3.9 * down)
    axes = list(drawn.subplots(down, across, squeeze=False).flat)
    for axis in axes:
        axis.set_axis_off()
    return drawn, axes[:number]


def _sections(adata: AnnData) -> list[Any]:
    if "section" not in adata.obs or adata.obs["section"].nunique() < 2:
        return [None]
    return list(dict.fromkeys(adata.obs["section"]))


def _values(adata: AnnData, name: str, chosen: np.ndarray) -> Any:
    """Return a categorical of the chosen cells, or numbers."""
    import pandas as pd

    if name in adata.obs:
        column = adata.obs[name]
        if isinstance(column.dtype, pd.CategoricalDtype) or column.dtype == object:
            return pd.Categorical(column)[chosen]
        return column.to_numpy(dtype=np.float64)[chosen]
    if name in adata.var_names:
        gene = adata[:, name].X
        return np.asarray(gene.todense() if hasattr(gene, "todense") else gene, dtype=np.float64).ravel()[chosen]
    known = [*adata.obs.columns, *adata.var_names]
    raise DataError(f"color = {name}: neither a column of obs nor a gene{did_you_mean(name, known)}")


def _scatter(axis: Axes, where: np.ndarray, values: Any, size: float | None) -> None:
    spot = size if size is not None else float(np.clip(60_000 / max(len(where), 1), 1.0, 40.0))
    style: dict[str, Any] = {"s": spot, "linewidths": 0, "rasterized": True}
    if not hasattr(values, "categories"):
        drawn = axis.scatter(where[:, 0], where[:, 1], c=values, cmap="viridis", **style)
        axis.figure.colorbar(drawn, ax=axis, shrink=0.7)
        return
    codes = np.asarray(values.codes)
    axis.scatter(*where[codes < 0].T, color=MISSING, **style)
    for code, (category, colour) in enumerate(zip(values.categories, colours(len(values.categories)), strict=True)):
        axis.scatter(*where[codes == code].T, color=colour, label=str(category)[:30], **style)
    if len(values.categories) <= MAX_LEGEND:
        axis.legend(
            fontsize=7,
            markerscale=max(1.0, (20 / spot) ** 0.5),
            loc="center left",
            bbox_to_anchor=(1, 0.5),
            frameon=False,
        )
