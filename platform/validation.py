"""Turn pydantic's errors into sentences: key, value, what is allowed, the nearest valid key."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate most like `word`, or None when nothing is close."""
    matches = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Return how a sentence about an unknown `word` ends: asking for a candidate that is near, or with a stop."""
    near = nearest(word, candidates)
    return f"; did you mean {near}?" if near else "."


def validate_all(model: type[Model], data: dict[str, Any], prefix: str = "") -> tuple[Model | None, list[str]]:
    """Check `data` strictly against `model`.

    Returns:
        The validated model (None when there are errors) and one sentence per error.
    """
    try:
        # JSON mode: lists become tuples where the model says so, while text never becomes a number.
        return model.model_validate_json(json.dumps(data, default=str), strict=True), []
    except ValidationError as error:
        return None, [_sentence(model, data, detail, prefix) for detail in error.errors()]


def _sentence(model: type[BaseModel], data: Any, detail: Any, prefix: str) -> str:
    location = [part for part in detail["loc"] if not _is_union_tag(part)]
    key = ".".join(str(part) for part in ([prefix] if prefix else []) + location) or "(top level)"
    if detail["type"] == "extra_forbidden":
        owner = _model_at(model, location[:-1])
        allowed = sorted(owner.model_fields) if owner else []
        wrong = str(location[-1])
        elsewhere = _same_leaf(model, wrong)
        # the very name in another section is a better guess than a like one in this
        hint = elsewhere if (elsewhere or "").endswith(f".{wrong}") else nearest(wrong, allowed) or elsewhere
        path = ".".join([prefix] * bool(prefix) + [str(part) for part in location[:-1]])
        if hint and "." not in hint:
            hint = f"{path}.{hint}" if path else hint
        elif hint and prefix:
            hint = f"{prefix}.{hint}"
        suggestion = f"did you mean {hint}? " if hint else ""
        return f"{key} = {_value(data, location)!r}: unknown key; {suggestion}allowed here: {', '.join(allowed)}"
    if detail["type"] == "missing":
        return f"{key}: missing; {_describe(model, location)}"
    message = detail["msg"].removeprefix("Value error, ")
    if not location and detail["type"] == "value_error":
        return f"{prefix}: {message}" if prefix else message  # about several options, which the message names
    return f"{key} = {_value(data, location)!r}: {message}; {_describe(model, location)}".removesuffix("; ")


def _is_union_tag(part: Any) -> bool:
    return isinstance(part, str) and (part in {"str", "int", "float", "bool"} or "[" in part)


def _value(data: Any, location: list[Any]) -> Any:
    for part in location:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    text = repr(data)
    return data if len(text) <= 120 else text[:117] + "..."


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, tuple, dict, typing.Annotated):
        return [found for argument in typing.get_args(annotation) for found in _models_in(argument)]
    return []


def _model_at(model: type[BaseModel], location: list[Any]) -> type[BaseModel] | None:
    current: type[BaseModel] | None = model
    for part in location:
        if current is None:
            return None
        if part in current.model_fields:
            found = _models_in(current.model_fields[part].annotation)
            current = found[0] if found else None
        # a list index or a dictionary key stays with the model of the items
    return current


def _describe(model: type[BaseModel], location: list[Any]) -> str:
    owner = _model_at(model, location[:-1])
    field = owner.model_fields.get(str(location[-1])) if owner and location else None
    return f"expected: {field.description}" if field and field.description else ""


def _same_leaf(model: type[BaseModel], leaf: str) -> str | None:
    """Return the dotted path of a key with this (or nearly this) name elsewhere in the model."""
    paths = {path.rsplit(".", 1)[-1]: path for path in dotted_keys(model)}
    match = leaf if leaf in paths else nearest(leaf, paths)
    return paths[match] if match else None


class OptionRow(NamedTuple):
    """One option as documentation shows it."""

    key: str
    default: Any
    description: str


def option_rows(model: type[BaseModel], prefix: str = "") -> list[OptionRow]:
    """List every option with its default ("required" where there is none) and description."""
    rows: list[OptionRow] = []
    for name, field in model.model_fields.items():
        inner = _models_in(field.annotation)
        if inner:
            rows.extend(option_rows(inner[0], f"{prefix}{name}."))
        else:
            default = "required" if field.is_required() else field.get_default(call_default_factory=True)
            rows.append(OptionRow(f"{prefix}{name}", default, field.description or ""))
    return rows


def dotted_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """List every option of a model as a dotted path, sections before their options."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(f"{prefix}{name}")
        for inner in _models_in(field.annotation):
            keys.extend(dotted_keys(inner, f"{prefix}{name}."))
    return keys
