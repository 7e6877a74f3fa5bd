"""What MLflow has not got yet: an append-only file of records, sent in order, that survives the process.

Each line is one JSON record (metrics, parameters, tags, an artifact, a status). A second file holds how many bytes
have been sent. So any process can append at any time with a single write, and one at a time sends (`sending`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spooled:
    """A record and the byte at which the next one starts."""

    record: dict[str, Any]
    end: int


class Spool:
    """The unsent records of one run, next to the run's other files."""

    def __init__(self, path: Path) -> None:
        """Name the file; nothing is created before the first record."""
        self.path = path
        self._position = path.with_name(path.name + ".sent")
        self._files = path.with_name(path.name + ".files")

    def pending(self) -> bool:
        """Tell whether there are unsent records."""
        try:
            return self.path.stat().st_size > self._sent()
        except OSError:
            return False

    def append(self, record: dict[str, Any], source: Path | None = None) -> None:
        """Keep a record, and a copy of the file it speaks of.

        Raises:
            OSError: it cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if source is not None:
            folder = self._files / uuid.uuid4().hex
            folder.mkdir(parents=True)
            record = {**record, "file": str(shutil.copy2(source, folder / source.name))}
        line = (json.dumps(record) + "\n").encode("utf-8")
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            # Over NFS two nodes that append at once would write to the same place; the lock falls with the descriptor.
            with contextlib.suppress(OSError):
                fcntl.lockf(descriptor, fcntl.LOCK_EX)
            if os.write(descriptor, line) != len(line):
                raise OSError(f"{self.path}: the record was cut, the disk may be full")
        finally:
            os.close(descriptor)

    def unsent(self) -> list[Spooled]:
        """Return all complete unsent records in order; a damaged line is left out and said."""
        try:
            with self.path.open("rb") as file:
                position = file.seek(self._sent())
                lines = file.readlines()
        except OSError:
            return []
        found: list[Spooled] = []
        for line in lines:
            position += len(line)
            if not line.endswith(b"\n"):
                break
            try:
                found.append(Spooled(json.loads(line), position))
            except ValueError:
                logger.warning("%s: a damaged record of %d bytes is left out", self.path, len(line))
        return found

    def mark_sent(self, spooled: Spooled) -> None:
        """Note that everything up to and including this record has been sent."""
        temporary = self._position.with_name(self._position.name + ".tmp")
        temporary.write_text(str(spooled.end), encoding="ascii")
        temporary.replace(self._position)
        if "file" in spooled.record:
            shutil.rmtree(Path(spooled.record["file"]).parent, ignore_errors=True)

    @contextlib.contextmanager
    def sending(self) -> Iterator[bool]:
        """Hold the right to send; yields False at once when another process has it."""
        from filelock import FileLock, Timeout

        lock = FileLock(str(self.path.with_name(self.path.name + ".lock")), timeout=0)
        try:
            lock.acquire()
        except (Timeout, OSError):
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def remove(self) -> None:
        """Delete the files when everything has been sent; called when no other process writes any more."""
        if self.path.exists() and not self.pending():
            for path in (self.path, self._position, self.path.with_name(self.path.name + ".lock")):
                path.unlink(missing_ok=True)
            shutil.rmtree(self._files, ignore_errors=True)

    def _sent(self) -> int:
        try:
            return int(self._position.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return 0
