"""The whole analysis of a section: prepare, embed, find domains, measure, write into the AnnData (3, 10.4)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tenfold.methods.gates.baselines import pca_embedding, spatial_pca_embedding
from tenfold.methods.gates.config import NETWORKS, Clustering, GATESOptions
from tenfold.methods.gates.domains import Domains, find_domains, relabel
from tenfold.methods.gates.fit import Fitted, fit, recipe
from tenfold.methods.gates.preparing import Prepared
from tenfold.methods.gates.refinement import refine
from tenfold.methods.gates.results import storable
from tenfold.methods.gates.spatial_metrics import chaos, pas
from tenfold.platform.errors import DataError
from tenfold.platform.evaluation.clustering import agreement

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy.sparse import csr_matrix

Progress = Callable[[int, int, float], None]
SILHOUETTE_CELLS = 5000  # it compares all pairs; a sample says the same


@dataclass(frozen=True)
class Analysis:
    """What an analysis found, on the kept cells.

    Attributes:
        embedding: float32 [N, Z]; None where a method gives domains alone.
        domains: labels, 0 the largest.
        refined: labels after the vote of neighbours, [N]; None without it.
        metrics: `ari`, `nmi`, ... where true domains are known; `pas`, `chaos`, `silhouette` always.
        fitted: the trained network, for the methods that have one.
        seconds: of embedding and clustering.
    """

    embedding: np.ndarray | None
    domains: Domains
    refined: np.ndarray | None
    metrics: dict[str, float]
    fitted: Fitted | None
    seconds: float


def analyse(
    adata: AnnData,
    prepared: Prepared,
    config: GATESOptions,
    seed: int,
    *,
    layer: str | None = None,
    truth: np.ndarray | None = None,
    fitted: Fitted | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """Embed the cells and find their domains.

    Args:
        adata: the section, for what single methods read of it (raw counts, precomputed results).
        prepared: of this section and configuration.
        config: GATES' options.
        seed: of initialisation and clustering.
        layer: layer with the counts; None: X.
        truth: true domain of each cell [N_all], None or NaN where unknown; read by the metrics alone, except that
            `n_domains: auto` takes the number of its classes.
        fitted: a network that was trained elsewhere; None trains here.
        progress: called with epoch, epochs, loss; what it raises stops the training.

    Raises:
        DataError: more domains than cells, or no precomputed result of the given name.
    """
    start = time.perf_counter()
    known = None if truth is None else np.asarray(truth, dtype=object)[prepared.kept]
    number = num_domains(config.clustering, known)
    if number != "auto" and number > len(prepared.coordinates):
        raise DataError(f"n_domains = {number}: there are {len(prepared.coordinates)} cells. Ask for fewer domains")
    embedding, domains = None, None
    if config.method in NETWORKS:
        fitted = fitted or fit(
            prepared.expression,
            prepared.graphs,
            config,
            seed,
            coordinates=prepared.coordinates,
            sections=prepared.sections,
            progress=progress,
        )
        embedding = fitted.latent
    elif config.method in ("pca_gmm", "pca_leiden"):
        embedding = pca_embedding(prepared.expression, config.num_components, seed)
    elif config.method == "spatial_pca":
        embedding = spatial_pca_embedding(prepared.expression, prepared.neighbours, config.num_components, seed)
    elif config.method == "spagcn":
        domains = _spagcn(adata, prepared, number, seed, layer, progress)
    else:
        embedding, domains = _precomputed(adata, prepared, str(config.precomputed_key))
    options = config.clustering
    if config.method == "pca_leiden":
        options = options.model_copy(update={"kind": "leiden"})
    if domains is None:
        assert embedding is not None
        domains = find_domains(embedding, options, number, seed, prepared.neighbours)
    refined = None
    if options.refine != "none":
        refined = refine(domains.labels, prepared.coordinates, options, prepared.sections)
    metrics = measure(domains.labels, prepared, known, embedding, seed)
    if refined is not None:
        own = measure(refined, prepared, known, None, seed)
        metrics |= {f"refined_{name}": value for name, value in own.items()}
    return Analysis(embedding, domains, refined, metrics, fitted, time.perf_counter() - start)


def known_domains(adata: AnnData) -> np.ndarray | None:
    """Return `obs["truth"]` as objects [N_all], None or NaN where unknown; None without that column."""
    return adata.obs["truth"].to_numpy(dtype=object) if "truth" in adata.obs else None


def num_domains(options: Clustering, truth: np.ndarray | None) -> int | Literal["auto"]:
    """Return K: as given, else the number of known classes (5.3), else auto."""
    if options.n_domains != "auto" or truth is None:
        return options.n_domains
    classes = {str(value) for value in truth if is_known(value)}
    return len(classes) or "auto"


def is_known(value: Any) -> bool:
    """Say whether a true label is there: neither None nor NaN."""
    return value is not None and value == value


def measure(
    labels: np.ndarray, prepared: Prepared, truth: np.ndarray | None, embedding: np.ndarray | None, seed: int
) -> dict[str, float]:
    """Return the metrics of 5.4: against the truth where it is known, of the shape of the domains always."""
    metrics: dict[str, float] = {}
    if truth is not None and any(is_known(value) for value in truth):
        metrics |= agreement(truth, labels)
    metrics["pas"] = pas(labels, prepared.coordinates, prepared.sections)
    metrics["chaos"] = chaos(labels, prepared.coordinates, prepared.sections)
    metrics["num_domains"] = float(len(np.unique(labels)))
    if embedding is not None and 1 < len(np.unique(labels)) < len(labels):
        metrics["silhouette"] = _silhouette(embedding, labels, seed)
    return metrics


def _silhouette(embedding: np.ndarray, labels: np.ndarray, seed: int) -> float:
    from sklearn.metrics import silhouette_score

    chosen = np.arange(len(labels))
    if len(labels) > SILHOUETTE_CELLS:
        chosen = np.random.default_rng(seed).choice(len(labels), SILHOUETTE_CELLS, replace=False)
    if not 1 < len(np.unique(labels[chosen])) < len(chosen):
        return float("nan")
    return float(silhouette_score(embedding[chosen], labels[chosen]))


def _spagcn(
    adata: AnnData,
    prepared: Prepared,
    number: int | Literal["auto"],
    seed: int,
    layer: str | None,
    progress: Progress | None,
) -> Domains:
    from scipy.sparse import csr_matrix
    from tenfold.methods.gates.spagcn import spagcn

    if number == "auto":
        raise DataError("n_domains = auto: spagcn needs a number of domains where no labels are given")
    counts = csr_matrix(adata.X if layer is None else adata.layers[layer])[prepared.kept]
    genes, places = list(adata.var_names), prepared.coordinates
    labels = spagcn(counts, genes, places, number, seed, sections=prepared.sections, progress=progress)
    return Domains(labels, np.ones(len(labels)), None, [])


def _precomputed(adata: AnnData, prepared: Prepared, key: str) -> tuple[np.ndarray | None, Domains | None]:
    """Return an embedding (obsm) or domains (obs) that are in the section already (6.5)."""
    if key in adata.obsm:
        return np.asarray(adata.obsm[key], dtype=np.float32)[prepared.kept], None
    if key not in adata.obs:
        raise DataError(f"precomputed_key = {key}: neither in obs {list(adata.obs)} nor in obsm {list(adata.obsm)}")
    values = adata.obs[key].astype(str).to_numpy()[prepared.kept]
    labels, _ = relabel(np.unique(values, return_inverse=True)[1])
    return None, Domains(labels, np.ones(len(labels)), None, [])


def write(
    adata: AnnData, prepared: Prepared, analysis: Analysis, config: GATESOptions, seed: int, *, key: str = "gates"
) -> None:
    """Put the results into the AnnData under scverse's conventions (10.4); cells that were dropped get none."""
    import pandas as pd

    size, kept = adata.n_obs, prepared.kept
    if analysis.embedding is not None:
        whole = np.full((size, analysis.embedding.shape[1]), np.nan, dtype=np.float32)
        whole[kept] = analysis.embedding
        adata.obsm[f"X_{key}"] = whole
    labels = {f"{key}_domain": analysis.domains.labels}
    if analysis.refined is not None:
        labels[f"{key}_domain_refined"] = analysis.refined
    for name, values in labels.items():
        codes = np.full(size, -1, dtype=np.int64)
        codes[kept] = values
        categories = [str(label) for label in range(int(values.max(initial=-1)) + 1)]
        adata.obs[name] = pd.Categorical.from_codes(codes, categories).remove_unused_categories()
    probability = np.full(size, np.nan)
    probability[kept] = analysis.domains.probability
    adata.obs[f"{key}_domain_prob"] = probability
    adata.obsp[f"{key}_spatial_connectivities"] = over_all_cells(prepared.neighbours.to_matrix(), kept)
    if prepared.graphs[1] is not None and "expression" in prepared.statistics:
        adata.obsp[f"{key}_expression_connectivities"] = over_all_cells(prepared.graphs[1].to_matrix(), kept)
    adata.uns[key] = storable(
        {
            "params": {
                **config.model_dump(mode="json", exclude={"sections"}),
                "alpha": config.fusion_weight,
                **trained_with(config),
                "seed": seed,
            },
            "genes": np.array(prepared.genes),
            "loss": np.array(analysis.fitted.losses if analysis.fitted else [], dtype=np.float64),
            "loss_epoch": np.array(analysis.fitted.epochs if analysis.fitted else [], dtype=np.float64),
            "metrics": analysis.metrics,
            "graphs": prepared.statistics,
            "notes": np.array([*prepared.notes, *analysis.domains.notes]),
            "seconds": analysis.seconds,
            "versions": _versions(),
        }
    )


def trained_with(config: GATESOptions) -> dict[str, Any]:
    """Return the values that a method trained with, its own defaults included."""
    return asdict(recipe(config)) if config.method in NETWORKS else {}


def over_all_cells(matrix: csr_matrix, kept: np.ndarray) -> csr_matrix:
    """Return a matrix of the kept cells over all cells of the section; the others' rows and columns are empty.

    Args:
        matrix: [N, N].
        kept: bool [N_all], N of them true.
    """
    from scipy.sparse import csr_matrix

    entries, place = matrix.tocoo(), np.flatnonzero(kept)
    return csr_matrix((entries.data, (place[entries.row], place[entries.col])), shape=(len(kept), len(kept)))


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("tenfold", "torch", "anndata", "scanpy", "scikit-learn", "numpy")}
