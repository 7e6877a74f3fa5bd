"""What one row of preference data says: a prompt, two answers of which one is better, or one that is good or bad."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tenfold.platform.data.examples import Example

# Our name -> the columns that may hold it; the first with a value counts.
COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt",),
    "instruction": ("instruction", "query", "question"),
    "input": ("input", "context"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "completion": ("completion", "response", "output", "answer"),
    "label": ("label",),
    "messages": ("messages", "conversations"),
}
# As chat templates name them, and as ShareGPT's files do.
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
Turn = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """What is asked.

    Attributes:
        messages: turns before the response, each {"role", "content"}; the last one is the user's.
        origin: file and row, for messages to people.
        input: the part of the last turn that the alpaca template sets apart, or "".
    """

    messages: tuple[Mapping[str, str], ...]
    origin: str
    input: str = ""

    def example(self, response: str = "") -> Example:
        """Return it with a response, in the form that the platform's templates read."""
        asked = self.messages[-1]["content"]
        instruction = asked.removesuffix(f"\n{self.input}") if self.input else asked
        return Example(self.messages, (response,), self.origin, instruction, self.input)


@dataclass(frozen=True, kw_only=True)
class Pair(Prompt):
    """A prompt and two answers, the better one and the worse one; either may be empty."""

    chosen: str
    rejected: str


@dataclass(frozen=True, kw_only=True)
class Single(Prompt):
    """A prompt and one answer that is good or bad; it may be empty."""

    response: str
    desirable: bool


def columns_of(fields: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return our name -> columns to look at: those of `fields` alone, or all known ones where it is empty."""
    return {name: (fields[name],) if name in fields else () for name in COLUMNS} if fields else COLUMNS


def read_prompt(row: Mapping[str, Any], origin: str, columns: Mapping[str, Sequence[str]]) -> Prompt:
    """Return what a row asks, whatever kind of row it is.

    It is the conversation before the last turn of `chosen`, or prompt / instruction (and input), or the messages
    without an assistant's last turn. Where `chosen` is a conversation, a prompt beside it must be in it: as its
    beginning, or as the text of a user's turn.

    Raises:
        ValueError: what is wrong with the row.
    """
    chosen = _value(row, columns["chosen"])
    conversation = _turns(chosen, "chosen")[:-1] if isinstance(chosen, list) else []
    name, asked = _find(row, [*columns["prompt"], *columns["instruction"]])
    extra = _value(row, columns["input"])
    if conversation:
        _check_same_prompt(asked, name, conversation)
        return _prompt(conversation, origin)
    if isinstance(asked, list):
        return _prompt(_without_answer(_turns(asked, name)), origin)
    if asked is not None:
        text, more = _text(asked, name), _text("" if extra is None else extra, "input")
        if not text.strip():
            raise ValueError(f"{name} is empty; needs text")
        more = more if more.strip() else ""
        return _prompt([{"role": "user", "content": f"{text}\n{more}" if more else text}], origin, more)
    messages = _value(row, columns["messages"])
    if messages is None:
        places = [name for kind in ("prompt", "instruction", "messages") for name in columns[kind]]
        raise ValueError(f"has no {' / '.join(places) or 'column that fields calls prompt'}; needs one of them")
    return _prompt(_without_answer(_turns(messages, "messages")), origin)


def has_pair(row: Mapping[str, Any], columns: Mapping[str, Sequence[str]]) -> bool:
    """Say whether the row has a chosen or a rejected answer."""
    return any(_value(row, columns[name]) is not None for name in ("chosen", "rejected"))


def read_pair(row: Mapping[str, Any], prompt: Prompt, columns: Mapping[str, Sequence[str]]) -> Pair:
    """Return the two answers to the row's prompt, each a text, a message, or a conversation that it ends.

    Raises:
        ValueError: an answer is missing or of another kind, or both do not answer the same prompt.
    """
    answers = {name: _answer(_value(row, columns[name]), name, prompt) for name in ("chosen", "rejected")}
    return Pair(messages=prompt.messages, origin=prompt.origin, input=prompt.input, **answers)


def read_single(row: Mapping[str, Any], prompt: Prompt, columns: Mapping[str, Sequence[str]]) -> Single:
    """Return the answer to the row's prompt, the completion or the messages' last turn, and whether it is good.

    Raises:
        ValueError: the answer or the label is missing or of another kind.
    """
    label = _value(row, columns["label"])
    if not isinstance(label, int) or label not in (0, 1):
        places = " / ".join(columns["label"]) or "a column that fields calls label"
        raise ValueError(
            f"{places} is {label!r}; single answers need true (good) or false (bad), else chosen, rejected"
        )
    name, value = _find(row, [*columns["completion"], *columns["messages"]])
    response = _answer(value, name or "completion", prompt)
    return Single(
        messages=prompt.messages, origin=prompt.origin, input=prompt.input, response=response, desirable=bool(label)
    )


def _prompt(turns: Sequence[Turn], origin: str, extra: str = "") -> Prompt:
    roles = [turn["role"] for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if spoken != ["user", *["assistant", "user"] * (len(spoken) // 2)]:
        raise ValueError(
            "before the answer, after an optional system turn, user and assistant must alternate and the user ends; "
            f"got {', '.join(roles) or 'nothing'}"
        )
    for number, turn in enumerate(turns, start=1):
        if turn["role"] == "user" and not turn["content"].strip():
            raise ValueError(f"turn {number} (user) is empty; needs text")
    return Prompt(tuple(turns), origin, extra)


def _answer(value: Any, name: str, prompt: Prompt) -> str:
    """Return an answer's text; one of white space alone is empty."""
    if value is None:
        raise ValueError(f"has no {name}; needs text, a message or messages")
    if isinstance(value, str):
        text = value
    else:
        turns = _turns(value if isinstance(value, list) else [value], name)
        if turns[-1]["role"] != "assistant":
            raise ValueError(f"{name} ends with the turn of the {turns[-1]['role']}; needs the assistant's")
        if len(turns) > 1 and tuple(turns[:-1]) != prompt.messages:
            raise ValueError(f"{name} answers another prompt than the row's; both answers need the same one")
        text = turns[-1]["content"]
    return text if text.strip() else ""


def _check_same_prompt(asked: Any, name: str, conversation: Sequence[Turn]) -> None:
    """Make sure that a prompt given beside a conversation is the one that the conversation shows."""
    if asked is None:
        return
    if isinstance(asked, list):
        same = _turns(asked, name) == list(conversation)
    else:
        words = _text(asked, name).split()
        same = any(turn["role"] == "user" and turn["content"].split() == words for turn in conversation)
    if not same:
        raise ValueError(f"{name} is not the prompt that chosen answers; needs the same one")


def _without_answer(turns: list[Turn]) -> list[Turn]:
    return turns[:-1] if turns[-1]["role"] == "assistant" else turns


def _turns(value: Any, name: str) -> list[Turn]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} needs text or a list of turns")
    turns = []
    for number, turn in enumerate(value, start=1):
        found = turn if isinstance(turn, Mapping) else {}
        role, content = _value(found, ("role", "from")), _value(found, ("content", "value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"{name}: turn {number} needs role and content (or from and value), both text")
        if role not in ROLES:
            raise ValueError(f"{name}: turn {number} has the role {role!r}; known: {', '.join(ROLES)}")
        turns.append({"role": ROLES[role], "content": content})
    return turns


def _find(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, Any]:
    """Return (name, value) of the first column with a value; columnar files fill what a row lacks with None."""
    return next(((name, row[name]) for name in columns if row.get(name) is not None), ("", None))


def _value(row: Mapping[str, Any], columns: Sequence[str]) -> Any:
    return _find(row, columns)[1]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is a {type(value).__name__}; needs text")
    return value
