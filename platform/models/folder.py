"""What is in a model folder, and writing one so that nobody ever sees half of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from tenfold.platform.errors import ModelError

if TYPE_CHECKING:
    from tenfold.platform.storage import Storage

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Any of these lets transformers build a tokenizer.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
TOKENIZER_FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
)


def weight_files(folder: Path) -> list[str]:
    """Return the names of the safetensors files that `from_pretrained` reads, sorted.

    Raises:
        ModelError: a shard is missing, there are only pickled weights, or none at all.
    """
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if (folder / WEIGHTS_INDEX).is_file():
        names = sorted(set(read_weight_map(folder).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{folder}: {len(missing)} of {len(names)} weight files are missing, the first is {missing[0]}. "
                f"Copy or download the folder again"
            )
        return names
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder}: the weights are only there as pickles ({pickles[0]}), which can run code when loaded. "
            f"Give a folder with {WEIGHTS}; transformers' save_pretrained writes one"
        )
    raise ModelError(f"{folder}: no weights; a model folder has {WEIGHTS}, or shards and {WEIGHTS_INDEX}")


def read_weight_map(folder: Path) -> dict[str, str]:
    """Return tensor name -> shard file of a sharded folder.

    Raises:
        ModelError: the index is damaged or points outside the folder.
    """
    path = folder / WEIGHTS_INDEX
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not weight_map or any(Path(name).name != name for name in weight_map.values()):
            raise ValueError("it must map tensor names to files beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: not a usable index of weights: {error!r}. Copy or download it again") from error
    return weight_map


def model_files(folder: Path) -> list[Path]:
    """Return the files that a finished model consists of: configuration, weights and tokenizer, sorted by name.

    What training left beside them (projectors, optimizer state, code) is not among them.

    Raises:
        ModelError: the configuration or the weights are missing.
    """
    check_config(folder)
    names = [CONFIG, "generation_config.json", *TOKENIZER_FILES, *weight_files(folder)]
    if not (folder / WEIGHTS).is_file():
        names.append(WEIGHTS_INDEX)
    return sorted(folder / name for name in names if (folder / name).is_file())


def check_config(folder: Path) -> None:
    """Make sure that a folder describes a model.

    Raises:
        ModelError: there is no config.json.
    """
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"{folder}: no {CONFIG}, so this is no model folder. Give one that transformers' save_pretrained wrote"
        )


def file_digest(path: Path) -> str:
    """Return the sha256 of a file in hex; remembered in this process while size and time of the file stay."""
    status = path.stat()
    return _digest(str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=4096)
def _digest(path: str, _size: int, _time: int, _inode: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch_folder(place: Storage, target: Path) -> None:
    """Copy a remote model folder, which has no sub-folders, file by file into an existing folder.

    Raises:
        FileNotFoundError: there is nothing at the place.
    """
    names = place.list()
    if not names:
        raise FileNotFoundError(f"{place.uri} is empty or missing")
    for name in names:
        place.download(name, target / name)


def check_new(target: Path) -> None:
    """Make sure that a folder can be created at `target`.

    Raises:
        ModelError: something is there already; only an empty folder may be.
    """
    if target.is_symlink() or target.exists():
        if not target.is_dir() or target.is_symlink():
            raise ModelError(f"{target}: is there already and no folder. Give the name of a new folder")
        if any(target.iterdir()):
            raise ModelError(
                f"{target}: is not empty. Nothing is overwritten: give a new or empty folder, or delete it"
            )


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `target` when the block ends well, and vanishes when it does not.

    Raises:
        ModelError: `target` holds something, or cannot be written.
    """
    check_new(target)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        try:
            # Not tempfile: its folders are for one user only.
            temporary.mkdir(parents=True)
            yield temporary
            # safetensors writes files that only their owner may read; give all what the folder has.
            mode = temporary.stat().st_mode & 0o666
            for path in temporary.rglob("*"):
                if path.is_file():
                    path.chmod(mode)
            temporary.replace(target)
        except OSError as error:
            raise ModelError(
                f"{target}: was not written: {error}. It needs a place with write access and enough free space"
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file so that readers see all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
