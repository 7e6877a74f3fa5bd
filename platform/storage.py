"""Run storage: one folder on a local disk, or in anything pyarrow (s3, gs, hdfs) or fsspec reaches.

All paths given to `Storage` are relative to its root and use `/`. Nothing outside the root can be named. What a
remote store does not answer is asked again (`tenfold.platform.patience`).
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import shutil
import tempfile
import urllib.parse
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tenfold.platform.deadline import run_with_deadline
from tenfold.platform.errors import ConfigError
from tenfold.platform.paths import expanded

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

Result = TypeVar("Result")

# These stores have no folders: creating one would only leave an empty marker object.
OBJECT_STORES = ("s3", "gcs", "gs", "abfs", "abfss", "az")
ANSWER_SECONDS = 30
BLOCK_BYTES = 1 << 24


class Storage:
    """Files below one root.

    Attributes:
        uri: the root, absolute: a local path without a scheme, or the URI that was given, with its query.
        filesystem: pyarrow file system; with `root` this is what Ray Train's `RunConfig` takes.
        root: the root as `filesystem` names it.
    """

    def __init__(self, uri: str | Path) -> None:
        """Open a storage; touches no file (S3 is asked for the bucket's region unless the URI names it).

        Args:
            uri: a folder (relative ones are taken from the current directory, `~` is expanded) or a URI. The query of
                an s3:// URI takes pyarrow's options (endpoint_override, scheme, region); that of any remote one takes
                `patience`, the seconds for which a store that does not answer is asked again (default 300).

        Raises:
            ConfigError: the URI is empty, has an unknown scheme, needs a package that is not installed, or its store
                does not answer.
        """
        text = str(uri).strip()
        if not text:
            raise ConfigError("storage: empty. Give a folder (storage=runs) or a URI (storage=s3://bucket/runs)")
        opened, patience = _without_patience(text)
        self._direct: FileSystem
        self._direct, self.root = _open(opened, text)
        self.is_local: bool = self._direct.type_name == "local"
        self.filesystem: FileSystem = self._direct
        address, _, query = text.partition("?")
        self._query = f"?{query}" if query and not self.is_local else ""
        self.uri: str = self.root if self.is_local else address.rstrip("/") + self._query
        self._patience = patience
        if not self.is_local:
            from pyarrow.fs import PyFileSystem
            from tenfold.platform.patience import PatientFileSystem

            self.filesystem = PyFileSystem(PatientFileSystem(self._direct, patience, self.uri))

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    def join(self, *parts: str) -> str:
        """Return the parts as one relative path.

        Raises:
            ConfigError: a part is absolute or leaves the root with `..`.
        """
        path = posixpath.normpath(posixpath.join("", *parts)) if parts else ""
        if path.startswith("/") or path.split("/")[0] == ".." or any(part.startswith("/") for part in parts[1:]):
            raise ConfigError(f"storage {self.uri}: {'/'.join(parts)!r} is outside. Give a path relative to its root")
        return "" if path == "." else path

    def uri_of(self, path: str) -> str:
        """Return the absolute address of a path, as logs and pointers name it."""
        relative = self.join(path)
        return f"{self.uri.removesuffix(self._query)}/{relative}{self._query}" if relative else self.uri

    @property
    def name(self) -> str:
        """The last part of the root."""
        return posixpath.basename(self.root)

    def above(self) -> Storage:
        """Return the storage of the folder that this one lies in."""
        return Storage(posixpath.dirname(self.uri.removesuffix(self._query)) + self._query)

    def relative(self, uri: str) -> str:
        """Return the path of an address that lies in this storage; the inverse of `uri_of`."""
        return uri.removesuffix(self._query).removeprefix(self.uri.removesuffix(self._query)).strip("/")

    def local_path(self, path: str = "") -> Path | None:
        """Return the path itself when the storage is a local disk, else None."""
        return Path(self._full(path)) if self.is_local else None

    def exists(self, path: str) -> bool:
        """Tell whether a file or folder of this name exists."""
        from pyarrow.fs import FileType

        full = self._full(path)
        return self._patiently(lambda: self._direct.get_file_info(full)).type != FileType.NotFound

    def read_text(self, path: str) -> str:
        """Return a file's text (UTF-8).

        Raises:
            FileNotFoundError: there is none.
        """

        def read() -> bytes:
            with self._direct.open_input_stream(self._full(path), compression=None) as stream:
                return stream.read()

        return self._patiently(read).decode("utf-8")

    def sha256(self, path: str) -> str:
        """Return the sha256 of a file's content in hex.

        Raises:
            FileNotFoundError: there is none.
        """

        def read() -> str:
            found = hashlib.sha256()
            with self._direct.open_input_stream(self._full(path), compression=None) as stream:
                while block := stream.read(BLOCK_BYTES):
                    found.update(block)
            return found.hexdigest()

        return self._patiently(read)

    def write_text(self, path: str, text: str) -> None:
        """Write a file (UTF-8) and its folders; on local disks and object stores readers see all of it or nothing."""
        full = self._full(path)
        data = text.encode("utf-8")
        if not self.is_local:
            self._patiently(lambda: self._write(full, data))
            return
        self._create_folder(posixpath.dirname(full))
        temporary = Path(full).with_name(f".{posixpath.basename(full)}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(full)
        finally:
            temporary.unlink(missing_ok=True)

    def delete(self, path: str) -> None:
        """Remove a file, or a folder with its content; nothing happens when there is none.

        Raises:
            ConfigError: the path is the root itself.
        """
        from pyarrow.fs import FileType

        if not self.join(path):
            raise ConfigError(f"storage {self.uri}: the root itself is never deleted. Name a file or folder in it")
        full = self._full(path)

        def remove() -> None:
            kind = self._direct.get_file_info(full).type
            if kind == FileType.Directory:
                self._direct.delete_dir(full)
            elif kind != FileType.NotFound:
                self._direct.delete_file(full)

        self._patiently(remove)

    def upload(self, local_folder: str | Path, path: str) -> None:
        """Copy a local folder's content to `path`; files of the same name are replaced, others stay.

        On a local disk a new folder appears only when it is complete. Elsewhere files appear one by one: write the
        file that marks completeness afterwards.

        Raises:
            FileNotFoundError: there is no such local folder.
        """
        source = Path(local_folder).resolve()
        if not source.is_dir():
            raise FileNotFoundError(f"{local_folder}: no such folder to copy to {self.uri_of(path)}")
        full = self._full(path)
        if self.is_local:
            _copy_folder(source, Path(full))
            return
        for file in sorted(file for file in source.rglob("*") if file.is_file()):
            self._put(file, f"{full}/{file.relative_to(source).as_posix()}")

    def download(self, path: str, local_folder: str | Path) -> Path:
        """Return a local folder (or file) with the content of `path`.

        A local storage answers with the path itself, uncopied. Otherwise the content appears at `local_folder` when it
        is complete; what was there before is replaced.

        Raises:
            FileNotFoundError: the storage has nothing there.
        """
        from pyarrow.fs import FileSelector, FileType

        full = self._full(path)
        kind = self._patiently(lambda: self._direct.get_file_info(full)).type
        if kind == FileType.NotFound:
            raise FileNotFoundError(f"{self.uri_of(path)}: no such file or folder")
        local = self.local_path(path)
        if local is not None:
            return local
        target = Path(local_folder).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
            copy = Path(temporary) / target.name
            if kind == FileType.Directory:
                copy.mkdir()
                selector = FileSelector(full, recursive=True)
                for info in self._patiently(lambda: self._direct.get_file_info(selector)):
                    if info.is_file:
                        self._get(info.path, copy / posixpath.relpath(info.path, full))
            else:
                self._get(full, copy)
            if target.is_dir():
                shutil.rmtree(target)
            copy.replace(target)
        return target

    def check_writable(self) -> None:
        """Write and remove a small file, leaving no trace.

        Raises:
            ConfigError: it cannot be written, with the cause and what to do.
        """
        try:
            run_with_deadline(self._probe, ANSWER_SECONDS, "writing a test file")
        except Exception as error:
            cause = str(error).strip() or type(error).__name__
            raise ConfigError(
                f"storage = {self.uri!r}: cannot be written: {cause}. It must be a writable folder, or a bucket with "
                f"write access and credentials. Change its permissions, or give another place with storage=..."
            ) from error

    def list(self, path: str = "") -> Sequence[str]:
        """Return the names (not paths) of the files and folders directly in `path`, sorted; empty when it is missing.

        Names that start with a dot are left out: unfinished copies have such names.
        """
        from pyarrow.fs import FileSelector

        selector = FileSelector(self._full(path), allow_not_found=True)
        infos = self._patiently(lambda: self._direct.get_file_info(selector))
        return sorted(info.base_name for info in infos if not info.base_name.startswith("."))

    def _full(self, path: str) -> str:
        relative = self.join(path)
        return posixpath.join(self.root, relative) if relative else self.root

    def _patiently(self, work: Callable[[], Result]) -> Result:
        if self.is_local:
            return work()
        from tenfold.platform.patience import patiently

        return patiently(work, self._patience, self.uri)

    def _create_folder(self, full: str) -> None:
        # fsspec file systems are named py::fsspec+PROTOCOL.
        if self._direct.type_name.rpartition("+")[2] not in OBJECT_STORES:
            self._direct.create_dir(full, recursive=True)

    def _write(self, full: str, data: bytes) -> None:
        self._create_folder(posixpath.dirname(full))
        with self._direct.open_output_stream(full, compression=None) as stream:
            stream.write(data)

    # Not pyarrow's copy_files: it drops an error of an upload's last part, and the file is missing without a word.
    def _put(self, file: Path, full: str) -> None:
        def put() -> None:
            self._create_folder(posixpath.dirname(full))
            with file.open("rb") as content, self._direct.open_output_stream(full, compression=None) as stream:
                shutil.copyfileobj(content, stream, BLOCK_BYTES)

        self._patiently(put)

    def _get(self, full: str, file: Path) -> None:
        def get() -> None:
            file.parent.mkdir(parents=True, exist_ok=True)
            with self._direct.open_input_stream(full, compression=None) as stream, file.open("wb") as content:
                shutil.copyfileobj(stream, content, BLOCK_BYTES)

        self._patiently(get)

    def _probe(self) -> None:
        if self.is_local:
            folder = Path(self.root)
            while not folder.exists():
                folder = folder.parent
            if not folder.is_dir():
                raise NotADirectoryError(f"{folder} is a file")
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"tenfold")
            return
        # not patiently: before the start, an error is wanted soon
        full = self._full(f".tenfold-{uuid.uuid4().hex}")
        self._write(full, b"tenfold")
        self._direct.delete_file(full)


def _without_patience(text: str) -> tuple[str, float]:
    """Return a URI as pyarrow knows it, and the seconds of its option `patience`."""
    from tenfold.platform.patience import PATIENCE_SECONDS

    address, mark, query = text.partition("?")
    if "://" not in text or not mark:
        return text, PATIENCE_SECONDS
    options = urllib.parse.parse_qsl(query, keep_blank_values=True)
    given = [value for key, value in options if key == "patience"]
    try:
        seconds = float(given[-1]) if given else PATIENCE_SECONDS
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ConfigError(f"storage = {text!r}: patience must be a number of seconds, e.g. patience=60")
    if not given:
        return text, seconds
    left = urllib.parse.urlencode([(key, value) for key, value in options if key != "patience"])
    return (f"{address}?{left}" if left else address), seconds


def _open(text: str, shown: str) -> tuple[FileSystem, str]:
    from pyarrow.fs import LocalFileSystem

    try:
        if "://" not in text and not text.startswith("file:"):
            return LocalFileSystem(), str(expanded(text).resolve())
        return run_with_deadline(lambda: _open_uri(text), ANSWER_SECONDS, "opening it")
    except Exception as error:  # fsspec's file systems raise what they like
        cause = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise ConfigError(
            f"storage = {shown!r}: {cause}. Give a folder, or a URI that pyarrow or an installed fsspec package "
            f"opens, such as s3://bucket/runs, gs://bucket/runs or file:///data/runs"
        ) from error


def _open_uri(text: str) -> tuple[FileSystem, str]:
    """Open a URI with pyarrow, or with fsspec what pyarrow has no scheme for (abfs of adlfs, memory, ...)."""
    import fsspec
    from fsspec.implementations.local import LocalFileSystem
    from pyarrow import ArrowInvalid, ArrowNotImplementedError
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    try:
        filesystem, root = FileSystem.from_uri(text)
    except (ArrowInvalid, ArrowNotImplementedError, OSError) as error:
        try:
            other, root = fsspec.core.url_to_fs(text)
        except (ImportError, ValueError):  # no such scheme there either
            raise error from None
        # What pyarrow refuses here (file:x, file://host/x) would become a folder below the current one.
        if isinstance(other, LocalFileSystem):
            raise
        filesystem = PyFileSystem(FSSpecHandler(other))
    return filesystem, root.rstrip("/") or "/"


def _copy_folder(source: Path, target: Path) -> None:
    if source == target:
        return
    if target.exists():
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        copy = Path(temporary) / target.name
        shutil.copytree(source, copy)
        copy.replace(target)
