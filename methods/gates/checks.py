"""What a section must hold before any work is done on it; all that is wrong is said at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from tenfold.methods.gates.apart import check_file
from tenfold.methods.gates.limits import Limits
from tenfold.platform.errors import DataError

__all__ = ["NOTES", "Limits", "check_file", "check_section"]

NOTES = "reading_notes"  # key of uns: sentences that reading left for people
NORMALISED_BELOW = 50  # values that are not whole and stay below are taken for log-normalised (3.1)
_BLOCK_VALUES = 4_000_000
_NAMED = 3  # cells that a message names


@dataclass(frozen=True)
class _Facts:
    """About a counts matrix; `bad` is the first cell and gene whose value is not finite."""

    low: float
    high: float
    whole: bool
    bad: tuple[int, int] | None
    totals: np.ndarray  # float64 [N]: 0 for an empty cell
    genes_seen: int


def check_section(
    adata: Any,
    *,
    layer: str | None = None,
    spatial_key: str = "spatial",
    n_domains: int | Literal["auto"] = "auto",
    preprocessing_enabled: bool = True,
) -> list[str]:
    """Check counts, coordinates and names of a section; changes nothing and reads a file-backed one in blocks.

    Args:
        adata: AnnData; X or the layer dense, CSR or CSC of any numeric type.
        layer: the layer with the counts; None: X.
        spatial_key: key of obsm with [N, 2] or [N, 3] coordinates.
        n_domains: K, compared with the cells that have counts.
        preprocessing_enabled: False takes values as they are, so they need not be counts.

    Returns:
        Sentences on what was found and is no error: empty cells, names that repeat, what reading left out.

    Raises:
        DataError: one line for each thing that is wrong: the field and the fix.
    """
    problems: list[str] = []
    notes = [str(note) for note in np.atleast_1d(adata.uns.get(NOTES, []))]
    inside = np.ones(adata.n_obs, dtype=bool)
    if "in_tissue" in adata.obs:
        inside = adata.obs["in_tissue"].to_numpy() == 1
        if not inside.all():
            notes.append(f"{np.sum(~inside)} spots outside of the tissue (in_tissue is not 1) are left out")
    matrix = _chosen(adata, layer, problems)
    kept = inside
    if matrix is not None:
        facts = _facts(matrix)
        place = "X" if layer is None else f"layers['{layer}']"
        kept = inside & (facts.totals != 0)
        _check_counts(adata, place, facts, inside, preprocessing_enabled, problems, notes)
    _check_coordinates(adata, spatial_key, kept, problems, notes)
    if n_domains != "auto" and n_domains > kept.sum() > 0:
        problems.append(f"n_domains = {n_domains}, but {kept.sum()} cells have counts. Ask for fewer domains")
    for names, what in ((adata.obs_names, "cell"), (adata.var_names, "gene")):
        if not names.is_unique:
            repeated = names[names.duplicated()]
            notes.append(
                f"{len(repeated)} {what} names occur before (first: {repeated[0]}); they are told apart by place"
            )
    if problems:
        raise DataError("\n".join(problems))
    return notes


def _chosen(adata: Any, layer: str | None, problems: list[str]) -> Any:
    """Return the matrix with the counts, or None after saying what is wrong with it."""
    if layer is not None and layer not in adata.layers:
        there = ", ".join(sorted(adata.layers)) or "none"
        problems.append(
            f"layers['{layer}'] is missing; layers there: {there}. Name one of them in layer, or none for X"
        )
        return None
    matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        problems.append(f"X is missing. Put raw counts there, or name a layer in layer: {', '.join(adata.layers)}")
        return None
    if hasattr(matrix, "to_memory"):  # a sparse matrix that is still in its file
        matrix = matrix.to_memory()
    if np.dtype(matrix.dtype).kind not in "biuf":
        problems.append(
            f"{'X' if layer is None else layer} holds {matrix.dtype}; needs numbers. Convert it to float32"
        )
        return None
    if min(adata.shape) == 0:
        problems.append(f"the section has {adata.n_obs} cells and {adata.n_vars} genes; needs some of both")
        return None
    return matrix


def _facts(matrix: Any) -> _Facts:
    """Look at every value once, in blocks."""
    low, high, whole = np.inf, -np.inf, True
    totals, seen = np.zeros(matrix.shape[0]), np.zeros(matrix.shape[1], dtype=bool)
    bad: tuple[int, int] | None = None
    for start, rows, block in _blocks(matrix):
        values = block.data if sp.issparse(block) else block
        if values.size:
            finite = np.isfinite(values).all()
            if not finite and bad is None:
                coordinates = sp.coo_matrix(block) if sp.issparse(block) else None
                flat = np.flatnonzero(~np.isfinite(values if coordinates is None else coordinates.data))[0]
                row, gene = (
                    divmod(flat, matrix.shape[1])
                    if coordinates is None
                    else (coordinates.row[flat], coordinates.col[flat])
                )
                bad = (int(row) + start, int(gene))
            low, high = min(low, float(values.min())), max(high, float(values.max()))
            whole = whole and bool(finite) and bool(np.all(values == np.rint(values)))
        # Sums of sizes, so that values of both signs do not look like an empty cell.
        totals[start : start + rows] = np.asarray(abs(block).sum(axis=1, dtype=np.float64)).ravel()
        seen |= np.asarray((block != 0).sum(axis=0)).ravel() > 0
    if sp.issparse(matrix):
        low = min(low, 0.0) if matrix.nnz < np.prod(matrix.shape, dtype=np.float64) else low
    return _Facts(low, high, whole, bad, totals, int(seen.sum()))


def _blocks(matrix: Any) -> Iterator[tuple[int, int, Any]]:
    """Yield (first row, number of rows, block) of about `_BLOCK_VALUES` stored values."""
    if sp.issparse(matrix):
        matrix = matrix.tocsr()
        values = max(1, matrix.nnz // max(1, matrix.shape[0]))
    else:
        values = max(1, matrix.shape[1])
    step = max(1, _BLOCK_VALUES // values)
    for start in range(0, matrix.shape[0], step):
        block = matrix[start : start + step]
        yield start, block.shape[0], block if sp.issparse(block) else np.asarray(block)


def _check_counts(
    adata: Any,
    place: str,
    facts: _Facts,
    inside: np.ndarray,
    preprocessing_enabled: bool,
    problems: list[str],
    notes: list[str],
) -> None:
    """Append what is wrong with the values, and what is worth knowing about them."""
    empty = int(np.sum(inside & (facts.totals == 0)))
    if facts.bad is not None:
        cell, gene = facts.bad
        problems.append(
            f"{place} holds NaN or infinite values (first: cell {adata.obs_names[cell]}, gene "
            f"{adata.var_names[gene]}). Replace them with counts, or drop those cells"
        )
    elif empty == inside.sum():
        problems.append(f"{place}: none of the {inside.sum()} cells has counts. Name the layer that has them in layer")
    elif facts.genes_seen < 2:
        problems.append(f"{place}: counts in {facts.genes_seen} gene; needs at least 2 genes. Give more genes")
    elif preprocessing_enabled:
        _check_raw(adata, place, facts, problems, notes)
    elif facts.whole and facts.high >= NORMALISED_BELOW:
        notes.append(
            f"{place} holds whole numbers up to {facts.high:g} and is taken for log-normalised values as told"
        )
    if empty and not problems:
        notes.append(f"{empty} cells have no counts and get no domain")


def _check_raw(adata: Any, place: str, facts: _Facts, problems: list[str], notes: list[str]) -> None:
    layers = [name for name in adata.layers if f"layers['{name}']" != place]
    elsewhere = f"Name the layer with raw counts in layer ({', '.join(layers)})" if layers else "Give raw counts"
    if facts.low < 0:
        problems.append(f"{place} holds negative values (lowest {facts.low:g}); raw counts have none. {elsewhere}")
    elif not facts.whole and facts.high < NORMALISED_BELOW:
        problems.append(
            f"{place} looks log-normalised already (values that are not whole, highest {facts.high:g}). {elsewhere}, "
            "or set preprocessing.enabled: false"
        )
    elif not facts.whole:
        notes.append(f"{place} holds values that are not whole numbers (highest {facts.high:g}), taken as counts")


def _check_coordinates(adata: Any, key: str, kept: np.ndarray, problems: list[str], notes: list[str]) -> None:
    """Append what is wrong with the coordinates of the cells that are used."""
    if key not in adata.obsm:
        there = ", ".join(sorted(adata.obsm)) or "nothing"
        problems.append(
            f"obsm['{key}'] is missing; obsm holds: {there}. Store x, y there for each cell, or name the key in "
            "spatial_key"
        )
        return
    raw = adata.obsm[key]
    values = raw.to_numpy() if hasattr(raw, "to_numpy") else raw.toarray() if sp.issparse(raw) else np.asarray(raw)
    if values.ndim != 2 or values.shape[1] not in (2, 3) or values.dtype.kind not in "biuf":
        problems.append(f"obsm['{key}'] is {values.dtype} of shape {values.shape}; needs numbers, cells x 2 or x 3")
        return
    lost = np.flatnonzero(kept & ~np.isfinite(values).all(axis=1))
    if len(lost):
        names = ", ".join(map(str, adata.obs_names[lost[:_NAMED]]))
        problems.append(f"obsm['{key}'] is NaN or infinite for {len(lost)} cells (first: {names}). Mend or drop them")
        return
    used = values[kept]
    if "section" in adata.obs:  # sections have coordinates of their own
        sections = np.unique(adata.obs["section"].astype(str).to_numpy()[kept], return_inverse=True)[1]
        used = np.column_stack([used, sections])
    same = len(used) - len(np.unique(used, axis=0))
    if same:
        notes.append(f"{same} cells lie exactly where another cell lies")
