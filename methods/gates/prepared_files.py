"""A prepared section on disk: what workers of a training job and later pieces read; nothing is pickled."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tenfold.methods.gates.graph import Graph
from tenfold.methods.gates.preparing import Prepared

ARRAYS, TEXTS = "arrays.npz", "texts.json"


def write_prepared(folder: Path, prepared: Prepared) -> None:
    """Write a prepared section into a folder."""
    expression = prepared.expression
    arrays = {
        "data": expression.data,
        "indices": expression.indices,
        "indptr": expression.indptr,
        "shape": np.array(expression.shape),
        "kept": prepared.kept,
        "coordinates": prepared.coordinates,
    }
    if prepared.sections is not None:
        arrays["sections"] = prepared.sections
    graphs = {"neighbours": prepared.neighbours, "first": prepared.graphs[0], "second": prepared.graphs[1]}
    for name, graph in graphs.items():
        if graph is not None:
            arrays |= {f"{name}_offsets": graph.offsets, f"{name}_senders": graph.senders}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / ARRAYS, **arrays)  # type: ignore[arg-type]
    texts = {"genes": prepared.genes, "statistics": prepared.statistics, "notes": prepared.notes}
    (folder / TEXTS).write_text(json.dumps(texts), encoding="utf-8")


def read_prepared(folder: Path) -> Prepared:
    """Read what `write_prepared` wrote."""
    from scipy.sparse import csr_matrix

    texts = json.loads((folder / TEXTS).read_text(encoding="utf-8"))
    with np.load(folder / ARRAYS, allow_pickle=False) as stored:
        graphs = {
            name: Graph(stored[f"{name}_offsets"], stored[f"{name}_senders"])
            for name in ("neighbours", "first", "second")
            if f"{name}_offsets" in stored
        }
        return Prepared(
            csr_matrix((stored["data"], stored["indices"], stored["indptr"]), shape=tuple(stored["shape"])),
            texts["genes"],
            stored["kept"],
            stored["coordinates"],
            stored.get("sections"),
            graphs["neighbours"],
            (graphs["first"], graphs.get("second")),
            texts["statistics"],
            texts["notes"],
        )
