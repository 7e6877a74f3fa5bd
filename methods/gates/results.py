"""What an analysis leaves: an AnnData for scverse tools, tables for everything else."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from tenfold.platform.errors import DataError

FILES = {"json": "result.json", "csv": "domains.csv", "h5ad": "result.h5ad", "npz": "embedding.npz"}


def write_results(
    adata: Any, folder: Path, formats: Iterable[str] = tuple(FILES), *, key: str = "gates"
) -> dict[str, Path]:
    """Write the results that an analysis put into a section, under the names of 10.4.

    Read are `obs[key_domain]`, and where they exist `obs[key_domain_refined]`, `obs[key_domain_prob]`, `obsm[X_key]`,
    `uns[key]["metrics"]`, `["graphs"]` and `["notes"]`. A file that exists is replaced as a whole.

    Args:
        adata: the section, unchanged afterwards.
        folder: where to write; made if needed.
        formats: some of json, csv, h5ad, npz.
        key: prefix of the results.

    Returns:
        Path by format; no npz where there is no embedding.

    Raises:
        DataError: a format is unknown, there are no results, or something of the user's in it cannot be stored.
    """
    formats = list(formats)
    unknown = sorted(set(formats) - FILES.keys())
    if unknown:
        raise DataError(f"formats: {', '.join(unknown)} unknown. Choose among {', '.join(FILES)}")
    _domains(adata, key)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    writers: dict[str, Callable[[Path], None]] = {
        "json": lambda path: _write_json(result_document(adata, key), path),
        "csv": lambda path: _write_csv(adata, key, path),
        "h5ad": lambda path: _write_h5ad(adata, path),
        "npz": lambda path: _write_npz(adata, key, path),
    }
    written = {}
    for name in formats:
        if name == "npz" and f"X_{key}" not in adata.obsm:
            continue
        written[name] = folder / FILES[name]
        # Written aside and renamed, so that nobody reads half a file. The ending stays: numpy would add one.
        aside = folder / f".part-{os.getpid()}-{FILES[name]}"
        try:
            writers[name](aside)
            aside.replace(written[name])
        finally:
            aside.unlink(missing_ok=True)
    return written


def result_document(adata: Any, key: str = "gates", *, embedding_url: str = FILES["npz"]) -> dict[str, Any]:
    """Return the result as plain JSON values (10.5); what is missing or not finite becomes None."""
    table = _table(adata, key)
    domains = _domains(adata, key)
    summary = adata.uns.get(key, {})
    document: dict[str, Any] = {
        "n_obs": int(adata.n_obs),
        "n_domains": int(domains.dropna().nunique()),
        "domains": [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)],
        "embedding": None,
        "metrics": plain(summary.get("metrics", {})),
        "graphs": plain(summary.get("graphs", {})),
        "notes": [str(note) for note in np.atleast_1d(summary.get("notes", []))],
    }
    if f"X_{key}" in adata.obsm:
        document["embedding"] = {"shape": list(adata.obsm[f"X_{key}"].shape), "url": embedding_url}
    return document


def plain(value: Any) -> Any:
    """Return a value as JSON knows it: arrays become lists, NaN and infinity None."""
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(inner) for inner in (value.tolist() if isinstance(value, np.ndarray) else value)]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)


def storable(value: Any) -> Any:
    """Return a value as `uns` can hold it through `write_h5ad`.

    None is left out, tuples and lists become arrays (of mixed or nested values: dictionaries by position), data frames
    dictionaries of columns, paths strings; a / in a name becomes _, since HDF5 would make a group of it.
    """
    if hasattr(value, "model_dump"):
        value = value.model_dump()
    if isinstance(value, pd.DataFrame):
        value = {"index": value.index.to_numpy(), **{str(name): value[name].to_numpy() for name in value}}
    elif isinstance(value, pd.Series | pd.Index | pd.Categorical):
        value = np.asarray(value)
    if isinstance(value, dict):
        return {str(name).replace("/", "_"): storable(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple | set | frozenset):
        return _storable_list(list(value) if isinstance(value, list | tuple) else sorted(value, key=str))
    if isinstance(value, np.ndarray):
        return _storable_list(value.tolist()) if value.dtype.kind == "O" else value
    if isinstance(value, bool | int | float | str | np.generic) or sp.issparse(value):
        return value
    return str(value)


def _storable_list(values: list[Any]) -> Any:
    kinds = {
        "text"
        if isinstance(value, str)
        else "number"
        if isinstance(value, bool | int | float | np.number)
        else "other"
        for value in values
        if value is not None
    }
    if kinds == {"text"}:
        return np.array(["" if value is None else value for value in values])
    if kinds <= {"number"}:
        return np.array([np.nan if value is None else value for value in values])
    return {str(index): storable(value) for index, value in enumerate(values) if value is not None}


def _domains(adata: Any, key: str) -> pd.Series:
    name = f"{key}_domain"
    if name not in adata.obs:
        raise DataError(f"obs['{name}'] is missing, so there are no results to write. Run the analysis first")
    return adata.obs[name]


def _table(adata: Any, key: str) -> dict[str, list[Any]]:
    """Return the columns of the table of cells; None where a cell got no domain."""
    columns = {
        "domain": f"{key}_domain",
        "p": f"{key}_domain_prob",
        "refined": f"{key}_domain_refined",
        "section": "section",
        "truth": "truth",
    }
    table: dict[str, list[Any]] = {"id": [str(name) for name in adata.obs_names]}
    for label, name in columns.items():
        if name not in adata.obs:
            continue
        values, missing = adata.obs[name].to_list(), adata.obs[name].isna().to_list()
        table[label] = [
            None if absent else round(float(value), 6) if label == "p" else str(value)
            for value, absent in zip(values, missing, strict=True)
        ]
    return table


def _write_json(document: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(document, allow_nan=False), encoding="utf-8")


def _write_csv(adata: Any, key: str, path: Path) -> None:
    table = _table(adata, key)
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))


def _write_npz(adata: Any, key: str, path: Path) -> None:
    """Write the embedding, names and domains; an empty string where a cell got no domain. Nothing is pickled."""
    table = _table(adata, key)
    np.savez_compressed(
        path,
        embedding=np.asarray(adata.obsm[f"X_{key}"], dtype=np.float32),
        ids=np.array(table["id"], dtype=np.str_),
        domains=np.array([domain or "" for domain in table["domain"]], dtype=np.str_),
    )


def _write_h5ad(adata: Any, path: Path) -> None:
    try:
        adata.write_h5ad(path, compression="gzip")
    except Exception as error:  # anndata raises the kinds of its parts, and notes where in the file it was
        reason = " ".join([str(error).strip() or type(error).__name__, *getattr(error, "__notes__", [])])
        raise DataError(
            f"the section cannot be stored as h5ad: {reason}. Remove what it names from the AnnData, or choose other "
            "formats"
        ) from error
