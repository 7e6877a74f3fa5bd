"""Crafted and damaged HDF5 files: each ends in one DataError that names the place, before an array is read."""

import dataclasses
import gzip
import subprocess
import sys
import zlib

import h5py
import numpy as np
import pytest
from tenfold.methods.gates import apart
from tenfold.methods.gates.apart import check_file
from tenfold.methods.gates.config import Section
from tenfold.methods.gates.file_checks import inspect_file
from tenfold.methods.gates.limits import Limits
from tenfold.methods.gates.reading import read_section
from tenfold.methods.gates.synthetic import synthetic_section
from tenfold.platform.errors import DataError

LIMITS = Limits(max_cells=1000, max_genes=1000, max_values=100_000, max_bytes=50_000_000)


@pytest.fixture
def path(tmp_path):
    place = tmp_path / "section.h5ad"
    adata = synthetic_section(30, 20, 3)
    adata.layers["counts"] = adata.X.copy()
    adata.write_h5ad(place)
    return place


def refused(path, match, limits=LIMITS):
    with pytest.raises(DataError, match=match):
        inspect_file(path, limits)


def test_a_sound_file_passes_with_and_without_limits(path):
    inspect_file(path, LIMITS)
    inspect_file(path, None)
    assert read_section(Section(path=str(path))).shape == (30, 20)


def test_a_truncated_file_is_refused(path):
    path.write_bytes(path.read_bytes()[:-500])
    refused(path, "truncated")


@pytest.mark.parametrize("length", [0, 3, 8, 60, 400])
def test_a_file_cut_early_is_refused(path, length):
    path.write_bytes(path.read_bytes()[:length])
    refused(path, "truncated|damaged|empty|unknown content")


def test_no_damaged_byte_leads_to_anything_but_a_data_error(path):
    whole = path.read_bytes()
    generator = np.random.default_rng(1)
    refusals = 0
    for place in generator.integers(8, len(whole), size=40):
        damaged = bytearray(whole)
        damaged[place] ^= 0x1F
        path.write_bytes(bytes(damaged))
        try:
            read_section(Section(path=str(path)))
        except DataError:
            refusals += 1
    assert refusals > 2


def forge_length(path, bytes_of_length):
    """Let the first name of obs declare another length than the text that it refers to."""
    with h5py.File(path, "a") as file:
        data = file["obs/_index"]
        place = data.id.get_offset()
    content = bytearray(path.read_bytes())
    content[place : place + 4] = bytes_of_length
    path.write_bytes(bytes(content))


_REFUSAL_AND_MEMORY = """
import resource, sys
from pathlib import Path
from tenfold.methods.gates.apart import check_file
from tenfold.methods.gates.limits import Limits
from tenfold.platform.errors import DataError
try:
    check_file(sys.argv[1], Limits(*map(int, sys.argv[2:])))
except DataError as error:
    print(error)
own = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(max(int(own.split()[1]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
"""


def test_a_string_that_declares_gigabytes_is_refused_without_taking_them(path):
    forge_length(path, b"\xff\xff\xff\xfe")
    # From a small process: getrusage counts the size of its parent, at the fork, as a process's own peak.
    order = [sys.executable, "-c", _REFUSAL_AND_MEMORY, str(path), *map(str, dataclasses.astuple(LIMITS))]
    refusal, peak = subprocess.run(order, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    assert "damaged" in refusal
    assert int(peak) < 1_000_000  # kB; the string declares 4 GB


def test_a_chunk_that_inflates_beyond_its_size_is_refused_without_taking_the_memory(path, monkeypatch):
    pack = zlib.compressobj(1)
    bomb = b"".join(pack.compress(bytes(2**24)) for _ in range(16)) + pack.flush()  # 256 MiB
    with h5py.File(path, "a") as file:
        data = file.create_dataset("uns/bomb", shape=(1000,), dtype="f8", chunks=(1000,), compression="gzip")
        data.id.write_direct_chunk((0,), bomb)
    assert path.stat().st_size < 2 * 10**6
    monkeypatch.setattr(apart, "_MEMORY_BYTES", 128 * 2**20)
    with pytest.raises(DataError, match=r"uns/bomb|damaged|memory|small chunks"):
        check_file(path, LIMITS)


def test_a_sound_file_passes_in_the_process_apart_and_is_then_read(path):
    assert read_section(Section(path=str(path)), LIMITS).shape == (30, 20)


def test_a_file_that_takes_too_much_computing_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b"x" * 2**24) * 1000)  # 16 GB when decompressed
    monkeypatch.setattr(apart, "_CPU_SECONDS", 1)
    with pytest.raises(DataError, match="more than 1 s of computing"):
        check_file(tmp_path / "a.tsv.gz", Limits(10, 10, 10, 10**12))


def test_the_process_apart_says_what_the_check_says(path):
    with pytest.raises(DataError, match="30 cells; at most 3"):
        read_section(Section(path=str(path)), Limits(3, 20, 10**6, 10**9))


@pytest.mark.parametrize(
    ("start", "name"),
    [(b"PK\x03\x04 a zip", "zip"), (b"\x1f\x8b\x08 gzip", "gzip"), (b"cell,x,y\n", "unknown"), (b"", "empty")],
)
def test_other_content_under_the_ending_h5ad_is_refused(path, start, name):
    path.write_bytes(start)
    refused(path, f"not HDF5.*{name}")


def test_an_external_link_is_refused_and_not_followed(path, tmp_path):
    with h5py.File(tmp_path / "secret.h5", "w") as other:
        other["x"] = np.ones(3)
    for target in ("secret.h5", "/etc/passwd"):
        with h5py.File(path, "a") as file:
            if "uns/stolen" in file:
                del file["uns/stolen"]
            file["uns/stolen"] = h5py.ExternalLink(target, "/x")
        refused(path, "uns/stolen: a link to another file")


def test_an_external_link_in_place_of_x_is_refused_without_limits_too(path):
    with h5py.File(path, "a") as file:
        del file["X"]
        file["X"] = h5py.ExternalLink("other.h5ad", "/X")
    refused(path, "X: a link to another file", limits=None)


def test_a_soft_link_is_refused(path):
    with h5py.File(path, "a") as file:
        file["uns/again"] = h5py.SoftLink("/X")
    refused(path, "uns/again: a soft link")


def test_external_storage_is_refused_and_not_read(path, tmp_path):
    (tmp_path / "secret.bin").write_bytes(b"top secret bytes")
    with h5py.File(path, "a") as file:
        file.create_dataset("uns/stolen", shape=(16,), dtype="u1", external=[(str(tmp_path / "secret.bin"), 0, 16)])
    refused(path, "uns/stolen: external storage")


def test_a_virtual_data_set_is_refused(path, tmp_path):
    with h5py.File(tmp_path / "secret.h5", "w") as other:
        other["x"] = np.ones(30)
    layout = h5py.VirtualLayout(shape=(30,), dtype="f8")
    layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "x", shape=(30,))
    with h5py.File(path, "a") as file:
        file.create_virtual_dataset("obs/stolen", layout)
    refused(path, "obs/stolen: a virtual data set")


def test_a_circle_of_hard_links_is_refused(path):
    with h5py.File(path, "a") as file:
        file["uns/circle"] = file["/"]
    refused(path, "uns/circle: a second link")


@pytest.mark.parametrize("dtype", [h5py.ref_dtype, h5py.regionref_dtype, h5py.vlen_dtype(np.int32)])
def test_object_types_other_than_strings_are_refused(path, dtype):
    with h5py.File(path, "a") as file:
        file.create_dataset("uns/odd", shape=(3,), dtype=dtype)
    refused(path, "uns/odd: holds objects")


def test_an_opaque_type_is_refused(path):
    with h5py.File(path, "a") as file:
        file.create_dataset("uns/odd", data=np.zeros(3, dtype="V8"))
    refused(path, "uns/odd: holds objects")


def test_an_object_field_inside_a_record_is_refused(path):
    dtype = np.dtype([("a", "f4"), ("b", h5py.ref_dtype)])
    with h5py.File(path, "a") as file:
        file.create_dataset("uns/odd", shape=(2,), dtype=dtype)
    refused(path, r"uns/odd\[b\]: holds objects")


def test_references_in_attributes_are_refused(path):
    with h5py.File(path, "a") as file:
        file["obs"].attrs.create("odd", file["X"].ref, dtype=h5py.ref_dtype)
    refused(path, "obs: attribute odd")


def test_records_of_strings_as_scanpy_writes_marker_genes_pass(path):
    adata = read_section(Section(path=str(path)))
    adata.uns["rank"] = np.array([("a", "b")], dtype=[("0", "O"), ("1", "O")])
    adata.write_h5ad(path)
    assert read_section(Section(path=str(path))).uns["rank"]["1"][0] == "b"


def test_declared_size_counts_before_anything_is_allocated(path):
    with h5py.File(path, "a") as file:  # no chunk is ever written: kilobytes on disk
        file.create_dataset("uns/bomb", shape=(10**12,), dtype="f8", chunks=(10**4,), compression="gzip")
    assert path.stat().st_size < 200_000
    refused(path, "uns/bomb: needs 8000")


def test_many_compressed_zeros_count_decompressed(path):
    with h5py.File(path, "a") as file:
        file.create_dataset("uns/bomb", data=np.zeros(10**7), compression="gzip")
    assert path.stat().st_size < 400_000
    refused(path, "uns/bomb: needs 80")


def test_a_small_array_with_a_huge_chunk_is_refused(path):
    with h5py.File(path, "a") as file:
        file.create_dataset("uns/bomb", shape=(3,), maxshape=(None,), dtype="f8", chunks=(10**8,), compression="gzip")
    refused(path, "uns/bomb: needs 8001")


def test_one_array_linked_many_times_counts_each_time(path):
    with h5py.File(path, "a") as file:
        data = file.create_dataset("uns/a0", data=np.zeros(10**6), compression="gzip")
        for index in range(1, 9):
            file[f"uns/a{index}"] = data
    refused(path, "uns/a.: needs")


def test_many_references_to_one_long_string_count_each_time(path):
    text = "x" * 300_000
    with h5py.File(path, "a") as file:
        data = file.create_dataset("uns/bomb", shape=(500,), chunks=(500,), dtype=h5py.string_dtype())
        data[0] = text
        chunk = bytearray(data.id.read_direct_chunk((0,))[1])
        for index in range(500):
            chunk[16 * index : 16 * index + 16] = chunk[:16]
        data.id.write_direct_chunk((0,), bytes(chunk))
    with h5py.File(path) as file:  # the crafted file is what it is meant to be
        assert file["uns/bomb"][499] == text.encode()
    assert path.stat().st_size < 1_000_000
    refused(path, "uns/bomb: needs")


def test_an_unusual_compression_is_refused_from_strangers(path):
    # Filter 32015 (zstandard) marked optional, so that a file can be made without it.
    with h5py.File(path, "a") as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((3,))
        try:
            properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, ())
        except ValueError:
            pytest.skip("this HDF5 does not even name filters that it lacks")
        space = h5py.h5s.create_simple((3,))
        h5py.h5d.create(file["uns"].id, b"odd", h5py.h5t.NATIVE_FLOAT, space, properties)
    with pytest.raises(DataError, match="uns/odd: compressed with filter 32015"):
        inspect_file(path, LIMITS)


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        (Limits(29, 1000, 10**6, 10**9), "30 cells; at most 29"),
        (Limits(30, 19, 10**6, 10**9), "20 genes; at most 19"),
        (Limits(30, 20, 5, 10**9), "non-zero counts; at most 5"),
        (Limits(30, 20, 10**6, 500), "decompressed; at most 500"),
    ],
)
def test_each_limit_is_kept(path, limits, match):
    refused(path, match, limits)
    inspect_file(path, Limits(30, 20, 10**6, 10**6))


def replace(path, name, value):
    with h5py.File(path, "a") as file:
        attributes = dict(file[name].attrs)
        del file[name]
        file[name] = value
        file[name].attrs.update(attributes)


@pytest.mark.parametrize("where", ["X", "layers/counts"])
@pytest.mark.parametrize(
    ("part", "change", "match"),
    [
        ("indptr", lambda old: old[:-1], "indptr has 30 entries, needs 31"),
        ("indptr", lambda old: np.append(old, old[-1]), "indptr has 32 entries, needs 31"),
        ("indptr", lambda old: old.astype("f8"), "needs integers"),
        ("indptr", lambda old: old[:, None], "not one-dimensional"),
        ("indptr", lambda old: np.append(old[:-1], old[-1] + 5), "damaged sparse matrix"),
        ("indptr", lambda old: np.append(old[:-1], -1), "damaged sparse matrix"),
        ("indptr", lambda old: np.append(7, old[1:]), "damaged sparse matrix"),
        ("indptr", lambda old: np.concatenate([old[:1], old[2:3], old[1:2], old[3:]]), "damaged sparse matrix"),
        ("indices", lambda old: old[:-1], "entries, data"),
        ("indices", lambda old: np.append(old[:-1], 20), "damaged sparse matrix"),
        ("indices", lambda old: np.append(old[:-1], 2**31 - 1), "damaged sparse matrix"),
        ("indices", lambda old: np.append(-1, old[1:]), "damaged sparse matrix"),
        ("data", lambda old: old.astype("S4"), "needs numbers"),
    ],
)
def test_a_sparse_matrix_that_leads_out_of_its_arrays_is_refused(path, where, part, change, match):
    name = f"{where}/{part}"
    with h5py.File(path) as file:
        old = file[name][...]
    replace(path, name, change(old))
    with pytest.raises(DataError, match=match):
        read_section(Section(path=str(path)))


@pytest.mark.parametrize(
    ("shape", "match"),
    [((30, 2**62), "X has shape|damaged"), ((2**62, 20), "indptr|X has shape"), ((-1, 20), "two whole numbers")],
)
def test_a_matrix_that_declares_another_shape_is_refused(path, shape, match):
    with h5py.File(path, "a") as file:
        file["X"].attrs["shape"] = np.array(shape)
    refused(path, match)


@pytest.mark.parametrize("shape", [3, "30x20", np.array([30.0, 20.0]), np.array([30, 20, 1])])
def test_a_shape_that_is_not_two_whole_numbers_is_refused(path, shape):
    with h5py.File(path, "a") as file:
        file["X"].attrs["shape"] = shape
    refused(path, "needs two whole numbers")


def test_coordinates_of_the_wrong_length_are_named(path):
    replace(path, "obsm/spatial", np.zeros((29, 2)))
    refused(path, r"obsm\['spatial'\] has shape \(29, 2\); needs 30")


def test_a_graph_of_the_wrong_size_is_named(path):
    with h5py.File(path, "a") as file:
        file["obsp/links"] = np.zeros((30, 29))
    refused(path, r"obsp\['links'\] has shape \(30, 29\); needs 30 x 30")


def test_a_column_of_the_wrong_length_is_named(path):
    replace(path, "obs/domain/codes", np.zeros(31, dtype="i1"))
    refused(path, r"obs\[domain\] has 31 rows, the names 30")


def test_category_codes_out_of_range_are_refused(path):
    replace(path, "obs/domain/codes", np.full(30, 100, dtype="i1"))
    with pytest.raises(DataError, match="not a usable AnnData"):
        read_section(Section(path=str(path)))


def test_an_unknown_encoding_is_refused(path):
    with h5py.File(path, "a") as file:
        file["uns"].create_group("odd").attrs.update({"encoding-type": "pickle", "encoding-version": "0.1.0"})
    with pytest.raises(DataError, match="not a usable AnnData"):
        read_section(Section(path=str(path)))


@pytest.mark.parametrize("missing", ["obs", "var"])
def test_a_file_that_is_no_anndata_is_named_so(path, missing):
    with h5py.File(path, "a") as file:
        del file[missing]
    refused(path, "no AnnData: it holds")


def test_a_file_without_counts_is_refused(path):
    with h5py.File(path, "a") as file:
        del file["X"]
        del file["layers"]
    refused(path, "neither X nor a layer")


def test_a_frame_without_names_is_refused(path):
    with h5py.File(path, "a") as file:
        del file["obs"].attrs["_index"]
    refused(path, "obs: no index of names")


def test_a_hidden_matrix_in_uns_is_checked_too(path):
    adata = read_section(Section(path=str(path)))
    adata.uns["deep"] = {"er": adata.X.copy()}
    adata.write_h5ad(path)
    with h5py.File(path) as file:
        old = file["uns/deep/er/indices"][...]
    replace(path, "uns/deep/er/indices", np.append(old[:-1], 99))
    with pytest.raises(DataError, match=r"uns\['deep'\]\['er'\]: damaged"):
        read_section(Section(path=str(path)))
