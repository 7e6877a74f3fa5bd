"""Counts, coordinates and domains from tables; names join them, positions only where a format has no names."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from tenfold.methods.gates.file_checks import TABLES, delimiter_of, ending_of, open_binary
from tenfold.methods.gates.limits import Limits
from tenfold.platform.errors import DataError

MISSING = ("", "na", "nan")  # of a domain, in any case

_BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Counts:
    """A counts table; names are None where the format has none.

    Attributes:
        matrix: float32 CSR [cells, genes].
        cells: names of the rows, or None.
        genes: names of the columns, or None.
    """

    matrix: sp.csr_matrix
    cells: list[str] | None
    genes: list[str] | None


@dataclass(frozen=True)
class Coordinates:
    """A coordinates table.

    Attributes:
        cells: distinct names.
        positions: float64 [cells, 2 or 3].
    """

    cells: list[str]
    positions: np.ndarray


def check_indices(matrix: sp.spmatrix, where: str) -> None:
    """Check that a CSR or CSC matrix from a file stays inside of its arrays.

    scipy's own check trusts the last pointer, so it lets a negative one pass.

    Raises:
        DataError: pointers do not ascend from 0 to the number of values, or an index is out of range.
    """
    pointers, indices = matrix.indptr, matrix.indices
    rows, columns = matrix.shape if matrix.format == "csr" else matrix.shape[::-1]
    sound = (
        len(pointers) == rows + 1
        and len(indices) == len(matrix.data)
        and pointers[0] == 0
        and pointers[-1] == len(indices)
        and bool(np.all(pointers[1:] >= pointers[:-1]))
        and (not len(indices) or 0 <= indices.min() <= indices.max() < columns)
    )
    if not sound:
        raise DataError(f"{where}: damaged sparse matrix: its indices lead out of it. Write the file anew")


def checked_csr(matrix: sp.spmatrix, where: str) -> sp.csr_matrix:
    """Return a matrix as float32 CSR after a check that its indices stay inside; nothing else is safe before.

    Raises:
        DataError: indices out of range, or pointers that do not ascend.
    """
    if matrix.format in ("csr", "csc"):
        check_indices(matrix, where)
    result = sp.csr_matrix(matrix, dtype=np.float32)
    result.sum_duplicates()
    return result


def read_counts(path: Path, shown: str, *, transpose: bool, limits: Limits | None = None) -> Counts:
    """Read a counts table of any format; cells are in rows afterwards.

    Args:
        path: a file that `check_file` passed.
        shown: how messages call it.
        transpose: the table has genes in rows.
        limits: bounds on the non-zero counts of a delimited table, which only reading it counts.

    Raises:
        DataError: a field is no number, rows differ in length, or the matrix is damaged.
    """
    ending = ending_of(path)
    rows: list[str] | None
    columns: list[str] | None
    if ending in TABLES:
        matrix, rows, columns = _read_delimited(path, shown, limits)
    elif ending == ".mtx":
        matrix, (rows, columns) = _read_mtx(path, shown), _names_beside(path, transpose)
    else:
        matrix, rows, columns = _read_npz(path, shown)
    for names, length, what in ((rows, matrix.shape[0], "rows"), (columns, matrix.shape[1], "columns")):
        if names is not None and len(names) != length:
            raise DataError(f"{shown}: {length} {what} but {len(names)} names for them. Write the file and names anew")
    if transpose:
        return Counts(matrix.T.tocsr(), columns, rows)
    return Counts(matrix, rows, columns)


def _read_delimited(path: Path, shown: str, limits: Limits | None) -> tuple[sp.csr_matrix, list[str], list[str]]:
    """Read a table whose first row names the columns and whose first column names the rows, block by block."""
    import pyarrow
    from pyarrow import csv as arrow_csv

    header, first, delimiter = _head(path, shown)
    columns = header[1:] if len(header) == len(first) else header  # R leaves out the corner
    if len(first) != len(columns) + 1 or not columns:
        raise DataError(
            f"{shown}: {len(header)} names in the first row and {len(first)} fields in the second. The first row "
            "names the columns, the first column the rows, parted by tabs or commas"
        )
    keys = [str(index) for index in range(len(first))]
    types = {key: pyarrow.float32() for key in keys[1:]} | {"0": pyarrow.string()}
    longest = sum(len(field) + 3 for field in first) * 8
    blocks, names, values = [], [], 0
    try:
        with open_binary(path) as stream:
            reader = arrow_csv.open_csv(
                stream,
                read_options=arrow_csv.ReadOptions(
                    column_names=keys, skip_rows=1, block_size=max(_BLOCK_BYTES, longest), use_threads=False
                ),
                parse_options=arrow_csv.ParseOptions(delimiter=delimiter),
                convert_options=arrow_csv.ConvertOptions(
                    column_types=types, null_values=[], strings_can_be_null=False
                ),
            )
            for batch in reader:
                dense = np.empty((batch.num_rows, len(columns)), dtype=np.float32)
                for index in range(len(columns)):
                    dense[:, index] = batch.column(index + 1).to_numpy(zero_copy_only=False)
                blocks.append(sp.csr_matrix(dense))
                names.extend(batch.column(0).to_pylist())
                values += blocks[-1].nnz
                if limits is not None:
                    limits.check_values(shown, values)
    except (pyarrow.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{shown}: not a table of numbers: {_readable(error)}. Mend it") from error
    return sp.vstack(blocks, format="csr"), names, columns


def _readable(error: Exception) -> str:
    """Return a parser's message with the table's own numbers: rows count from 1 with the header, columns from 0."""
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def _head(path: Path, shown: str) -> tuple[list[str], list[str], str]:
    """Return the fields of the first two rows of a table and what parts them."""
    with io.TextIOWrapper(open_binary(path), encoding="utf-8-sig", newline="") as stream:
        try:
            lines = [stream.readline(), stream.readline()]
        except (UnicodeDecodeError, OSError, EOFError) as error:
            raise DataError(f"{shown}: not UTF-8 text: {error}. Save it as UTF-8") from error
    if not lines[1].strip():
        raise DataError(f"{shown}: one row; needs names in the first row and counts below")
    delimiter = delimiter_of(lines[0])
    header, first = (next(csv.reader([line], delimiter=delimiter)) for line in lines)
    return header, first, delimiter


def _read_mtx(path: Path, shown: str) -> sp.csr_matrix:
    from scipy.io import mmread

    try:
        matrix = mmread(path)
    except Exception as error:  # the parser raises several kinds
        raise DataError(f"{shown}: damaged Matrix Market file: {_readable(error)}. Write it anew") from error
    return checked_csr(sp.csr_matrix(matrix), shown)


def _names_beside(path: Path, transpose: bool) -> tuple[list[str] | None, list[str] | None]:
    """Return the names of rows and columns that 10x tools write beside a matrix, if they are there."""
    cells = _first_present(path.parent, ("barcodes.tsv", "barcodes.tsv.gz"))
    genes = _first_present(path.parent, ("features.tsv", "features.tsv.gz", "genes.tsv", "genes.tsv.gz"))
    cell_names = None if cells is None else [row[0] for _, row in _rows(cells, cells.name)]
    # Second column: the symbol; the first is Ensembl's id.
    gene_names = None if genes is None else [row[min(1, len(row) - 1)] for _, row in _rows(genes, genes.name)]
    return (gene_names, cell_names) if transpose else (cell_names, gene_names)


def _first_present(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def names_files(path: Path) -> list[Path]:
    """Return the lists of names that are read with a Matrix Market file."""
    found = (
        _first_present(path.parent, ("barcodes.tsv", "barcodes.tsv.gz")),
        _first_present(path.parent, ("features.tsv", "features.tsv.gz", "genes.tsv", "genes.tsv.gz")),
    )
    return [name for name in found if name is not None and ending_of(path) == ".mtx"]


def _read_npz(path: Path, shown: str) -> tuple[sp.csr_matrix, list[str] | None, list[str] | None]:
    with np.load(path, allow_pickle=False) as arrays:
        parts = {name: arrays[name] for name in arrays.files}
    form = parts["format"].item()
    form = form.decode("ascii", "replace") if isinstance(form, bytes) else str(form)
    shape = tuple(int(size) for size in parts["shape"])
    try:
        if form in ("csr", "csc"):
            build = sp.csr_matrix if form == "csr" else sp.csc_matrix
            matrix = build((parts["data"], parts["indices"], parts["indptr"]), shape=shape)
        elif form == "coo":
            matrix = sp.coo_matrix((parts["data"], (parts["row"], parts["col"])), shape=shape)
        else:
            raise DataError(f"{shown}: format {form!r}; needs csr, csc or coo. Convert with matrix.tocsr()")
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise DataError(f"{shown}: damaged sparse matrix: {error}. Write it anew") from error
    names = (None if key not in parts else [str(name) for name in parts[key]] for key in ("obs_names", "var_names"))
    return checked_csr(matrix, shown), *names


def _rows(path: Path, shown: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, fields) of the rows that are not empty."""
    with io.TextIOWrapper(open_binary(path), encoding="utf-8-sig", newline="") as stream:
        try:
            delimiter = delimiter_of(stream.readline())
            stream.seek(0)
            reader = csv.reader(stream, delimiter=delimiter)
            for row in reader:
                if any(field.strip() for field in row):
                    yield reader.line_num, [field.strip() for field in row]
        except (UnicodeDecodeError, csv.Error, OSError, EOFError) as error:
            raise DataError(f"{shown}: not a table: {_readable(error)}. Save it as UTF-8 text") from error


def read_coordinates(path: Path, shown: str) -> Coordinates:
    """Read a table of cell, x, y and perhaps z, with or without names of columns in its first row.

    Raises:
        DataError: a position is no number, rows differ in length, or a cell occurs twice.
    """
    positions: dict[str, list[float]] = {}
    width = 0
    for line, row in _rows(path, shown):
        if len(row) not in (3, 4) or width not in (0, len(row)):
            raise DataError(f"{shown}, line {line}: {len(row)} fields; needs {width or '3 or 4'}: cell, x, y[, z]")
        width = len(row)
        try:
            position = [float(field) for field in row[1:]]
        except ValueError as error:
            if line == 1:
                continue  # names of the columns
            raise DataError(f"{shown}, line {line}: {error}; x, y[, z] have to be numbers") from error
        if row[0] in positions:
            raise DataError(f"{shown}, line {line}: the cell {row[0]} occurs twice. Keep one of its rows")
        positions[row[0]] = position
    if not positions:
        raise DataError(f"{shown}: no rows; needs cell, x, y[, z]")
    return Coordinates(list(positions), np.array(list(positions.values()), dtype=np.float64))


def read_truth(path: Path, shown: str) -> dict[str, str | None]:
    """Read a table of cell and domain without names of columns; None where the domain is missing.

    Raises:
        DataError: a row has not two fields, or a cell occurs with two domains.
    """
    truth: dict[str, str | None] = {}
    for line, row in _rows(path, shown):
        if len(row) != 2:
            raise DataError(f"{shown}, line {line}: {len(row)} fields; needs two: cell and domain, no header")
        domain = None if row[1].lower() in MISSING else row[1]
        if truth.setdefault(row[0], domain) != domain:
            raise DataError(f"{shown}, line {line}: the cell {row[0]} has two domains. Keep one of its rows")
    return truth
