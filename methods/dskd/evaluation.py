"""What DSKD measures: loss per token and per byte, ROUGE-L on the validation rows and on further instruction sets."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tenfold.methods.dskd.config import DSKDConfig
from tenfold.platform.errors import DataError
from tenfold.platform.evaluation.options import EvaluationOptions
from tenfold.platform.models.source import ModelSource

if TYPE_CHECKING:
    from tenfold.platform.context import RunContext
    from tenfold.platform.data.examples import Example


def measure(config: DSKDConfig, model: str, context: RunContext) -> dict[str, float]:
    """Return `eval/...` of the student and `teacher/...` of the teacher; the responses become an artifact.

    A test set's metrics are `eval/SET/...`; `eval/mean_rouge_l` is the unweighted mean over the test sets. A judge
    adds `judge_...` to the sets it is asked about, `structure_distance` the metrics of that name.

    Raises:
        ConfigError: a judge's API key is missing; before anything is computed.
    """
    from tenfold.methods.dskd.pairing import teacher_rows
    from tenfold.methods.dskd.structure_distance import measure_structure
    from tenfold.methods.dskd.teacher import encode_rows, teacher_dtype
    from tenfold.platform.data.examples import load_examples, read_examples
    from tenfold.platform.data.tokenise import tokenised_dataset
    from tenfold.platform.evaluation.judge_client import check_judge
    from tenfold.platform.evaluation.perplexity import token_nll
    from tenfold.platform.models.loading import load_causal_lm, load_tokenizer
    from tenfold.platform.models.manifest import model_digest
    from tenfold.platform.models.references import resolve

    if config.evaluation.judge is not None:
        check_judge(config.evaluation.judge)
    source = ModelSource(model=model)
    tokenizer, their_tokenizer = load_tokenizer(source), load_tokenizer(config.teacher)
    examples = load_examples(config.data).validation
    rows = tokenised_dataset(examples, tokenizer, config.data)
    their_rows = teacher_rows(rows, examples, their_tokenizer, config)
    student = load_causal_lm(source, dtype="float32")
    total, count = token_nll(student, rows)
    states = encode_rows(context, config, their_rows, "validation")
    found = {
        "eval": _likelihood(total, count, rows, tokenizer),
        "teacher": _likelihood(states.nll, states.labels, their_rows, their_tokenizer),
    }
    if config.evaluation.structure_distance is not None:
        number = config.evaluation.structure_distance
        found["eval"] |= measure_structure(context, config, student, tokenizer, their_tokenizer, number)
    sets = {"": [examples[index] for index in rows["index"]]}
    sets |= {name: read_examples(files, config.data, name)[0] for name, files in config.test_sets.items()}
    who: dict[str, tuple[ModelSource, str, str | None]] = {
        "eval": (source, model_digest(resolve(source)), None),
        "teacher": (config.teacher, model_digest(resolve(config.teacher)), teacher_dtype(config)),
    }
    for name, members in sets.items():
        chosen = members[: config.evaluation.max_rows]
        texts = {}
        for side, (each, digest, dtype) in who.items():
            scores, texts[side] = _responses(context, config, each, chosen, digest, dtype)
            found[side] |= {f"{name}/{key}" if name else key: value for key, value in scores.items()}
        _keep(context, _file(name), chosen, texts["eval"], texts["teacher"])
        verdicts = _judged(context, config, name, chosen, texts["eval"], texts["teacher"])
        found["eval"] |= {f"{name}/{key}" if name else key: value for key, value in verdicts.items()}
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
        # the rest of the options does not change what is sampled
        EvaluationOptions(seeds=config.evaluation.seeds, generation=config.evaluation.generation),
        digest=digest,
        dtype=dtype,
    )


def _judged(
    context: RunContext,
    config: DSKDConfig,
    name: str,
    examples: Sequence[Example],
    students: Sequence[str],
    teachers: Sequence[str],
) -> dict[str, float]:
    """Return the judge's counts and rates of the student's answers to one set; none where it is not asked."""
    from tenfold.platform.evaluation.judge import compare

    options, against = config.evaluation.judge, config.evaluation.judge_against
    label = name or "validation"
    if options is None or label not in config.evaluation.judge_sets:
        return {}
    if against == "references":
        opponents = [example.responses[0] for example in examples]
    elif against == "teacher":
        opponents = list(teachers)
    else:
        opponents = other_answers(against, _file(name), [example.messages[-1]["content"] for example in examples])
    return compare(
        options,
        [request(example) for example in examples],
        students,
        opponents,
        context.storage,
        f"judge/{label}.jsonl",
    ).metrics()


def request(example: Example) -> str:
    """Return what a judge reads as the request: the instruction, or the whole conversation where there is more."""
    if len(example.messages) == 1:
        return str(example.messages[0]["content"])
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in example.messages)


def other_answers(folder: str, file: str, prompts: Sequence[str]) -> list[str]:
    """Return what the student of another run answered to these prompts.

    Raises:
        DataError: the run's folder has no such file, or the file lacks a prompt.
    """
    from tenfold.platform.storage import Storage

    storage = Storage(folder)
    if not storage.exists(file):
        raise DataError(
            f"evaluation.judge_against = {folder}: has no {file}. Give references, teacher, or the folder of a run "
            "that was evaluated on the same rows"
        )
    lines = [json.loads(line) for line in storage.read_text(file).split("\n") if line]
    answers = {line["prompt"]: line["student"] for line in lines}
    missing = [prompt for prompt in prompts if prompt not in answers]
    if missing:
        raise DataError(
            f"{storage.uri_of(file)}: {len(missing)} of {len(prompts)} prompts are not in it, one is "
            f"{missing[0][:80]!r}. evaluation.judge_against needs a run with the same rows"
        )
    return [answers[prompt] for prompt in prompts]


def _file(name: str) -> str:
    """Return the file of a run that has the responses to one set."""
    return f"responses{'_' if name else ''}{name}.jsonl"


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
