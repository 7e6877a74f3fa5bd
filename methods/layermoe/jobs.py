"""One training of an expansion: the model that it starts from, what the workers are told, and the model that it gives.

The model with untrained experts or classifiers is made once, by one worker, and lies in the stage's folder while the
stage trains: so every worker loads it as it loads any model, whole or in the parts that ZeRO-3 leaves it.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.methods.layermoe.assignment import Assignment
from tenfold.methods.layermoe.config import LayerMoEConfig
from tenfold.methods.layermoe.sources import layout, loaded
from tenfold.platform.method import Outcome
from tenfold.platform.models.source import ModelSource

if TYPE_CHECKING:
    from tenfold.platform.context import RunContext
    from tenfold.platform.training.options import TrainingOptions

START = "start"  # folder of the untrained model
FLAVOR, PLAIN = "moe-causal-lm", "causal-lm"


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        stage: base, experts, review, full_ft, lora or llama_pro.
        options: of the expansion.
        source: the model that it starts from, as yet without the experts or classifiers that the stage adds.
        training: steps, batches, ...
        digest: of the model.
        texts: group -> digest of what is read.
        assignment: what the layers get.
        places: the layers behind which llama_pro inserts copies.
    """

    stage: str
    options: LayerMoEConfig
    source: ModelSource
    training: TrainingOptions
    digest: str
    texts: dict[str, str]
    assignment: Assignment | None = None
    places: tuple[int, ...] = ()

    def additions(self) -> dict[str, Any] | None:
        """Return what the stage adds to its model before it trains, as plain data for `start_piece`; None: nothing."""
        options, given = self.options, self.assignment
        if self.places:
            return {"places": list(self.places)}
        if given is None:
            return None
        if self.stage == "experts":
            groups = options.data.groups()
            return {
                "new_counts": given.new,
                "languages": groups["new"],
                "old_languages": groups["old"],
                "router_init": options.router_init,
                "top_k": options.top_k,
                "record": {
                    "strategy": options.strategy,
                    "allocation": options.allocation.model_dump(mode="json", exclude_none=True),
                    "totals": given.totals,
                    "similarity": given.similarity,
                },
            }
        if not given.classifier_layers:
            return None
        classifier = options.classifier
        return {"layers": given.classifier_layers, "classes": classifier.classes, "pool": classifier.pool}


def train(job: Job, context: RunContext) -> Outcome:
    """Do a job, and keep the best checkpoint as a model."""
    from tenfold.methods.layermoe.insertion import copies_of
    from tenfold.methods.layermoe.trainer import build_trainer
    from tenfold.platform.models.manifest import Parent
    from tenfold.platform.training.launch import TrainingJob

    start = start_model(job, context)
    payload = {
        "layermoe": job.options.model_dump(mode="json"),
        "stage": job.stage,
        "model": start.model_dump(mode="json"),
        "copies": copies_of(job.places),
    }
    result = context.train(TrainingJob(build_trainer, payload, job.training, name=job.stage))
    metrics = {name: value for name, value in result.best.metrics.items() if name.startswith("eval/")}
    parents = [Parent(kind="initial", reference=job.source.name, digest=job.digest)]
    parents += [
        Parent(kind="data", reference=", ".join(c.path for c in job.options.data.named()[name]), digest=digest)
        for name, digest in job.texts.items()
        if name != "evaluation"
    ]
    expanded = job.stage in ("experts", "review") or any(total > 1 for total in layout(start).totals)
    model = context.save_model(
        result.best.path,
        name="model",
        flavor=FLAVOR if expanded else PLAIN,
        metrics=metrics,
        parents=parents,
    )
    context.storage.delete(START)
    return Outcome(metrics=metrics, model=model)


def start_model(job: Job, context: RunContext) -> ModelSource:
    """Return the model that workers load, which a worker makes first where the stage adds something."""
    from tenfold.platform.models.manifest import MANIFEST_NAME

    additions = job.additions()
    if additions is None:
        return job.source
    storage = context.storage
    if not storage.exists(f"{START}/{MANIFEST_NAME}"):
        item = {
            "model": job.source.model_dump(mode="json"),
            "seed": context.seed,
            "storage": storage.uri,
            "stage": job.stage,
            "additions": additions,
        }
        storage.delete(f"map/{START}")  # it may have been made once and deleted since
        storage.delete(START)
        context.map(start_piece, [item], name=START, cpus=context.compute.cpus_per_worker)
    return ModelSource(model=storage.uri_of(START), dtype=job.source.dtype)


def start_piece(item: dict[str, Any]) -> dict[str, Any]:
    """Add experts, classifiers or layers to a model and store it; runs on a worker, on the CPU."""
    from tenfold.methods.layermoe.expansion import attach_classifiers, expand
    from tenfold.methods.layermoe.insertion import insert_layers
    from tenfold.platform.models.saving import save_model
    from tenfold.platform.storage import Storage

    model, tokenizer = loaded(item["model"], item["seed"])
    if item["stage"] == "experts":
        model = expand(model, seed=item["seed"], **item["additions"])
    elif item["stage"] == "llama_pro":
        model = insert_layers(model, item["additions"]["places"])
    else:
        model = attach_classifiers(model, seed=item["seed"], **item["additions"])
    with tempfile.TemporaryDirectory(prefix="tenfold-expanded-") as scratch:
        folder = Path(scratch) / "model"
        flavor = PLAIN if item["stage"] == "llama_pro" else FLAVOR
        manifest = save_model(model, tokenizer, folder, flavor=flavor, method="layermoe", name=START)
        Storage(item["storage"]).upload(folder, START)
    return {"digest": manifest.digest}
