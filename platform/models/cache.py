"""The user's cache folder: things that are made once and can always be made again."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tenfold.platform.errors import ModelError
from tenfold.platform.models.folder import new_folder

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return `$XDG_CACHE_HOME/tenfold`, or `~/.cache/tenfold` (XDG Base Directory Specification); not created."""
    # The specification says that relative paths are to be ignored.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "tenfold"


def build_once(target: Path, build: Callable[[Path], None], damage: Callable[[Path], str | None]) -> Path:
    """Return `target`, building it first when it is missing or damaged.

    Processes that want the same folder wait for the first one. A build that was killed leaves only a hidden folder,
    which the next one removes.

    Args:
        target: folder in the cache.
        build: fills the (empty, temporary) folder it is given.
        damage: says what is wrong with an existing folder, or None.

    Raises:
        ModelError: the cache cannot be written; whatever `build` raises.
    """
    from filelock import FileLock, Timeout

    if target.is_dir() and damage(target) is None:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_name(f".{target.name}.lock"))
        try:
            lock.acquire(timeout=1)
        except Timeout:
            logger.info("waiting for another process that makes %s", target)
            lock.acquire()
    except OSError as error:
        raise ModelError(
            f"{target.parent}: the cache cannot be written: {error}. Set XDG_CACHE_HOME to a folder that can"
        ) from error
    try:
        for leftover in target.parent.glob(f".{target.name}.*.tmp"):
            logger.info("removing %s, left by a process that was stopped", leftover)
            shutil.rmtree(leftover, ignore_errors=True)
        if target.is_dir():
            problem = damage(target)
            if problem is None:
                return target
            logger.warning("%s in the cache is damaged (%s); making it again", target, problem)
            shutil.rmtree(target)
        with new_folder(target) as temporary:
            build(temporary)
        return target
    finally:
        lock.release()
