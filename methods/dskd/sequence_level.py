"""SeqKD: the teacher answers the training prompts once, and the student is fine-tuned on its answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tenfold.methods.dskd.config import DSKDConfig
from tenfold.platform.evaluation.options import EvaluationOptions
from tenfold.platform.storage import Storage

if TYPE_CHECKING:
    from tenfold.platform.context import RunContext
    from tenfold.platform.data.examples import Example


def teacher_responses(context: RunContext, config: DSKDConfig, examples: Sequence[Example]) -> str:
    """Make sure that the teacher's answers to the training prompts are in the cache; return their file there."""
    from tenfold.methods.dskd.teacher import teacher_dtype
    from tenfold.platform.data.tokenise import prompt_ids
    from tenfold.platform.evaluation.responses import responses
    from tenfold.platform.models.loading import load_tokenizer
    from tenfold.platform.models.manifest import model_digest
    from tenfold.platform.models.references import resolve

    tokenizer = load_tokenizer(config.teacher)
    _, file = responses(
        context,
        config.teacher,
        [prompt_ids(example, tokenizer, config.data) for example in examples],
        EvaluationOptions(seeds=[config.seqkd_seed], generation=config.seqkd_generation),
        digest=model_digest(resolve(config.teacher)),
        dtype=teacher_dtype(config),
    )
    return file


def with_responses(examples: Sequence[Example], cache: Storage, file: str | None) -> list[Example]:
    """Return the examples with the responses of a file of the cache; as they are without a file."""
    from tenfold.platform.evaluation.rouge import clean_response

    if file is None:
        return list(examples)
    (texts,) = json.loads(cache.read_text(file))
    return [replace(example, responses=(clean_response(text),)) for example, text in zip(examples, texts, strict=True)]
