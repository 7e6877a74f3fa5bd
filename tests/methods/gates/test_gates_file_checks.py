"""Tables and archives: limits before arrays, and content that is not what the ending says."""

import gzip
import io
import zipfile

import numpy as np
import pytest
import scipy.sparse as sp
from tenfold.methods.gates.file_checks import inspect_file
from tenfold.methods.gates.limits import Limits
from tenfold.platform.errors import DataError

LIMITS = Limits(max_cells=10, max_genes=5, max_values=30, max_bytes=100_000)


def table(cells, genes):
    rows = [",".join(["", *(f"g{i}" for i in range(genes))])]
    rows += [",".join([f"c{i}", *"1" * genes]) for i in range(cells)]
    return ("\n".join(rows) + "\n").encode()


def save(path, content):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_a_table_within_the_limits_passes(tmp_path, name):
    inspect_file(save(tmp_path / name, table(10, 5)), LIMITS)


@pytest.mark.parametrize(
    ("cells", "genes", "transpose", "match"),
    [
        (11, 5, False, "11 cells; at most 10"),
        (10, 6, False, "6 genes; at most 5"),
        (5, 11, True, "11 cells; at most 10"),
        (6, 10, True, "6 genes; at most 5"),
    ],
)
def test_rows_and_columns_of_a_table_are_counted_while_streaming(tmp_path, cells, genes, transpose, match):
    with pytest.raises(DataError, match=match):
        inspect_file(save(tmp_path / "a.csv", table(cells, genes)), LIMITS, transpose=transpose)
    inspect_file(save(tmp_path / "b.csv", table(5, 10)), LIMITS, transpose=True)


def test_a_gzip_bomb_stops_at_the_limit(tmp_path):
    path = save(tmp_path / "a.tsv.gz", b"\tg\n" + b"0" * 50_000_000)
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match="decompressed; at most 100000"):
        inspect_file(path, LIMITS)


def test_a_row_without_end_stops_at_the_limit(tmp_path):
    with pytest.raises(DataError, match="decompressed; at most 100000"):
        inspect_file(save(tmp_path / "a.csv", b"0" * 3_000_000), LIMITS)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.csv", gzip.compress(b"a,b\n1,2\n"), "content is gzip, the name says otherwise"),
        ("a.csv.gz", b"a,b\n1,2\n", "content is not gzip"),
        ("a.tsv", b"\x89HDF\r\n\x1a\n\0\0\0", "content is not text"),
        ("a.csv", b"", "empty"),
        ("a.csv", b" \n\n", "empty"),
        ("a.mtx", b"a,b\n1,2\n", "not Matrix Market"),
        ("a.npz", b"a,b\n1,2\n", "not a sound .npz"),
        ("a.xlsx", b"PK", "ending '.xlsx' is unknown. Give .h5ad"),
        ("a", b"x", "ending '' is unknown"),
    ],
)
def test_content_that_is_not_what_the_ending_says_is_refused(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=match):
        inspect_file(tmp_path / name, None)


def test_a_truncated_gzip_is_refused(tmp_path):
    path = save(tmp_path / "a.csv.gz", table(10, 5))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="truncated or damaged gzip"):
        inspect_file(path, LIMITS)


def test_a_missing_file_names_the_folder_that_paths_start_from():
    with pytest.raises(DataError, match="no such file; relative paths start at"):
        inspect_file("nowhere.h5ad", None)


def test_a_folder_that_is_no_visium_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no Visium folder: it has none of filtered_feature_bc_matrix\.h5"):
        inspect_file(tmp_path, None)


MTX = "%%MatrixMarket matrix coordinate integer general\n% comment\n"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (MTX + "11 5 1\n1 1 1\n", "11 cells; at most 10"),
        (MTX + "10 6 1\n1 1 1\n", "6 genes; at most 5"),
        (MTX + "10 5 31\n1 1 1\n", "31 non-zero counts; at most 30"),
        (MTX + "10 5 30\n1 1 1\n", "declares 30 entries in .* truncated"),
        (MTX + "10 5\n", "no line with the numbers"),
        (MTX + "10 5 99999999999999999999\n", "no line with the numbers"),
        (MTX, "no line with the numbers"),
        ("%%MatrixMarket matrix coordinate complex general\n1 1 1\n1 1 1 1\n", "complex"),
        ("%%MatrixMarket matrix coordinate integer symmetric\n1 1 1\n1 1 1\n", "symmetric"),
        ("%%MatrixMarket matrix array integer general\n10 5\n1\n", "50 non-zero counts"),
        ("%%MatrixMarket vector\n", "not Matrix Market"),
    ],
)
def test_a_matrix_market_file_is_judged_by_its_first_lines(tmp_path, text, match):
    with pytest.raises(DataError, match=match):
        inspect_file(save(tmp_path / "a.mtx", text.encode()), LIMITS)
    with pytest.raises(DataError, match=match):
        inspect_file(save(tmp_path / "a.mtx.gz", text.encode()), LIMITS)


def write_npz(path, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, value in members.items():
            stream = io.BytesIO()
            if isinstance(value, bytes):
                stream.write(value)
            else:
                np.save(stream, value, allow_pickle=True)
            archive.writestr(f"{name}.npy", stream.getvalue())
    return path


def parts(**changes):
    matrix = sp.csr_matrix(np.eye(4, 5, dtype=np.float32))
    whole = {
        "format": np.array(b"csr"),
        "shape": np.array([4, 5]),
        "data": matrix.data,
        "indices": matrix.indices,
        "indptr": matrix.indptr,
    }
    return {name: value for name, value in (whole | changes).items() if value is not None}


def header(shape, dtype="<f8"):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def test_a_sound_archive_passes(tmp_path):
    sp.save_npz(tmp_path / "a.npz", sp.csr_matrix(np.eye(4, 5)))
    inspect_file(tmp_path / "a.npz", LIMITS)
    inspect_file(write_npz(tmp_path / "b.npz", parts()), LIMITS)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data": np.array([{"a": 1}] * 4, dtype=object)}, "data holds object, which is read by unpickling"),
        ({"obs_names": np.array(["a"] * 4, dtype=object)}, "obs_names holds object"),
        ({"indptr": None}, "no sparse matrix of format"),
        ({"shape": np.array([4, 5, 6])}, "no sparse matrix"),
        ({"data": np.ones((2, 2))}, "no sparse matrix"),
        ({"extra": np.ones(3)}, r"extra\.npy is no part of a sparse matrix"),
        ({"data": header((10**12,))}, "data declares shape"),
        ({"data": header((4,)) + bytes(8 * 5)}, "data declares shape"),
        ({"data": b"\x80\x04pickle"}, "not a sound .npz"),
        ({"shape": np.array([11, 5])}, "11 cells; at most 10"),
        ({"shape": np.array([4, 6])}, "6 genes; at most 5"),
        ({"data": np.ones(31)}, "31 non-zero counts; at most 30"),
        ({"data": np.ones(10**6)}, "decompressed; at most 100000"),
    ],
)
def test_a_crafted_archive_is_refused_by_its_headers(tmp_path, changes, match):
    with pytest.raises(DataError, match=match):
        inspect_file(write_npz(tmp_path / "a.npz", parts(**changes)), LIMITS)


def test_compressions_that_inflate_at_once_are_refused(tmp_path):
    with pytest.raises(DataError, match="unusual compression"):
        inspect_file(write_npz(tmp_path / "a.npz", parts(), zipfile.ZIP_LZMA), LIMITS)


def test_a_member_that_occurs_twice_is_refused(tmp_path):
    path = write_npz(tmp_path / "a.npz", parts())
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("data.npy", header((4,)) + bytes(32))
    with pytest.raises(DataError, match=r"data\.npy is no part"):
        inspect_file(path, LIMITS)
