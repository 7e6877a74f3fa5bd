"""Uploads: multipart forms written to disk while they arrive, and no more of them than allowed.

Starlette's `request.form()` takes a whole body, of any size, before it says anything. Here each piece is counted and
hashed on its way to the disk.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tenfold.serve.access import check_announced_length, too_long
from tenfold.serve.errors import ApiError, FieldError
from tenfold.serve.spatial.params import invalid

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks
    from starlette.requests import Request

TABLES = (".csv", ".tsv", ".npz", ".mtx")
# What may be sent, and how its name may end.
FILES = {
    "file": (".h5ad",),
    "counts": TABLES,
    "coordinates": (".csv", ".tsv"),
    "labels": (".csv", ".tsv"),
    "barcodes": (".tsv",),
    "features": (".tsv",),
}
FIELDS = {"params": 64 * 1024, "model_id": 200}
SIGNATURES = {".h5ad": b"\x89HDF\r\n\x1a\n", ".npz": b"PK\x03\x04", ".mtx": b"%%MatrixMarket"}
BINARY = (b"\x89HDF", b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"%PDF", b"\x89PNG")
HEADER_BYTES = 8 * 1024
BUFFER_BYTES = 2**20
DRAIN_BYTES = 64 * 2**20  # of a refused body: a client that still sends would not read the answer
DRAIN_SECONDS = 20.0


@dataclass
class Upload:
    """A form on the disk.

    Attributes:
        files: what was sent -> stored file.
        names: what was sent -> the client's name of the file.
        digests: what was sent -> SHA-256.
        fields: form fields without a file.
    """

    files: dict[str, Path] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)


async def receive(request: Request, folder: Path, *, max_bytes: int, timeout_s: float) -> Upload:
    """Write a multipart form into a folder.

    Args:
        request: its body has not been read.
        folder: empty.
        max_bytes: of the body.
        timeout_s: for the whole of it.

    Raises:
        ApiError: 413 too large, 415 not a form or not a file of ours, 422 parts are missing or are not what their
            names say, 408 too slow, 400 not what multipart should look like.
    """
    stream = request.stream()
    try:
        check_announced_length(request, max_bytes, "limits.max_upload_bytes")
        async with asyncio.timeout(timeout_s):
            upload = await _Form(request.headers.get("content-type", ""), folder).read(stream, max_bytes)
        _check_parts(upload)
    except TimeoutError as error:
        raise ApiError(
            408, f"the upload took longer than {timeout_s:g} s (limits.upload_s)", code="upload_timeout"
        ) from error
    except ApiError as error:
        await _drain(stream)
        error.headers["Connection"] = "close"  # what may still come is not read
        raise
    return upload


class _Form:
    """A multipart form that is being read: the parser calls the methods, `read` does what has to wait."""

    def __init__(self, content_type: str, folder: Path) -> None:
        from python_multipart.multipart import MultipartParser, parse_options_header

        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise ApiError(
                415,
                f"the body is {content_type[:60] or 'of no type'}, not multipart/form-data; send the section "
                f"as the part `file`, for instance with curl -F file=@section.h5ad",
                code="unsupported_media_type",
            )
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._close,
        }
        self._parse_options = parse_options_header
        self._parser = MultipartParser(options[b"boundary"], callbacks)
        self._folder = folder
        self._upload = Upload()
        self._header = b"", b""
        self._disposition = b""
        self._name = ""
        self._text: bytearray | None = None
        self._file: IO[bytes] | None = None
        self._hash = hashlib.sha256()
        self._complete = False

    async def read(self, stream: AsyncIterator[bytes], max_bytes: int) -> Upload:
        """Read to the end of the body, or to where it is too long."""
        from python_multipart.exceptions import FormParserError
        from starlette.requests import ClientDisconnect

        received = 0
        waiting = bytearray()
        try:
            async for chunk in stream:
                received += len(chunk)
                if received > max_bytes:
                    raise too_long(received, max_bytes, "limits.max_upload_bytes")
                waiting += chunk
                if len(waiting) >= BUFFER_BYTES:
                    await asyncio.to_thread(self._parser.write, bytes(waiting))
                    waiting.clear()
            await asyncio.to_thread(self._parser.write, bytes(waiting))
        except (FormParserError, ClientDisconnect) as error:
            raise ApiError(400, f"the form cannot be read: {error or 'the client left'}", code="bad_form") from error
        finally:
            if self._file is not None:
                self._file.close()
        if not self._complete:
            raise ApiError(400, "the form ends in the middle; send it again", code="bad_form")
        return self._upload

    def _begin(self) -> None:
        self._header, self._disposition = (b"", b""), b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._grow(data[start:end], b"")

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._grow(b"", data[start:end])

    def _grow(self, name: bytes, value: bytes) -> None:
        self._header = self._header[0] + name, self._header[1] + value
        if len(self._header[0]) + len(self._header[1]) > HEADER_BYTES:
            raise ApiError(400, f"the form has a header of more than {HEADER_BYTES} bytes", code="bad_form")

    def _header_end(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = value
        self._header = b"", b""

    def _headers_finished(self) -> None:
        _, options = self._parse_options(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        given = options.get(b"filename")
        if self._name in self._upload.files or self._name in self._upload.fields:
            raise invalid([FieldError(self._name, "is there twice; send it once")])
        if self._name in FIELDS:
            self._text = bytearray()
        elif self._name in FILES:
            self._open(given)
        else:
            known = ", ".join([*FILES, *FIELDS])
            raise invalid([FieldError(self._name[:60] or "form", f"unknown part of the form; known are {known}")])

    def _open(self, given: bytes | None) -> None:
        if given is None:
            raise invalid([FieldError(self._name, "must be a file with its name, as curl -F NAME=@FILE sends it")])
        client_name = given.decode("utf-8", "replace").replace("\\", "/").rpartition("/")[2][:200]
        ending = Path(client_name).suffix.lower()
        if ending not in FILES[self._name]:
            raise ApiError(
                415,
                f"{self._name}: {client_name!r} must end in {' or '.join(FILES[self._name])}"
                + ("; a table of counts is sent as `counts` beside `coordinates`" if ending in TABLES else ""),
                param=self._name,
                code="unsupported_media_type",
            )
        path = self._folder / f"{self._name}{ending}"
        self._upload.files[self._name] = path
        self._upload.names[self._name] = client_name
        self._hash = hashlib.sha256()
        self._file = path.open("xb")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            piece = memoryview(data)[start:end]
            self._hash.update(piece)
            self._file.write(piece)
        elif self._text is not None:
            self._text += data[start:end]
            if len(self._text) > FIELDS[self._name]:
                raise invalid([FieldError(self._name, f"is longer than {FIELDS[self._name]} bytes")])

    def _end(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._upload.digests[self._name] = self._hash.hexdigest()
        elif self._text is not None:
            self._upload.fields[self._name] = self._text.decode("utf-8", "replace")
            self._text = None

    def _close(self) -> None:
        self._complete = True


def _check_parts(upload: Upload) -> None:
    sent = set(upload.files)
    if "file" in sent and len(sent) > 1:
        others = ", ".join(sorted(sent - {"file"}))
        raise invalid(
            [FieldError("file", f"came together with {others}; send either file, or counts and coordinates")]
        )
    if "file" not in sent:
        missing = [name for name in ("counts", "coordinates") if name not in sent]
        if len(missing) == 2:
            raise invalid([FieldError("file", "is missing; send a .h5ad as `file`, or `counts` and `coordinates`")])
        if missing:
            raise invalid([FieldError(missing[0], "is missing; counts and coordinates are sent together")])
    errors = [problem for name, path in upload.files.items() if (problem := _wrong_content(name, path))]
    if errors:
        raise invalid(errors)


def _wrong_content(name: str, path: Path) -> FieldError | None:
    with path.open("rb") as file:
        start = file.read(32)
    if not start:
        return FieldError(name, "is empty")
    signature = SIGNATURES.get(path.suffix)
    if signature and not start.startswith(signature):
        found = "it looks like text" if start.isascii() else "it is something else"
        return FieldError(name, f"ends in {path.suffix}, but is not such a file: {found}; send it under its real name")
    if signature is None and (start.startswith(BINARY) or b"\0" in start):
        return FieldError(name, f"ends in {path.suffix}, but is not text; send it under its real name")
    return None


async def _drain(stream: AsyncIterator[bytes]) -> None:
    """Throw away what a client still sends, within limits."""
    rest = 0
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            async for chunk in stream:
                rest += len(chunk)
                if rest > DRAIN_BYTES:
                    return
    except Exception:  # it left, or the stream was closed by the first error
        return
