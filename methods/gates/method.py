"""GATES as the platform drives it."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tenfold.methods.gates.config import NETWORKS, GATESConfig
from tenfold.platform.errors import ConfigError
from tenfold.platform.method import Outcome, Paper, PlanSection

if TYPE_CHECKING:
    from tenfold.methods.gates.service import GATESAnalyser
    from tenfold.platform.context import PlanContext, RunContext

# what decides the prepared section; the rest of the configuration works on it
PREPARED_BY = (
    "preprocessing",
    "spatial_graph",
    "expression_graph",
    "mode",
    "pre_resolution",
    "pre_labels",
    "smooth_input",
)


class GATES:
    """Finds the spatial domains of tissue sections."""

    name: ClassVar[str] = "gates"
    summary: ClassVar[str] = "spatial domains in tissue from a graph attention auto-encoder, with its competitors"
    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "GATES: Graph Attention Network with Global Expression Fusion for Deciphering Spatial Transcriptome "
            "Architectures",
            "2410.20159",
            2024,
        ),
    )
    Config: ClassVar[type[GATESConfig]] = GATESConfig

    @staticmethod
    def spatial_analyser() -> GATESAnalyser:
        """Return what the spatial HTTP application runs."""
        from tenfold.methods.gates.service import GATESAnalyser

        return GATESAnalyser()

    def plan(self, config: GATESConfig, context: PlanContext) -> list[PlanSection]:
        """Read and check the sections; say sizes and what will be done."""
        from tenfold.methods.gates.analysis import is_known, known_domains, num_domains
        from tenfold.methods.gates.checks import check_section
        from tenfold.methods.gates.reading import read_sections
        from tenfold.platform.training.deepspeed_config import deepspeed_config, zero_stage

        if config.method in NETWORKS and context.compute.min_workers != context.compute.max_workers:
            raise ConfigError(
                f"compute.workers = {context.compute.min_workers} to {context.compute.max_workers}: the section is "
                "cut into parts for one number of workers; give that"
            )
        if config.method in NETWORKS and zero_stage(deepspeed_config(context.compute.deepspeed)) == 3:
            raise ConfigError(
                "compute.deepspeed: stage 3 splits weights that the loss reads whole; the network has a million and a "
                "half parameters, use zero0"
            )
        adata = read_sections(config.sections)
        notes = check_section(
            adata,
            layer=config.sections[0].layer,
            spatial_key=config.sections[0].spatial_key,
            n_domains=config.clustering.n_domains,
            preprocessing_enabled=config.preprocessing.enabled,
        )
        truth = known_domains(adata)
        labelled = 0 if truth is None else sum(map(is_known, truth))
        number = num_domains(config.clustering, truth)
        names = list(dict.fromkeys(adata.obs["section"].astype(str)))
        section = (
            ("sections", f"{len(names)}: {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}"),
            ("cells", f"{adata.n_obs:,} ({labelled:,} with a true domain)"),
            ("genes", f"{adata.n_vars:,}; at most {config.preprocessing.num_genes:,} are used"),
            *(("note", note) for note in notes),
        )
        work = [("method", config.method)]
        if config.method in NETWORKS:
            work.append(("graphs", config.mode if config.fusion_weight else "spatial"))
            work.append(("alpha", f"{config.fusion_weight:g}"))
            work.append(("training", training_text(config)))
            work.append(("workers", f"{context.compute.max_workers} (plain data parallel)"))
        work.append(("domains", f"{number} by {config.clustering.kind}, refinement {config.clustering.refine}"))
        return [PlanSection("section", section), PlanSection("work", tuple(work))]

    def run(self, config: GATESConfig, context: RunContext) -> Outcome:
        """Prepare the sections, train, find the domains, keep results, pictures and model."""
        from tenfold.methods.gates.pieces import MODEL, RESULT, domains_piece, prepare_piece
        from tenfold.methods.gates.reading import sections_digest
        from tenfold.methods.gates.saved import FILES, FLAVOR
        from tenfold.platform.models.manifest import Parent

        data = sections_digest(config.sections)
        item: dict[str, Any] = {
            "gates": config.model_dump(mode="json", exclude_unset=True),
            "seed": context.seed,
            "cache": context.cache.uri,
            "folder": f"gates/{_prepared_digest(config, data, context.seed)}",
        }
        cpus, gpus = context.compute.cpus_per_worker, context.compute.gpus_per_worker
        if not context.cache.exists(item["folder"]):
            context.map(prepare_piece, [item], name="prepare", cpus=cpus)
        # a sweep compares metrics; the pictures of the trial that one keeps come from running it alone
        pictures = context.trial is None
        item |= {"storage": context.storage.uri, "checkpoint": None, "log": [], "pictures": pictures}
        if config.method in NETWORKS:
            item |= self._train(config, context, item)
        metrics = context.map(domains_piece, [item], name="domains", cpus=cpus, gpus=gpus)[0]
        found = {f"eval/{name}": value for name, value in metrics.items()}
        if pictures:
            self._show(config, context)
        model = None
        if context.storage.exists(f"{RESULT}-{MODEL}"):
            parents = [Parent(kind="data", reference=", ".join(part.path for part in config.sections), digest=data)]
            model = context.save_model(
                f"{RESULT}-{MODEL}", name="encoder", flavor=FLAVOR, metrics=found, parents=parents, files=FILES
            )
        return Outcome(metrics=found, artifacts={"result": f"{RESULT}/result.h5ad"}, model=model)

    @staticmethod
    def _train(config: GATESConfig, context: RunContext, item: dict[str, Any]) -> dict[str, Any]:
        from tenfold.methods.gates.fit import build_trainer, training_options
        from tenfold.platform.training.curves import training_log
        from tenfold.platform.training.launch import TrainingJob

        payload = {name: item[name] for name in ("gates", "cache", "folder")}
        result = context.train(TrainingJob(build_trainer, payload, training_options(config)))
        log = training_log(context.storage, "train/train").get("train/loss", [])
        return {"checkpoint": result.best.path, "log": log}

    @staticmethod
    def _show(config: GATESConfig, context: RunContext) -> None:
        """Put the pictures into MLflow."""
        import anndata
        from tenfold.methods.gates.pieces import RESULT, figures

        with tempfile.TemporaryDirectory(prefix="tenfold-result-") as scratch:
            folder = context.storage.download(RESULT, Path(scratch) / RESULT)
            adata = anndata.read_h5ad(folder / "result.h5ad")
        for name, drawn in figures(adata, config.sections).items():
            context.log_figure(name, drawn)

    def evaluate(self, config: GATESConfig, model: str, context: RunContext) -> Mapping[str, float]:
        """Label the sections with the saved encoder, without training, and measure."""
        from tenfold.methods.gates.pieces import transformed
        from tenfold.platform.models.references import resolve

        return {f"eval/{name}": value for name, value in transformed(config, resolve(model)).items()}


def training_text(config: GATESConfig) -> str:
    """Return how the network is trained, for people."""
    from tenfold.methods.gates.fit import recipe

    used = recipe(config)
    tiles = f", tiles of {config.tile_cells:,} cells" if config.tile_cells else ", the whole graph in one step"
    return f"{used.epochs} epochs, learning rate {used.learning_rate:g}, {used.loss} loss{tiles}"


def _prepared_digest(config: GATESConfig, data: str, seed: int) -> str:
    content = config.model_dump(mode="json", include={*PREPARED_BY, "sections"})
    content |= {"data": data, "seed": seed, "fused": config.method in NETWORKS and config.fusion_weight > 0}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
