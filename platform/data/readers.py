"""Rows from JSON, JSON lines, Parquet, hub data sets and Ray Data, each with the place it came from.

Readers do not judge rows; they hand them on as plain Python objects. A JSON line that does not parse comes as a
`BadRow`, so that it can be listed, or skipped, together with the other bad rows.
"""

from __future__ import annotations

import importlib.resources
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold.platform.data.config import DataSource
from tenfold.platform.deadline import run_with_deadline
from tenfold.platform.errors import DataError
from tenfold.platform.paths import expanded

ENDINGS = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
OPEN_SECONDS = 60
_BETWEEN_ROWS = re.compile(r"[\s,]*")

Rows = Iterator[tuple[Any, str]]


@dataclass(frozen=True)
class BadRow:
    """Stands for a row that could not be parsed; `reason` says why."""

    reason: str


def read_rows(source: DataSource) -> Rows:
    """Yield (row, origin) from `start` to `stop`; origin reads "FILE, line N" or "FILE, row N", counted from 1.

    Raises:
        DataError: the data is missing, unreadable, of an unknown kind, or has no row in the range.
    """
    empty = True
    for row, origin in itertools.islice(_all_rows(source), source.start, source.stop):
        empty = False
        yield row, origin
    if empty:
        wanted = f"from {source.start} to {'the end' if source.stop is None else source.stop}"
        raise DataError(f"{source.path}: holds no rows {wanted}. Give a file with rows, or other start and stop")


def _all_rows(source: DataSource) -> Rows:
    if source.format == "hub":
        return _hub_rows(source.path, source.split or "train")
    path = _locate(source.path)
    if source.format == "ray":
        return _ray_rows(path, source.path)
    return _plain_rows(_kind(source), path, source.path)


def _plain_rows(kind: str, path: str, shown: str) -> Rows:
    return {"json": _json_rows, "jsonl": _jsonl_rows, "parquet": _parquet_rows}[kind](path, shown)


def _kind(source: DataSource) -> str:
    if source.format != "auto":
        return source.format
    ending = Path(source.path).suffix
    if ending not in ENDINGS:
        raise DataError(
            f"{source.path}: the ending {ending!r} is unknown; known: {', '.join(ENDINGS)}. Rename it or set `format`"
        )
    return ENDINGS[ending]


def _locate(path: str) -> str:
    """Turn `sample:PATH` into the packaged file's path; other paths stay as they are."""
    if not path.startswith("sample:"):
        return path
    return str(importlib.resources.files("tenfold.samples") / path.removeprefix("sample:"))


def _json_rows(path: str, shown: str) -> Rows:
    text = _read(path, shown)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{shown}, line {error.lineno}: not JSON: {error.msg}. Mend it; one object a line needs format jsonl"
        ) from error
    if not isinstance(rows, list):
        raise DataError(f"{shown}: holds one {type(rows).__name__}; needs a list of objects: [{{...}}, ...]")
    for number, (row, line) in enumerate(_with_lines(text, len(rows)), start=1):
        yield row, f"{shown}, row {number} (line {line})"


def _with_lines(text: str, count: int) -> Iterator[tuple[Any, int]]:
    """Yield (item, line where it starts) of a JSON list that is known to be valid."""
    decoder = json.JSONDecoder()
    position, line = text.index("[") + 1, 1
    counted = 0
    for _ in range(count):
        start = _BETWEEN_ROWS.match(text, position).end()  # type: ignore[union-attr]
        line += text.count("\n", counted, start)
        counted = start
        item, position = decoder.raw_decode(text, start)
        yield item, line


def _jsonl_rows(path: str, shown: str) -> Rows:
    # Not splitlines(): JSON text may hold U+2028 and other characters that it takes for line ends.
    for number, line in enumerate(_read(path, shown).split("\n"), start=1):
        if line.strip():
            yield _parse(line), f"{shown}, line {number}"


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return BadRow(f"not JSON: {error.msg} at column {error.colno}")


def _open(path: str, shown: str) -> Any:
    from pyarrow import ArrowException
    from pyarrow.fs import FileSystem, LocalFileSystem

    def remote() -> Any:
        filesystem, inner = FileSystem.from_uri(path)
        return filesystem.open_input_file(inner)

    try:
        if "://" in path:
            return run_with_deadline(remote, OPEN_SECONDS, f"opening {shown}")
        return LocalFileSystem().open_input_file(str(expanded(path).absolute()))
    except FileNotFoundError as error:
        raise DataError(f"{shown}: no such file; relative paths start at {Path.cwd()}") from error
    except (OSError, ArrowException) as error:
        raise DataError(f"{shown}: cannot be read: {error}. Check the path and its permissions") from error


def _read(path: str, shown: str) -> str:
    with _open(path, shown) as stream:
        try:
            text = stream.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{shown}: not UTF-8 text: {error}. Convert it to UTF-8") from error
    if not text.strip():
        raise DataError(f"{shown}: the file is empty; needs at least one row")
    return text


def _parquet_rows(path: str, shown: str) -> Rows:
    import pyarrow
    import pyarrow.parquet

    with _open(path, shown) as stream:
        try:
            file = pyarrow.parquet.ParquetFile(stream)
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"{shown}: not a Parquet file: {error}") from error
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield row, f"{shown}, row {number}"


def _hub_rows(name: str, split: str) -> Rows:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split)
    except Exception as error:  # the hub's client raises many kinds
        raise DataError(
            f"{name}, split {split}: the data set cannot be loaded: {_first_line(error)}. "
            "Check the name, the split, the network, and HF_HUB_OFFLINE"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield row, f"{name}, row {number}"


def _ray_rows(path: str, shown: str) -> Rows:
    import ray.data
    from tenfold.platform import cluster

    if "://" not in path and not ray.is_initialized() and cluster.cluster_address() is None:
        # A plan starts nothing, not even a local cluster.
        yield from _local_rows(path, shown)
        return
    # Otherwise Ray Data starts a cluster by its own rules.
    cluster.connect()

    context = ray.data.DataContext.get_current()
    keep = context.execution_options.preserve_order
    # Otherwise blocks come as they finish: row numbers and the split would differ between runs.
    context.execution_options.preserve_order = True
    try:
        number = 0
        for batch in _ray_data(path).iter_batches(batch_format="pyarrow"):
            for row in batch.to_pylist():
                number += 1
                yield row, f"{shown}, row {number}"
    except FileNotFoundError as error:
        raise DataError(f"{shown}: no such file; relative paths start at {Path.cwd()}") from error
    except (ray.exceptions.RayError, OSError, ValueError) as error:
        raise DataError(f"{shown}: Ray Data cannot read it: {_first_line(error)}") from error
    finally:
        context.execution_options.preserve_order = keep


def _ray_kind(path: str) -> str:
    return ENDINGS.get(Path(path).suffix, "parquet")  # a folder's name has no ending


def _local_rows(path: str, shown: str) -> Rows:
    """Yield what Ray Data would: the rows of one file, or of a folder's files in the order of their names."""
    kind, place = _ray_kind(path), expanded(path)
    inside = sorted(file for file in place.rglob("*") if ENDINGS.get(file.suffix) == kind)
    rows = (row for file in inside or [place] for row, _ in _plain_rows(kind, str(file), shown))
    for number, row in enumerate(rows, start=1):
        if isinstance(row, BadRow):
            raise DataError(f"{shown}, row {number}: {row.reason}. Ray Data reads whole files only; mend it")
        yield row, f"{shown}, row {number}"


def _ray_data(path: str) -> Any:
    import ray.data

    # Workers have another current directory.
    place = path if "://" in path else str(expanded(path).absolute())
    kind = _ray_kind(path)
    if kind == "parquet":
        return ray.data.read_parquet(place)
    return ray.data.read_json(place, lines=kind == "jsonl")


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
