"""From raw counts to the expression that the models read (3.1)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tenfold.methods.gates.checks import NORMALISED_BELOW
from tenfold.methods.gates.config import Preprocessing
from tenfold.methods.gates.graph import Graph
from tenfold.platform.errors import DataError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from scipy.sparse import csr_matrix

LARGE_PANEL = 3000  # genes above which min_cells = auto drops rare ones
RARE = 3
LOESS_SPANS = (0.3, 0.5, 1.0)  # scanpy's own, then wider ones where the fit of seurat_v3 is singular
LOESS_GENES = 20  # the regression needs some; skmisc 0.5 ends the process where span x genes is below 1
LEAST_SHARE = 0.5  # of a model's genes that a new section must have


@dataclass(frozen=True)
class Preprocessed:
    """Expression of the cells that are kept.

    Attributes:
        expression: float32 CSR [N, G], log-normalised.
        genes: names of the G genes.
        kept: bool [N_all], cells with counts; where obs has `in_tissue`, only those inside.
        gene_choice: how the genes were chosen, for people.
        notes: what a user should know, as sentences.
    """

    expression: csr_matrix
    genes: list[str]
    kept: np.ndarray
    gene_choice: str
    notes: list[str]


def preprocess(
    adata: AnnData, options: Preprocessing, *, layer: str | None = None, sections: np.ndarray | None = None
) -> Preprocessed:
    """Choose genes on raw counts, normalise over all genes, take the logarithm, keep the chosen genes (3.1).

    The AnnData is not changed.

    Args:
        adata: raw counts; with `enabled: false` log-normalised values. Dense, CSR, CSC or file-backed.
        options: number and flavor of the genes, target sum.
        layer: layer with the counts; None: X.
        sections: section of each cell [N_all]; genes are chosen in each and ranked together.

    Raises:
        DataError: the values are no counts, or no cell or gene is left.
    """
    counts, kept = _counts(adata, layer, options)
    names = _gene_names(adata)
    notes: list[str] = []
    used = np.flatnonzero(_used_genes(counts, options, notes))
    if not len(used):
        raise DataError(
            f"no gene is left of {len(names)}: none is seen in {options.min_cells} cells. Lower "
            "preprocessing.min_cells"
        )
    within = None if sections is None else np.asarray(sections)[kept]
    candidates = counts if len(used) == counts.shape[1] else counts[:, used]
    chosen, how = _chosen_genes(candidates, options, within, notes)
    places = used[chosen]
    expression = _log_normalised(counts[:, places], _totals(counts), options)
    return Preprocessed(expression, [str(name) for name in names[places]], kept, how, notes)


def align(adata: AnnData, genes: list[str], options: Preprocessing, *, layer: str | None = None) -> Preprocessed:
    """Preprocess a section for a model that reads given genes; one that is missing counts 0 (10.4).

    Args:
        adata: as in `preprocess`.
        genes: names of the model's genes, in its order.
        options: as the model was trained with; no genes are chosen.
        layer: layer with the counts; None: X.

    Raises:
        DataError: fewer than half of the genes are there, or the values are no counts.
    """
    from scipy.sparse import csr_matrix

    counts, kept = _counts(adata, layer, options)
    places = _gene_names(adata).get_indexer(genes)
    there = np.flatnonzero(places >= 0)
    if len(there) < LEAST_SHARE * len(genes):
        raise DataError(
            f"the section has {len(there)} of the model's {len(genes)} genes (such as {', '.join(genes[:3])}); at "
            f"least {LEAST_SHARE:.0%} are needed. Use the kind of gene names that the model was trained with"
        )
    found = counts[:, places[there]]
    spread = csr_matrix((found.data, there[found.indices], found.indptr), shape=(counts.shape[0], len(genes)))
    expression = _log_normalised(spread, _totals(counts), options)
    missing = len(genes) - len(there)
    notes = [f"{missing} of the model's {len(genes)} genes are missing and count 0"] if missing else []
    return Preprocessed(expression, list(genes), kept, "those of the model", notes)


def smooth(expression: csr_matrix, graph: Graph, rounds: int) -> csr_matrix:
    """Average every cell with its neighbours, itself included, `rounds` times (ours; 6.6 does so with components).

    Args:
        expression: float32 CSR [N, G]; not changed.
        graph: neighbours, with or without self loops.
        rounds: 0 gives the expression as it is.

    Returns:
        float32 CSR [N, G], with more nonzero values every round.
    """
    if rounds == 0:
        return expression
    weights = graph.with_self_loops().to_matrix()
    weights.data /= np.repeat(np.diff(weights.indptr), np.diff(weights.indptr))
    for _ in range(rounds):
        expression = weights @ expression
    expression.sort_indices()
    return expression


def _counts(adata: AnnData, layer: str | None, options: Preprocessing) -> tuple[csr_matrix, np.ndarray]:
    """Return the counts of the kept cells, and which these are; DataError if they are none."""
    from scipy.sparse import csr_matrix, issparse

    matrix: Any = adata.X if layer is None else adata.layers[layer]
    if hasattr(matrix, "to_memory"):  # sparse, still in its file
        matrix = matrix.to_memory()
    counts = csr_matrix(matrix if issparse(matrix) else np.asarray(matrix))
    if not counts.has_canonical_format:
        counts = counts.copy()
        counts.sum_duplicates()
    values = counts.data
    if not np.isfinite(values).all() or (values < 0).any():
        raise DataError("counts must be finite numbers, none below 0. Name the layer that holds them, or mend them")
    if options.enabled and (values != np.rint(values)).any():
        _check_fractions(float(values.max()), counts.shape[1], options)
    kept = _totals(counts) > 0
    if "in_tissue" in adata.obs:
        kept &= adata.obs["in_tissue"].to_numpy() == 1
    if not kept.any():
        raise DataError(f"none of {len(kept)} cells has counts (and is in the tissue); nothing to analyse")
    return counts if kept.all() else counts[kept], kept


def _check_fractions(highest: float, num_genes: int, options: Preprocessing) -> None:
    """Refuse values that are not whole where they are logarithms, or where seurat_v3 would read them as counts."""
    if highest < NORMALISED_BELOW:
        raise DataError(
            f"the values look log-normalised already (not whole numbers, highest {highest:g}); raw counts are needed. "
            "Name the layer that holds them, or set preprocessing.enabled = false to take the values as they are"
        )
    if options.flavor == "seurat_v3" and num_genes > options.num_genes:
        raise DataError(
            "the values are not whole numbers, and seurat_v3 chooses genes by raw counts. Name the layer that holds "
            "them, or set preprocessing.flavor = seurat"
        )


def _gene_names(adata: AnnData) -> pd.Index:
    from anndata.utils import make_index_unique

    return make_index_unique(adata.var_names.astype(str))


def _totals(counts: csr_matrix) -> np.ndarray:
    """Return the sum of each cell, float64 [N]."""
    return np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()


def _used_genes(counts: csr_matrix, options: Preprocessing, notes: list[str]) -> np.ndarray:
    """Return which genes are seen in enough cells, bool; genes without any count are never used."""
    least = options.min_cells
    if least == "auto":
        least = RARE if counts.shape[1] > LARGE_PANEL and options.enabled else 0
    least = max(least, 1)
    used = np.bincount(counts.indices[counts.data != 0], minlength=counts.shape[1]) >= least
    if not used.all():
        rare = "without counts" if least == 1 else f"seen in fewer than {least} cells"
        notes.append(f"{int((~used).sum())} genes {rare} were left out")
    return used


def _chosen_genes(
    counts: csr_matrix, options: Preprocessing, sections: np.ndarray | None, notes: list[str]
) -> tuple[np.ndarray, str]:
    """Return places of the highly variable genes, ascending, and how they were chosen."""
    if counts.shape[1] <= options.num_genes or counts.shape[0] == 1:  # in one cell nothing varies
        return np.arange(counts.shape[1]), f"all {counts.shape[1]}"
    flavor = options.flavor
    if flavor == "seurat_v3":
        chosen = _by_seurat_v3(counts, options.num_genes, sections, notes) if options.enabled else None
        if chosen is not None:
            return chosen, f"{len(chosen)} of {counts.shape[1]} by seurat_v3"
        flavor = "seurat"
        notes.append("genes were chosen by flavor seurat on log-normalised values, in place of seurat_v3")
    values = _log_normalised(counts, _totals(counts), options)
    chosen = _variable(values, options.num_genes, flavor, sections)
    return chosen, f"{len(chosen)} of {counts.shape[1]} by {flavor}"


def _by_seurat_v3(
    counts: csr_matrix, num_genes: int, sections: np.ndarray | None, notes: list[str]
) -> np.ndarray | None:
    """Return places of the genes that seurat_v3 chooses; None where its local regression cannot be fitted."""
    varying = _least_varying(counts, sections)
    if varying < LOESS_GENES:
        notes.append(f"seurat_v3 needs {LOESS_GENES} genes that vary in each section; one has {varying}")
        return None
    for span in LOESS_SPANS:
        try:
            return _variable(counts, num_genes, "seurat_v3", sections, span=span)
        except ValueError as error:
            reason = " ".join(str(error).split())[:100]
            notes.append(f"seurat_v3 with span {span} cannot be fitted ({reason})")
    return None


def _least_varying(counts: csr_matrix, sections: np.ndarray | None) -> int:
    """Return how many genes are not constant, in the section with the fewest of them."""
    parts = [counts] if sections is None else [counts[sections == section] for section in np.unique(sections)]
    return min(int((part.max(axis=0) != part.min(axis=0)).sum()) for part in parts)


def _variable(
    values: csr_matrix, num_genes: int, flavor: str, sections: np.ndarray | None, **arguments: float
) -> np.ndarray:
    """Return places of scanpy's highly variable genes, ascending."""
    import anndata
    import pandas as pd
    import scanpy

    cells = anndata.AnnData(values.astype(np.float32, copy=False))
    batch_key = None
    if sections is not None and len(np.unique(sections)) > 1:
        batch_key = "section"
        cells.obs[batch_key] = pd.Categorical(np.asarray(sections).astype(str))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy, about genes without variance
        table = scanpy.pp.highly_variable_genes(
            cells, n_top_genes=num_genes, flavor=flavor, batch_key=batch_key, inplace=False, **arguments
        )
    return np.flatnonzero(table["highly_variable"].to_numpy())


def _log_normalised(counts: csr_matrix, totals: np.ndarray, options: Preprocessing) -> csr_matrix:
    """Return log(1 + target_sum x share of the cell's counts), float32; the values themselves if not enabled.

    Args:
        counts: CSR [N, G], some of the genes.
        totals: counts of each cell over all genes, float64 [N].
        options: `target_sum`, `enabled`.
    """
    from scipy.sparse import csr_matrix

    values = counts.data.astype(np.float64)
    if options.enabled:
        values *= np.repeat(options.target_sum / np.where(totals > 0, totals, 1), np.diff(counts.indptr))
        np.log1p(values, out=values)
    expression = csr_matrix((values.astype(np.float32), counts.indices, counts.indptr), shape=counts.shape, copy=True)
    expression.eliminate_zeros()
    expression.sort_indices()
    return expression
