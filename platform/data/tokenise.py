"""Examples become token ids: prompt and response apart, labels on the response alone.

There is no packing here: rows of like length are put together by transformers' own sampler
(`train_sampling_strategy: group_by_length`), which reads the column `length`.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tenfold.platform.data.config import DataConfig
from tenfold.platform.data.examples import Example
from tenfold.platform.data.positions import IGNORED
from tenfold.platform.data.templates import check_tokenizer, prompt_text
from tenfold.platform.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def prompt_ids(example: Example, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[int]:
    """Return the prompt's first `max_prompt_length` token ids; no special tokens but the template's own (no BOS).

    Raises:
        DataError: the prompt has no tokens, or the tokenizer lacks what the template needs.
    """
    return _prompts([example], tokenizer, config)[0][: config.max_prompt_length]


def tokenise(example: Example, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> dict[str, list[int]]:
    """Return `input_ids` and `labels`, equally long (data preparation of DSKD, arXiv 2406.17328, and MiniLLM).

    Prompt and response are tokenised apart, without added special tokens; EOS ends the response. labels[i] =
    input_ids[i] on the response and its EOS, -100 on the prompt: the model shifts by one. What exceeds `max_length` is
    cut, so a long response loses its EOS. An empty response has one label, the EOS. A prompt that fills `max_length`
    leaves no label.

    Raises:
        DataError: the prompt has no tokens, or the tokenizer lacks what the template needs.
    """
    return _join(prompt_ids(example, tokenizer, config), _responses([example], tokenizer)[0], config.max_length)


def tokenised_dataset(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Dataset:
    """Return a Dataset with `input_ids`, `labels`, `length` and `index` (the example's place in `examples`).

    Rows are those of `tokenise`. An example without a label is dropped; the number of dropped and cut ones is logged.

    Raises:
        DataError: a prompt has no tokens, the tokenizer lacks what the template needs, or no example is left.
    """
    from datasets import Dataset
    from datasets.table import InMemoryTable

    check_tokenizer(tokenizer, config)
    columns: dict[str, list] = {"input_ids": [], "labels": [], "length": [], "index": []}
    cut_prompts = cut_responses = 0
    pairs = zip(_prompts(examples, tokenizer, config), _responses(examples, tokenizer), strict=True)
    for index, (prompt, response) in enumerate(pairs):
        kept = prompt[: config.max_prompt_length]
        row = _join(kept, response, config.max_length)
        cut_prompts += len(kept) < len(prompt)
        cut_responses += len(row["input_ids"]) < len(kept) + len(response)
        if row["labels"][-1] == IGNORED:
            continue
        columns["input_ids"].append(row["input_ids"])
        columns["labels"].append(row["labels"])
        columns["length"].append(len(row["input_ids"]))
        columns["index"].append(index)
    dropped = len(examples) - len(columns["index"])
    if not columns["index"]:
        raise DataError(
            f"none of {len(examples)} examples keeps a response token within max_length {config.max_length}; "
            "raise it or lower max_prompt_length"
        )
    if cut_prompts:
        logger.info("%d prompts are cut to their first %d tokens", cut_prompts, config.max_prompt_length)
    if cut_responses > dropped:
        logger.info(
            "%d responses are cut to %d tokens in all, without EOS", cut_responses - dropped, config.max_length
        )
    if dropped:
        logger.warning("%d of %d examples are dropped: their prompts leave no response token", dropped, len(examples))
    # a fingerprint of its own: datasets would else hash the whole table, for a cache that nothing here uses
    return Dataset(InMemoryTable.from_pydict(columns), fingerprint=uuid.uuid4().hex[:16])


def _prompts(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[list[int]]:
    """Return the uncut prompts' ids; one call of the tokenizer is about 1.6 times as quick as one a row."""
    prompts = _encode([prompt_text(example, tokenizer, config) for example in examples], tokenizer)
    for example, ids in zip(examples, prompts, strict=True):
        if not ids:
            raise DataError(f"{example.origin}: the prompt has no tokens; nothing predicts the response's first token")
    return prompts


def _responses(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    texts = _encode([example.responses[0] for example in examples], tokenizer)
    return [ids + [tokenizer.eos_token_id] for ids in texts]


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    # verbose=False: lengths are cut by our own rules; the tokenizer need not warn about its maximum.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _join(prompt: list[int], response: list[int], max_length: int) -> dict[str, list[int]]:
    labels = [IGNORED] * len(prompt) + response
    return {"input_ids": (prompt + response)[:max_length], "labels": labels[:max_length]}
