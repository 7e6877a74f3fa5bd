"""What a run will do, checked before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tenfold.methods.layermoe.assignment import Assignment, assign
from tenfold.methods.layermoe.config import EXPANDING, LayerMoEConfig
from tenfold.platform.errors import ConfigError
from tenfold.platform.method import PlanSection

if TYPE_CHECKING:
    from tenfold.methods.layermoe.modeling import Layout
    from tenfold.methods.layermoe.similarity import Similarity
    from tenfold.methods.layermoe.sizes import Shape
    from tenfold.platform.context import PlanContext
    from tenfold.platform.models.loading import ModelFacts

ADAM = 12  # bytes a trained parameter beside its float32 weight: gradient and two moments
Rows = list[tuple[str, str]]


def describe_run(config: LayerMoEConfig, context: PlanContext) -> list[PlanSection]:
    """Return the plan's sections.

    Raises:
        ConfigError: options that do not fit the model or the texts.
        ModelError: the model is missing, damaged, or of an architecture that cannot be expanded.
        DataError: texts cannot be used.
    """
    from tenfold.methods.layermoe.corpora import check_corpora, replay_warnings
    from tenfold.methods.layermoe.modeling import layout_of
    from tenfold.methods.layermoe.planned_steps import planned_stages
    from tenfold.platform.models.heads import check_logit_options
    from tenfold.platform.models.loading import describe, load_tokenizer, outline

    facts, model = describe(config.model), outline(config.model)
    check_logit_options(model.config)
    layout = layout_of(model.config)
    check_base(config, layout)
    check_groups(config, layout)
    _check_lengths(config, model.config.get_text_config())
    check_evaluation(config)
    known = layout.languages
    recorded = {"old": known["old"], "earlier": [name for names in known["expansions"] for name in names]}
    later = [corpus.language for expansion in config.lifelong for corpus in expansion.new]
    warnings = replay_warnings(config.data, recorded, later) if config.has_review else []
    texts = (*check_corpora(config.data), *(("warning", warning) for warning in warnings))
    expansions, memory = _expansions(config, model, facts, context)
    stages = planned_stages(config, load_tokenizer(config.model), context)
    return [
        PlanSection("model", tuple(_model_rows(config, facts, layout))),
        PlanSection("languages", texts),
        *expansions,
        PlanSection("stages", (*stages, ("memory a worker", memory))),
    ]


def check_base(config: LayerMoEConfig, layout: Layout) -> None:
    """Make sure that the model can be what the run starts from.

    Raises:
        ConfigError: it cannot.
    """
    is_expanded = bool(layout.languages["expansions"])
    if config.model.config is not None and config.base_training is None:
        raise ConfigError(
            "config.model is a fresh model, which knows no language. Give base_training, which trains it on data.old "
            "first, or a trained model"
        )
    if config.base_training is not None and is_expanded:
        raise ConfigError(f"base_training trains a dense model; {config.model.name} has experts. Remove base_training")
    if config.base_training is not None and not config.data.old:
        raise ConfigError("base_training trains on data.old, which is empty. Give documents of the old languages")
    if is_expanded and config.strategy in EXPANDING and config.top_k != layout.top_k:
        raise ConfigError(
            f"top_k = {config.top_k}: {config.model.name} was made with {layout.top_k} experts a token; its routers "
            f"keep that. Set top_k: {layout.top_k}"
        )


def check_groups(config: LayerMoEConfig, layout: Layout) -> None:
    """Make sure that the groups of languages are those that the model records.

    Raises:
        ConfigError: a language is in another group, or the review has no old language.
    """
    groups, known = config.data.groups(), layout.languages
    added = [name for names in known["expansions"] for name in names]
    again = [name for name in groups["new"] if name in [*known["old"], *added]]
    if again:
        raise ConfigError(f"data.new names {', '.join(again)}, which {config.model.name} has already. Name others")
    if added:
        wrong = [name for name in groups["old"] if name in added] + [
            name for name in groups["earlier"] if name in known["old"]
        ]
        if wrong:
            raise ConfigError(
                f"{', '.join(wrong)}: in {config.model.name}, {', '.join(known['old']) or 'none'} are old languages "
                f"and {', '.join(added)} were added. Put them under data.old and data.earlier accordingly"
            )
    elif groups["earlier"] and config.strategy in EXPANDING:
        raise ConfigError(
            f"data.earlier names {', '.join(groups['earlier'])}, and {config.model.name} was never expanded. Put what "
            "it knows under data.old"
        )
    if config.has_review and not groups["old"]:
        raise ConfigError("stage2 teaches which tokens belong to old languages; data.old is empty. Give replay text")


def _check_lengths(config: LayerMoEConfig, model_config: Any) -> None:
    most = getattr(model_config, "max_position_embeddings", None)
    for name in ("stage1_length", "stage2_length"):
        length = getattr(config.data, name)
        if most is not None and length > most:
            raise ConfigError(f"data.{name} = {length}: {config.model.name} has {most} positions. Use a shorter one")


def check_evaluation(config: LayerMoEConfig) -> None:
    """Make sure that what evaluation asks for is there.

    Raises:
        ConfigError: a package is missing, few-shot translation lacks its pivot or examples of a language, or no
            benchmark is left.
    """
    from tenfold.methods.layermoe.corpora import languages_of
    from tenfold.methods.layermoe.downstream import harness_tasks
    from tenfold.methods.layermoe.harness import check_harness
    from tenfold.methods.layermoe.translation import check_sacrebleu

    options, groups = config.evaluation.translation, config.expansions()[-1].data.groups()
    if options is not None:
        check_sacrebleu("evaluation.translation")
        examples, lines = languages_of(options.examples), [name for names in groups.values() for name in names]
        if options.pivot not in lines:
            raise ConfigError(f"evaluation.translation.pivot = {options.pivot}: the languages are {', '.join(lines)}")
        lacking = [name for name in lines if name not in examples]
        if lacking:
            raise ConfigError(f"evaluation.translation.examples has none of {', '.join(lacking)}. Give lines of each")
    if config.evaluation.harness is not None:
        check_harness("evaluation.harness")
        if not harness_tasks(config, groups):
            raise ConfigError(
                "evaluation.harness: no benchmark is of these languages and names. Languages are called by their "
                "ISO 639-1 codes (en, el); benchmarks as in the paper (ARC-Challenge)"
            )


def _model_rows(config: LayerMoEConfig, facts: ModelFacts, layout: Layout) -> Rows:
    groups = config.data.groups()
    rows = [
        (
            "model",
            f"{facts.name}: {facts.model_type}, {facts.num_parameters:,} parameters, {facts.num_layers} layers, "
            f"vocabulary {facts.vocabulary_size:,}",
        ),
        ("strategy", config.strategy),
        ("old languages", ", ".join(groups["old"]) or "none"),
    ]
    if layout.languages["expansions"]:
        told = "; ".join(", ".join(names) for names in layout.languages["expansions"])
        rows.append(("added before", f"{told}; {sum(layout.totals)} experts in {len(layout.totals)} layers"))
    new = [groups["new"], *([corpus.language for corpus in each.new] for each in config.lifelong)]
    return [*rows, ("new languages", "; then ".join(", ".join(dict.fromkeys(names)) for names in new))]


@dataclass(frozen=True)
class _Growth:
    """What is known of one expansion beforehand: exact counts, or the most that there may be."""

    shape: Shape
    new: list[int]
    assignment: Assignment | None
    text: str


def _expansions(
    config: LayerMoEConfig, model: Any, facts: ModelFacts, context: PlanContext
) -> tuple[list[PlanSection], str]:
    """Return a section for each expansion, and an estimate of the memory of the largest training."""
    from tenfold.methods.layermoe.planned_similarity import cached_similarity
    from tenfold.methods.layermoe.sizes import shape_of

    if config.strategy == "llama_pro":
        return _deeper(config, model, facts)
    if config.strategy not in EXPANDING:
        return [], _memory(facts.num_parameters, _trained_whole(config, model, facts), facts, config)
    shape, memory = shape_of(model), [] if config.base_training is None else [(facts.num_parameters,) * 2]
    sections = []
    for number, options in enumerate(config.expansions(), start=1):
        measured = cached_similarity(config, context) if number == 1 else None
        grown = _growth(options, shape, measured, context.seed)
        rows: Rows = []
        if options.needs_similarity:
            state = "measured before" if measured is not None else "measured first"
            rows.append(
                (
                    "similarity",
                    f"{options.similarity.tokens:,} tokens a language, {options.similarity.indicator}; {state}",
                )
            )
        rows += [("experts", grown.text), *_size_rows(options, shape, grown)]
        sections.append(PlanSection("expansion" if number == 1 else f"expansion {number}", tuple(rows)))
        trained = grown.shape.parameters if options.strategy == "moe" else grown.shape.trained(grown.new)
        memory.append((grown.shape.parameters, trained))
        shape = grown.shape
    largest = max(memory, key=lambda pair: 4 * pair[0] + ADAM * pair[1])
    return sections, _memory(*largest, facts, config)


def _deeper(config: LayerMoEConfig, model: Any, facts: ModelFacts) -> tuple[list[PlanSection], str]:
    """Return the section of llama_pro, and an estimate of the memory of the largest training."""
    from tenfold.methods.layermoe.insertion import deepened, places_of
    from tenfold.methods.layermoe.sizes import copied_parameters

    deepened(model.config)
    places = places_of(facts.num_layers, config.inserted_layers)
    added = copied_parameters(model, places)
    total = facts.num_parameters + added
    told = ", ".join(map(str, places))
    rows = (
        ("layers", f"{len(places)} copies, behind layers {told}; {facts.num_layers + len(places)} afterwards"),
        ("parameters", f"{total:,}, {added:,} of them added"),
        ("active", f"{total:,} for a token"),
        ("trained", f"{added:,}"),
    )
    trainings = [(total, added)] if config.base_training is None else [(facts.num_parameters,) * 2, (total, added)]
    largest = max(trainings, key=lambda pair: 4 * pair[0] + ADAM * pair[1])
    return [PlanSection("expansion", rows)], _memory(*largest, facts, config)


def _growth(options: LayerMoEConfig, shape: Shape, measured: Similarity | None, seed: int) -> _Growth:
    """Return what an expansion adds, or the most that it can add where similarity is not known yet."""
    layers = len(shape.totals)
    if measured is not None or not options.needs_similarity:
        assignment = assign(options, shape.totals, measured, seed=seed)
        assert assignment is not None
        text = f"{sum(assignment.new)} new: " + ", ".join(map(str, assignment.totals)) + " a layer, with the original"
        if assignment.classifier_layers:
            text += f"; classifiers on layers {', '.join(map(str, assignment.classifier_layers))}"
        return _Growth(shape.expanded(assignment.new, options.top_k), assignment.new, assignment, text)
    if options.allocation.explicit is not None:
        assumed = _without_classifiers(options, shape, seed)
        share = max(1, round(options.classifier.share * layers))
        text = f"{sum(assumed.new)} new, as listed; classifiers on up to {share} layers of the largest similarity"
        return _Growth(shape.expanded(assumed.new, options.top_k), assumed.new, None, text)
    _check_classifier_numbers(options, layers)
    alike = _without_classifiers(options, shape, seed)
    text = f"{_budget(options, layers)}, by similarity; about {sum(alike.new)} new"
    return _Growth(shape.expanded(alike.new, options.top_k), alike.new, None, text)


def _without_classifiers(options: LayerMoEConfig, shape: Shape, seed: int) -> Assignment:
    """Return the counts as if all layers were alike: the same budget, the same errors."""
    order = "similar" if options.allocation.explicit is not None else "uniform"
    changed = {
        "allocation": options.allocation.model_copy(update={"order": order}),
        "classifier": options.classifier.model_copy(update={"layers": []}),
    }
    assignment = assign(options.model_copy(update=changed), shape.totals, None, seed=seed)
    assert assignment is not None
    return assignment


def _check_classifier_numbers(options: LayerMoEConfig, layers: int) -> None:
    wrong = [layer for layer in options.classifier.layers or () if layer >= layers]
    if wrong:
        raise ConfigError(f"classifier.layers: {wrong[0]} is no layer of the model: 0 to {layers - 1}")


def _budget(options: LayerMoEConfig, layers: int) -> str:
    from tenfold.methods.layermoe.allocation import FACTOR

    allocation = options.allocation
    counted = ", originals included" if allocation.count_mode == "total_minus_one" else " new ones"
    if allocation.total_experts is not None:
        return f"exactly {allocation.total_experts} in {layers} layers{counted}"
    delta = allocation.delta if allocation.delta is not None else FACTOR * layers
    return f"delta {delta:g}{counted}"


def _size_rows(options: LayerMoEConfig, before: Shape, grown: _Growth) -> Rows:
    after = grown.shape
    about = "" if grown.assignment is not None or options.allocation.explicit is not None else "about "
    trained = after.parameters if options.strategy == "moe" else after.trained(grown.new)
    return [
        ("parameters", f"{about}{after.parameters:,}, {after.parameters - before.parameters:,} of them added"),
        ("active", f"{about}{after.active:,} for a token (top {after.top_k})"),
        ("trained", f"stage 1: {about}{trained:,}; stage 2: routers and classifiers"),
    ]


def _trained_whole(config: LayerMoEConfig, model: Any, facts: ModelFacts) -> int:
    from tenfold.platform.models.adapters import add_adapter, num_trained

    if config.strategy == "lora":
        add_adapter(model, config.lora)
        return num_trained(model)
    return facts.num_parameters if config.strategy == "full_ft" or config.base_training is not None else 0


def _memory(parameters: int, trained: int, facts: ModelFacts, config: LayerMoEConfig) -> str:
    logits = 4 * 6 * config.loss_chunk_rows * facts.vocabulary_size  # a few float32 copies of one chunk
    gib = (4 * parameters + ADAM * trained + logits) / 2**30
    return f"about {gib:.2f} GiB without activations, before sharding (estimate)"
