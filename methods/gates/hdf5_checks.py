"""What an HDF5 file declares and holds, looked at before a reader sees it.

HDF5 can point outside of itself (external links, external storage, virtual data sets), compress terabytes into
kilobytes, and describe sparse matrices whose indices lead outside of their arrays. Readers follow all of that, so a
file of unknown origin is walked link by link first. Nothing here follows a link that is not a plain hard link.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from tenfold.methods.gates.limits import Limits
from tenfold.platform.errors import DataError

SIGNATURE = b"\x89HDF\r\n\x1a\n"
REWRITE = "Write it anew with AnnData.write_h5ad"
SPARSE = ("csr_matrix", "csc_matrix")

# deflate, shuffle, fletcher32, szip, nbit, scaleoffset, lzf: built in, so no plug-in is loaded for a stranger's file.
_FILTERS = (1, 2, 3, 4, 5, 6, 32000)
_MAX_OBJECTS = 100_000
_CACHE_BYTES = 64 * 2**20
_PIECE_BYTES = 32 * 2**20
_REFERENCE_BYTES = 16  # a string of variable length on disk: length, address of its heap, index in it
_UNREADABLE = (OSError, KeyError, RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError)


def check_h5ad(path: Path, shown: str, limits: Limits | None) -> None:
    """Check an AnnData file: where it points, what it declares, and that its shapes fit together.

    Args:
        path: the file.
        shown: how messages call it.
        limits: bounds on what it declares; all is then also read once, in pieces. None only looks at headers.

    Raises:
        DataError: it must not or cannot be read; the message names the object in the file.
    """
    with _opened(path, shown) as file:
        sizes = _check_objects(file, path, shown, limits)
        _check_anndata(file, shown, limits)
        _read_through(file, path, shown, limits, sizes)


def check_10x(path: Path, shown: str, limits: Limits | None) -> None:
    """Check a 10x feature-barcode matrix (`matrix/shape` is genes x cells), as `check_h5ad` does."""
    with _opened(path, shown) as file:
        sizes = _check_objects(file, path, shown, limits)
        for name in ("data", "indices", "indptr", "shape", "barcodes", "features/id", "features/name"):
            if not isinstance(file.get(f"matrix/{name}"), h5py.Dataset):
                raise DataError(f"{shown}: no data set matrix/{name}; needs a feature-barcode matrix of Space Ranger")
        matrix = file["matrix"]
        genes, cells = _two_integers(matrix["shape"], f"{shown}: matrix/shape")
        _check_sparse(matrix, f"{shown}: matrix", cells)
        for name, length in (("barcodes", cells), ("features/id", genes), ("features/name", genes)):
            if matrix[name].shape != (length,):
                raise DataError(
                    f"{shown}: matrix/{name} has shape {matrix[name].shape}, needs {(length,)}. Copy it anew"
                )
        if limits is not None:
            limits.check_shape(shown, cells, genes)
            limits.check_values(shown, matrix["data"].size)
        _read_through(file, path, shown, limits, sizes)


class _opened:
    """An open file; whatever h5py raises inside becomes a DataError."""

    def __init__(self, path: Path, shown: str) -> None:
        self.path, self.shown = path, shown

    def __enter__(self) -> h5py.File:
        with self.path.open("rb") as stream:
            start = stream.read(len(SIGNATURE))
        if start != SIGNATURE:
            raise DataError(f"{self.shown}: the content is not HDF5 ({_looks_like(start)}). {REWRITE}, or rename it")
        try:
            self.file = h5py.File(self.path, "r", rdcc_nbytes=_CACHE_BYTES)
        except _UNREADABLE as error:
            raise DataError(f"{self.shown}: truncated or damaged: {_first_line(error)}. Copy the file anew") from error
        return self.file

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.file.close()
        if isinstance(error, _UNREADABLE):
            raise DataError(f"{self.shown}: damaged: {_first_line(error)}. {REWRITE}") from error


def _looks_like(start: bytes) -> str:
    known = ((b"PK", "a zip archive"), (b"\x1f\x8b", "gzip"), (b"%%Mat", "Matrix Market text"), (b"", "empty"))
    if not start:
        return "empty"
    return next((name for magic, name in known if magic and start.startswith(magic)), "unknown content")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _check_objects(file: h5py.File, path: Path, shown: str, limits: Limits | None) -> int:
    """Check every link, type, filter and size; returns the bytes that all arrays declare."""
    heap = _largest_heap(path)
    total = 0
    for name, item in _objects(file, shown):
        where = f"{shown}: {name or '/'}"
        total += _check_attributes(item, where, heap)
        if isinstance(item, h5py.Dataset):
            total += _check_dataset(item, where, limits)
        if limits is not None:
            limits.check_bytes(where, total)
    return total


def _objects(file: h5py.File, shown: str) -> Iterator[tuple[str, Any]]:
    """Yield (name, group or data set); hard links only, and no group twice, so this ends."""
    yield "", file
    waiting: list[tuple[str, Any]] = [("", file)]
    seen = {h5py.h5o.get_info(file.id).addr}
    count = 0
    while waiting:
        prefix, group = waiting.pop()
        for key in group:
            name = f"{prefix}/{key}".removeprefix("/")
            count += 1
            if count > _MAX_OBJECTS:
                raise DataError(f"{shown}: more than {_MAX_OBJECTS} objects. Leave out what is in uns")
            item = _target(group, key, f"{shown}: {name}")
            if isinstance(item, h5py.Group):
                address = h5py.h5o.get_info(item.id).addr
                if address in seen:
                    raise DataError(f"{shown}: {name}: a second link to one group. {REWRITE}")
                seen.add(address)
                waiting.append((name, item))
            yield name, item


def _target(group: h5py.Group, key: str, where: str) -> Any:
    try:
        link = group.get(key, getlink=True)
    except TypeError:
        link = None  # a kind of link that only its author's library knows
    if not isinstance(link, h5py.HardLink):
        kind = {h5py.SoftLink: "a soft link", h5py.ExternalLink: "a link to another file"}.get(
            type(link), "a foreign link"
        )
        raise DataError(f"{where}: {kind}; a section has to hold its data itself. {REWRITE}")
    item = group[key]
    if not isinstance(item, h5py.Dataset | h5py.Group):
        raise DataError(f"{where}: a named type; needs groups and arrays only. {REWRITE}")
    return item


def _check_attributes(item: Any, where: str, heap: int) -> int:
    """Check an object's attributes; returns the most bytes that they can take."""
    total = 0
    for name in item.attrs:
        attribute = item.attrs.get_id(name)
        _check_type(attribute.dtype, f"{where}: attribute {name}")
        size = math.prod(attribute.shape)
        total += size * (heap if attribute.dtype.hasobject else attribute.dtype.itemsize)
    return total


def _check_type(dtype: np.dtype, where: str) -> None:
    """Raise DataError for types whose values are not plain numbers or strings, such as references."""
    if dtype.names is not None:
        for name in dtype.names:
            _check_type(dtype[name], f"{where}[{name}]")
    elif dtype.subdtype is not None:
        _check_type(dtype.base, where)
    elif not (h5py.check_string_dtype(dtype) if dtype.kind == "O" else dtype.kind in "biufcS"):
        raise DataError(
            f"{where}: holds objects ({h5py.check_dtype(ref=dtype) or dtype}); needs numbers or strings. {REWRITE}"
        )


def _check_dataset(data: h5py.Dataset, where: str, limits: Limits | None) -> int:
    """Check one array; returns the bytes that reading it takes, long strings not counted."""
    if data.is_virtual:
        raise DataError(f"{where}: a virtual data set, its values are in other files. {REWRITE}")
    if data.external:
        raise DataError(f"{where}: external storage, its values are in other files. {REWRITE}")
    _check_type(data.dtype, where)
    properties = data.id.get_create_plist()
    unknown = [
        code
        for code in (properties.get_filter(index)[0] for index in range(properties.get_nfilters()))
        if code not in _FILTERS
    ]
    if unknown and limits is not None:
        raise DataError(f"{where}: compressed with filter {unknown[0]}. Write it with compression='gzip' or none")
    width = _REFERENCE_BYTES if data.dtype.kind == "O" else data.dtype.itemsize
    # A chunk may be larger than its array, and is decompressed whole.
    return max(data.size or 0, math.prod(data.chunks or (0,))) * width


def _read_through(file: h5py.File, path: Path, shown: str, limits: Limits | None, total: int) -> None:
    """Read every attribute and array once in pieces, so that whatever is wrong in them shows here.

    Strings of variable length are measured: many short references may name one long string. `total` are the bytes
    of everything else.
    """
    if limits is None:
        return
    heap = _largest_heap(path)
    for name, item in _objects(file, shown):
        for attribute in item.attrs:
            item.attrs.get(attribute)
        if not isinstance(item, h5py.Dataset) or not item.size:
            continue
        for piece in _pieces(item, heap, f"{shown}: {name}"):
            columns = [piece[field] for field in piece.dtype.names or ()] or [piece]
            total += sum(len(text) for column in columns if column.dtype.kind == "O" for text in column.flat)
            limits.check_bytes(f"{shown}: {name}", total)


def _pieces(data: h5py.Dataset, heap: int, where: str) -> Iterator[np.ndarray]:
    """Yield an array in pieces of whole chunks, small even if each string was as long as the longest in the file."""
    fields = [data.dtype[name] for name in data.dtype.names or ()] or [data.dtype]
    width = sum(max(heap, _REFERENCE_BYTES) if field.kind == "O" else field.itemsize for field in fields)
    if not data.shape:
        yield np.array([data[()]], dtype=object if data.dtype.kind == "O" else data.dtype)
        return
    rows = max(1, _PIECE_BYTES // max(1, math.prod(data.shape[1:]) * width))
    if data.chunks is not None:
        chunk = math.prod(data.chunks) * max(_REFERENCE_BYTES, data.dtype.itemsize)
        if data.dtype.hasobject and chunk > _CACHE_BYTES:
            raise DataError(f"{where}: a chunk of strings larger than {_CACHE_BYTES} bytes. {REWRITE}")
        # A chunk is decompressed whole; those that the cache cannot keep are read whole, so not again and again.
        rows = rows if chunk <= _CACHE_BYTES else max(rows, data.chunks[0])
    for start in range(0, data.shape[0], rows):
        yield data[start : start + rows]


def _largest_heap(path: Path) -> int:
    """Return an upper bound of the bytes of any string of variable length in a file.

    Such strings lie in global heap collections, which start with GCOL, version 1, three zeros and their size.
    """
    largest, size = 1, path.stat().st_size
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        place = content.find(b"GCOL\x01")
        while place >= 0:
            largest = max(largest, min(size, int.from_bytes(content[place + 8 : place + 16], "little")))
            place = content.find(b"GCOL\x01", place + 1)
    return largest


def _check_anndata(file: h5py.File, shown: str, limits: Limits | None) -> None:
    """Check that the parts of an AnnData file are there and that their lengths agree."""
    if "obs" not in file or "var" not in file:
        raise DataError(
            f"{shown}: no AnnData: it holds {', '.join(file) or 'nothing'}, needs X, obs and var. {REWRITE}"
        )
    cells, genes = (_frame_length(file[name], f"{shown}: {name}") for name in ("obs", "var"))
    if limits is not None:
        limits.check_shape(shown, cells, genes)
    if "X" not in file and not len(file.get("layers", ())):
        raise DataError(f"{shown}: neither X nor a layer; needs raw counts in X or in a layer. {REWRITE}")
    for name, item in _objects(file, shown):
        kind = item.attrs.get("encoding-type", item.attrs.get("h5sparse_format", ""))
        if isinstance(item, h5py.Group) and kind in (*SPARSE, "csr", "csc"):
            shape = _sparse_shape(item, f"{shown}: {name}")
            _check_sparse(item, f"{shown}: {name}", shape[0] if kind.startswith("csr") else shape[1])
            if limits is not None:
                limits.check_values(f"{shown}: {name}", item["data"].size)
        _check_place(name, item, (cells, genes), shown)


def _frame_length(frame: Any, where: str) -> int:
    """Return the rows of obs or var; raises DataError where its columns differ in length."""
    if isinstance(frame, h5py.Dataset):  # anndata before 0.7
        return int(frame.shape[0])
    index = frame.attrs.get("_index")
    if not isinstance(index, str) or index not in frame:
        raise DataError(f"{where}: no index of names. {REWRITE}")
    lengths = {key: _length(frame[key]) for key in frame}
    rows = lengths[index]
    if rows is None:
        raise DataError(f"{where}: the index {index} is no list of names. {REWRITE}")
    for key, length in lengths.items():
        if length not in (rows, None):
            raise DataError(f"{where}[{key}] has {length} rows, the names {rows}. {REWRITE}")
    return rows


def _length(item: Any) -> int | None:
    """Return the rows of a column however it is encoded; None where that is not known."""
    if isinstance(item, h5py.Group):
        inner = next((item[key] for key in ("codes", "values") if key in item), None)
        return None if inner is None else _length(inner)
    return int(item.shape[0]) if item.shape else None


def _check_place(name: str, item: Any, size: tuple[int, int], shown: str) -> None:
    """Compare the shape of X, a layer, obsm, varm, obsp or varp with the number of cells and genes."""
    cells, genes = size
    folder, _, key = name.partition("/")
    needed = {
        "X": (cells, genes),
        "layers": (cells, genes),
        "obsm": (cells,),
        "varm": (genes,),
        "obsp": (cells, cells),
        "varp": (genes, genes),
    }.get(folder)
    if needed is None or "/" in key or (folder == "X") != (key == ""):
        return
    shape = _shape(item, f"{shown}: {name}")
    if shape is not None and shape[: len(needed)] != needed:
        label = f"{folder}['{key}']" if key else folder
        of = " x ".join(map(str, needed))
        raise DataError(
            f"{shown}: {label} has shape {shape}; needs {of} for {cells} cells and {genes} genes. {REWRITE}"
        )


def _shape(item: Any, where: str) -> tuple[int, ...] | None:
    if isinstance(item, h5py.Dataset):
        return item.shape
    if "indptr" in item:
        return _sparse_shape(item, where)
    return (_frame_length(item, where),) if "_index" in item.attrs else None


def _sparse_shape(group: h5py.Group, where: str) -> tuple[int, int]:
    return _two_integers(group.attrs.get("shape", group.attrs.get("h5sparse_shape")), f"{where}: shape")


def _two_integers(value: Any, where: str) -> tuple[int, int]:
    shape = getattr(value, "shape", None)
    if shape != (2,) or value.dtype.kind not in "iu" or min(value[0], value[1]) < 0:
        raise DataError(f"{where}: needs two whole numbers. {REWRITE}")
    return int(value[0]), int(value[1])


def _check_sparse(group: h5py.Group, where: str, rows: int) -> None:
    """Check the lengths and types of a compressed matrix; `rows` is its compressed dimension."""
    parts = {key: group.get(key) for key in ("data", "indices", "indptr")}
    for key, part in parts.items():
        if not isinstance(part, h5py.Dataset) or len(part.shape or ()) != 1:
            raise DataError(f"{where}/{key}: missing or not one-dimensional; a sparse matrix needs it. {REWRITE}")
        if part.dtype.kind not in ("biuf" if key == "data" else "iu"):
            raise DataError(f"{where}/{key}: holds {part.dtype}, needs {'numbers' if key == 'data' else 'integers'}")
    if parts["indptr"].size != rows + 1:
        raise DataError(f"{where}/indptr has {parts['indptr'].size} entries, needs {rows + 1}. {REWRITE}")
    if parts["indices"].size != parts["data"].size:
        raise DataError(
            f"{where}/indices has {parts['indices'].size} entries, data {parts['data'].size}; need as many. {REWRITE}"
        )
