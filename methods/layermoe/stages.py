"""The stages of an expansion: the base where it is not given, similarity, new experts (stage 1), review (stage 2).

All but a run's last one are shared by all runs and trials with the same data and options: a sweep over budgets
measures similarity once, one over the review trains the experts once. A later expansion starts where the review ended.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tenfold.methods.layermoe.assignment import Assignment, assign
from tenfold.methods.layermoe.config import EXPANDING, LayerMoEConfig
from tenfold.methods.layermoe.jobs import Job, train
from tenfold.methods.layermoe.sources import layout, loaded, on_device, saved, source_digest
from tenfold.platform.method import Outcome
from tenfold.platform.models.source import ModelSource
from tenfold.platform.stages import Stage, StageResult

if TYPE_CHECKING:
    from tenfold.methods.layermoe.similarity import Similarity
    from tenfold.platform.context import PlanContext, RunContext

SIMILARITY, ASSIGNMENT = "similarity.json", "assignment{}.json"


@dataclass(frozen=True)
class Grown:
    """One expansion that has been done.

    Attributes:
        options: of this expansion.
        before: the model that it started from.
        after: the model that it gave; the same with strategy base.
        assignment: what the layers got; None for strategies without experts.
        result: the last stage; None with strategy base.
    """

    options: LayerMoEConfig
    before: ModelSource
    after: ModelSource
    assignment: Assignment | None
    result: StageResult | None


def grow(config: LayerMoEConfig, context: RunContext) -> list[Grown]:
    """Do every expansion of a run, the last stage of all in the run's own folder."""
    source = base_model(config, context)
    done: list[Grown] = []
    expansions = config.expansions()
    for number, options in enumerate(expansions, start=1):
        ending = "" if number == 1 else f"-{number}"
        done.append(_expansion(options, source, context, ending, is_last=number == len(expansions)))
        source = done[-1].after
    return done


def base_model(config: LayerMoEConfig, context: RunContext) -> ModelSource:
    """Return the model that the first expansion starts from; trained on the old languages first where asked."""
    if config.base_training is None:
        return config.model
    return saved(config.model, context.stages([base_stage(config, context)])[0])


def base_stage(config: LayerMoEConfig, context: PlanContext | RunContext) -> Stage:
    """Return the training of the base, all weights on the old languages."""
    assert config.base_training is not None
    options, digest = config.expansions()[0], source_digest(config.model)
    texts = _texts(options, "old", "evaluation")
    decides = {
        **_common(options, digest, texts, context),
        "stage": "base",
        "length": options.data.stage1_length,
        "training": config.base_training.model_dump(mode="json"),
    }
    job = Job("base", options, config.model, config.base_training, digest, texts)
    return Stage("base", decides, partial(train, job), shared=True)


def _expansion(
    options: LayerMoEConfig, source: ModelSource, context: RunContext, ending: str, *, is_last: bool
) -> Grown:
    measured = measure_similarity(options, source, context, ending) if options.needs_similarity else None
    assignment = assign(options, layout(source).totals, measured, seed=context.seed)
    if assignment is not None:
        _keep(assignment, options, source, context, ending)
    if options.strategy == "base":
        return Grown(options, source, source, None, None)
    is_shared = options.has_review or not is_last
    done = context.stages([experts_stage(options, source, assignment, context, ending, shared=is_shared)])[0]
    if options.has_review and assignment is not None:
        stage = review_stage(options, saved(source, done), assignment, context, ending, shared=not is_last)
        done = context.stages([stage])[0]
    return Grown(options, source, saved(source, done), assignment, done)


def experts_stage(
    options: LayerMoEConfig,
    source: ModelSource,
    assignment: Assignment | None,
    context: RunContext,
    ending: str = "",
    *,
    shared: bool,
) -> Stage:
    """Return stage 1, or the training that stands in its place for full_ft, lora and llama_pro.

    What decides is named one by one: layermoe and moe_lpr with the same counts are the same stage.
    """
    from tenfold.methods.layermoe.insertion import places_of

    kind = "experts" if options.strategy in EXPANDING else options.strategy
    digest, texts = source_digest(source), _texts(options, "new", "evaluation")
    decides = {
        **_common(options, digest, texts, context),
        "stage": "moe" if options.strategy == "moe" else kind,  # moe freezes nothing
        "length": options.data.stage1_length,
        "token_budget": options.data.token_budget,
        "training": options.stage1.model_dump(mode="json"),
    }
    if assignment is not None:
        decides |= {
            "new_experts": assignment.new,
            "top_k": options.top_k,
            "router_init": options.router_init,
            "balance_weight": options.balance_weight,
        }
    if options.strategy == "lora":
        decides["lora"] = options.lora.model_dump(mode="json")
    places: list[int] = []
    if options.strategy == "llama_pro":
        places = places_of(len(layout(source).totals), options.inserted_layers)
        decides["copied_layers"] = places
    job = Job(kind, options, source, options.stage1, digest, texts, assignment, tuple(places))
    return Stage(f"{kind}{ending}", decides, partial(train, job), shared=shared)


def review_stage(
    options: LayerMoEConfig,
    source: ModelSource,
    assignment: Assignment,
    context: RunContext,
    ending: str = "",
    *,
    shared: bool,
) -> Stage:
    """Return stage 2, from the model that stage 1 gave."""
    assert options.stage2 is not None
    digest, texts = source_digest(source), _texts(options, "old", "earlier", "new", "evaluation")
    decides = {
        **_common(options, digest, texts, context),
        "stage": "review",
        "length": options.data.stage2_length,
        "max_documents": options.data.max_documents,
        "prior": [options.prior_weight, options.prior_form],
        "classifier_layers": assignment.classifier_layers,
        "training": options.stage2.model_dump(mode="json"),
    }
    if assignment.classifier_layers:
        decides["classifier"] = options.classifier.model_dump(mode="json", exclude={"layers", "share"})
        decides["classifier_weight"] = options.classifier_weight
    job = Job("review", options, source, options.stage2, digest, texts, assignment)
    return Stage(f"review{ending}", decides, partial(train, job), shared=shared)


def similarity_stage(options: LayerMoEConfig, source: ModelSource, ending: str = "") -> Stage:
    """Return the measuring of similarity; every indicator is made of the same pairs, so it does not decide."""
    groups = options.data.groups()
    decides = {
        "stage": "similarity",
        "model": source_digest(source),
        "data": _texts(options, "old", "earlier", "new"),
        "known": [*groups["old"], *groups["earlier"]],
        "new": groups["new"],
        **options.similarity.model_dump(mode="json", exclude={"indicator"}),
    }
    return Stage(f"similarity{ending}", decides, partial(_similarity_work, options, source), shared=True)


def measure_similarity(
    options: LayerMoEConfig, source: ModelSource, context: RunContext, ending: str = ""
) -> Similarity:
    """Return how alike the languages look to each layer of a model; measured once for a model and its texts."""
    from tenfold.methods.layermoe.similarity import Similarity

    done = context.stages([similarity_stage(options, source, ending)])[0]
    return Similarity.from_json(json.loads(done.storage.read_text(SIMILARITY)))


def _similarity_work(options: LayerMoEConfig, source: ModelSource, context: RunContext) -> Outcome:
    import numpy as np
    from tenfold.methods.layermoe.corpora import by_language
    from tenfold.methods.layermoe.plots import similarity_figure
    from tenfold.methods.layermoe.similarity import layer_similarity, pairwise

    data, groups = options.data, options.data.groups()
    texts = by_language([*data.old, *data.earlier, *data.new])
    items = [
        {
            "model": source.model_dump(mode="json"),
            "seed": context.seed,
            "corpora": [corpus.model_dump(mode="json") for corpus in corpora],
            "options": options.similarity.model_dump(mode="json", exclude={"indicator"}),
        }
        for corpora in texts.values()
    ]
    found = context.map(
        similarity_piece,
        items,
        name="similarity",
        keys=list(texts),
        cpus=context.compute.cpus_per_worker,
        gpus=context.compute.gpus_per_worker,
    )
    means = {name: np.asarray(part["sums"]) / part["count"] for name, part in zip(texts, found, strict=True)}
    measured = layer_similarity(pairwise(means), [*groups["old"], *groups["earlier"]], groups["new"])
    counts = {name: part["count"] for name, part in zip(texts, found, strict=True)}
    context.storage.write_text(SIMILARITY, json.dumps(measured.to_json() | {"tokens": counts}))
    context.log_figure("similarity", similarity_figure(measured))
    metrics = {f"similarity/layer_{layer:03d}": float(value) for layer, value in enumerate(measured.combined)}
    return Outcome(metrics=metrics, artifacts={"similarity": SIMILARITY})


def similarity_piece(item: dict[str, Any]) -> dict[str, Any]:
    """Measure one language; runs on a worker."""
    from tenfold.methods.layermoe.corpora import Corpus, documents
    from tenfold.methods.layermoe.similarity import measure_language

    model, tokenizer = loaded(item["model"], item["seed"])
    texts = documents([Corpus.model_validate(corpus) for corpus in item["corpora"]])
    found = measure_language(on_device(model), tokenizer, texts, **item["options"])
    return {"sums": found.sums.tolist(), "count": found.count, "skipped": found.skipped}


def _common(
    options: LayerMoEConfig, digest: str, texts: dict[str, str], context: PlanContext | RunContext
) -> dict[str, Any]:
    """Return what decides every training; held-out text does, because it chooses the checkpoint."""
    return {
        "model": digest,
        "data": texts,
        "groups": options.data.groups(),
        "held_out_lines": options.evaluation.max_lines,
        "workers": context.compute.max_workers,
    }


def _texts(options: LayerMoEConfig, *groups: str) -> dict[str, str]:
    """Return group -> digest of its texts, of those that have any."""
    from tenfold.methods.layermoe.corpora import corpora_digest

    named = options.data.named()
    return {name: corpora_digest(named[name]) for name in groups if named[name]}


def _keep(
    assignment: Assignment, options: LayerMoEConfig, source: ModelSource, context: RunContext, ending: str
) -> None:
    """Write down and draw what the layers get."""
    from tenfold.methods.layermoe.plots import allocation_figure

    present = layout(source)
    experts = [[*known, new] for known, new in zip(present.experts, assignment.new, strict=True)]
    expansions = [", ".join(names) for names in [*present.languages["expansions"], options.data.groups()["new"]]]
    context.storage.write_text(ASSIGNMENT.format(ending), json.dumps(assignment.to_json()))
    context.report({f"experts{ending}/layer_{layer:03d}": float(n) for layer, n in enumerate(assignment.totals)})
    drawn = allocation_figure(
        experts,
        expansions=expansions,
        classifier_layers=assignment.classifier_layers,
        similarity=assignment.similarity,
    )
    context.log_figure(f"allocation{ending}", drawn)
