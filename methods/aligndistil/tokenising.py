"""Preference data becomes token ids: every response ends with exactly one EOS, and nothing follows it.

On purpose not as in the official code (github.com/songmzhang/AlignDistil), which measures the prompt by tokenising its
text again, writes a space before an EOS that the template lacks, ends every cut response with EOS, and cuts the long
prompts of on-policy training on the right, where the assistant's header is.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tenfold.methods.aligndistil.config import PreferenceData
from tenfold.methods.aligndistil.preference_rows import Pair, Prompt, Single
from tenfold.platform.data.positions import IGNORED
from tenfold.platform.data.templates import check_tokenizer, prompt_text
from tenfold.platform.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# The prompt leaves room for two tokens and more, as in the official code.
ROOM = 2


@dataclass
class TokenCounts:
    """What tokenising did to the rows.

    Attributes:
        kept: rows that came out.
        dropped: left out because their prompt is too long.
        same: pairs left out because both answers are the same tokens once they are cut.
        cut: responses that lost their end, and with it their EOS unless `force_eos_on_truncation`.
        empty: responses of nothing but EOS.
        without_template_eos: responses whose EOS is ours, because the chat template writes none.
        apart: responses tokenised apart from their prompt, because the template changes the prompt's tokens.
        early_eos: responses whose own text contains EOS; they end there.
    """

    kept: int = 0
    dropped: int = 0
    same: int = 0
    cut: int = 0
    empty: int = 0
    without_template_eos: int = 0
    apart: int = 0
    early_eos: int = 0

    def rows(self) -> tuple[tuple[str, str], ...]:
        """Return (label, number) of what happened at all, for logs and the plan."""
        labels = {
            "dropped": "rows with too long prompts, left out",
            "same": "pairs whose cut answers are the same, left out",
            "cut": "responses cut at max_length",
            "empty": "responses of EOS alone",
            "without_template_eos": "responses whose EOS the chat template does not write",
            "apart": "responses tokenised apart from their prompt",
            "early_eos": "responses ended by an EOS in their own text",
        }
        return tuple((label, f"{getattr(self, name):,}") for name, label in labels.items() if getattr(self, name))


def pair_rows(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, data: PreferenceData
) -> tuple[Dataset, TokenCounts]:
    """Return `input_ids`, `labels` (prompt and chosen), `rejected_input_ids`, `rejected_labels`, `length`, `index`.

    labels[i] = input_ids[i] on the response and its EOS, -100 on the prompt: the model shifts by one. `length` is that
    of the longer row, `index` the pair's place in `pairs`. Both rows begin with the same prompt tokens. Pairs with a
    prompt above `max_prompt_length`, or of `max_length` - 2 tokens and more, are left out.

    Raises:
        DataError: a prompt has no tokens, the tokenizer lacks what the template needs, or no pair is left.
    """
    counts = TokenCounts()
    kept = _kept_prompts(pairs, tokenizer, data, counts, room=ROOM)
    chosen = _rows(kept, pairs, [pair.chosen for pair in pairs], tokenizer, data, counts)
    rejected = _rows(kept, pairs, [pair.rejected for pair in pairs], tokenizer, data, counts)
    rows = []
    for index, better, worse in zip(kept, chosen, rejected, strict=True):
        if better["input_ids"] == worse["input_ids"]:
            counts.same += 1
            continue
        length = max(len(better["input_ids"]), len(worse["input_ids"]))
        other = {f"rejected_{name}": ids for name, ids in worse.items()}
        rows.append({**better, **other, "length": length, "index": index})
    return _dataset(rows, pairs, counts, data), counts


def single_rows(
    singles: Sequence[Single], tokenizer: PreTrainedTokenizerBase, data: PreferenceData
) -> tuple[Dataset, TokenCounts]:
    """Return `input_ids`, `labels`, `desirable` (bool), `length` and `index`; else as `pair_rows`."""
    desirable = [single.desirable for single in singles]
    return _answers(singles, [single.response for single in singles], tokenizer, data, desirable=desirable)


def chosen_rows(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, data: PreferenceData
) -> tuple[Dataset, TokenCounts]:
    """Return `input_ids`, `labels`, `length` and `index` of the chosen responses; else as `pair_rows`."""
    return _answers(pairs, [pair.chosen for pair in pairs], tokenizer, data)


def _answers(
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    data: PreferenceData,
    **more: Sequence[Any],
) -> tuple[Dataset, TokenCounts]:
    """Return the rows of one response to each prompt that is short enough, with further columns of the prompts."""
    counts = TokenCounts()
    kept = _kept_prompts(prompts, tokenizer, data, counts, room=ROOM)
    rows = [
        {
            **row,
            **{name: values[index] for name, values in more.items()},
            "length": len(row["input_ids"]),
            "index": index,
        }
        for index, row in zip(kept, _rows(kept, prompts, texts, tokenizer, data, counts), strict=True)
    ]
    return _dataset(rows, prompts, counts, data), counts


def prompt_rows(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, data: PreferenceData
) -> tuple[Dataset, TokenCounts]:
    """Return `input_ids` (the prompt), `labels` (all -100), `length` and `index` for training on own responses.

    Prompts above `max_prompt_length` are left out; `max_length` is not read, because responses are not there yet: the
    plan sees to it that they fit.

    Raises:
        DataError: as `pair_rows`.
    """
    counts = TokenCounts()
    kept = _kept_prompts(prompts, tokenizer, data, counts)
    rows = [
        {"input_ids": ids, "labels": [IGNORED] * len(ids), "length": len(ids), "index": index}
        for index, ids in kept.items()
    ]
    return _dataset(rows, prompts, counts, data), counts


def _kept_prompts(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    data: PreferenceData,
    counts: TokenCounts,
    *,
    room: int | None = None,
) -> dict[int, list[int]]:
    """Return the ids of the prompts that are short enough, by their place in `prompts`.

    With `room` they also leave more than so many tokens of `max_length` to the response.
    """
    check_tokenizer(tokenizer, data)
    limit = data.max_prompt_length if room is None else min(data.max_prompt_length, data.max_length - room - 1)
    encoded = _encode([prompt_text(prompt.example(), tokenizer, data) for prompt in prompts], tokenizer)
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise DataError(f"{prompt.origin}: the prompt has no tokens; nothing predicts the response's first token")
    kept = {index: ids for index, ids in enumerate(encoded) if len(ids) <= limit}
    counts.dropped += len(prompts) - len(kept)
    return kept


def _rows(
    kept: Mapping[int, list[int]],
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    data: PreferenceData,
    counts: TokenCounts,
) -> list[dict[str, list[int]]]:
    """Return `input_ids` and `labels` of every kept prompt with its response, cut on the right to `max_length`."""
    end = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    rows = []
    for prompt, response in zip(kept.values(), _responses(kept, prompts, texts, tokenizer, data, counts), strict=True):
        ended = [*response[: response.index(end)], end] if end in response else [*response, end]
        ids = (prompt + ended)[: data.max_length]
        counts.empty += len(ended) == 1
        if len(ids) < len(prompt) + len(ended):
            counts.cut += 1
            if data.force_eos_on_truncation:
                ids[-1] = end
        rows.append({"input_ids": ids, "labels": [IGNORED] * len(prompt) + ids[len(prompt) :]})
    return rows


def _responses(
    kept: Mapping[int, list[int]],
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    data: PreferenceData,
    counts: TokenCounts,
) -> list[list[int]]:
    """Return what follows each kept prompt, uncut, perhaps without EOS, perhaps with more behind it."""
    end = tokenizer.eos_token_id
    stripped = [texts[index] if texts[index].strip() else "" for index in kept]
    counts.early_eos += sum(str(tokenizer.eos_token) in text for text in stripped)
    if data.template != "chat":
        return _encode(stripped, tokenizer)
    conversations = [
        _conversation(prompts[index], text, tokenizer, data) for index, text in zip(kept, stripped, strict=True)
    ]
    responses = []
    for prompt, whole, text in zip(kept.values(), _encode(conversations, tokenizer), stripped, strict=True):
        if whole[: len(prompt)] == prompt:
            responses.append(whole[len(prompt) :])
            counts.without_template_eos += end not in responses[-1]
        else:
            responses += _encode([text], tokenizer)
            counts.apart += 1
    return responses


def _conversation(prompt: Prompt, response: str, tokenizer: PreTrainedTokenizerBase, data: PreferenceData) -> str:
    """Return the chat template's text of prompt and response; it should begin with `prompt_text`."""
    messages = [*map(dict, prompt.messages), {"role": "assistant", "content": response}]
    if data.system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": data.system})
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))
    except TemplateError as error:
        raise DataError(f"{prompt.origin}: the tokenizer's chat template refuses it: {error}") from error


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    # add_special_tokens=False: the templates write what they need. verbose=False: we cut by our own rules.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _dataset(
    rows: list[dict[str, Any]], given: Sequence[Prompt], counts: TokenCounts, data: PreferenceData
) -> Dataset:
    from datasets import Dataset
    from datasets.table import InMemoryTable

    counts.kept = len(rows)
    if not rows:
        raise DataError(
            f"none of {len(given)} rows is left: {counts.dropped} prompts are longer than max_prompt_length "
            f"{data.max_prompt_length} or leave no room in max_length {data.max_length}, {counts.same} pairs have the "
            "same tokens twice; raise the limits"
        )
    if counts.rows():
        told = ", ".join(f"{label}: {number}" for label, number in counts.rows())
        logger.info("%d of %d rows are tokenised; %s", len(rows), len(given), told)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    # a fingerprint of its own: datasets would else hash the whole table, for a cache that nothing here uses
    return Dataset(InMemoryTable.from_pydict(columns), fingerprint=uuid.uuid4().hex[:16])
