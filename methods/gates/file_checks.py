"""What a section's file declares, whatever its format: looked at before its arrays are read.

Tables are read through once in small blocks where limits are given; archives by their directory and the headers of
their arrays; HDF5 as in `hdf5_checks`. Files of strangers are checked in a process apart: see `apart`.
"""

from __future__ import annotations

import gzip
import math
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import numpy as np
from tenfold.methods.gates import hdf5_checks
from tenfold.methods.gates.limits import Limits
from tenfold.platform.errors import DataError

TABLES = (".csv", ".tsv", ".txt")
FORMATS = ".h5ad, a Visium folder, a counts table (.csv, .tsv, .txt, .mtx, also with .gz, .npz), or synthetic:CELLS"

_BLOCK = 2**20
_GZIP = b"\x1f\x8b"
_SIZE_LINE = re.compile(r"\s*(\d{1,18})\s+(\d{1,18})(?:\s+(\d{1,18}))?\s*")
# What scipy.sparse.save_npz writes, and two lists of names.
_MEMBERS = {"format", "shape", "data", "indices", "indptr", "row", "col", "obs_names", "var_names"}
_DECOMPRESSION_ERRORS = (OSError, EOFError, zlib.error)


def inspect_file(path: str | Path, limits: Limits | None, *, transpose: bool = False) -> None:
    """Check one file, or the matrix of a Visium folder, in this process.

    Args:
        path: .h5ad, .h5 of 10x, a table (.csv, .tsv, .txt, .mtx, also with .gz), .npz, or a Visium folder.
        limits: bounds; tables and HDF5 are then read through once, in pieces. None only looks at headers.
        transpose: a counts table has genes in rows.

    Raises:
        DataError: it is missing, damaged, of another format than its ending says, too large, or points out of itself.
    """
    shown, file = str(path), Path(path)
    if file.is_dir():
        from tenfold.methods.gates.visium import matrix_of

        file = matrix_of(file, shown)
        shown = f"{shown}/{file.name}"
        transpose = True  # of Space Ranger's text form; its HDF5 form says it itself
    if not file.is_file():
        raise DataError(f"{shown}: no such file; relative paths start at {Path.cwd()}")
    ending = ending_of(file)
    if ending == ".h5ad":
        hdf5_checks.check_h5ad(file, shown, limits)
    elif ending == ".h5":
        hdf5_checks.check_10x(file, shown, limits)
    elif ending == ".npz":
        _check_npz(file, shown, limits, transpose)
    elif ending in (*TABLES, ".mtx"):
        _check_text(file, shown)
        if ending == ".mtx":
            _check_mtx(file, shown, limits, transpose)
        elif limits is not None:
            _check_table(file, shown, limits, transpose)
    else:
        raise DataError(f"{shown}: the ending {ending!r} is unknown. Give {FORMATS}")


def ending_of(path: Path) -> str:
    """Return the lower-case ending of a file's name, without .gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading bytes; .gz is decompressed."""
    return cast(IO[bytes], gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else path.open("rb")


def delimiter_of(line: str) -> str:
    """Return what parts a table's columns: a tab where the first line has one, else a comma."""
    return "\t" if "\t" in line else ","


def _check_text(path: Path, shown: str) -> None:
    """Check by its first bytes that a file is text, gzip only where its name says so."""
    with path.open("rb") as stream:
        zipped = stream.read(2) == _GZIP
    if zipped != path.name.lower().endswith(".gz"):
        raise DataError(f"{shown}: the content is {'' if zipped else 'not '}gzip, the name says otherwise. Rename it")
    start = next(_blocks(path, shown), b"")
    if not start.strip():
        raise DataError(f"{shown}: the file is empty; needs a table")
    if b"\0" in start:
        raise DataError(f"{shown}: the content is not text. Save it as a table, or give the ending of its format")


def _blocks(path: Path, shown: str) -> Iterator[bytes]:
    with open_binary(path) as stream:
        try:
            while block := stream.read(_BLOCK):
                yield block
        except _DECOMPRESSION_ERRORS as error:
            raise DataError(f"{shown}: truncated or damaged gzip: {error}. Copy the file anew") from error


def _check_table(path: Path, shown: str, limits: Limits, transpose: bool) -> None:
    """Count bytes, rows and the columns of the first row; stops at the first limit that is passed."""
    size = rows = 0
    columns: int | None = None
    head = b""
    for block in _blocks(path, shown):
        size += len(block)
        rows += block.count(b"\n")
        if columns is None:
            head += block
            line, newline, _ = head.partition(b"\n")
            delimiter = delimiter_of(line.decode("utf-8", "replace")).encode()
            count = line.count(delimiter)
            _check_counted(shown, rows - 1, count, limits, transpose)
            columns, head = (count, b"") if newline else (None, head)
        else:
            _check_counted(shown, rows - 1, columns, limits, transpose)
        limits.check_bytes(shown, size)


def _check_counted(shown: str, rows: int, columns: int, limits: Limits, transpose: bool) -> None:
    limits.check_shape(shown, *((columns, rows) if transpose else (rows, columns)))


def _check_mtx(path: Path, shown: str, limits: Limits | None, transpose: bool) -> None:
    """Check Matrix Market's banner and size line; the declared entries have to fit into the text."""
    with open_binary(path) as stream:
        banner = stream.readline(1024).decode("utf-8", "replace").lower().split()
        line = stream.readline(_BLOCK)
        while line.startswith(b"%") or (line and not line.strip()):
            line = stream.readline(_BLOCK)
    if banner[:2] != ["%%matrixmarket", "matrix"] or len(banner) != 5:
        raise DataError(f"{shown}: not Matrix Market: the first line has to start with %%MatrixMarket matrix")
    form, field, symmetry = banner[2:]
    if form not in ("coordinate", "array") or field not in ("integer", "real", "pattern") or symmetry != "general":
        raise DataError(f"{shown}: {form} {field} {symmetry}; needs coordinate or array, integer or real, general")
    size = _SIZE_LINE.fullmatch(line.decode("utf-8", "replace"))
    if size is None or (size[3] is None) != (form == "array"):
        raise DataError(f"{shown}: no line with the numbers of rows, columns and entries. Write the file anew")
    rows, columns = int(size[1]), int(size[2])
    entries = rows * columns if form == "array" else int(size[3])
    if limits is None:
        return
    _check_counted(shown, rows, columns, limits, transpose)
    limits.check_values(shown, entries)
    text = 0
    for block in _blocks(path, shown):
        text += len(block)
        limits.check_bytes(shown, text)
    # The shortest entry is "1 1" and a line end, or one digit and a line end in an array.
    if entries * (2 if form == "array" else 4) > text + 1:
        raise DataError(f"{shown}: declares {entries} entries in {text} bytes of text: truncated. Copy it anew")


def _check_npz(path: Path, shown: str, limits: Limits | None, transpose: bool) -> None:
    """Check scipy's sparse archive by its directory and its arrays' headers."""
    try:
        with zipfile.ZipFile(path) as archive:
            headers = _array_headers(archive, shown, limits)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, *_DECOMPRESSION_ERRORS) as error:
        raise DataError(f"{shown}: not a sound .npz: {error}. Write it with scipy.sparse.save_npz") from error
    fits = {"format", "shape", "data"} <= headers.keys() and (
        {"indices", "indptr"} <= headers.keys() or {"row", "col"} <= headers.keys()
    )
    if not fits or headers["shape"][0] != (2,) or headers["format"][0] != () or len(headers["data"][0]) != 1:
        raise DataError(f"{shown}: no sparse matrix of format csr, csc or coo. Write it with scipy.sparse.save_npz")
    if limits is None:
        return
    limits.check_values(shown, headers["data"][0][0])
    with np.load(path, allow_pickle=False) as arrays:
        rows, columns = (int(size) for size in arrays["shape"])
    _check_counted(shown, rows, columns, limits, transpose)


def _array_headers(
    archive: zipfile.ZipFile, shown: str, limits: Limits | None
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Return shape and type of every array by name; raises DataError for anything but plain arrays."""
    total = 0
    headers: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name not in _MEMBERS or name in headers:
            raise DataError(f"{shown}: {member.filename} is no part of a sparse matrix. Write it with save_npz alone")
        # Other methods decompress a block of any size at once.
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(
                f"{shown}: {member.filename} has an unusual compression. Write it with scipy.sparse.save_npz"
            )
        total += member.file_size
        if limits is not None:
            limits.check_bytes(shown, total)
        shape, dtype, start = _array_header(archive, member)
        if dtype.kind not in "biufSU":
            raise DataError(f"{shown}: {name} holds {dtype}, which is read by unpickling; needs numbers or strings")
        if start + math.prod(shape) * dtype.itemsize != member.file_size:
            raise DataError(
                f"{shown}: {name} declares shape {shape} and holds {member.file_size} bytes. Write it anew"
            )
        headers[name] = (shape, dtype)
    return headers


def _array_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype, int]:
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"{member.filename} has format version {version}")
        shape, _, dtype = readers[version](stream)
        return shape, dtype, stream.tell()
