"""A 10x Visium folder as Space Ranger 1, 2 and later write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from tenfold.methods.gates.tables import checked_csr, read_counts
from tenfold.platform.errors import DataError

MATRIX = "filtered_feature_bc_matrix"
POSITIONS = ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv")
IMAGES = ("hires", "lowres")

_COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
_FEATURE_TYPE = "Gene Expression"


def matrix_of(folder: Path, shown: str) -> Path:
    """Return the file with a Visium folder's counts.

    Raises:
        DataError: the folder is no Visium folder.
    """
    names = (f"{MATRIX}.h5", f"{MATRIX}/matrix.mtx.gz", f"{MATRIX}/matrix.mtx")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(
        f"{shown}: no Visium folder: it has none of {', '.join(names)}. Give the folder that Space Ranger made"
    )


def positions_of(folder: Path, shown: str) -> Path:
    """Return the file with a Visium folder's positions; raises DataError where there is none."""
    for name in POSITIONS:
        if (folder / "spatial" / name).is_file():
            return folder / "spatial" / name
    raise DataError(
        f"{shown}: no coordinates: spatial/ has none of {', '.join(POSITIONS)}. Copy them from Space Ranger"
    )


def read_visium(folder: Path, shown: str) -> tuple[anndata.AnnData, list[str]]:
    """Read a folder that `check_file` passed; images are optional.

    Returns:
        The section (`obsm["spatial"]`: x = column and y = row in pixels of the full image) and notes for people.

    Raises:
        DataError: counts or positions are missing or damaged, or share no barcode.
    """
    path = matrix_of(folder, shown)
    matrix, barcodes, genes, library = (_read_h5 if path.suffix == ".h5" else _read_text)(path, shown)
    places = _read_positions(positions_of(folder, shown), shown)
    known = pd.Index(barcodes).isin(places.index)
    if not known.any():
        raise DataError(
            f"{shown}: no barcode of the counts (first: {barcodes[0] if barcodes else 'none'}) is among the positions "
            f"(first: {places.index[0]}). Give counts and positions of one section"
        )
    notes = []
    if not known.all():
        lost = [barcode for barcode, here in zip(barcodes, known, strict=True) if not here]
        notes.append(f"{shown}: {len(lost)} barcodes without a position (first: {lost[0]}) were left out")
        matrix, barcodes = matrix[known], [barcode for barcode in barcodes if barcode in places.index]
    places = places.loc[barcodes]
    section = anndata.AnnData(X=matrix, obs=places[_COLUMNS[1:4]].astype(int), var=genes)
    section.obsm["spatial"] = places[[_COLUMNS[5], _COLUMNS[4]]].to_numpy(dtype=np.float64)
    section.uns["spatial"] = {library or folder.absolute().name: _pictures(folder, shown)}
    return section, notes


def _read_h5(path: Path, shown: str) -> tuple[sp.csr_matrix, list[str], pd.DataFrame, str | None]:
    try:
        with h5py.File(path, "r") as file:
            part = file["matrix"]
            genes, cells = (int(size) for size in part["shape"][...])
            raw = sp.csr_matrix((part["data"][...], part["indices"][...], part["indptr"][...]), shape=(cells, genes))
            barcodes = [str(name) for name in part["barcodes"].asstr()[...]]
            features = part["features"]
            ids, names = (features[key].asstr()[...] for key in ("id", "name"))
            kinds = features["feature_type"].asstr()[...] if "feature_type" in features else None
            library = np.atleast_1d(file.attrs.get("library_ids", []))
    except (OSError, KeyError, ValueError, TypeError, UnicodeDecodeError) as error:
        raise DataError(f"{shown}: damaged {path.name}: {error}. Copy it anew") from error
    matrix = checked_csr(raw, f"{shown}/{path.name}")
    frame = pd.DataFrame({"gene_ids": ids.astype(str)}, index=names.astype(str))
    first = library[0] if len(library) else None
    return *_expression_only(matrix, barcodes, frame, kinds), first.decode() if isinstance(first, bytes) else first


def _read_text(path: Path, shown: str) -> tuple[sp.csr_matrix, list[str], pd.DataFrame, str | None]:
    counts = read_counts(path, f"{shown}/{path.name}", transpose=True)
    if counts.cells is None or counts.genes is None:
        raise DataError(f"{shown}: {path.parent.name} lacks barcodes.tsv or features.tsv. Copy the whole folder")
    return counts.matrix, counts.cells, pd.DataFrame(index=counts.genes), None


def _expression_only(
    matrix: sp.csr_matrix, barcodes: list[str], genes: pd.DataFrame, kinds: np.ndarray | None
) -> tuple[sp.csr_matrix, list[str], pd.DataFrame]:
    """Leave out antibodies and other features that are not gene expression."""
    if kinds is None:
        return matrix, barcodes, genes
    chosen = np.flatnonzero(kinds.astype(str) == _FEATURE_TYPE)
    return (
        (matrix, barcodes, genes) if len(chosen) == len(kinds) else (matrix[:, chosen], barcodes, genes.iloc[chosen])
    )


def _read_positions(path: Path, shown: str) -> pd.DataFrame:
    """Return the columns of Space Ranger by barcode; only the oldest form has no names of columns."""
    where = f"{shown}/spatial/{path.name}"
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path, columns=_COLUMNS)
        else:
            with path.open(encoding="utf-8-sig") as stream:
                named = stream.readline().startswith("barcode")
            table = pd.read_csv(path, header=0 if named else None, names=_COLUMNS, dtype={"barcode": str})
        table[_COLUMNS[1:]] = table[_COLUMNS[1:]].apply(pd.to_numeric)
    except (ValueError, KeyError, OSError) as error:  # also what pandas and pyarrow raise
        raise DataError(f"{where}: needs the columns {', '.join(_COLUMNS)}: {error}. Copy it anew") from error
    if not len(table) or table["barcode"].duplicated().any() or table[_COLUMNS[1:4]].isna().any(axis=None):
        raise DataError(f"{where}: is empty, has a barcode twice or a field missing. Copy it anew from Space Ranger")
    return table.set_index("barcode")


def _pictures(folder: Path, shown: str) -> dict[str, Any]:
    """Return images and scale factors in scanpy's form, as far as they are there."""
    from matplotlib.image import imread

    place = folder / "spatial"
    images = {
        name: np.asarray(imread(place / f"tissue_{name}_image.png"))
        for name in IMAGES
        if (place / f"tissue_{name}_image.png").is_file()
    }
    factors = place / "scalefactors_json.json"
    try:
        scales = json.loads(factors.read_text(encoding="utf-8")) if factors.is_file() else {}
    except ValueError as error:
        raise DataError(f"{shown}/spatial/{factors.name}: not JSON: {error}. Copy it anew, or remove it") from error
    return {"images": images, "scalefactors": scales, "metadata": {}}


def visium_files(folder: Path, shown: str) -> list[Path]:
    """Return the files of a Visium folder that decide what is read, images aside."""
    return [matrix_of(folder, shown), positions_of(folder, shown)]
