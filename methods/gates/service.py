"""What the spatial HTTP application asks of GATES: `tenfold.serve.spatial.analyser.SpatialAnalyser`."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tenfold.methods.gates import analysis, pl, saved, tl
from tenfold.methods.gates.checks import NOTES, Limits, check_section
from tenfold.methods.gates.config import GATESOptions, Section
from tenfold.methods.gates.joining import join_sections
from tenfold.methods.gates.preparing import prepare
from tenfold.methods.gates.reading import read_section
from tenfold.methods.gates.results import result_document, write_results
from tenfold.platform.errors import ConfigError, DataError
from tenfold.platform.validation import did_you_mean

if TYPE_CHECKING:
    from anndata import AnnData

Progress = Callable[[dict[str, Any]], None]

SEED = 2024
EMBEDDING_URL = "result?format=npz"  # beside .../jobs/ID/result, where clients read it
VIEW, EXPRESSION = "view.npz", "expression.h5"
SECTION_OPTIONS = ("labels", "layer", "spatial_key", "sample_key", "transpose")
# option of a client -> where it is in GATESOptions
PLACES = {
    "n_domains": ("clustering", "n_domains"),
    "clustering": ("clustering", "kind"),
    "refine": ("clustering", "refine"),
    "spatial_graph": ("spatial_graph", "kind"),
    "radius": ("spatial_graph", "radius"),
    "k": ("expression_graph", "k"),
    "num_genes": ("preprocessing", "num_genes"),
    "preprocess": ("preprocessing", "enabled"),
}
GAP = 1.1  # sections are drawn side by side at this multiple of their widths


class GATESAnalyser:
    """Checks uploaded sections, analyses them, answers questions about results."""

    def check(self, files: Mapping[str, Path], params: Mapping[str, Any], limits: Any) -> dict[str, Any]:
        """Read and check a section within limits; see `SpatialAnalyser.check`."""
        options, section = _options(params), _section(files, params)
        adata = _read(section, files, Limits(**asdict(limits)))
        notes = check_section(
            adata,
            layer=section.layer,
            spatial_key=section.spatial_key,
            n_domains=options.clustering.n_domains,
            preprocessing_enabled=options.preprocessing.enabled,
        )
        return {
            "n_obs": adata.n_obs,
            "n_vars": adata.n_vars,
            "sections": int(adata.obs["section"].nunique()),
            "notes": notes,
        }

    def run(self, files: Mapping[str, Path], params: Mapping[str, Any], folder: Path, progress: Progress) -> None:
        """Analyse a section and write everything that a client may ask for; see `SpatialAnalyser.run`."""
        options, section = _options(params), _section(files, params)
        seed = int(params.get("seed", SEED))
        progress({"stage": "reading"})
        adata = _read(section, files)
        progress({"stage": "building graphs"})
        prepared = prepare(
            adata,
            options,
            seed,
            layer=section.layer,
            spatial_key=section.spatial_key,
            sections=adata.obs["section"].to_numpy(),
        )
        progress({"stage": "training"})

        def told(epoch: int, epochs: int, loss: float) -> None:
            progress({"stage": "training", "epoch": epoch, "epochs": epochs, "loss": loss})

        found = analysis.analyse(
            adata, prepared, options, seed, layer=section.layer, truth=analysis.known_domains(adata), progress=told
        )
        analysis.write(adata, prepared, found, options, seed)
        if found.embedding is not None:
            progress({"stage": "drawing the map of cells"})
            tl.umap(adata, random_state=seed)
        progress({"stage": "writing results"})
        pl.set_colours(adata)
        adata.uns["gates"]["spatial_key"] = section.spatial_key
        _leave_out_stored_name(adata, section)
        write_results(adata, folder, ("csv", "npz", "h5ad"))
        document = result_document(adata, embedding_url=EMBEDDING_URL)
        (folder / "result.json").write_text(json.dumps(document, allow_nan=False), encoding="utf-8")
        _write_view(adata, section.spatial_key, folder / VIEW)
        _write_expression(prepared, adata.n_obs, folder / EXPRESSION)

    def genes(self, folder: Path) -> list[str]:
        """Return the genes of the analysis."""
        import h5py

        with h5py.File(folder / EXPRESSION, "r") as stored:
            return [str(name) for name in stored["genes"].asstr()[:]]

    def gene(self, folder: Path, name: str) -> np.ndarray:
        """Return log-normalised expression [N]; 0 for cells that were left out."""
        import h5py

        names = self.genes(folder)
        if name not in names:
            raise DataError(
                f"gene: {name} is not among the {len(names)} genes of the analysis{did_you_mean(name, names)}"
            )
        index = names.index(name)
        with h5py.File(folder / EXPRESSION, "r") as stored:
            start, end = (int(value) for value in stored["indptr"][index : index + 2])
            values = np.zeros(int(stored.attrs["cells"]), dtype=np.float32)
            values[stored["indices"][start:end]] = stored["data"][start:end]
        return values

    def plot(self, folder: Path, color: str, size: float | None, dpi: int) -> bytes:
        """Draw the tissue as PNG."""
        import anndata

        adata = anndata.read_h5ad(folder / "result.h5ad")
        known = {"domain": "gates_domain", "refined": "gates_domain_refined", "truth": "truth"}
        there = {name: column for name, column in known.items() if column in adata.obs}
        if color in there:
            name = there[color]
        elif color in known:
            raise DataError(f"color: there is no {color} in these results; there are {', '.join(there)} and genes")
        else:
            name = f"gene {color}"
            try:
                adata.obs[name] = self.gene(folder, color)
            except DataError as error:
                raise DataError(str(error).replace("gene:", "color:", 1)) from error
        drawn = pl.spatial(adata, name, spatial_key=str(adata.uns["gates"]["spatial_key"]), size=size)
        stream = io.BytesIO()
        drawn.savefig(stream, format="png", dpi=dpi)
        return stream.getvalue()

    def describe_model(self, model_folder: Path) -> dict[str, Any]:
        """Return what a client should know about a saved model."""
        return saved.describe(model_folder)

    def predict(self, files: Mapping[str, Path], model_folder: Path, params: Mapping[str, Any]) -> dict[str, Any]:
        """Label a section with a saved model."""
        model, section = saved.load_model(model_folder), _section(files, params)
        adata = _read(section, files)
        prepared, found = saved.transform(
            adata,
            model,
            layer=section.layer,
            spatial_key=section.spatial_key,
            sections=adata.obs["section"].to_numpy(),
            truth=analysis.known_domains(adata),
        )
        analysis.write(adata, prepared, found, model.options, model.seed)
        _leave_out_stored_name(adata, section)
        return {**result_document(adata), "embedding": None}  # it is stored nowhere


def _options(params: Mapping[str, Any]) -> GATESOptions:
    """Return the options of an analysis from a client's.

    Raises:
        DataError: they do not fit together; one line each.
    """
    nested: dict[str, Any] = {}
    for name, value in params.items():
        if name in SECTION_OPTIONS or name == "seed":
            continue
        if name in PLACES:
            part, field = PLACES[name]
            nested.setdefault(part, {})[field] = value
        else:
            nested[name] = value
    try:
        return tl.make_options(nested, {})
    except ConfigError as error:
        raise DataError(
            "\n".join(line if " = " in line.split(":")[0] else f"params: {line}" for line in str(error).splitlines())
        ) from error


def _section(files: Mapping[str, Path], params: Mapping[str, Any]) -> Section:
    options = {name: params[name] for name in SECTION_OPTIONS if name in params}
    main = files.get("file") or files["counts"]
    beside = {"coordinates": files.get("coordinates"), "truth": files.get("labels")}
    return Section(path=str(main), **{name: str(path) for name, path in beside.items() if path is not None}, **options)


def _read(section: Section, files: Mapping[str, Path], limits: Limits | None = None) -> AnnData:
    """Read an upload; what is noted about it names files by the parts of the form, not by their places here."""
    adata = read_section(section, limits)
    left_out = section.sample_key is None and "section" in adata.obs
    if left_out:
        del adata.obs["section"]
    adata = join_sections([adata], [section])
    notes = [str(note) for note in np.atleast_1d(adata.uns.get(NOTES, []))]
    for name, path in files.items():
        notes = [note.replace(str(path), name) for note in notes]
    if left_out:
        notes.append("obs['section'] is left out. Name it in sample_key if its values are sections")
    if notes:
        adata.uns[NOTES] = np.array(notes)
    return adata


def _leave_out_stored_name(adata: AnnData, section: Section) -> None:
    """Remove the name of a section that has none but that of its file, for the application stores all alike."""
    if section.sample_key is None:
        del adata.obs["section"]


def _write_view(adata: AnnData, spatial_key: str, path: Path) -> None:
    """Write what the page draws: places with sections side by side, domains (-1 = none), probabilities, UMAP."""
    where = np.array(adata.obsm[spatial_key][:, :2], dtype=np.float64)
    edge = 0.0
    sections = adata.obs["section"].to_numpy() if "section" in adata.obs else np.zeros(adata.n_obs)
    for section in dict.fromkeys(sections):
        chosen = sections == section
        low, high = np.nanmin(where[chosen], axis=0), np.nanmax(where[chosen], axis=0)
        where[chosen] -= low
        where[chosen, 0] += edge
        edge += float(high[0] - low[0]) * GAP
    arrays = {
        "x": where[:, 0].astype(np.float32),
        "y": where[:, 1].astype(np.float32),
        "domain": _codes(adata, "gates_domain"),
        "y_up": np.bool_("spatial" not in adata.uns),  # rows of an image count downwards
        "probability": np.nan_to_num(adata.obs["gates_domain_prob"].to_numpy(dtype=np.float32)),
    }
    if "gates_domain_refined" in adata.obs:
        arrays["refined"] = _codes(adata, "gates_domain_refined")
    if "X_gates_umap" in adata.obsm:
        arrays["umap"] = np.asarray(adata.obsm["X_gates_umap"], dtype=np.float32)
    np.savez(path, **arrays)  # type: ignore[arg-type]


def _codes(adata: AnnData, name: str) -> np.ndarray:
    return adata.obs[name].cat.codes.to_numpy(dtype=np.int16)


def _write_expression(prepared: Any, num_cells: int, path: Path) -> None:
    """Write log-normalised expression by gene, so that one gene is read without the others."""
    import h5py

    by_gene = prepared.expression.tocsc()
    rows = np.flatnonzero(prepared.kept)[by_gene.indices]
    with h5py.File(path, "w") as stored:
        stored.attrs["cells"] = num_cells
        stored.create_dataset("genes", data=list(prepared.genes), dtype=h5py.string_dtype())
        stored.create_dataset("indptr", data=by_gene.indptr)
        stored.create_dataset("indices", data=rows.astype(np.int32))
        stored.create_dataset("data", data=by_gene.data.astype(np.float32))
