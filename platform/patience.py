"""Storage that goes away for a while: try again, wait longer each time, give up after a bounded time.

pyarrow's own clients give up after some seconds. A run has hours of work behind it, and stores are restarted,
throttle and fail over; so every operation on a remote store goes through here, those of Ray Train as well, which gets
`PatientFileSystem` as its file system.
"""

from __future__ import annotations

import logging
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pyarrow
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileSystemHandler
from tenfold.platform.errors import StorageError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# Long enough for a restart or a fail-over of the store, and far below the 30 minutes after which torch.distributed
# takes ranks that wait for this one as lost.
PATIENCE_SECONDS = 300.0
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0
IN_MEMORY_BYTES = 1 << 24

# How arrow's S3 and GCS clients name what may pass; they raise plain OSErrors.
OUTAGE = re.compile(
    r"NETWORK_CONNECTION|HTTP status (?:429|5\d\d)|SLOW_DOWN|SERVICE_UNAVAILABLE|THROTTLING|REQUEST_TIMEOUT|"
    r"INTERNAL_FAILURE|REQUEST_TIME_TOO_SKEWED|curlCode|\b(?:UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED)\b"
)


def is_outage(error: BaseException) -> bool:
    """Say whether the same operation may succeed later; a missing file or a refused permission stays as it is."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return isinstance(error, OSError) and OUTAGE.search(str(error)) is not None


def patiently(work: Callable[[], Result], seconds: float, place: str) -> Result:
    """Return what `work` returns; while the store does not answer, call it again, for about `seconds`.

    Args:
        work: may be called several times, also after it has done a part.
        seconds: no new try begins later than this after the first one.
        place: names the store in messages.

    Raises:
        StorageError: it did not answer in time.
        Exception: what `work` raised, where trying again is of no use.
    """
    began, pause = time.monotonic(), FIRST_PAUSE
    failed = False
    while True:
        try:
            result = work()
            break
        except Exception as error:
            if not is_outage(error):
                raise
            cause = " ".join(str(error).split())[:300] or type(error).__name__
            left = seconds - (time.monotonic() - began)
            if left <= 0:
                raise StorageError(
                    f"storage {place}: no answer for {time.monotonic() - began:.0f} s: {cause}. When it is back, the "
                    f"same command goes on from the newest whole checkpoint"
                ) from error
            if not failed:
                logger.warning("storage %s does not answer; trying again for %.0f s: %s", place, left, cause)
            failed = True
        # ranks that were turned away together must not come back together
        time.sleep(min(left, pause * random.uniform(0.5, 1.0)))
        pause = min(2 * pause, LONGEST_PAUSE)
    if failed:
        logger.warning("storage %s answers again after %.0f s", place, time.monotonic() - began)
    return result


class PatientFileSystem(FileSystemHandler):
    """A pyarrow file system whose operations are tried again; for `pyarrow.fs.PyFileSystem`.

    A file that is written is sent when it is closed, so that it can be sent again. Reading is tried again where it
    begins.
    """

    def __init__(self, inner: FileSystem, seconds: float, place: str) -> None:
        """Wrap a file system; see `patiently`."""
        self.inner, self.seconds, self.place = inner, seconds, place

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PatientFileSystem) and self.inner == other.inner

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]

    def _do(self, work: Callable[[], Result]) -> Result:
        return patiently(work, self.seconds, self.place)

    def get_type_name(self) -> str:
        """Return a name that ends in that of the inner file system."""
        return f"patient+{self.inner.type_name.rpartition('+')[2]}"

    def normalize_path(self, path: str) -> str:
        """See `pyarrow.fs.FileSystem`, as the methods below."""
        return self.inner.normalize_path(path)

    def get_file_info(self, paths: Sequence[str]) -> list[FileInfo]:
        """Describe paths."""
        return self._do(lambda: self.inner.get_file_info(paths))

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        """List a folder."""
        return self._do(lambda: self.inner.get_file_info(selector))

    def create_dir(self, path: str, recursive: bool) -> None:
        """Make a folder."""
        self._do(lambda: self.inner.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        """Delete a folder."""
        self._do(lambda: self.inner.delete_dir(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        """Empty a folder."""
        self._do(lambda: self.inner.delete_dir_contents(path, missing_dir_ok=missing_dir_ok))

    def delete_root_dir_contents(self) -> None:
        """Refuse: nobody here empties a whole store.

        Raises:
            PermissionError: always.
        """
        raise PermissionError(f"storage {self.place}: the root of a store is never emptied")

    def delete_file(self, path: str) -> None:
        """Delete a file."""
        self._do(lambda: self.inner.delete_file(path))

    def move(self, src: str, dest: str) -> None:
        """Rename a file."""
        self._do(lambda: self.inner.move(src, dest))

    def copy_file(self, src: str, dest: str) -> None:
        """Copy a file within the store."""
        self._do(lambda: self.inner.copy_file(src, dest))

    def open_input_stream(self, path: str) -> Any:
        """Open a file for reading from its start."""
        return self._do(lambda: self.inner.open_input_stream(path, compression=None))

    def open_input_file(self, path: str) -> Any:
        """Open a file for reading anywhere."""
        return self._do(lambda: self.inner.open_input_file(path))

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        """Open a file for writing; it appears when it is closed."""

        def send(content: Any) -> None:
            def work() -> None:
                content.seek(0)
                with self.inner.open_output_stream(path, compression=None, metadata=metadata) as stream:
                    shutil.copyfileobj(content, stream)

            self._do(work)

        return pyarrow.PythonFile(_SentWhenClosed(send), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        """Open a file for appending; tried again only where it begins."""
        return self._do(lambda: self.inner.open_append_stream(path, compression=None, metadata=metadata))


class _SentWhenClosed:
    """What is written, until it is closed: in memory, a large content on the local disk."""

    def __init__(self, send: Callable[[Any], None]) -> None:
        self._send, self.closed = send, False
        self._content = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES)  # noqa: SIM115 (closed in `close`)

    def write(self, data: Any) -> int:
        return self._content.write(data)

    def tell(self) -> int:
        return self._content.tell()

    def flush(self) -> None:
        """Nothing is sent before the end."""

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            with self._content:
                self._send(self._content)
