"""What DSKD measures: loss per token and per byte, ROUGE-L on the validation rows and on further instruction sets."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.methods.dskd.config import DSKDConfig
from tenfold.platform.models.source import ModelSource

if TYPE_CHECKING:
    from tenfold.platform.context import RunContext
    from tenfold.platform.data.examples import Example


def measure(config: DSKDConfig, model: Path, context: RunContext) -> dict[str, float]:
    """Return `eval/...` of the student and `teacher/...` of the teacher; the responses become an artifact.

    A test set's metrics are `eval/SET/...`; `eval/mean_rouge_l` is the unweighted mean over the test sets.
    """
    from tenfold.methods.dskd.pairing import teacher_rows
    from tenfold.methods.dskd.teacher import encode_rows, teacher_dtype
    from tenfold.platform.data.examples import load_examples, read_examples
    from tenfold.platform.data.tokenise import tokenised_dataset
    from tenfold.platform.evaluation.perplexity import token_nll
    from tenfold.platform.models.loading import load_causal_lm, load_tokenizer
    from tenfold.platform.models.manifest import model_digest
    from tenfold.platform.models.references import resolve

    source = ModelSource(model=str(model))
    tokenizer, their_tokenizer = load_tokenizer(source), load_tokenizer(config.teacher)
    examples = load_examples(config.data).validation
    rows = tokenised_dataset(examples, tokenizer, config.data)
    their_rows = teacher_rows(rows, examples, their_tokenizer, config)
    total, count = token_nll(load_causal_lm(source, dtype="float32"), rows)
    states = encode_rows(context, config, their_rows, "validation")
    found = {
        "eval": _likelihood(total, count, rows, tokenizer),
        "teacher": _likelihood(states.nll, states.labels, their_rows, their_tokenizer),
    }
    sets = {"": [examples[index] for index in rows["index"]]}
    sets |= {name: read_examples(files, config.data, name)[0] for name, files in config.test_sets.items()}
    who: dict[str, tuple[ModelSource, str, str | None]] = {
        "eval": (source, model_digest(model), None),
        "teacher": (config.teacher, model_digest(resolve(config.teacher)), teacher_dtype(config)),
    }
    for name, members in sets.items():
        chosen = members[: config.evaluation.max_rows]
        texts = {}
        for side, (each, digest, dtype) in who.items():
            scores, texts[side] = _responses(context, config, each, chosen, digest, dtype)
            found[side] |= {f"{name}/{key}" if name else key: value for key, value in scores.items()}
        _keep(context, f"responses{'_' if name else ''}{name}.jsonl", chosen, texts["eval"], texts["teacher"])
    if config.test_sets:
        for values in found.values():
            values["mean_rouge_l"] = statistics.fmean(values[f"{name}/rouge_l"] for name in config.test_sets)
    return {f"{side}/{key}": value for side, values in found.items() for key, value in values.items()}


def _responses(
    context: RunContext, config: DSKDConfig, source: ModelSource, examples: Sequence[Example], digest: str, dtype: Any
) -> tuple[dict[str, float], list[str]]:
    from tenfold.platform.data.tokenise import prompt_ids
    from tenfold.platform.evaluation.responses import response_metrics
    from tenfold.platform.models.loading import load_tokenizer

    tokenizer = load_tokenizer(source)
    return response_metrics(
        context,
        source,
        [prompt_ids(example, tokenizer, config.data) for example in examples],
        [example.responses for example in examples],
        config.evaluation,
        digest=digest,
        dtype=dtype,
    )


def _likelihood(total: float, count: int, rows: Sequence[Any], tokenizer: Any) -> dict[str, float]:
    """Return loss per token, perplexity, and the loss per byte of text, which vocabularies do not change."""
    from tenfold.platform.evaluation.perplexity import label_bytes, perplexity

    num_bytes = label_bytes(rows, tokenizer)
    return {"nll": total / count, "perplexity": perplexity(total, count), "nll_per_byte": total / max(num_bytes, 1)}


def _keep(
    context: RunContext, file: str, examples: Sequence[Example], students: Sequence[str], teachers: Sequence[str]
) -> None:
    """Store prompt, reference and both responses of every example."""
    lines = [
        {
            "prompt": example.messages[-1]["content"],
            "reference": example.responses[0],
            "student": student,
            "teacher": teacher,
        }
        for example, student, teacher in zip(examples, students, teachers, strict=True)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    context.storage.write_text(file, text)
    context.tracker.log_text(text, file)
