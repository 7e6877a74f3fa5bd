"""From a section to what a method reads: expression, coordinates and graphs of the cells that are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tenfold.methods.gates.checks import check_section
from tenfold.methods.gates.config import NETWORKS, GATESOptions
from tenfold.methods.gates.expression_graph import expression_graph
from tenfold.methods.gates.graph import Graph
from tenfold.methods.gates.preprocessing import Preprocessed, align, preprocess, smooth
from tenfold.methods.gates.pruning import expression_clusters, prune
from tenfold.methods.gates.spatial_graph import spatial_graph
from tenfold.platform.errors import ConfigError, DataError

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy.sparse import csr_matrix


@dataclass(frozen=True)
class Prepared:
    """What is computed once for a section, whatever is trained on it afterwards.

    Attributes:
        expression: float32 CSR [N, G], log-normalised, of the kept cells.
        genes: the G genes.
        kept: bool [N_all], which cells of the section these are.
        coordinates: float64 [N, 2 or 3].
        sections: int64 [N], number of each cell's section; None: there is one.
        neighbours: neighbours in space, without self loops.
        graphs: the two graphs that the network fuses; (neighbours, None) for the methods that use one.
        statistics: name of a graph -> its numbers.
        notes: what a user should know, as sentences.
    """

    expression: csr_matrix
    genes: list[str]
    kept: np.ndarray
    coordinates: np.ndarray
    sections: np.ndarray | None
    neighbours: Graph
    graphs: tuple[Graph, Graph | None]
    statistics: dict[str, dict[str, Any]]
    notes: list[str]


def prepare(
    adata: AnnData,
    config: GATESOptions,
    seed: int,
    *,
    layer: str | None = None,
    spatial_key: str = "spatial",
    sections: np.ndarray | None = None,
    genes: list[str] | None = None,
) -> Prepared:
    """Check a section, normalise it and build its graphs (3.1-3.5); the section itself is not changed.

    Args:
        adata: the section, or several one below the other.
        config: GATES' options.
        seed: of the approximate index and of the clusters that prune.
        layer: layer with the counts; default: X.
        spatial_key: key of obsm with the coordinates.
        sections: section of each cell, any hashable values [N_all]; None: there is one.
        genes: take exactly these instead of choosing: a model was trained on them.

    Raises:
        DataError: the section cannot be analysed; all that is wrong with it.
    """
    number = config.clustering.n_domains
    notes = check_section(
        adata,
        layer=layer,
        spatial_key=spatial_key,
        n_domains=number,
        preprocessing_enabled=config.preprocessing.enabled,
    )
    codes = None if sections is None else _numbered(sections)
    if codes is not None and codes.max(initial=0) == 0:
        codes = None
    if genes is None:
        ready = preprocess(adata, config.preprocessing, layer=layer, sections=codes)
    else:
        ready = align(adata, genes, config.preprocessing, layer=layer)
    kept = ready.kept
    coordinates = np.asarray(adata.obsm[spatial_key], dtype=np.float64)[kept]
    within = None if codes is None else codes[kept]
    neighbours = spatial_graph(
        coordinates, config.spatial_graph, sections=within, existing=_existing(adata, config, kept)
    )
    expression = smooth(ready.expression, neighbours, config.smooth_input)
    statistics: dict[str, dict[str, Any]] = {"spatial": neighbours.statistics()}
    graphs: tuple[Graph, Graph | None] = (neighbours, None)
    if config.method in NETWORKS and config.fusion_weight > 0:
        graphs = _fused(adata, config, seed, ready, neighbours, expression, within, statistics)
    isolated = int(statistics["spatial"].get("isolated", 0))
    if isolated:
        notes.append(f"{isolated} cells have no neighbour in space: they attend to themselves alone")
    return Prepared(
        expression,
        ready.genes,
        kept,
        coordinates,
        within,
        neighbours,
        graphs,
        statistics,
        [*notes, *ready.notes, f"genes: {ready.gene_choice}"],
    )


def _numbered(sections: np.ndarray) -> np.ndarray:
    """Number sections in the order of their first cells: `z_radius` links those that follow each other."""
    import pandas as pd

    return np.asarray(pd.factorize(np.asarray(sections).astype(str))[0], dtype=np.int64)


def _fused(
    adata: AnnData,
    config: GATESOptions,
    seed: int,
    ready: Preprocessed,
    neighbours: Graph,
    expression: csr_matrix,
    sections: np.ndarray | None,
    statistics: dict[str, dict[str, Any]],
) -> tuple[Graph, Graph]:
    """Return the two graphs of a mode (3.5)."""
    pruned = similar = None
    if "prune" in config.mode:
        if config.pre_labels is not None:
            if config.pre_labels not in adata.obs:
                raise DataError(f"pre_labels = {config.pre_labels}: obs has no such column; it has {list(adata.obs)}")
            labels = adata.obs[config.pre_labels].astype(str).to_numpy()[ready.kept]
        else:
            labels = expression_clusters(ready.expression, config.pre_resolution, seed)
        pruned = prune(neighbours, labels)
        statistics["pruned"] = pruned.statistics()
    if "similarity" in config.mode:
        similar, index = expression_graph(ready.expression, config.expression_graph, sections=sections, seed=seed)
        statistics["expression"] = {**similar.statistics(), "index": index}
    first = pruned if config.mode == "prune-similarity" else neighbours
    second = pruned if config.mode == "spatial-prune" else similar
    assert first is not None
    assert second is not None
    return first, second


def _existing(adata: AnnData, config: GATESOptions, kept: np.ndarray) -> Any:
    if config.spatial_graph.kind != "existing":
        return None
    if "spatial_connectivities" not in adata.obsp:
        raise ConfigError(
            "spatial_graph.kind = existing: obsp['spatial_connectivities'] is missing; let squidpy write it, or use "
            "radius, knn or delaunay"
        )
    return adata.obsp["spatial_connectivities"][kept][:, kept]
