"""The parts of a run as they go to the cluster: each is one task, takes plain data and returns plain data."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tenfold.methods.gates import analysis, pl, saved, tl
from tenfold.methods.gates.config import NETWORKS, GATESConfig, Section
from tenfold.methods.gates.fit import Fitted, encode, losses_by_epoch, recipe
from tenfold.methods.gates.network import AutoEncoder
from tenfold.methods.gates.prepared_files import read_prepared, write_prepared
from tenfold.methods.gates.preparing import prepare
from tenfold.methods.gates.reading import read_sections
from tenfold.methods.gates.results import write_results
from tenfold.platform.storage import Storage

if TYPE_CHECKING:
    from anndata import AnnData

MODEL, RESULT = "model", "result"


def prepare_piece(item: dict[str, Any]) -> dict[str, Any]:
    """Read the sections, build expression and graphs, keep them in the cache.

    Args:
        item: `gates` (the configuration), `seed`, `cache` (address), `folder` (in the cache).

    Returns:
        What a plan and a log say about them.
    """
    config, cache = GATESConfig.model_validate(item["gates"]), Storage(item["cache"])
    adata = read_sections(config.sections)
    prepared = prepare(
        adata,
        config,
        item["seed"],
        layer=config.sections[0].layer,
        spatial_key=config.sections[0].spatial_key,
        sections=adata.obs["section"].to_numpy(),
    )
    with tempfile.TemporaryDirectory(prefix="tenfold-section-") as scratch:
        write_prepared(Path(scratch), prepared)
        cache.upload(scratch, item["folder"])
    return {"cells": len(prepared.coordinates), "genes": len(prepared.genes), "notes": prepared.notes}


def domains_piece(item: dict[str, Any]) -> dict[str, float]:
    """Embed, find domains, measure, and put results, plots' data and model into the run's storage.

    Args:
        item: as for `prepare_piece`, and `storage` (the run's address), `checkpoint` (folder in it, None for methods
            without a network), `log` (step and loss of the training job), `pictures` (whether a UMAP is made).

    Returns:
        The metrics.
    """
    config, storage = GATESConfig.model_validate(item["gates"]), Storage(item["storage"])
    adata = read_sections(config.sections)
    with tempfile.TemporaryDirectory(prefix="tenfold-domains-") as scratch:
        folder = Path(scratch)
        prepared = read_prepared(Storage(item["cache"]).download(item["folder"], folder / "section"))
        fitted = None
        if config.method in NETWORKS:
            network = AutoEncoder.from_pretrained(storage.download(item["checkpoint"], folder / "checkpoint"))
            latent = encode(network, prepared.expression, prepared.graphs)
            losses, epochs = losses_by_epoch(item["log"], recipe(config).epochs)
            fitted = Fitted(network, latent, losses, epochs)
        found = analysis.analyse(
            adata,
            prepared,
            config,
            item["seed"],
            layer=config.sections[0].layer,
            truth=analysis.known_domains(adata),
            fitted=fitted,
        )
        analysis.write(adata, prepared, found, config, item["seed"])
        if found.embedding is not None and item["pictures"]:
            tl.umap(adata, random_state=item["seed"])
        pl.set_colours(adata)
        write_results(adata, folder / RESULT)
        storage.upload(folder / RESULT, RESULT)
        if fitted is not None and found.domains.mixture is not None:
            saved.save_model(folder / MODEL, prepared, found, config, item["seed"])
            storage.upload(folder / MODEL, f"{RESULT}-{MODEL}")
    return {name: float(value) for name, value in found.metrics.items() if np.isfinite(value)}


def transformed(config: GATESConfig, model: Path) -> dict[str, float]:
    """Label the configuration's sections with a saved model and return the metrics."""
    adata = read_sections(config.sections)
    _, found = saved.transform(
        adata,
        saved.load_model(model),
        layer=config.sections[0].layer,
        spatial_key=config.sections[0].spatial_key,
        sections=adata.obs["section"].to_numpy(),
        truth=analysis.known_domains(adata),
    )
    return {name: float(value) for name, value in found.metrics.items() if np.isfinite(value)}


def figures(adata: AnnData, sections: list[Section]) -> dict[str, Any]:
    """Return name -> picture of everything that a result has to show."""
    names = [name for name in ("truth", "gates_domain", "gates_domain_refined") if name in adata.obs]
    drawn = {
        "tissue": pl.spatial(adata, names, spatial_key=sections[0].spatial_key),
        "neighbours": pl.neighbours(adata),
    }
    if "X_gates_umap" in adata.obsm:
        drawn["umap"] = pl.umap(adata, names)
    if "truth" in adata.obs:
        drawn["agreement"] = pl.agreement(adata)
    return drawn
