"""Several sections as one AnnData (3.12): over the genes that all have, each cell with the name of its section."""

from __future__ import annotations

import itertools

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from tenfold.methods.gates.checks import NOTES
from tenfold.methods.gates.config import Section
from tenfold.platform.errors import DataError


def join_sections(parts: list[anndata.AnnData], sections: list[Section]) -> anndata.AnnData:
    """Put sections one below the other; the parts are changed.

    Args:
        parts: at least one, as `read_section` returns them.
        sections: where each came from.

    Returns:
        The cells of all parts in their order, with `obs["section"]` (categorical, in the order of appearance): the
        values of `sample_key`, else the file's name. One part keeps all it has; several keep what all of them have.

    Raises:
        DataError: they share no gene, or differ in layer, key or dimensions of the coordinates.
    """
    names = _section_names(parts, sections)
    for part, labels, section in zip(parts, names, sections, strict=True):
        if "section" in part.obs and section.sample_key != "section":
            note = f"{section.path}: obs['section'] is replaced by the section's name"
            part.uns[NOTES] = np.append(part.uns.get(NOTES, np.array([], dtype=str)), note)
        part.obs["section"] = labels
    joined = parts[0] if len(parts) == 1 else _concatenate(parts, sections)
    order = list(dict.fromkeys(itertools.chain.from_iterable(names)))
    joined.obs["section"] = pd.Categorical(joined.obs["section"], categories=order)
    return joined


def _section_names(parts: list[anndata.AnnData], sections: list[Section]) -> list[list[str]]:
    """Return the section of each cell of each part; names that two parts share get the file's name before them."""
    stems = _unique(
        [section.path.rstrip("/").rsplit("/", 1)[-1].split(".", 1)[0] or "section" for section in sections]
    )
    names = [
        [stem] * part.n_obs if section.sample_key is None else part.obs[section.sample_key].astype(str).tolist()
        for part, section, stem in zip(parts, sections, stems, strict=True)
    ]
    counts = pd.Series([name for own in names for name in dict.fromkeys(own)]).value_counts()
    return [
        [f"{stem}-{name}" if counts[name] > 1 else name for name in own]
        for own, stem in zip(names, stems, strict=True)
    ]


def _unique(names: list[str]) -> list[str]:
    return [
        name if names.count(name) == 1 else f"{name}{names[:index].count(name) + 1}"
        for index, name in enumerate(names)
    ]


def _concatenate(parts: list[anndata.AnnData], sections: list[Section]) -> anndata.AnnData:
    _check_alike(parts, sections)
    notes = [str(note) for part in parts for note in np.atleast_1d(part.uns.get(NOTES, []))]
    for column, filling in (("truth", np.nan), ("in_tissue", 1)):  # otherwise one section without it takes it from all
        if any(column in part.obs for part in parts):
            for part in parts:
                if column not in part.obs:
                    part.obs[column] = pd.Categorical([filling] * part.n_obs) if column == "truth" else filling
    for part in parts:
        if sp.issparse(part.X):
            part.X = sp.csr_matrix(part.X)
    repeated = pd.Index([name for part in parts for name in part.obs_names]).duplicated().any()
    if repeated:
        for part in parts:
            part.obs_names = [
                f"{name}-{label}" for name, label in zip(part.obs_names, part.obs["section"], strict=True)
            ]
        notes.append("sections share cell names; the section was added to each")
    joined = anndata.concat(parts, join="inner", merge="same", pairwise=True)
    if not joined.n_vars:
        first = " and ".join(part.var_names[0] for part in parts[:2])
        raise DataError(f"the sections share no gene (first genes: {first}). Use the same gene names in all of them")
    if joined.n_vars < max(part.n_vars for part in parts):
        sizes = ", ".join(str(part.n_vars) for part in parts)
        notes.append(f"{joined.n_vars} genes are in all sections, which have {sizes}")
    pictures = {name: picture for part in parts for name, picture in part.uns.get("spatial", {}).items()}
    if pictures:
        joined.uns["spatial"] = pictures
    joined.obs_names_make_unique()
    if notes:
        joined.uns[NOTES] = np.array(notes)
    return joined


def _check_alike(parts: list[anndata.AnnData], sections: list[Section]) -> None:
    for field in ("layer", "spatial_key"):
        given = {str(getattr(section, field)) for section in sections}
        if len(given) > 1:
            raise DataError(
                f"sections: {field} is {' and '.join(sorted(given))}; needs to be the same in all sections"
            )
    key = sections[0].spatial_key
    for part, section in zip(parts, sections, strict=True):
        if key not in part.obsm:
            raise DataError(f"{section.path}: obsm['{key}'] is missing. Store x, y there, or name it in spatial_key")
        if sections[0].layer is not None and sections[0].layer not in part.layers:
            raise DataError(
                f"{section.path}: layers['{sections[0].layer}'] is missing. Name the layer with raw counts"
            )
    shapes = {np.shape(part.obsm[key])[1:] for part in parts}
    if len(shapes) > 1:
        widths = " and ".join(sorted(str(shape[0]) for shape in shapes))
        raise DataError(f"sections: obsm['{key}'] has {widths} columns; needs x, y (or x, y, z) in all sections")
