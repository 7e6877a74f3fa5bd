"""A trained encoder as a folder: weights, options, genes and the mixture that names its domains (10.4)."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tenfold.methods.gates.analysis import Analysis, measure
from tenfold.methods.gates.config import GATESOptions
from tenfold.methods.gates.domains import Domains, Mixture
from tenfold.methods.gates.fit import encode
from tenfold.methods.gates.network import AutoEncoder
from tenfold.methods.gates.preparing import Prepared, prepare
from tenfold.methods.gates.refinement import refine
from tenfold.platform.errors import ModelError
from tenfold.platform.models.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    from anndata import AnnData

FLAVOR = "spatial-encoder"
OPTIONS, MIXTURE = "gates.json", "clusters.npz"
FILES = ("config.json", "model.safetensors", OPTIONS, MIXTURE)


@dataclass(frozen=True)
class SavedModel:
    """A trained encoder with what it needs to label another section.

    Attributes:
        network: the auto-encoder.
        mixture: of its domains.
        options: with which it was trained.
        genes: that it reads, in order.
        seed: of its training.
    """

    network: AutoEncoder
    mixture: Mixture
    options: GATESOptions
    genes: list[str]
    seed: int


def save_model(folder: Path, prepared: Prepared, analysis: Analysis, config: GATESOptions, seed: int) -> Path:
    """Write network, options, genes and mixture into a folder.

    Raises:
        ModelError: the method trains no network, or its domains do not come from the mixture.
    """
    if analysis.fitted is None:
        raise ModelError(
            f"method {config.method} trains no network, so there is no model to save; use gates or stagate"
        )
    if analysis.domains.mixture is None:
        raise ModelError(
            f"clustering.kind = {config.clustering.kind} gives no model of the domains; a saved model needs gmm"
        )
    folder.mkdir(parents=True, exist_ok=True)
    analysis.fitted.network.save_pretrained(folder)
    options = config.model_dump(mode="json", exclude={"sections"}, exclude_unset=True)
    content = {"options": options, "genes": prepared.genes, "seed": seed}
    (folder / OPTIONS).write_text(json.dumps(content, indent=1), encoding="utf-8")
    analysis.domains.mixture.save(folder / MIXTURE)
    return folder


def load_model(folder: Path) -> SavedModel:
    """Read a folder that `save_model` wrote; nothing in it is unpickled.

    Raises:
        ModelError: a file is missing or damaged.
    """
    folder = Path(folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder}: no spatial encoder: {', '.join(missing)} missing. Give the folder of a saved model"
        )
    if (folder / MANIFEST_NAME).is_file():
        from tenfold.platform.models.manifest import verify_manifest

        verify_manifest(folder)
    try:
        content = json.loads((folder / OPTIONS).read_text(encoding="utf-8"))
        options = GATESOptions.model_validate_json(json.dumps(content["options"]))
        genes, seed = [str(gene) for gene in content["genes"]], int(content["seed"])
        network = AutoEncoder.from_pretrained(folder)
        mixture = Mixture.load(folder / MIXTURE)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}: damaged spatial encoder: {error}. Save or copy it again") from error
    return SavedModel(network, mixture, options, genes, seed)


def transform(
    adata: AnnData,
    model: SavedModel,
    *,
    layer: str | None = None,
    spatial_key: str = "spatial",
    sections: np.ndarray | None = None,
    truth: np.ndarray | None = None,
) -> tuple[Prepared, Analysis]:
    """Embed a section with a trained encoder and label it with the encoder's domains; nothing is trained (10.4).

    Genes are matched by name (a missing one counts 0), graphs are built anew on this section.

    Raises:
        DataError: the section cannot be analysed, or has fewer than half of the genes.
    """
    start = time.perf_counter()
    prepared = prepare(
        adata,
        _without_number(model.options),
        model.seed,
        layer=layer,
        spatial_key=spatial_key,
        sections=sections,
        genes=model.genes,
    )
    latent = encode(model.network, prepared.expression, prepared.graphs)
    labels, probability = model.mixture.predict(latent)
    refined = None
    if model.options.clustering.refine != "none":
        refined = refine(labels, prepared.coordinates, model.options.clustering, prepared.sections)
    known = None if truth is None else np.asarray(truth, dtype=object)[prepared.kept]
    metrics = measure(labels, prepared, known, latent, model.seed)
    domains = Domains(labels, probability, model.mixture, [])
    return prepared, Analysis(latent, domains, refined, metrics, None, time.perf_counter() - start)


def _without_number(options: GATESOptions) -> GATESOptions:
    """Return the options without K: a section may have fewer cells than the model has domains."""
    return options.model_copy(update={"clustering": options.clustering.model_copy(update={"n_domains": "auto"})})


def describe(folder: Path) -> dict[str, Any]:
    """Return what a person should know about a saved model."""
    model = load_model(folder)
    return {
        "method": model.options.method,
        "n_domains": len(model.mixture.weights),
        "n_genes": len(model.genes),
        "first_genes": model.genes[:5],
    }
