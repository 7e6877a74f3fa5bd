"""Architectures that a method brings: transformers learns about them when a model of theirs is asked for."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from tenfold.platform.method import method_table
from tenfold.platform.models.folder import CONFIG


def architecture_module(model_type: Any) -> str | None:
    """Return the module that registers a type with transformers' Auto classes; None for transformers' own.

    A method's types are called `METHOD-BASE`, and its module `modeling` registers them when it is imported.
    """
    method, dash, _ = model_type.partition("-") if isinstance(model_type, str) else ("", "", "")
    place = method_table().get(method)
    if not dash or place is None:
        return None
    package = place.partition(":")[0].rpartition(".")[0]
    module = f"{package}.modeling"
    return module if importlib.util.find_spec(module) is not None else None


def known(model_type: Any) -> None:
    """Let transformers' Auto classes know a method's type; any other is left to them."""
    module = architecture_module(model_type)
    if module is not None:
        importlib.import_module(module)


def stored_type(folder: Path) -> Any:
    """Return the model type that a folder's config.json names; None where it cannot be read or names none."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # whoever loads the folder says what is wrong with it
    return content.get("model_type") if isinstance(content, dict) else None


def known_in(folder: Path) -> None:
    """Let transformers' Auto classes know the type of a model folder."""
    known(stored_type(folder))
