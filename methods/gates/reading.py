"""From a file, a folder or a recipe to a checked AnnData; from several to one."""

from __future__ import annotations

import hashlib
import importlib.resources
import re
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from tenfold.methods.gates.checks import NOTES, check_file
from tenfold.methods.gates.config import Section
from tenfold.methods.gates.file_checks import ending_of
from tenfold.methods.gates.joining import join_sections
from tenfold.methods.gates.limits import Limits
from tenfold.methods.gates.synthetic import synthetic_section
from tenfold.methods.gates.tables import (
    MISSING,
    Coordinates,
    check_indices,
    names_files,
    read_coordinates,
    read_counts,
    read_truth,
)
from tenfold.methods.gates.visium import read_visium, visium_files
from tenfold.platform.errors import DataError

SAMPLE = "sample:"
SYNTHETIC = "synthetic:"


def read_section(section: Section, limits: Limits | None = None) -> anndata.AnnData:
    """Read one section; the file is checked before its arrays are read.

    Args:
        section: what to read and how.
        limits: bounds for files of strangers.

    Returns:
        The section in memory, names unique; `obs["truth"]` if domains were given (categorical of strings, missing
        where unknown), sentences for people in `uns["reading_notes"]` if there are any.

    Raises:
        DataError: something is missing, damaged, too large or contradicts itself.
    """
    notes: list[str] = []
    made = section.path.startswith(SYNTHETIC)
    adata = _synthetic(section.path, limits) if made else _read(section, limits, notes)
    adata.uns.pop(NOTES, None)
    adata = _chosen_samples(adata, section)
    _make_names_unique(adata, section.path, notes)
    truth = _truth(adata, section, limits, notes)
    if truth is not None:
        adata.obs["truth"] = truth
    if notes:
        adata.uns[NOTES] = np.array(notes)
    return adata


def read_sections(sections: list[Section], limits: Limits | None = None) -> anndata.AnnData:
    """Read sections and put them one below the other, over the genes that all of them have (3.12).

    `obs["section"]` (categorical) tells them apart: the values of `sample_key`, else the file's name.

    Raises:
        DataError: a section cannot be read, or they do not fit together.
    """
    joined = join_sections([read_section(section, limits) for section in sections], sections)
    if limits is not None:
        limits.check_shape("the sections together", joined.n_obs, joined.n_vars)
    return joined


def sections_digest(sections: list[Section]) -> str:
    """Return sha256 (hexadecimal) over the bytes of all files that the sections are read from, in their order."""
    digest = hashlib.sha256()
    for section in sections:
        if section.path.startswith(SYNTHETIC):
            digest.update(section.path.encode())
        for path in _files(section):
            digest.update(path.stat().st_size.to_bytes(8, "little"))  # so that bytes cannot move between files
            with path.open("rb") as stream:
                while block := stream.read(2**20):
                    digest.update(block)
    return digest.hexdigest()


def locate(reference: str) -> Path:
    """Return the path that a reference means: `sample:PATH` is a packaged file, anything else a path.

    Raises:
        DataError: nothing is there.
    """
    if reference.startswith(SAMPLE):
        name = reference.removeprefix(SAMPLE)
        root = Path(str(importlib.resources.files("tenfold.samples")))
        if not name or ".." in Path(name).parts or Path(name).is_absolute() or not (root / name).exists():
            there = sorted(file.relative_to(root).as_posix() for file in root.glob("spatial/*"))
            raise DataError(f"{reference}: no such sample. Sections among the samples: {', '.join(there) or 'none'}")
        return root / name
    path = Path(reference).expanduser()
    if not path.exists():
        raise DataError(f"{reference}: no such file; relative paths start at {Path.cwd()}")
    return path


def _files(section: Section) -> list[Path]:
    if section.path.startswith(SYNTHETIC):
        return [locate(section.truth)] if section.truth else []
    path = locate(section.path)
    main = visium_files(path, section.path) if path.is_dir() else [path]
    beside = [file for name in main for file in names_files(name)]
    return [*main, *beside, *(locate(extra) for extra in (section.coordinates, section.truth) if extra)]


def _synthetic(reference: str, limits: Limits | None) -> anndata.AnnData:
    number = reference.removeprefix(SYNTHETIC)
    if not re.fullmatch(r"[1-9]\d{0,8}", number):
        raise DataError(f"{reference}: write synthetic:CELLS, such as synthetic:2000")
    cells = int(number)
    if limits is not None:
        limits.check_shape(reference, cells, 3000)
    adata = synthetic_section(cells, num_domains=min(7, cells))
    adata.obs["truth"] = adata.obs["domain"]
    return adata


def _read(section: Section, limits: Limits | None, notes: list[str]) -> anndata.AnnData:
    path, shown = locate(section.path), section.path
    _check(path, shown, limits, section.transpose)
    if path.is_dir() or ending_of(path) == ".h5ad":
        if section.coordinates is not None or section.transpose:
            option = "coordinates" if section.coordinates is not None else "transpose"
            raise DataError(f"{shown}: {option} is only for counts tables; this holds its own. Remove {option}")
        if path.is_dir():
            adata, found = read_visium(path, shown)
            notes.extend(found)
            return adata
        return _read_h5ad(path, shown)
    if ending_of(path) == ".h5":
        raise DataError(f"{shown}: a counts file of 10x without coordinates. Give the Visium folder that it lies in")
    return _read_tables(path, section, limits, notes)


def _check(path: Path, shown: str, limits: Limits | None, transpose: bool = False) -> None:
    try:
        check_file(path, limits, transpose=transpose)
    except DataError as error:  # says the name that the user typed, not the place where a sample lies
        raise DataError(str(error).replace(str(path), shown)) from error


def _read_h5ad(path: Path, shown: str) -> anndata.AnnData:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names that repeat and old formats: the first is noted, the second read
        try:
            adata = anndata.read_h5ad(path)
        except Exception as error:  # anndata, h5py, pandas and scipy raise many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"{shown}: not a usable AnnData file: {reason}. Write it anew with write_h5ad") from error
    for where, matrix in _sparse_matrices(adata):
        check_indices(matrix, f"{shown}: {where}")
    for matrix in (adata.X, *adata.layers.values()):
        if sp.issparse(matrix):
            matrix.sum_duplicates()
    return adata


def _sparse_matrices(adata: anndata.AnnData) -> list[tuple[str, sp.spmatrix]]:
    """Return every compressed matrix of an AnnData and where it is."""
    waiting = [("X", adata.X), ("raw.X", None if adata.raw is None else adata.raw.X), ("uns", adata.uns)]
    waiting += [(name, dict(getattr(adata, name))) for name in ("layers", "obsm", "varm", "obsp", "varp")]
    if adata.raw is not None:
        waiting.append(("raw.varm", dict(adata.raw.varm)))
    found = []
    while waiting:
        where, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{where}['{key}']", inner) for key, inner in value.items()]
        elif sp.issparse(value):
            found.append((where, value))
    return found


def _read_tables(path: Path, section: Section, limits: Limits | None, notes: list[str]) -> anndata.AnnData:
    if section.coordinates is None:
        raise DataError(
            f"{section.path}: a counts table has no coordinates. Name a table of cell, x, y in coordinates"
        )
    place = locate(section.coordinates)
    _check(place, section.coordinates, limits)
    counts = read_counts(path, section.path, transpose=section.transpose, limits=limits)
    if limits is not None:
        limits.check_shape(section.path, *counts.matrix.shape)
    coordinates = read_coordinates(place, section.coordinates)
    rows, places, cells = _joined(counts.cells, counts.matrix.shape[0], coordinates, section, notes)
    genes = counts.genes or [f"gene{index + 1}" for index in range(counts.matrix.shape[1])]
    # An index of its own, so that names may repeat until they are made unique.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata = anndata.AnnData(
            X=counts.matrix if len(rows) == counts.matrix.shape[0] else counts.matrix[rows],
            obs=pd.DataFrame(index=pd.Index(cells, dtype=str)),
            var=pd.DataFrame(index=pd.Index(genes, dtype=str)),
        )
    adata.obsm[section.spatial_key] = coordinates.positions[places]
    return adata


def _joined(
    cells: list[str] | None, length: int, coordinates: Coordinates, section: Section, notes: list[str]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return rows of the counts, rows of the coordinates, and names, of the cells that both tables have."""
    if cells is None:
        if length != len(coordinates.cells):
            raise DataError(
                f"{section.path}: {length} cells without names, but {section.coordinates} has "
                f"{len(coordinates.cells)}. Give as many rows in the same order, or set transpose if the genes are in "
                "rows"
            )
        notes.append(f"{section.path} has no names: its cells are those of {section.coordinates} in the same order")
        return np.arange(length), np.arange(length), coordinates.cells
    index = pd.Index(cells)
    if not index.is_unique:
        first = index[index.duplicated()][0]
        raise DataError(f"{section.path}: the cell {first} occurs twice, so its coordinates are unclear. Rename one")
    places = pd.Index(coordinates.cells).get_indexer(index)
    rows = np.flatnonzero(places >= 0)
    if not len(rows):
        raise DataError(
            f"{section.path} and {section.coordinates} share no cell (first: {cells[0]} and {coordinates.cells[0]}). "
            "Use the same names in both, or set transpose if the genes are in rows"
        )
    lost = [cells[row] for row in np.flatnonzero(places < 0)]
    spare = len(coordinates.cells) - len(rows)
    for number, name, first in (
        (len(lost), "coordinates", lost[0] if lost else ""),
        (spare, "counts", next((name for name in coordinates.cells if name not in index), "")),
    ):
        if number:
            notes.append(f"{section.path}: {number} cells without {name} (first: {first}) were left out")
    return rows, places[rows], [cells[row] for row in rows]


def _chosen_samples(adata: anndata.AnnData, section: Section) -> anndata.AnnData:
    if section.sample_key is None:
        if section.samples is not None:
            raise DataError(f"{section.path}: samples needs sample_key, the column of obs that holds them")
        return adata
    if section.sample_key not in adata.obs:
        there = ", ".join(adata.obs.columns) or "none"
        raise DataError(f"{section.path}: sample_key: obs['{section.sample_key}'] is missing; columns there: {there}")
    column = adata.obs[section.sample_key]
    if column.isna().any():
        raise DataError(
            f"{section.path}: obs['{section.sample_key}'] is missing for {column.isna().sum()} cells. Fill it"
        )
    if section.samples is None:
        return adata
    values = column.astype(str)
    unknown = [name for name in section.samples if name not in set(values)]
    if unknown:
        there = ", ".join(sorted(set(values))[:20])
        raise DataError(f"{section.path}: samples: {', '.join(unknown)} not in obs['{section.sample_key}']: {there}")
    return adata[values.isin(section.samples).to_numpy()].copy()


def _make_names_unique(adata: anndata.AnnData, shown: str, notes: list[str]) -> None:
    for names, make_unique, what in (
        (adata.obs_names, adata.obs_names_make_unique, "cell"),
        (adata.var_names, adata.var_names_make_unique, "gene"),
    ):
        if not names.is_unique:
            repeated = names[names.duplicated()]
            notes.append(
                f"{shown}: {len(repeated)} {what} names occur before (first: {repeated[0]}); a number was added"
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                make_unique()


def _truth(adata: anndata.AnnData, section: Section, limits: Limits | None, notes: list[str]) -> pd.Categorical | None:
    """Return the true domains from the column or the table that the section names; None without either."""
    if section.labels is not None and section.truth is not None:
        raise DataError(f"{section.path}: both labels and truth name the true domains. Remove one")
    labels = section.labels
    if labels is None and section.truth is None and "truth" in adata.obs:
        labels = "truth"
        notes.append(f"{section.path}: obs['truth'] is taken for the true domains")
    if labels is not None:
        if labels not in adata.obs:
            there = ", ".join(adata.obs.columns) or "none"
            raise DataError(f"{section.path}: labels: obs['{labels}'] is missing; columns there: {there}")
        column = adata.obs[labels]
        values = [None if missing else str(value) for value, missing in zip(column, column.isna(), strict=True)]
        order = (
            [str(value) for value in column.cat.categories] if isinstance(column.dtype, pd.CategoricalDtype) else None
        )
    elif section.truth is not None:
        place = locate(section.truth)
        _check(place, section.truth, limits)
        known = read_truth(place, section.truth)
        found = [name in known for name in adata.obs_names]
        if not any(found):
            first = next(iter(known), "none")
            raise DataError(
                f"{section.truth}: no cell of {section.path} in it (first: {first} and {adata.obs_names[0]}). Use the "
                "same names in both"
            )
        if len(known) > sum(found):
            notes.append(
                f"{section.truth}: {len(known) - sum(found)} of its {len(known)} cells are not in the section"
            )
        values, order = [known.get(name) for name in adata.obs_names], None
    else:
        return None
    values = [None if value is None or value.strip().lower() in MISSING else value for value in values]
    used = {value for value in values if value is not None}
    return pd.Categorical(values, categories=[value for value in order if value in used] if order else sorted(used))
