"""GGUF files become Hugging Face folders once, in the cache; whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from tenfold.platform.errors import ModelError
from tenfold.platform.models.cache import build_once, cache_folder
from tenfold.platform.models.folder import file_digest
from tenfold.platform.models.manifest import Parent, verify_manifest, write_manifest
from tenfold.platform.models.sharding import sharded_by

logger = logging.getLogger(__name__)

GGUF_MAGIC = b"GGUF"


def check_gguf(path: Path, sha256: str | None = None) -> str:
    """Return the sha256 of a GGUF file.

    Args:
        path: the file.
        sha256: the digest it must have, if any.

    Raises:
        ModelError: it is no GGUF file, or not the expected one.
    """
    try:
        with path.open("rb") as stream:
            magic = stream.read(len(GGUF_MAGIC))
        digest = file_digest(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if magic != GGUF_MAGIC:
        raise ModelError(f"{path}: not a GGUF file (it begins with {magic!r}). Download it again")
    if sha256 is not None and digest != sha256:
        raise ModelError(
            f"{path}: has sha256 {digest}, expected {sha256}. The file is damaged or another version: install it "
            f"again, or correct sha256"
        )
    return digest


def converted_folder(path: Path, digest: str) -> Path:
    """Return where the conversion of a GGUF file is kept, made or not."""
    return cache_folder() / "gguf" / f"{path.stem}-{digest[:16]}"


def damage(folder: Path) -> str | None:
    """Return what is wrong with a converted folder, or None; all files are read (once in a process)."""
    try:
        verify_manifest(folder)
    except ModelError as error:
        return str(error)
    return None


def outline_gguf(path: Path, *, sha256: str | None = None) -> Path:
    """Return a folder with the configuration and the tokenizer of a GGUF file; of its conversion where there is one.

    Reading them takes up to a minute, so it is done once as well; the weights are not looked at.

    Args:
        path: the GGUF file.
        sha256: the digest that the file must have, if any.

    Raises:
        ModelError: see `convert_gguf`.
    """
    digest = check_gguf(path, sha256)
    converted = converted_folder(path, digest)
    if converted.is_dir() and damage(converted) is None:
        return converted
    target = cache_folder() / "gguf-outline" / converted.name
    return build_once(target, lambda folder: _outline(path, digest, folder), damage)


def _outline(path: Path, digest: str, folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    logger.info("reading the vocabulary of %s once", path.name)
    with _read_by_transformers(path):
        for kind in (AutoConfig, AutoTokenizer):
            kind.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False).save_pretrained(folder)
    _sign(path, digest, folder, flavor="outline")


def _sign(path: Path, digest: str, folder: Path, *, flavor: str) -> None:
    parents = [Parent(kind="gguf", reference=path.name, digest=digest)]
    write_manifest(folder, flavor=flavor, method="gguf-conversion", name=path.stem, parents=parents)


@contextlib.contextmanager
def _read_by_transformers(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # The reader lets errors of many kinds through.
        raise ModelError(
            f"{path}: transformers cannot read this GGUF file: {type(error).__name__}: {error}. Give a file that is "
            f"whole and of an architecture it knows (llama, qwen2, ...), or a Hugging Face folder"
        ) from error


def convert_gguf(path: Path, *, sha256: str | None = None) -> Path:
    """Return the Hugging Face folder (float32 safetensors) of a GGUF file, converting it at the first use.

    Quantised weights are dequantised: transformers keeps them as GGUF blocks otherwise, which can be neither trained
    nor saved. A conversion that was stopped leaves nothing that is used, and a damaged one is made again.

    Args:
        path: the GGUF file.
        sha256: the digest that the file must have, if any.

    Raises:
        ModelError: it is not the expected file, is damaged, or holds a kind of model that transformers cannot read.
    """
    digest = check_gguf(path, sha256)
    target = converted_folder(path, digest)
    return build_once(target, lambda folder: _convert(path, digest, folder), damage)


def _convert(path: Path, digest: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logger.info("converting %s (%.0f MB) once, to %s", path.name, path.stat().st_size / 1e6, folder.parent)
    started = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(outline_gguf(path), trust_remote_code=False)
    with (
        _read_by_transformers(path),
        sharded_by(None),  # a worker that trains with ZeRO-3 may be the first to need it
    ):
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            trust_remote_code=False,
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _sign(path, digest, folder, flavor="causal-lm")
    logger.info("converted %s in %.0f s", path.name, time.monotonic() - started)
