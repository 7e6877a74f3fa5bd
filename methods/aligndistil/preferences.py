"""Preference data is read, checked, counted and split: pairs, single answers, or prompts alone.

The validation part that is taken from the training data shares no prompt with the rest, and all three kinds are split
alike: held-out pairs answer none of the prompts that on-policy training reads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from tenfold.methods.aligndistil.config import AlignDistilConfig, PreferenceData, PreferenceSource
from tenfold.methods.aligndistil.preference_rows import (
    Pair,
    Prompt,
    Single,
    columns_of,
    has_pair,
    read_pair,
    read_prompt,
    read_single,
)
from tenfold.platform.data.examples import SHOWN_BAD_ROWS
from tenfold.platform.data.readers import BadRow, read_rows
from tenfold.platform.errors import DataError

logger = logging.getLogger(__name__)

Item = TypeVar("Item", bound=Prompt)
Key = tuple[tuple[str, str], ...]
Columns = Mapping[str, Sequence[str]]
ItemsOf = Callable[[Mapping[str, Any], Prompt, Columns, Counter[str]], list[Item]]


@dataclass(frozen=True)
class Found:
    """What reading found.

    Attributes:
        kind: "pairs", "answers" or "prompts": what is counted.
        train: how many for training, after `max_train_rows`.
        validation: how many held out, after `max_validation_rows`.
        same: pairs left out because chosen and rejected are the same text.
        duplicates: left out because the same was there before.
        empty: empty answers, which are kept: they teach to end at once.
        skipped: bad rows left out.
        scored_against: pairs whose own scores (score_chosen, score_rejected) prefer the rejected answer; kept.
        shared_prompts: prompts of a separate validation file that training has too; kept.
    """

    kind: str
    train: int
    validation: int
    same: int = 0
    duplicates: int = 0
    empty: int = 0
    skipped: int = 0
    scored_against: int = 0
    shared_prompts: int = 0

    def rows(self) -> tuple[tuple[str, str], ...]:
        """Return (label, number) for the plan; of the counts of oddities only those above 0."""
        oddities = {
            "same": "pairs with equal answers, left out",
            "duplicates": f"{self.kind} that were there before, left out",
            "empty": "empty answers",
            "skipped": "bad rows, left out",
            "scored_against": "pairs whose scores prefer the rejected answer",
            "shared_prompts": "validation prompts that training has too",
        }
        counts = {f"training {self.kind}": self.train, f"validation {self.kind}": self.validation}
        counts |= {label: getattr(self, name) for name, label in oddities.items() if getattr(self, name)}
        return tuple((label, f"{count:,}") for label, count in counts.items())


@dataclass(frozen=True)
class PreferenceSplits(Generic[Item]):
    """Data for training and validation.

    Attributes:
        train: at least one.
        validation: at least one.
        found: what reading found.
        digest: sha256 over the texts of both splits, in order.
    """

    train: tuple[Item, ...]
    validation: tuple[Item, ...]
    found: Found
    digest: str


def load_pairs(data: PreferenceData) -> PreferenceSplits[Pair]:
    """Read pairs of a better and a worse answer; with `swap_preferences` the two are exchanged.

    The held-out part are the pairs of the last `validation_ratio` of the shuffled prompts, which depends on
    `split_seed` alone.

    Raises:
        DataError: bad rows (the first ten are named with file and line), or a split without data.
    """

    def pairs(row: Mapping[str, Any], prompt: Prompt, columns: Columns, tally: Counter[str]) -> list[Pair]:
        return _pair(row, prompt, columns, tally, data.swap_preferences)

    return _load(data, "pairs", pairs)


def load_singles(data: PreferenceData) -> PreferenceSplits[Single]:
    """Read single answers that are good or bad (KTO); a pair gives one of each. Else as `load_pairs`.

    With `swap_preferences` good is bad and bad is good.
    """

    def singles(row: Mapping[str, Any], prompt: Prompt, columns: Columns, tally: Counter[str]) -> list[Single]:
        if not has_pair(row, columns):
            single = read_single(row, prompt, columns)
            return [replace(single, desirable=single.desirable != data.swap_preferences)]
        return [
            Single(messages=pair.messages, origin=pair.origin, input=pair.input, response=text, desirable=desirable)
            for pair in _pair(row, prompt, columns, tally, data.swap_preferences)
            for text, desirable in ((pair.chosen, True), (pair.rejected, False))
        ]

    return _load(data, "answers", singles)


def load_prompts(data: PreferenceData) -> PreferenceSplits[Prompt]:
    """Read what is asked, from any kind of row, each prompt once: an assistant's last turn is dropped."""
    return _load(data, "prompts", lambda row, prompt, columns, tally: [prompt])


def held_out_pairs(data: PreferenceData) -> tuple[Pair, ...]:
    """Return the pairs of the validation part; training data without pairs (prompts alone) is not asked for any."""
    if data.validation is not None:
        data = data.model_copy(update={"train": data.validation})
    return load_pairs(data).validation


def data_digest(config: AlignDistilConfig) -> str:
    """Return a sha256 over all that training with an objective reads, held-out pairs too."""
    if config.on_policy is not None:
        return _digest(load_prompts(config.data).train, held_out_pairs(config.data))
    return load_singles(config.data).digest if config.objective == "kto" else load_pairs(config.data).digest


def _pair(row: Mapping[str, Any], prompt: Prompt, columns: Columns, tally: Counter[str], swap: bool) -> list[Pair]:
    """Return the row's pair, or nothing where both answers are the same but for white space around them."""
    pair = read_pair(row, prompt, columns)
    if pair.chosen.strip() == pair.rejected.strip():
        tally["same"] += 1
        return []
    scores = [row.get(name) for name in ("score_chosen", "score_rejected")]
    if all(isinstance(score, int | float) for score in scores):
        tally["scored_against"] += scores[0] < scores[1]  # type: ignore[operator]
    return [replace(pair, chosen=pair.rejected, rejected=pair.chosen) if swap else pair]


def _load(data: PreferenceData, kind: str, items_of: ItemsOf[Item]) -> PreferenceSplits[Item]:
    tally: Counter[str] = Counter()
    train, prompts = _read(data.train, data, items_of, "train", tally)
    if data.validation is not None:
        random.Random(data.split_seed).shuffle(train)
        validation, _ = _read(data.validation, data, items_of, "validation", tally)
        tally["shared_prompts"] = len({_key(item) for item in validation} & {_key(item) for item in train})
    else:
        train, validation = _hold_out(train, prompts, data)
    train, validation = train[: data.max_train_rows], validation[: data.max_validation_rows]
    if not train or not validation:
        raise DataError(f"{len(train)} training and {len(validation)} validation {kind} are left; needs at least one")
    tally["empty"] = sum(_content(item).count("") for item in (*train, *validation))
    found = Found(kind, len(train), len(validation), **tally)
    if found.scored_against or found.shared_prompts:
        logger.warning("preference data: %s", ", ".join(f"{label}: {count}" for label, count in found.rows()))
    return PreferenceSplits(tuple(train), tuple(validation), found, _digest(train, validation))


def _hold_out(items: list[Item], prompts: list[Key], data: PreferenceData) -> tuple[list[Item], list[Item]]:
    """Return (training, validation) items in the order of their shuffled prompts."""
    random.Random(data.split_seed).shuffle(prompts)
    held_out = round(len(prompts) * data.validation_ratio)
    if not 0 < held_out < len(prompts):
        raise DataError(
            f"{len(prompts)} different prompts with validation_ratio {data.validation_ratio} leave a split empty; "
            "give more rows, another ratio, or `validation`"
        )
    place = {key: number for number, key in enumerate(prompts)}
    ordered = sorted(items, key=lambda item: place[_key(item)])
    border = len(prompts) - held_out
    train = [item for item in ordered if place[_key(item)] < border]
    return train, ordered[len(train) :]


def _read(
    sources: Sequence[PreferenceSource],
    data: PreferenceData,
    items_of: ItemsOf[Item],
    split: str,
    tally: Counter[str],
) -> tuple[list[Item], list[Key]]:
    """Return the items of the good rows in their order, each once, and all prompts, whatever the kind of item."""
    items: dict[tuple[Any, ...], Item] = {}
    prompts: dict[Key, None] = {}
    bad: list[str] = []
    rows = 0
    for source in sources:
        columns = columns_of(source.fields)
        for row, origin in read_rows(source):
            rows += 1
            try:
                prompt = _checked_prompt(row, origin, columns, data)
                prompts[_key(prompt)] = None
                for item in items_of(row, prompt, columns, tally):
                    tally["duplicates"] += _content(item) in items
                    items.setdefault(_content(item), item)
            except ValueError as error:
                bad.append(f"{origin}: {error}")
    _tell_bad(bad, rows, split, data)
    tally["skipped"] += len(bad)
    if not items:
        names = ", ".join(source.path for source in sources)
        why = f"; the first: {bad[0]}" if bad else ""
        raise DataError(f"{names}: none of {rows} {split} rows is left, {len(bad)} are bad{why}")
    return list(items.values()), list(prompts)


def _checked_prompt(row: Any, origin: str, columns: Columns, data: PreferenceData) -> Prompt:
    if isinstance(row, BadRow):
        raise ValueError(row.reason)
    if not isinstance(row, Mapping):
        raise ValueError(f"is a {type(row).__name__}; needs an object with named fields")
    prompt = read_prompt(row, origin, columns)
    if data.template != "chat" and len(prompt.messages) > 1:
        raise ValueError(f"has earlier turns, which template {data.template} cannot show; use chat")
    return prompt


def _tell_bad(bad: Sequence[str], rows: int, split: str, data: PreferenceData) -> None:
    """Refuse bad rows, or tell them where they may be left out; worded as in platform/data/examples.py."""
    if not bad:
        return
    shown = "\n".join(f"  - {line}" for line in bad[:SHOWN_BAD_ROWS])
    more = f"\n  ... and {len(bad) - SHOWN_BAD_ROWS} more" if len(bad) > SHOWN_BAD_ROWS else ""
    told = f"{len(bad)} of {rows} {split} rows"
    if not data.skip_bad_rows:
        raise DataError(
            f"{told} cannot be used:\n{shown}{more}\nMend them, or set skip_bad_rows: true to leave them out"
        )
    logger.warning("%s are bad and left out:\n%s%s", told, shown, more)


def _key(prompt: Prompt) -> Key:
    return tuple((turn["role"], turn["content"]) for turn in prompt.messages)


def _content(item: Prompt) -> tuple[Any, ...]:
    """Return the prompt and, by kind, the answers or the answer and its label: what makes two items the same."""
    names = {Pair: ("chosen", "rejected"), Single: ("response", "desirable")}.get(type(item), ())
    return (_key(item), *(getattr(item, name) for name in names))


def _digest(*splits: Sequence[Prompt]) -> str:
    content = [[_content(item) for item in split] for split in splits]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
