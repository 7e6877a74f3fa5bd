"""Few-shot translation and benchmarks, where a run asks for them: of the last model and of the one it started from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tenfold.methods.layermoe.config import LayerMoEConfig
from tenfold.methods.layermoe.measured import kept
from tenfold.methods.layermoe.sources import loaded, on_device, source_digest
from tenfold.platform.models.source import ModelSource
from tenfold.platform.stages import digest_of

if TYPE_CHECKING:
    from tenfold.platform.context import RunContext

Groups = dict[str, list[str]]


def downstream(
    config: LayerMoEConfig, source: ModelSource, groups: Groups, context: RunContext, name: str
) -> dict[str, float]:
    """Return `translation/...` and `harness/...` of a model, of those that are asked for.

    Args:
        config: the run's options.
        source: the model.
        groups: old, new, earlier -> languages.
        context: the run.
        name: tells this measurement from others of the run.
    """
    metrics: dict[str, float] = {}
    if config.evaluation.translation is not None:
        metrics |= _translation(config, source, groups, context, name)
    if config.evaluation.harness is not None:
        metrics |= _harness(config, source, groups, context, name)
    return metrics


def _translation(
    config: LayerMoEConfig, source: ModelSource, groups: Groups, context: RunContext, name: str
) -> dict[str, float]:
    from tenfold.methods.layermoe.corpora import by_language, corpora_digest
    from tenfold.methods.layermoe.translation import TranslationScore, directions, translation_metrics

    options = config.evaluation.translation
    assert options is not None
    lines, examples = by_language(config.data.evaluation), by_language(options.examples)
    known = {language for languages in groups.values() for language in languages}
    pairs = directions(options.pivot, [language for language in lines if language in known])
    plain = options.model_dump(mode="json", exclude={"examples", "pivot"})
    items, keys = [], []
    for pair in pairs:
        texts = {
            "examples": [corpus for language in pair for corpus in examples[language]],
            "lines": [corpus for language in pair for corpus in lines[language]],
        }
        decides = {"model": source_digest(source), "pair": pair, "options": plain}
        keys.append(digest_of(decides | {part: corpora_digest(corpora) for part, corpora in texts.items()}))
        items.append(
            {
                "model": source.model_dump(mode="json"),
                "seed": context.seed,
                "direction": list(pair),
                "options": plain,
                **{part: [corpus.model_dump(mode="json") for corpus in corpora] for part, corpora in texts.items()},
            }
        )
    found = kept(context, translation_piece, items, keys, f"translation-{name}")
    scores = {pair: TranslationScore(**part["score"]) for pair, part in zip(pairs, found, strict=True)}
    return translation_metrics(scores, options.pivot, groups)


def translation_piece(item: dict[str, Any]) -> dict[str, Any]:
    """Translate the lines of one direction; runs on a worker."""
    from dataclasses import asdict

    from tenfold.methods.layermoe.corpora import Corpus, lines_by_language
    from tenfold.methods.layermoe.translation import measure_direction

    model, tokenizer = loaded(item["model"], item["seed"])
    examples, lines = (
        lines_by_language([Corpus.model_validate(corpus) for corpus in item[part]]) for part in ("examples", "lines")
    )
    source, target = item["direction"]
    found, texts = measure_direction(on_device(model), tokenizer, (source, target), examples, lines, **item["options"])
    return {"score": asdict(found), "translations": texts}


def _harness(
    config: LayerMoEConfig, source: ModelSource, groups: Groups, context: RunContext, name: str
) -> dict[str, float]:
    from tenfold.methods.layermoe.harness import harness_metrics

    options = config.evaluation.harness
    assert options is not None
    tasks = harness_tasks(config, groups)
    plain = options.model_dump(mode="json")
    items = [
        {"model": source.model_dump(mode="json"), "seed": context.seed, "task": task.task, "options": plain}
        for task in tasks
    ]
    digest = source_digest(source)
    keys = [digest_of({"model": digest, "harness": item["task"], "options": plain}) for item in items]
    found = kept(context, harness_piece, items, keys, f"harness-{name}")
    return harness_metrics({task: float(score) for task, score in zip(tasks, found, strict=True)}, groups)


def harness_tasks(config: LayerMoEConfig, groups: Groups) -> Sequence[Any]:
    """Return the benchmarks of the languages of a run."""
    from tenfold.methods.layermoe.harness import tasks_of

    options = config.evaluation.harness
    assert options is not None
    languages = [language for names in groups.values() for language in names]
    return tasks_of(languages, benchmarks=options.benchmarks, with_own=options.definitions is not None)


def harness_piece(item: dict[str, Any]) -> float:
    """Run one benchmark in one language; runs on a worker."""
    from pathlib import Path

    from tenfold.methods.layermoe.harness import TASKS, run_harness

    model, tokenizer = loaded(item["model"], item["seed"])
    (task,) = (task for task in TASKS if task.task == item["task"])
    options = item["options"]
    found = run_harness(
        on_device(model),
        tokenizer,
        [task],
        batch_size=options["batch_size"],
        limit=options["limit"],
        definitions=None if options["definitions"] is None else Path(options["definitions"]),
    )
    return found[task]
