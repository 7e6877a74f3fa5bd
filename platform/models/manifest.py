"""`tenfold.json`: what a model folder is, what it was made from, and the digest of every file in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from tenfold.platform.errors import ModelError
from tenfold.platform.models.folder import CONFIG, file_digest, model_files, weight_files, write_text

__all__ = [
    "MANIFEST_NAME",
    "Manifest",
    "Parent",
    "check_digest",
    "model_digest",
    "model_files",
    "read_manifest",
    "verify_manifest",
    "write_manifest",
]

MANIFEST_NAME = "tenfold.json"
SCHEMA_VERSION = 1


class Parent(BaseModel):
    """One thing that a model was made from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str = Field(min_length=1, description="its part: teacher, student, initial, data, gguf, ...")
    reference: str = Field(min_length=1, description="a reference, path, URI or run id that a person can follow")
    digest: str | None = Field(None, description="sha256, where it is known")


class Manifest(BaseModel):
    """Content of `tenfold.json`."""

    # NaN and infinity as text: JSON has no numbers for them.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    schema_version: int = Field(ge=1, le=SCHEMA_VERSION)
    flavor: str = Field(min_length=1, description="kind of model: causal-lm, moe-causal-lm, edit-delta, ...")
    method: str = Field(min_length=1, description="what made it, a method's name or a tool of the platform")
    name: str = Field(min_length=1, description="for people")
    created: str = Field(description="UTC, ISO 8601")
    parents: list[Parent] = Field(default_factory=list)
    metrics: dict[str, float] = Field(default_factory=dict)
    files: dict[str, str] = Field(description="path in the folder, with / -> sha256 in hex")
    tenfold_version: str

    @field_validator("files")
    @classmethod
    def _inside_the_folder(cls, files: dict[str, str]) -> dict[str, str]:
        for name in files:
            if not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{name!r} is outside the folder")
        return files

    @property
    def digest(self) -> str:
        """The model's own digest, as the files were when the manifest was written; see `model_digest`."""
        return _digest_of(self.files)


def write_manifest(
    folder: Path,
    *,
    flavor: str,
    method: str,
    name: str,
    parents: Sequence[Parent] = (),
    metrics: Mapping[str, float] | None = None,
    created: str | None = None,
) -> Manifest:
    """Describe all files in a folder; call it last, it declares the folder complete.

    Args:
        folder: a model folder; every file in it is digested.
        flavor: see `Manifest`.
        method: see `Manifest`.
        name: see `Manifest`.
        parents: what the model was made from.
        metrics: its scores.
        created: ISO time; default now.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        flavor=flavor,
        method=method,
        name=name,
        created=created or datetime.now(UTC).isoformat(timespec="seconds"),
        parents=list(parents),
        metrics=dict(metrics or {}),
        files={name: file_digest(folder / name) for name in names if name != MANIFEST_NAME},
        tenfold_version=version("tenfold"),
    )
    write_text(folder / MANIFEST_NAME, manifest.model_dump_json(indent=2) + "\n")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Return a folder's manifest.

    Raises:
        ModelError: there is none, it is damaged, or a newer tenfold wrote it.
    """
    path = folder / MANIFEST_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ModelError(
            f"{folder}: no {MANIFEST_NAME}, so this folder is incomplete or was not written by tenfold. Make it again"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        written = _schema_version(text)
        if written is not None and written > SCHEMA_VERSION:
            raise ModelError(
                f"{path}: has schema_version {written}, this tenfold reads up to {SCHEMA_VERSION}. Install a newer one"
            ) from error
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ModelError(f"{path}: damaged: {where}: {first['msg']}. Make or copy the folder again") from error


def _schema_version(text: str) -> int | None:
    try:
        content: Any = json.loads(text)
    except ValueError:
        return None
    number = content.get("schema_version") if isinstance(content, dict) else None
    return number if isinstance(number, int) else None


def verify_manifest(folder: Path) -> Manifest:
    """Read all files of a folder and compare them with its manifest; files that it does not name are not looked at.

    Raises:
        ModelError: no manifest, or a file is missing or differs; the message names it.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{path}: missing, though {MANIFEST_NAME} names it. Make or copy the folder again")
        try:
            found = file_digest(path)
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error}. Make or copy the folder again") from error
        if found != expected:
            raise ModelError(
                f"{path}: not what was written (sha256 {found[:12]}, {MANIFEST_NAME} says {expected[:12]}). "
                f"Make or copy the folder again"
            )
    return manifest


def model_digest(folder: Path) -> str:
    """Return one sha256 for a model: over the digests of its configuration and weights.

    Tokenizer, manifest, projectors and other files do not count, so a copy and an export of a model have its digest.
    Digests are taken from the manifest where there is one (`verify_manifest` compares them with the files), else from
    the files, which are read once in a process.

    Raises:
        ModelError: the folder has no weights, or a file is missing.
    """
    if (folder / MANIFEST_NAME).is_file():
        return read_manifest(folder).digest
    names = _identifying(path.name for path in folder.glob("*") if path.is_file())
    if not any(name.endswith(".safetensors") for name in names):
        weight_files(folder)  # says what there is instead
    return _digest_of({name: file_digest(folder / name) for name in names})


def _identifying(names: Iterable[str]) -> list[str]:
    """Choose the configuration and the weights; models that are no Hugging Face folder name those as they like."""
    given = sorted(names)
    weights = [name for name in given if name.endswith(".safetensors") and "/" not in name]
    main = [name for name in weights if name.startswith("model")]
    return [name for name in given if name == CONFIG] + (main or weights)


def _digest_of(files: Mapping[str, str]) -> str:
    lines = [f"{files[name]}  {name}\n" for name in _identifying(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_digest(folder: Path, expected: str | None) -> None:
    """Make sure that a model is the one that was asked for; None asks for nothing.

    Raises:
        ModelError: it is another one, or its files are damaged.
    """
    if expected is None:
        return
    if (folder / MANIFEST_NAME).is_file():
        verify_manifest(folder)
    found = model_digest(folder)
    if found != expected:
        raise ModelError(
            f"{folder}: sha256 of the model is {found}, expected {expected}. Correct sha256, or get the right model"
        )
