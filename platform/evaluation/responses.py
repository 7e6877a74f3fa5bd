"""Responses of a model to many prompts, generated over the cluster, and their ROUGE-L."""

from __future__ import annotations

import functools
import hashlib
import json
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tenfold.platform.evaluation.options import EvaluationOptions
from tenfold.platform.evaluation.rouge import clean_response, exact_match, rouge_l
from tenfold.platform.models.options import GenerationOptions
from tenfold.platform.models.source import ModelSource

if TYPE_CHECKING:
    from tenfold.platform.context import RunContext


def responses(
    context: RunContext,
    source: ModelSource,
    prompts: Sequence[Sequence[int]],
    options: EvaluationOptions,
    *,
    digest: str,
    dtype: str | None = None,
) -> tuple[list[list[str]], str]:
    """Sample one response per prompt and seed; what was sampled before is read from the cache.

    Args:
        context: the run.
        source: the model.
        prompts: token ids.
        options: seeds, generation.
        digest: identifies the model's weights.
        dtype: what it computes in; default: the source's.

    Returns:
        The texts of each seed, and the file of the cache that holds them (JSON).
    """
    pieces = max(context.compute.max_workers, 1)
    content = [digest, dtype, options.model_dump(mode="json"), pieces, [list(prompt) for prompt in prompts]]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]
    cached = f"responses/{key}.json"
    if context.cache.exists(cached):
        return json.loads(context.cache.read_text(cached)), cached
    rounds = _generate(context, source, prompts, options, pieces, key, dtype)
    context.cache.write_text(cached, json.dumps(rounds))
    return rounds, cached


def response_metrics(
    context: RunContext,
    source: ModelSource,
    prompts: Sequence[Sequence[int]],
    references: Sequence[Sequence[str]],
    options: EvaluationOptions,
    *,
    digest: str,
    dtype: str | None = None,
) -> tuple[dict[str, float], list[str]]:
    """Score sampled responses; arguments as for `responses`, and at least one reference text per prompt.

    Returns:
        `rouge_l` (mean over the seeds, 0 to 100), its standard deviation `rouge_l_std` (0 for one seed) and
        `exact_match`; and the first seed's responses.
    """
    rounds, _ = responses(context, source, prompts, options, digest=digest, dtype=dtype)
    scores = [rouge_l(round_, references) for round_ in rounds]
    matches = [exact_match(round_, references) for round_ in rounds]
    metrics = {
        "rouge_l": statistics.fmean(scores),
        "rouge_l_std": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        "exact_match": statistics.fmean(matches),
    }
    return metrics, [clean_response(text) for text in rounds[0]]


def _generate(
    context: RunContext,
    source: ModelSource,
    prompts: Sequence[Sequence[int]],
    options: EvaluationOptions,
    pieces: int,
    key: str,
    dtype: str | None,
) -> list[list[str]]:
    items = [
        {
            "source": source.model_dump(mode="json"),
            "prompts": [list(prompt) for prompt in prompts[piece::pieces]],
            "options": options.generation.model_dump(mode="json"),
            "seed": seed + piece,
            "dtype": dtype,
        }
        for seed in options.seeds
        for piece in range(pieces)
    ]
    compute = context.compute
    results = context.map(
        respond, items, name=f"responses-{key}", cpus=compute.cpus_per_worker, gpus=compute.gpus_per_worker
    )
    rounds = []
    for number in range(len(options.seeds)):
        texts = [""] * len(prompts)
        for piece in range(pieces):
            texts[piece::pieces] = results[number * pieces + piece]
        rounds.append(texts)
    return rounds


@functools.lru_cache(maxsize=1)
def _loaded(source: str, dtype: str | None, on_gpu: bool) -> Any:
    from tenfold.platform.models.loading import load_causal_lm, load_tokenizer

    own = ModelSource.model_validate_json(source)
    model = load_causal_lm(own, dtype=dtype)
    return model.to("cuda") if on_gpu else model, load_tokenizer(own)


def respond(item: dict[str, Any]) -> list[str]:
    """Generate the responses of one piece; runs on a worker."""
    import torch
    from tenfold.platform.models.generation import generate_texts

    model, tokenizer = _loaded(json.dumps(item["source"]), item["dtype"], torch.cuda.is_available())
    options = GenerationOptions.model_validate(item["options"])
    return generate_texts(model, tokenizer, item["prompts"], options, seed=item["seed"])
