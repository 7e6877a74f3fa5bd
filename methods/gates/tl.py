"""Tools on an AnnData, as scanpy's users expect them: they act in place and return None unless `copy=True`.

from tenfold.methods.gates import tl
tl.gates(adata, n_domains=7)
scanpy.pl.embedding(adata, basis="spatial", color="gates_domain")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tenfold.methods.gates import analysis as analysis_module
from tenfold.methods.gates import readout, saved
from tenfold.methods.gates.communities import NEIGHBOUR_SEARCH
from tenfold.methods.gates.config import NETWORKS, GATESOptions, MethodName
from tenfold.methods.gates.preparing import prepare
from tenfold.platform.errors import ConfigError, DataError
from tenfold.platform.validation import validate_all

if TYPE_CHECKING:
    from anndata import AnnData
    from tenfold.methods.gates.network import AutoEncoder
    from tenfold.methods.gates.preparing import Prepared


def gates(
    adata: AnnData,
    n_domains: int | Literal["auto"] = "auto",
    *,
    method: MethodName = "gates",
    alpha: float | None = None,
    k: int | None = None,
    radius: float | Literal["auto"] = "auto",
    epochs: int | None = None,
    learning_rate: float | None = None,
    refine: Literal["none", "majority", "spagcn"] = "none",
    options: Mapping[str, Any] | None = None,
    layer: str | None = None,
    spatial_key: str = "spatial",
    sample_key: str | None = None,
    labels: str | None = None,
    key_added: str = "gates",
    random_state: int = 2024,
    denoised: bool = False,
    attention: bool = False,
    save: str | Path | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Find spatial domains (GATES, arXiv 2410.20159, or one of the methods it is compared with).

    Args:
        adata: raw counts in X or in `layer`, coordinates in `obsm[spatial_key]`; X, raw and layers stay as they are.
        n_domains: K; auto takes the smallest BIC over 2..20 (or the number of classes in `labels`): a first guess.
        method: gates, stagate, stagate_pyg, pca_gmm, pca_leiden, spatial_pca or spagcn.
        alpha: weight of the expression graph; default 0.01.
        k: most similar cells in the expression graph; default 6.
        radius: of spatial neighbours in the coordinates' unit.
        epochs: of training; default 500.
        learning_rate: default 1e-4.
        refine: vote of the neighbours on the domains.
        options: any other option of `GATESOptions`, nested as in an experiment file, such as
            `{"clustering": {"kind": "leiden"}}`.
        layer: layer with the counts.
        spatial_key: key of obsm.
        sample_key: column of obs that tells sections apart.
        labels: column of obs with true domains, for the metrics in `uns`.
        key_added: prefix of everything that is written.
        random_state: seed.
        denoised: also write the network's expression of every cell, N x G numbers.
        attention: also write how much every cell attends to each neighbour.
        save: folder for the trained model.
        progress: called with epoch, epochs, loss; what it raises stops the training.
        copy: return a changed copy instead.

    Returns:
        None, or the copy. Written: `obs[gates_domain, gates_domain_prob, gates_domain_refined]`, `obsm["X_gates"]`,
        `obsp["gates_spatial_connectivities", "gates_expression_connectivities"]`, `uns["gates"]`; on request
        `obsm["gates_denoised"]` (log scale, genes `uns["gates"]["genes"]`) and `obsp["gates_spatial_attention",
        "gates_expression_attention"]` (rows receive and sum to 1; "gates_pruned_attention" in the modes that prune).

    Raises:
        ConfigError: an option is wrong, or denoised or attention is asked of a method without a network.
        DataError: the section cannot be analysed; every reason.
    """
    short = {
        "alpha": alpha,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "method": method,
        "clustering": {"n_domains": n_domains, "refine": refine},
        "spatial_graph": {"radius": radius},
        "expression_graph": {} if k is None else {"k": k},
    }
    config = make_options({name: value for name, value in short.items() if value is not None}, options or {})
    if (denoised or attention) and config.method not in NETWORKS:
        raise ConfigError(
            f"{'denoised' if denoised else 'attention'} = True: {config.method} trains no network. Leave it out, or "
            f"use method {' or '.join(NETWORKS)}"
        )
    _check_in_memory(adata)
    target = adata.copy() if copy else adata  # a view becomes a copy of its own when it is written to
    prepared = prepare(
        target,
        config,
        random_state,
        layer=layer,
        spatial_key=spatial_key,
        sections=_column(target, sample_key, "sample_key"),
    )
    found = analysis_module.analyse(
        target,
        prepared,
        config,
        random_state,
        layer=layer,
        truth=_column(target, labels, "labels"),
        progress=progress,
    )
    analysis_module.write(target, prepared, found, config, random_state, key=key_added)
    if found.fitted is not None:
        _write_readout(target, prepared, found.fitted.network, denoised, attention, key_added)
    if save is not None:
        saved.save_model(Path(save), prepared, found, config, random_state)
    return target if copy else None


def transform(
    adata: AnnData,
    model: str | Path,
    *,
    layer: str | None = None,
    spatial_key: str = "spatial",
    sample_key: str | None = None,
    labels: str | None = None,
    key_added: str = "gates",
    denoised: bool = False,
    attention: bool = False,
    copy: bool = False,
) -> AnnData | None:
    """Label a section with a saved model, without training; arguments and results as in `gates`.

    Raises:
        ModelError: the folder holds no saved model.
        DataError: the section cannot be analysed, or has fewer than half of the model's genes.
    """
    _check_in_memory(adata)
    loaded = saved.load_model(Path(model))
    target = adata.copy() if copy else adata
    prepared, found = saved.transform(
        target,
        loaded,
        layer=layer,
        spatial_key=spatial_key,
        sections=_column(target, sample_key, "sample_key"),
        truth=_column(target, labels, "labels"),
    )
    analysis_module.write(target, prepared, found, loaded.options, loaded.seed, key=key_added)
    _write_readout(target, prepared, loaded.network, denoised, attention, key_added)
    return target if copy else None


def umap(adata: AnnData, *, key: str = "gates", n_neighbors: int = 15, random_state: int = 2024) -> None:
    """Add `obsm["X_gates_umap"]`, float32 [N, 2]: UMAP of the embedding; NaN for cells that were dropped (3.11)."""
    import scanpy
    from anndata import AnnData as Plain

    if f"X_{key}" not in adata.obsm:
        raise DataError(f"obsm['X_{key}'] is missing: run tl.gates first, with a method that has an embedding")
    embedding = np.asarray(adata.obsm[f"X_{key}"])
    kept = np.isfinite(embedding).all(axis=1)
    whole = np.full((adata.n_obs, 2), np.nan, dtype=np.float32)
    if kept.sum() > 3:  # fewer have no neighbourhood to draw
        cells = Plain(embedding[kept])
        neighbours = min(n_neighbors, int(kept.sum()) - 1)
        scanpy.pp.neighbors(
            cells, n_neighbors=neighbours, use_rep="X", random_state=random_state, transformer=NEIGHBOUR_SEARCH
        )
        scanpy.tl.umap(cells, random_state=random_state)
        whole[kept] = cells.obsm["X_umap"]
    adata.obsm[f"X_{key}_umap"] = whole


def make_options(short: dict[str, Any], more: Mapping[str, Any]) -> GATESOptions:
    """Return checked options; `more` comes on top of `short`, section by section.

    Raises:
        ConfigError: all errors at once.
    """
    merged = dict(short)
    for name, value in more.items():
        inner = merged.get(name)
        merged[name] = {**inner, **value} if isinstance(inner, dict) and isinstance(value, Mapping) else value
    config, errors = validate_all(GATESOptions, merged)
    if config is None:
        raise ConfigError("\n".join(errors))
    return config


def _write_readout(
    adata: AnnData, prepared: Prepared, network: AutoEncoder, denoised: bool, attention: bool, key: str
) -> None:
    if denoised:
        readout.write_denoised(adata, prepared, network, key=key)
    if attention:
        readout.write_attention(adata, prepared, network, key=key)


def _check_in_memory(adata: AnnData) -> None:
    if adata.isbacked:
        raise DataError(f"adata is backed by {adata.filename}; give adata.to_memory(), which can be written to")


def _column(adata: AnnData, name: str | None, argument: str) -> np.ndarray | None:
    if name is None:
        return None
    if name not in adata.obs:
        raise DataError(f"{argument} = {name!r}: obs has no such column; it has {', '.join(adata.obs) or 'none'}")
    column = adata.obs[name]
    return np.array([None if gone else str(value) for value, gone in zip(column, column.isna(), strict=True)], object)
