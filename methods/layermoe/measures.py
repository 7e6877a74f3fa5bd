"""What a run is measured by: loss on held-out lines before and after each expansion, routing, what it cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tenfold.methods.layermoe.config import LayerMoEConfig
from tenfold.methods.layermoe.downstream import downstream
from tenfold.methods.layermoe.measured import kept
from tenfold.methods.layermoe.sources import layout, loaded, on_device, source_digest
from tenfold.methods.layermoe.stages import Grown
from tenfold.platform.models.source import ModelSource
from tenfold.platform.stages import digest_of

if TYPE_CHECKING:
    from tenfold.platform.context import RunContext

FILE = "scores.json"


def measure(config: LayerMoEConfig, done: Sequence[Grown], context: RunContext) -> dict[str, float]:
    """Return the metrics of a run; every model is measured once, whatever runs share it.

    Args:
        config: the run's options.
        done: its expansions in their order.
        context: the run.

    Returns:
        `eval/...` of the last expansion (`evaluation.loss_metrics`; `eval/nats_per_byte` and `eval/bits_per_byte` are
        means over all languages, old and new) with `before/...`, the same of the model that it started from,
        `routing/...`, what `downstream` gives, and `eval/added_parameters` of all expansions together; of earlier
        expansions `expansion_N/...`.
    """
    from tenfold.methods.layermoe.evaluation import loss_metrics

    metrics: dict[str, float] = {}
    table: dict[str, Any] = {}
    for number, grown in enumerate(done, start=1):
        is_last = number == len(done)
        groups = grown.options.data.groups()
        before, after = (scores(config, source, context, f"{name}-{number}") for name, source in _models(grown))
        found = loss_metrics(losses(after), groups, losses(before)) | _overall(losses(after), groups)
        metrics |= (
            found if is_last else {_renamed(name, f"expansion_{number}"): value for name, value in found.items()}
        )
        table[f"expansion_{number}"] = {"before": before, "after": after}
        if is_last:
            own = loss_metrics(losses(before), groups) | downstream(config, grown.before, groups, context, "before")
            metrics |= {_renamed(name, "before"): value for name, value in own.items()}
            metrics |= downstream(config, grown.after, groups, context, "after") | routing(config, grown, context)
    metrics["eval/added_parameters"] = float(num_parameters(done[-1].after) - num_parameters(done[0].before))
    context.storage.write_text(FILE, json.dumps(table))
    return metrics


def scores(config: LayerMoEConfig, source: ModelSource, context: RunContext, name: str) -> dict[str, dict[str, Any]]:
    """Return language -> what `LanguageLoss` holds, of every language with held-out lines."""
    from tenfold.methods.layermoe.corpora import by_language, corpora_digest

    digest, options = source_digest(source), config.evaluation
    # a fresh model has other weights with every seed
    seed = context.seed if source.config is not None else None
    items, keys = [], []
    for language, corpora in by_language(config.data.evaluation).items():
        keys.append(
            digest_of({"model": digest, "seed": seed, "text": corpora_digest(corpora), "n": options.max_lines})
        )
        items.append(_item(config, source, context, language, [corpus.model_dump(mode="json") for corpus in corpora]))
    found = kept(context, score_piece, items, keys, f"scores-{name}")
    return {item["language"]: part for item, part in zip(items, found, strict=True)}


def score_piece(item: dict[str, Any]) -> dict[str, Any]:
    """Measure the loss on one language's lines; runs on a worker."""
    from dataclasses import asdict

    from tenfold.methods.layermoe.evaluation import loss_by_language

    model, tokenizer = loaded(item["model"], item["seed"])
    lines = _lines(item)
    found = loss_by_language(
        on_device(model), tokenizer, lines, batch_size=item["batch_size"], chunk=item["loss_chunk_rows"]
    )
    return asdict(found[item["language"]])


def _overall(found: Mapping[str, Any], groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return the plain means over all languages of the run, old and new: one number that sweeps may compare."""
    known = [found[language] for names in groups.values() for language in names]
    return {
        f"eval/{name}": sum(getattr(loss, name) for loss in known) / len(known)
        for name in ("nats_per_byte", "bits_per_byte")
    }


def losses(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return language -> LanguageLoss."""
    from tenfold.methods.layermoe.evaluation import LanguageLoss

    return {language: LanguageLoss(**part) for language, part in found.items()}


def routing(config: LayerMoEConfig, grown: Grown, context: RunContext) -> dict[str, float]:
    """Return where the tokens of each language go, and draw it; nothing for models without experts."""
    from tenfold.methods.layermoe.corpora import by_language, corpora_digest, group_of_language
    from tenfold.methods.layermoe.evaluation import counts_from_json, load_shares, routing_metrics
    from tenfold.methods.layermoe.plots import routing_figure

    made = layout(grown.after)
    if not config.evaluation.routing or all(total == 1 for total in made.totals):
        return {}
    groups = group_of_language(grown.options.data, made.languages["expansions"][:-1])
    # of languages that the model has met
    texts = {name: own for name, own in by_language(config.data.evaluation).items() if name in groups}
    digest = source_digest(grown.after)
    items, keys = [], []
    for language, corpora in texts.items():
        item = _item(config, grown.after, context, language, [corpus.model_dump(mode="json") for corpus in corpora])
        items.append(item | {"group": groups[language]})
        decides = {"model": digest, "text": corpora_digest(corpora), "n": item["max_lines"], "group": groups[language]}
        keys.append(digest_of({"routing": decides}))
    found = kept(context, routing_piece, items, keys, "routing")
    counts = {name: counts_from_json(part)[name] for name, part in zip(texts, found, strict=True)}
    context.log_figure(
        "routing",
        routing_figure(
            load_shares(counts, len(made.totals)),
            old=grown.options.data.groups()["old"],
            classifier_layers=made.classifier_layers,
        ),
    )
    metrics = routing_metrics(counts, groups)
    layers: dict[int, dict[str, float]] = {}
    for name, value in metrics.items():
        whole, _, layer = name.partition("/layer_")
        if layer:
            layers.setdefault(int(layer), {})[f"{whole}/by_layer"] = value
    for layer_number, values in layers.items():
        context.tracker.log_metrics(values, step=layer_number)  # a curve over the layers
    return {name: value for name, value in metrics.items() if "/layer_" not in name}


def routing_piece(item: dict[str, Any]) -> dict[str, Any]:
    """Count where the tokens of one language go; runs on a worker."""
    from tenfold.methods.layermoe.evaluation import counts_to_json, routing_by_language

    model, tokenizer = loaded(item["model"], item["seed"])
    groups = {item["language"]: item["group"]}
    counts = routing_by_language(on_device(model), tokenizer, _lines(item), groups, batch_size=item["batch_size"])
    return counts_to_json(counts)


def num_parameters(source: ModelSource) -> int:
    """Return the parameters of a model; tied weights count once."""
    from tenfold.platform.models.loading import outline

    return sum(parameter.numel() for parameter in outline(source).parameters())


def _models(grown: Grown) -> list[tuple[str, ModelSource]]:
    return [("before", grown.before), ("after", grown.after)]


def _renamed(metric: str, prefix: str) -> str:
    return f"{prefix}/{metric.removeprefix('eval/')}"


def _item(
    config: LayerMoEConfig, source: ModelSource, context: RunContext, language: str, corpora: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "model": source.model_dump(mode="json"),
        "seed": context.seed,
        "language": language,
        "corpora": corpora,
        "max_lines": config.evaluation.max_lines,
        "batch_size": config.evaluation.batch_size,
        "loss_chunk_rows": config.loss_chunk_rows,
    }


def _lines(item: dict[str, Any]) -> dict[str, list[str]]:
    from tenfold.methods.layermoe.corpora import Corpus, lines_by_language

    return lines_by_language([Corpus.model_validate(corpus) for corpus in item["corpora"]], item["max_lines"])
