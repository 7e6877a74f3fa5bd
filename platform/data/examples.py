"""Rows of many shapes become examples: a conversation and its reference responses."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tenfold.platform.data.config import DataConfig, DataSource
from tenfold.platform.data.readers import BadRow, read_rows
from tenfold.platform.errors import DataError

logger = logging.getLogger(__name__)

INSTRUCTION = ("instruction", "prompt", "query", "question")
INPUT = ("input", "context")
RESPONSE = ("output", "response", "answer", "completion")
SHOWN_BAD_ROWS = 10


@dataclass(frozen=True)
class Example:
    """One conversation.

    Attributes:
        messages: turns before the response, each {"role", "content"}; the last one is the user's.
        responses: at least one reference; training uses the first.
        origin: file and row, for messages to people.
        instruction: what the last user turn asks; with `input` the parts that the alpaca template sets apart.
        input: the instruction's own context, or "".
    """

    messages: tuple[Mapping[str, str], ...]
    responses: tuple[str, ...]
    origin: str
    instruction: str
    input: str = ""


@dataclass(frozen=True)
class Splits:
    """Examples for training and validation.

    Attributes:
        train: at least one example.
        validation: at least one example.
        skipped: rows left out because they were bad.
        digest: sha256 over the texts of both splits, in order.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    skipped: int
    digest: str


def load_examples(config: DataConfig) -> Splits:
    """Read, check, shuffle and split the data; which row goes where depends on `split_seed` alone.

    The held-out part is the last `validation_ratio` of the shuffled training data, rounded to whole rows.

    Raises:
        DataError: bad rows (the first ten are named with file and line), or a split without examples.
    """
    train, skipped = read_examples(config.train, config, "train")
    random.Random(config.split_seed).shuffle(train)
    if config.validation is not None:
        validation, more = read_examples(config.validation, config, "validation")
        skipped += more
    else:
        held_out = round(len(train) * config.validation_ratio)
        if not 0 < held_out < len(train):
            raise DataError(
                f"{len(train)} rows with validation_ratio {config.validation_ratio} leave a split empty; "
                "give more rows, another ratio, or `validation`"
            )
        train, validation = train[:-held_out], train[-held_out:]
    train, validation = train[: config.max_train_rows], validation[: config.max_validation_rows]
    return Splits(tuple(train), tuple(validation), skipped, _digest(train, validation))


def _digest(*splits: Sequence[Example]) -> str:
    content = [[[[dict(turn) for turn in e.messages], e.responses] for e in split] for split in splits]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_examples(sources: Sequence[DataSource], config: DataConfig, split: str) -> tuple[list[Example], int]:
    """Return the good rows of some sources in their order, and the number of bad ones that were left out.

    Args:
        sources: what to read.
        config: its template and `skip_bad_rows`.
        split: what messages call these rows.

    Raises:
        DataError: bad rows, or no good one.
    """
    examples: list[Example] = []
    bad: list[str] = []
    for source in sources:
        for row, origin in read_rows(source):
            try:
                example = to_example(row, origin, source.fields)
                if config.template != "chat" and len(example.messages) > 1:
                    raise ValueError(f"has earlier turns, which template {config.template} cannot show; use chat")
                examples.append(example)
            except ValueError as error:
                bad.append(f"{origin}: {error}")
    if bad:
        shown = "\n".join(f"  - {line}" for line in bad[:SHOWN_BAD_ROWS])
        more = f"\n  ... and {len(bad) - SHOWN_BAD_ROWS} more" if len(bad) > SHOWN_BAD_ROWS else ""
        told = f"{len(bad)} of {len(bad) + len(examples)} {split} rows"
        if not config.skip_bad_rows:
            raise DataError(
                f"{told} cannot be used:\n{shown}{more}\nMend them, or set skip_bad_rows: true to leave them out"
            )
        logger.warning("%s are bad and left out:\n%s%s", told, shown, more)
    if not examples:
        names = ", ".join(source.path for source in sources)
        raise DataError(f"{names}: all {len(bad)} {split} rows are bad, nothing is left; the first: {bad[0]}")
    return examples, len(bad)


def to_example(row: Any, origin: str, fields: Mapping[str, str] | None = None) -> Example:
    """Turn one row into an example.

    Known shapes: {instruction, input?, output}, {prompt, response}, {question, answer}, {messages: [...]}, and
    self-instruct's {instruction, instances: [{input, output}, ...]}, of which the first instance is taken. The
    response is a text or a list of reference texts; it may be empty, the instruction may not.

    Args:
        row: a mapping, or a `BadRow`.
        origin: where the row came from.
        fields: our name -> column; when given, no other column is looked at.

    Raises:
        ValueError: what is wrong with the row.
    """
    if isinstance(row, BadRow):
        raise ValueError(row.reason)
    if not isinstance(row, Mapping):
        raise ValueError(f"is a {type(row).__name__}; needs an object with named fields")
    columns = {"instruction": INSTRUCTION, "input": INPUT, "response": RESPONSE, "messages": ("messages",)}
    if fields:
        columns = {name: (fields[name],) if name in fields else () for name in columns}
    elif row.get("instances") is not None and row.get("messages") is None:
        row = {**row, **_first_instance(row["instances"])}
    _, messages = _find(row, columns["messages"])
    if messages is not None or (fields and "messages" in fields):
        return _from_messages(messages, origin)

    name, instruction = _find(row, columns["instruction"])
    instruction = _text(instruction, name, columns["instruction"])
    if not instruction.strip():
        raise ValueError(f"{name} is empty; needs text")
    name, extra = _find(row, columns["input"])
    extra = "" if extra is None else _text(extra, name, columns["input"])
    name, responses = _find(row, columns["response"])
    if isinstance(responses, list) and not responses:
        raise ValueError(f"{name} is an empty list; needs at least one reference")
    texts = responses if isinstance(responses, list) else [responses]
    references = tuple(_text(text, name, columns["response"]) for text in texts)
    user = f"{instruction}\n{extra}" if extra.strip() else instruction
    return Example(({"role": "user", "content": user},), references, origin, instruction, extra)


def _from_messages(messages: Any, origin: str) -> Example:
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError("messages needs a list of at least two turns")
    turns: list[dict[str, str]] = []
    for number, turn in enumerate(messages, start=1):
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise ValueError(f"messages: turn {number} needs role and content, both text")
        turns.append({"role": turn["role"], "content": turn["content"]})
    roles = [turn["role"] for turn in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    if len(spoken) < 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise ValueError(
            "messages: after an optional system turn, user and assistant must alternate and the assistant must end; "
            f"got {', '.join(roles)}"
        )
    for number, turn in enumerate(turns, start=1):
        if turn["role"] == "user" and not turn["content"].strip():
            raise ValueError(f"messages: turn {number} (user) is empty; needs text")
    return Example(tuple(turns[:-1]), (turns[-1]["content"],), origin, turns[-2]["content"])


def _first_instance(instances: Any) -> Mapping[str, Any]:
    if not isinstance(instances, list) or not instances or not isinstance(instances[0], Mapping):
        raise ValueError("instances needs a list of objects with input and output")
    return instances[0]


def _find(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, Any]:
    """Return (name, value) of the first column with a value; columnar files fill what a row lacks with None."""
    return next(((name, row[name]) for name in columns if row.get(name) is not None), ("", None))


def _text(value: Any, name: str, columns: Sequence[str]) -> str:
    if value is None:
        missing = f"{name} holds null" if name else f"has no {' / '.join(columns)}"
        raise ValueError(f"{missing}; needs text")
    if not isinstance(value, str):
        raise ValueError(f"{name} is a {type(value).__name__}; needs text")
    return value
