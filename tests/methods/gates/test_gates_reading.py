"""Sections from every format, joined by name; several sections as one."""

import gzip
import hashlib
import json
import shutil
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
from tenfold.methods.gates.config import Section
from tenfold.methods.gates.limits import Limits
from tenfold.methods.gates.reading import locate, read_section, read_sections, sections_digest
from tenfold.platform.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[3]
SPATIAL = REPOSITORY.parent / "shared" / "data" / "spatial"
OSMFISH = "sample:spatial/osmfish_sscortex.h5ad"

COUNTS = np.array([[3, 0, 1], [0, 2, 0], [5, 0, 0], [1, 1, 4]], dtype=np.float32)
CELLS, GENES = ["a", "b", "c", "d"], ["Gad1", "Sox2", "Mbp"]
POSITIONS = {"a": (0, 1), "b": (2, 3), "c": (4, 5), "d": (6, 7.5)}


def notes_of(adata):
    return " | ".join(adata.uns.get("reading_notes", []))


def delimited(rows, columns, values, delimiter=",", corner=True):
    lines = [delimiter.join([*([""] if corner else []), *columns])]
    lines += [delimiter.join([name, *(f"{value:g}" for value in row)]) for name, row in zip(rows, values, strict=True)]
    return "\n".join(lines) + "\n"


@pytest.fixture
def places(tmp_path):
    # Another order than the counts: only names may join them.
    text = "".join(f"{name},{x},{y}\n" for name, (x, y) in sorted(POSITIONS.items(), reverse=True))
    (tmp_path / "places.csv").write_text(text)
    return tmp_path / "places.csv"


def write_counts(folder, kind):
    """Write COUNTS in one form; returns the path and whether genes are in rows."""
    path = folder / f"counts.{kind.split(':')[0]}"
    turned = kind.endswith(":turned")
    rows, columns, values = (GENES, CELLS, COUNTS.T) if turned else (CELLS, GENES, COUNTS)
    if ".mtx" in path.name:
        scipy.io.mmwrite(folder / "plain.mtx", sp.coo_matrix(values.astype(int)))
        content = (folder / "plain.mtx").read_bytes()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        (folder / "barcodes.tsv").write_text("".join(f"{name}\n" for name in CELLS))
        content = "".join(f"ENS{index}\t{name}\tGene Expression\n" for index, name in enumerate(GENES))
        (folder / "features.tsv.gz").write_bytes(gzip.compress(content.encode()))
    elif path.suffix == ".npz":
        matrix = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "coo": sp.coo_matrix}[kind.split(":")[1]](values)
        sp.save_npz(path, matrix)
        with np.load(path) as arrays:
            np.savez(path, **arrays, obs_names=np.array(rows), var_names=np.array(columns))
    else:
        text = delimited(rows, columns, values, "\t" if ".tsv" in path.name else ",", corner=":r" not in kind)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path, turned


@pytest.mark.parametrize(
    "kind",
    ["csv", "csv.gz", "tsv", "tsv.gz", "csv:r", "csv:turned", "mtx", "mtx.gz", "mtx:turned", "npz:csr", "npz:csc"]
    + ["npz:coo", "npz:csr:turned"],
)
def test_every_counts_table_gives_the_same_section_joined_by_name(tmp_path, places, kind):
    path, turned = write_counts(tmp_path, kind)
    adata = read_section(Section(path=str(path), coordinates=str(places), transpose=turned))
    assert list(adata.obs_names) == CELLS
    assert list(adata.var_names) == GENES
    assert sp.issparse(adata.X)
    assert adata.X.dtype == np.float32
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS)
    np.testing.assert_array_equal(adata.obsm["spatial"], [POSITIONS[name] for name in CELLS])
    assert notes_of(adata) == ""


def test_the_coordinates_go_to_the_key_that_the_section_names(tmp_path, places):
    path, _ = write_counts(tmp_path, "csv")
    adata = read_section(Section(path=str(path), coordinates=str(places), spatial_key="xy"))
    assert "xy" in adata.obsm


@pytest.mark.parametrize("header", ["", "cell,x,y,z\n"])
def test_a_coordinates_table_may_have_a_header_and_a_third_axis(tmp_path, header):
    path, _ = write_counts(tmp_path, "csv")
    (tmp_path / "p.tsv").write_text(
        (header + "".join(f"{name},{x},{y},9\n" for name, (x, y) in POSITIONS.items())).replace(",", "\t")
    )
    adata = read_section(Section(path=str(path), coordinates=str(tmp_path / "p.tsv")))
    np.testing.assert_array_equal(adata.obsm["spatial"][3], [6, 7.5, 9])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a,1\nb,2\n", "line 1: 2 fields; needs 3 or 4"),
        ("a,1,2\nb,1,2,3\n", "line 2: 4 fields; needs 3"),
        ("cell,x,y\na,1,2\nb,one,2\n", "line 3: could not convert.*'one'"),
        ("a,1,2\na,3,4\n", "line 2: the cell a occurs twice"),
        ("cell,x,y\n", "no rows"),
        ("e,1,2\nf,3,4\n", r"share no cell \(first: a and e\)"),
        ("a,1\xff,2\n", "not a table"),
    ],
)
def test_a_coordinates_table_that_cannot_be_used_names_the_line(tmp_path, text, match):
    path, _ = write_counts(tmp_path, "csv")
    (tmp_path / "p.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=match):
        read_section(Section(path=str(path), coordinates=str(tmp_path / "p.csv")))


def test_cells_that_miss_a_partner_are_left_out_and_named(tmp_path):
    path, _ = write_counts(tmp_path, "csv")
    (tmp_path / "p.csv").write_text("d,6,7.5\nb,2,3\nother,0,0\n")
    adata = read_section(Section(path=str(path), coordinates=str(tmp_path / "p.csv")))
    assert list(adata.obs_names) == ["b", "d"]
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS[[1, 3]])
    np.testing.assert_array_equal(adata.obsm["spatial"], [[2, 3], [6, 7.5]])
    assert "2 cells without coordinates (first: a)" in notes_of(adata)
    assert "1 cells without counts (first: other)" in notes_of(adata)


def test_a_matrix_without_names_is_joined_by_position_only_if_all_rows_have_one(tmp_path, places):
    sp.save_npz(tmp_path / "m.npz", sp.csr_matrix(COUNTS))
    adata = read_section(Section(path=str(tmp_path / "m.npz"), coordinates=str(places)))
    assert list(adata.obs_names) == ["d", "c", "b", "a"]  # the order of the coordinates
    assert list(adata.var_names) == ["gene1", "gene2", "gene3"]
    assert "in the same order" in notes_of(adata)
    with pytest.raises(DataError, match=r"3 cells without names, but .* has 4.*transpose"):
        read_section(Section(path=str(tmp_path / "m.npz"), coordinates=str(places), transpose=True))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (",g,h\na,1,x\n", "not a table of numbers.*'x'"),
        (",g,h\na,1,\n", "not a table of numbers"),
        (",g,h\na,1,2\nb,1\n", "not a table of numbers.*got 2"),
        (",g,h\na,1,2\nb,1,2,3\n", "not a table of numbers.*got 4"),
        ("a 1 2\nb 1 2\n", "1 names in the first row and 1 fields"),
        (",g,h\n", "one row"),
        (",g,h\na,1,2\na,1,2\n", "the cell a occurs twice"),
    ],
)
def test_a_counts_table_that_cannot_be_used_says_why(tmp_path, places, text, match):
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(DataError, match=match):
        read_section(Section(path=str(tmp_path / "c.csv"), coordinates=str(places)))


def test_a_counts_table_needs_coordinates(tmp_path):
    path, _ = write_counts(tmp_path, "csv")
    with pytest.raises(DataError, match=r"no coordinates\. Name a table of cell, x, y in coordinates"):
        read_section(Section(path=str(path)))


def test_non_zero_counts_of_a_table_are_limited_while_reading(tmp_path, places):
    path, _ = write_counts(tmp_path, "csv")
    limits = Limits(max_cells=4, max_genes=3, max_values=6, max_bytes=10**6)
    with pytest.raises(DataError, match="7 non-zero counts; at most 6"):
        read_section(Section(path=str(path), coordinates=str(places)), limits)


def test_matrix_market_indices_out_of_range_are_refused(tmp_path, places):
    (tmp_path / "m.mtx").write_text("%%MatrixMarket matrix coordinate integer general\n4 3 1\n9 9 1\n")
    with pytest.raises(DataError, match="damaged Matrix Market"):
        read_section(Section(path=str(tmp_path / "m.mtx"), coordinates=str(places)))


@pytest.mark.parametrize(
    ("name", "value"),
    [("indices", [0, 2, 99, 0, 0, 1, 2]), ("indices", [0, 2, -1, 0, 0, 1, 2]), ("indptr", [0, 2, 3, 4, -1])],
)
def test_an_archive_whose_indices_lead_out_of_it_is_refused(tmp_path, places, name, value):
    sp.save_npz(tmp_path / "m.npz", sp.csr_matrix(COUNTS))
    with np.load(tmp_path / "m.npz") as arrays:
        changed = {**arrays, name: np.array(value, dtype=np.int32)}
    np.savez(tmp_path / "m.npz", **changed)
    with pytest.raises(DataError, match="damaged sparse matrix"):
        read_section(Section(path=str(tmp_path / "m.npz"), coordinates=str(places)))


# Visium folders


def write_visium(folder, positions="list", matrix="h5"):
    """Write COUNTS as Space Ranger does, with a spot outside of the tissue and one protein."""
    (folder / "spatial").mkdir(parents=True)
    rows = [(name, 0 if name == "d" else 1, i, i + 1, 100 + i, 200 + i) for i, name in enumerate(CELLS)]
    rows.append(("empty", 0, 9, 9, 900, 900))
    columns = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
    frame = pd.DataFrame(rows[::-1], columns=columns)
    if positions == "list":
        frame.to_csv(folder / "spatial" / "tissue_positions_list.csv", header=False, index=False)
    elif positions == "csv":
        frame.to_csv(folder / "spatial" / "tissue_positions.csv", index=False)
    else:
        frame.to_parquet(folder / "spatial" / "tissue_positions.parquet")
    wide = np.hstack([COUNTS, np.full((4, 1), 7)])  # the last feature is an antibody
    genes = [*GENES, "CD3"]
    kinds = ["Gene Expression"] * 3 + ["Antibody Capture"]
    if matrix == "h5":
        csr = sp.csr_matrix(wide)
        with h5py.File(folder / "filtered_feature_bc_matrix.h5", "w") as file:
            file.attrs["library_ids"] = np.array([b"slide1"])
            part = file.create_group("matrix")
            for name, value in (("data", csr.data.astype("i4")), ("indices", csr.indices), ("indptr", csr.indptr)):
                part[name] = value
            part["shape"] = np.array([4, 4])
            part["barcodes"] = np.array(CELLS, dtype="S")
            for name, value in (("id", [f"E{i}" for i in range(4)]), ("name", genes), ("feature_type", kinds)):
                part[f"features/{name}"] = np.array(value, dtype="S")
    else:
        inner = folder / "filtered_feature_bc_matrix"
        inner.mkdir()
        scipy.io.mmwrite(inner / "m.mtx", sp.coo_matrix(COUNTS.T.astype(int)))
        (inner / "matrix.mtx.gz").write_bytes(gzip.compress((inner / "m.mtx").read_bytes()))
        (inner / "m.mtx").unlink()
        (inner / "barcodes.tsv.gz").write_bytes(gzip.compress("\n".join(CELLS).encode()))
        content = "\n".join(f"E{i}\t{name}\tGene Expression" for i, name in enumerate(GENES))
        (inner / "features.tsv.gz").write_bytes(gzip.compress(content.encode()))
    return folder


@pytest.mark.parametrize("positions", ["list", "csv", "parquet"])
@pytest.mark.parametrize("matrix", ["h5", "mtx"])
def test_every_form_of_a_visium_folder_gives_the_same_section(tmp_path, positions, matrix):
    folder = write_visium(tmp_path / "slide", positions, matrix)
    adata = read_section(Section(path=str(folder)))
    assert list(adata.obs_names) == CELLS
    assert list(adata.var_names) == GENES
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS)
    np.testing.assert_array_equal(adata.obs["in_tissue"], [1, 1, 1, 0])
    # x is the column of pixels, y the row.
    np.testing.assert_array_equal(adata.obsm["spatial"], [[200, 100], [201, 101], [202, 102], [203, 103]])
    assert list(adata.uns["spatial"]) == ["slide1" if matrix == "h5" else "slide"]


def test_a_visium_folder_may_have_scale_factors_without_images(tmp_path):
    folder = write_visium(tmp_path / "slide")
    (folder / "spatial" / "scalefactors_json.json").write_text(json.dumps({"spot_diameter_fullres": 89.4}))
    adata = read_section(Section(path=str(folder)))
    assert adata.uns["spatial"]["slide1"]["scalefactors"] == {"spot_diameter_fullres": 89.4}
    adata.write_h5ad(tmp_path / "again.h5ad")


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (
            lambda folder: (folder / "spatial" / "tissue_positions_list.csv").unlink(),
            "no coordinates: spatial/ has none",
        ),
        (
            lambda folder: (folder / "spatial" / "tissue_positions_list.csv").write_text("x,1,1,1,1,1\n"),
            r"no barcode of the counts \(first: a\) is among the positions \(first: x\)",
        ),
        (
            lambda folder: (folder / "spatial" / "tissue_positions_list.csv").write_text("a,1\n"),
            "needs the columns|missing",
        ),
        (lambda folder: (folder / "spatial" / "tissue_positions_list.csv").write_text(""), "is empty"),
        (lambda folder: (folder / "spatial" / "scalefactors_json.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "filtered_feature_bc_matrix.h5").write_bytes(b"PK"), "not HDF5"),
    ],
)
def test_a_visium_folder_that_cannot_be_used_says_what_is_missing(tmp_path, spoil, match):
    folder = write_visium(tmp_path / "slide")
    spoil(folder)
    with pytest.raises(DataError, match=match):
        read_section(Section(path=str(folder)))


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("indptr", np.array([0, 1, 2]), "indptr has 3 entries, needs 5"),
        ("indices", np.full(11, 9), "damaged sparse matrix"),
        ("barcodes", np.array([b"a"]), "barcodes has shape"),
        ("shape", np.array([4.0, 4.0]), "two whole numbers"),
    ],
)
def test_a_crafted_feature_matrix_is_refused(tmp_path, name, value, match):
    folder = write_visium(tmp_path / "slide")
    with h5py.File(folder / "filtered_feature_bc_matrix.h5", "a") as file:
        del file[f"matrix/{name}"]
        file[f"matrix/{name}"] = value
    with pytest.raises(DataError, match=match):
        read_section(Section(path=str(folder)))


def test_the_measured_visium_folder_is_read_with_its_truth():
    folder = SPATIAL / "visium_151510_mini"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/spatial")
    adata = read_section(Section(path=str(folder), truth=str(folder / "151510_mini_truth.txt")))
    assert adata.shape == (575, 500)
    assert adata.obs["truth"].cat.categories.size == 5
    first = adata["AAACAGGGTCTATATT-1"]
    np.testing.assert_array_equal(first.obsm["spatial"], [[407, 439]])
    assert first.obs["truth"].iloc[0] == "Layer4"
    assert set(adata.uns["spatial"]["151510_mini"]["images"]) == {"hires", "lowres"}


# Truth, samples, names


def h5ad(path, cells=CELLS, genes=GENES, **obs):
    adata = anndata.AnnData(sp.csr_matrix(COUNTS), pd.DataFrame(obs, index=cells), pd.DataFrame(index=genes))
    adata.obsm["spatial"] = np.array([POSITIONS[name] for name in CELLS], dtype=float)
    adata.write_h5ad(path)
    return str(path)


def test_missing_labels_in_any_spelling_are_missing_and_unused_categories_go(tmp_path):
    column = pd.Categorical(["L2", "NA", None, "L1"], categories=["L2", "NA", "unused", "L1"])
    adata = read_section(Section(path=h5ad(tmp_path / "a.h5ad", layer=column), labels="layer"))
    assert adata.obs["truth"].tolist()[::3] == ["L2", "L1"]
    assert adata.obs["truth"].isna().tolist() == [False, True, True, False]
    assert list(adata.obs["truth"].cat.categories) == ["L2", "L1"]  # in their own order


def test_numbers_as_labels_become_strings(tmp_path):
    adata = read_section(Section(path=h5ad(tmp_path / "a.h5ad", layer=[2, 1, 2, 1]), labels="layer"))
    assert adata.obs["truth"].tolist() == ["2", "1", "2", "1"]


def test_a_truth_table_is_joined_by_name(tmp_path):
    (tmp_path / "t.tsv").write_text("d\tWhite matter\nb\tNA\na\tL1\nother\tL9\n")
    section = Section(path=h5ad(tmp_path / "a.h5ad"), truth=str(tmp_path / "t.tsv"))
    adata = read_section(section)
    assert adata.obs["truth"].astype(object).where(adata.obs["truth"].notna(), None).tolist() == [
        "L1",
        None,
        None,
        "White matter",
    ]
    assert "1 of its 4 cells are not in the section" in notes_of(adata)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a\tL1\tx\n", "line 1: 3 fields; needs two"),
        ("a\tL1\na\tL2\n", "line 2: the cell a has two domains"),
        ("z\tL1\n", "no cell of .* in it"),
    ],
)
def test_a_truth_table_that_cannot_be_used_says_why(tmp_path, text, match):
    (tmp_path / "t.tsv").write_text(text)
    with pytest.raises(DataError, match=match):
        read_section(Section(path=h5ad(tmp_path / "a.h5ad"), truth=str(tmp_path / "t.tsv")))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"labels": "nothing"}, r"labels: obs\['nothing'\] is missing; columns there: batch"),
        ({"labels": "batch", "truth": "t.tsv"}, "both labels and truth"),
        ({"samples": ["1"]}, "samples needs sample_key"),
        ({"sample_key": "slice"}, r"sample_key: obs\['slice'\] is missing; columns there: batch"),
        ({"sample_key": "batch", "samples": ["9", "x"]}, r"samples: 9 not in obs\['batch'\]: x, y"),
        ({"coordinates": "p.csv"}, "coordinates is only for counts tables"),
        ({"transpose": True}, "transpose is only for counts tables"),
    ],
)
def test_options_that_do_not_fit_the_file_are_refused(tmp_path, options, match):
    path = h5ad(tmp_path / "a.h5ad", batch=["x", "x", "y", "y"])
    with pytest.raises(DataError, match=match):
        read_section(Section(path=path, **options))


def test_samples_choose_cells_by_the_column(tmp_path):
    path = h5ad(tmp_path / "a.h5ad", batch=[1, 2, 3, 2])
    adata = read_sections([Section(path=path, sample_key="batch", samples=["2", "3"])])
    assert list(adata.obs_names) == ["b", "c", "d"]
    assert adata.obs["section"].tolist() == ["2", "3", "2"]
    assert not adata.is_view


@pytest.mark.filterwarnings("ignore:.* names are not unique")
def test_names_that_repeat_get_a_number_and_a_note(tmp_path):
    path = h5ad(tmp_path / "a.h5ad", cells=["a", "a", "c", "d"], genes=["g", "h", "g"])
    adata = read_section(Section(path=path))
    assert list(adata.obs_names) == ["a", "a-1", "c", "d"]
    assert list(adata.var_names) == ["g", "h", "g-1"]
    assert "1 cell names occur before (first: a)" in notes_of(adata)
    assert "1 gene names occur before (first: g)" in notes_of(adata)


def test_entries_that_occur_twice_in_a_sparse_matrix_are_added(tmp_path):
    path = h5ad(tmp_path / "a.h5ad")
    with h5py.File(path, "a") as file:
        file["X/indices"][1] = file["X/indices"][0]  # 3 and 1 in one place
    assert read_section(Section(path=path)).X.toarray()[0].tolist() == [4, 0, 0]


def test_tables_beside_the_section_keep_the_limits_too(tmp_path):
    path = h5ad(tmp_path / "a.h5ad")
    (tmp_path / "t.tsv.gz").write_bytes(gzip.compress(b"a\tL1\n" * 10_000_000))
    with pytest.raises(DataError, match=r"t\.tsv\.gz: .*at most"):
        read_section(Section(path=path, truth=str(tmp_path / "t.tsv.gz")), Limits(10, 10, 100, 10**6))


# Several sections


def test_sections_are_joined_over_the_genes_that_all_have(tmp_path):
    one = h5ad(tmp_path / "one.h5ad", domain=["L1", "L1", "L2", "L2"])
    two = h5ad(tmp_path / "two.h5ad", genes=["Mbp", "Gad1", "Actb"])
    adata = read_sections([Section(path=one, labels="domain"), Section(path=two)])
    assert sorted(adata.var_names) == ["Gad1", "Mbp"]
    np.testing.assert_array_equal(
        adata[:, ["Gad1", "Mbp"]].X.toarray(), np.vstack([COUNTS[:, [0, 2]], COUNTS[:, [1, 0]]])
    )
    assert adata.obs["section"].tolist() == ["one"] * 4 + ["two"] * 4
    assert list(adata.obs["section"].cat.categories) == ["one", "two"]
    assert adata.obs["truth"].isna().tolist() == [False] * 4 + [True] * 4
    assert adata.obs_names.is_unique
    assert adata.obs_names[4] == "a-two"
    assert "2 genes are in all sections, which have 3, 3" in notes_of(adata)
    assert "share cell names" in notes_of(adata)
    np.testing.assert_array_equal(adata.obsm["spatial"][4:], adata.obsm["spatial"][:4])


def test_sections_with_one_name_are_told_apart(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    paths = [h5ad(tmp_path / name / "a.h5ad", batch=["s", "s", "t", "t"]) for name in ("x", "y")]
    assert read_sections([Section(path=path) for path in paths]).obs["section"].unique().tolist() == ["a1", "a2"]
    by_batch = read_sections([Section(path=path, sample_key="batch") for path in paths])
    assert by_batch.obs["section"].unique().tolist() == ["a1-s", "a1-t", "a2-s", "a2-t"]


def test_a_spot_outside_of_the_tissue_stays_marked_beside_a_section_without_that_column(tmp_path):
    folder = write_visium(tmp_path / "slide")
    adata = read_sections([Section(path=str(folder)), Section(path=h5ad(tmp_path / "one.h5ad"))])
    assert adata.obs["in_tissue"].tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
    assert list(adata.uns["spatial"]) == ["slide1"]


def test_neighbours_that_the_sections_bring_along_stay_within_them(tmp_path):
    paths = []
    for name in ("one", "two"):
        adata = anndata.read_h5ad(h5ad(tmp_path / f"{name}.h5ad"))
        adata.obsp["spatial_connectivities"] = sp.csr_matrix(np.eye(4, k=1))
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
        paths.append(str(tmp_path / f"{name}.h5ad"))
    links = read_sections([Section(path=path) for path in paths]).obsp["spatial_connectivities"].toarray()
    np.testing.assert_array_equal(links, np.kron(np.eye(2), np.eye(4, k=1)))


def test_sections_that_do_not_fit_together_are_refused(tmp_path):
    one = h5ad(tmp_path / "one.h5ad")
    other = h5ad(tmp_path / "other.h5ad", genes=["x", "y", "z"])
    with pytest.raises(DataError, match=r"share no gene.*Gad1 and x"):
        read_sections([Section(path=one), Section(path=other)])
    with pytest.raises(DataError, match="layer is None and counts; needs to be the same"):
        read_sections([Section(path=one), Section(path=other, layer="counts")])
    with pytest.raises(DataError, match=r"layers\['counts'\] is missing"):
        read_sections([Section(path=one, layer="counts"), Section(path=other, layer="counts")])
    flat, deep = anndata.read_h5ad(one), anndata.read_h5ad(one)
    deep.obsm["spatial"] = np.zeros((4, 3))
    del flat.obsm["spatial"]
    deep.write_h5ad(tmp_path / "deep.h5ad")
    flat.write_h5ad(tmp_path / "flat.h5ad")
    with pytest.raises(DataError, match="has 2 and 3 columns"):
        read_sections([Section(path=one), Section(path=str(tmp_path / "deep.h5ad"))])
    with pytest.raises(DataError, match=r"flat.h5ad: obsm\['spatial'\] is missing"):
        read_sections([Section(path=one), Section(path=str(tmp_path / "flat.h5ad"))])


def test_the_three_measured_samples_of_one_file_are_three_sections():
    path = SPATIAL / "starmap_mpfc_3samples.h5ad"
    if not path.is_file():
        pytest.skip("needs ../shared/data/spatial")
    adata = read_sections([Section(path=str(path), sample_key="sample", labels="domain")])
    assert adata.obs["section"].value_counts().to_dict() == {"BZ5": 1049, "BZ9": 1053, "BZ14": 1088}
    assert list(adata.obs["section"].cat.categories) == adata.obs["section"].unique().tolist()


# References and digests


def test_the_packaged_section_is_read_by_its_reference():
    adata = read_section(Section(path=OSMFISH, labels="domain"))
    assert adata.shape == (4839, 33)
    assert adata.obs["truth"].cat.categories.size == 11


@pytest.mark.parametrize("reference", ["sample:spatial/none.h5ad", "sample:../pyproject.toml", "sample:"])
def test_an_unknown_sample_lists_those_there_are(reference):
    with pytest.raises(DataError, match=r"no such sample.*spatial/osmfish_sscortex\.h5ad"):
        locate(reference)


def test_a_damaged_sample_is_called_by_its_reference(tmp_path, monkeypatch):
    (tmp_path / "spatial").mkdir()
    (tmp_path / "spatial" / "a.h5ad").write_bytes(b"PK")
    monkeypatch.setattr("importlib.resources.files", lambda name: tmp_path)
    with pytest.raises(DataError, match=r"^sample:spatial/a\.h5ad: the content is not HDF5"):
        read_section(Section(path="sample:spatial/a.h5ad"))


def test_a_synthetic_section_knows_its_truth():
    adata = read_sections([Section(path="synthetic:40")])
    assert adata.n_obs == 40
    assert adata.obs["truth"].tolist() == adata.obs["domain"].tolist()
    with pytest.raises(DataError, match="write synthetic:CELLS"):
        read_section(Section(path="synthetic:many"))
    with pytest.raises(DataError, match="40 cells; at most 39"):
        read_section(Section(path="synthetic:40"), Limits(39, 3000, 10**9, 10**9))


def test_the_digest_is_that_of_the_bytes_wherever_they_lie(tmp_path, places):
    path, _ = write_counts(tmp_path, "csv")
    section = Section(path=str(path), coordinates=str(places))
    (tmp_path / "else").mkdir()
    moved = Section(
        path=str(shutil.copy(path, tmp_path / "else" / "x.csv")),
        coordinates=str(shutil.copy(places, tmp_path / "else" / "y.csv")),
    )
    before = sections_digest([section])
    assert before == sections_digest([moved])
    assert len(before) == len(hashlib.sha256().hexdigest())
    places.write_text(places.read_text().replace("7.5", "7.6"))
    assert sections_digest([section]) != before
    assert sections_digest([Section(path="synthetic:30")]) != sections_digest([Section(path="synthetic:31")])


def test_the_digest_covers_a_visium_folder_and_names_beside_a_matrix(tmp_path):
    folder = write_visium(tmp_path / "slide", "csv", "mtx")
    section = Section(path=str(folder))
    before = sections_digest([section])
    inner = folder / "filtered_feature_bc_matrix" / "barcodes.tsv.gz"
    inner.write_bytes(gzip.compress(b"a\nb\nc\ne"))
    assert sections_digest([section]) != before
