"""What is wrong with a section is said at once, before any work; what is only odd becomes a note."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from tenfold.methods.gates import checks
from tenfold.methods.gates.checks import check_section
from tenfold.platform.errors import DataError

COUNTS = np.array([[3, 0, 1], [0, 2, 0], [5, 0, 60], [1, 1, 4]])


def section(counts=COUNTS, form=sp.csr_matrix, dtype=np.float32, coordinates=None, **obs):
    counts = np.asarray(counts)
    adata = anndata.AnnData(form(counts.astype(dtype)), pd.DataFrame(obs, index=[f"c{i}" for i in range(len(counts))]))
    adata.var_names = [f"g{i}" for i in range(counts.shape[1])]
    places = np.arange(2.0 * len(counts)).reshape(-1, 2) if coordinates is None else np.asarray(coordinates)
    adata.obsm["spatial"] = places
    return adata


def changed(row, gene, value):
    counts = COUNTS.astype(float)
    counts[row, gene] = value
    return counts


FORMS = [np.asarray, sp.csr_matrix, sp.csc_matrix]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int64, np.uint8])
def test_raw_counts_of_any_form_pass_without_a_note(form, dtype):
    adata = section(form=form, dtype=dtype)
    before = adata.X.copy()
    assert check_section(adata, n_domains=4) == []
    assert type(adata.X) is type(before)
    assert (abs(adata.X - before)).sum() == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("blocks", [1, 4_000_000])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_counts_name_the_cell_and_the_gene(form, blocks, value, monkeypatch):
    monkeypatch.setattr(checks, "_BLOCK_VALUES", blocks)
    with pytest.raises(DataError, match=r"X holds NaN or infinite values.*cell c2, gene g1.*Replace"):
        check_section(section(changed(2, 1, value), form))


@pytest.mark.parametrize("form", FORMS)
def test_negative_counts_are_refused(form):
    with pytest.raises(DataError, match=r"X holds negative values.*-2.*raw counts have none"):
        check_section(section(changed(3, 0, -2), form))


@pytest.mark.parametrize("form", FORMS)
def test_normalised_values_are_refused_with_both_ways_out(form):
    adata = section(np.log1p(COUNTS), form)
    with pytest.raises(
        DataError, match=r"looks log-normalised.*Give raw counts, or set preprocessing\.enabled: false"
    ):
        check_section(adata)
    assert check_section(adata, preprocessing_enabled=False) == []
    adata.layers["counts"] = form(COUNTS.astype(np.float32))
    with pytest.raises(DataError, match=r"raw counts in layer \(counts\)"):
        check_section(adata)
    assert check_section(adata, layer="counts") == []


def test_large_values_that_are_not_whole_are_noted():
    (note,) = check_section(section(COUNTS * 1.5))
    assert "not whole numbers (highest 90)" in note


def test_counts_that_are_taken_for_normalised_values_are_noted():
    (note,) = check_section(section(), preprocessing_enabled=False)
    assert "whole numbers up to 60" in note


@pytest.mark.parametrize("form", FORMS)
def test_empty_cells_are_noted_and_do_not_count_for_k(form):
    adata = section(np.vstack([COUNTS, np.zeros((2, 3))]), form)
    assert check_section(adata, n_domains=4) == ["2 cells have no counts and get no domain"]
    with pytest.raises(DataError, match="n_domains = 5, but 4 cells have counts"):
        check_section(adata, n_domains=5)


def test_explicit_zeros_are_an_empty_cell():
    adata = section()
    adata.X.data[:2] = 0
    assert check_section(adata) == ["1 cells have no counts and get no domain"]


def test_cells_that_are_all_empty_are_refused():
    with pytest.raises(DataError, match="none of the 4 cells has counts"):
        check_section(section(np.zeros((4, 3))))


@pytest.mark.parametrize("counts", [COUNTS[:, :1] + 1, COUNTS * [0, 0, 1] + [0, 0, 1]])
def test_one_gene_is_refused(counts):
    with pytest.raises(DataError, match="counts in 1 gene; needs at least 2"):
        check_section(section(counts))


def test_one_cell_passes():
    assert check_section(section(COUNTS[:1]), n_domains=1) == []


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_a_section_without_cells_or_genes_is_refused(shape):
    with pytest.raises(DataError, match=rf"{shape[0]} cells and {shape[1]} genes"):
        check_section(section(np.zeros(shape)))


def test_text_instead_of_counts_is_refused():
    adata = section()
    adata.layers["odd"] = COUNTS.astype(str)
    with pytest.raises(DataError, match=r"odd holds <U.*needs numbers"):
        check_section(adata, layer="odd")


def test_a_missing_layer_lists_those_there_are():
    adata = section()
    with pytest.raises(DataError, match=r"layers\['counts'\] is missing; layers there: none"):
        check_section(adata, layer="counts")
    adata.layers["raw"] = adata.X
    with pytest.raises(DataError, match="layers there: raw"):
        check_section(adata, layer="counts")


def test_a_section_without_x_names_its_layers():
    adata = section()
    adata.layers["raw"] = adata.X
    adata.X = None
    with pytest.raises(DataError, match=r"X is missing.*raw"):
        check_section(adata)
    assert check_section(adata, layer="raw") == []


def test_missing_coordinates_name_the_field_and_what_is_there():
    adata = section()
    adata.obsm["X_pca"] = adata.obsm.pop("spatial")
    with pytest.raises(DataError, match=r"obsm\['spatial'\] is missing; obsm holds: X_pca.*spatial_key"):
        check_section(adata)
    assert check_section(adata, spatial_key="X_pca") == []


@pytest.mark.parametrize("places", [np.zeros((4, 1)), np.zeros((4, 4)), np.array([["a", "b"]] * 4)])
def test_coordinates_have_two_or_three_numbers(places):
    with pytest.raises(DataError, match="needs numbers, cells x 2 or x 3"):
        check_section(section(coordinates=places))


def test_coordinates_may_be_three_dimensional_or_a_frame():
    assert check_section(section(coordinates=np.arange(12.0).reshape(4, 3))) == []
    adata = section()
    adata.obsm["spatial"] = pd.DataFrame(adata.obsm["spatial"], index=adata.obs_names, columns=["x", "y"])
    assert check_section(adata) == []


def test_coordinates_that_are_not_finite_name_the_cells():
    places = np.arange(8.0).reshape(4, 2)
    places[[1, 3], [0, 1]] = np.nan, np.inf
    with pytest.raises(DataError, match=r"NaN or infinite for 2 cells \(first: c1, c3\)"):
        check_section(section(coordinates=places))


def test_spots_outside_of_the_tissue_need_no_coordinates():
    places = np.arange(8.0).reshape(4, 2)
    places[3] = np.nan
    adata = section(coordinates=places, in_tissue=[1, 1, 1, 0])
    assert check_section(adata, n_domains=3) == ["1 spots outside of the tissue (in_tissue is not 1) are left out"]
    with pytest.raises(DataError, match="n_domains = 4, but 3 cells"):
        check_section(adata, n_domains=4)


def test_cells_in_one_place_are_noted_but_not_across_sections():
    places = [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert check_section(section(coordinates=places)) == ["2 cells lie exactly where another cell lies"]
    adata = section(coordinates=places, section=pd.Categorical(["a", "b", "a", "b"]))
    assert check_section(adata) == []


def test_names_that_repeat_are_noted():
    adata = section()
    adata.obs_names = ["c0", "c0", "c0", "c3"]
    adata.var_names = ["g", "h", "g"]
    notes = check_section(adata)
    assert notes[0].startswith("2 cell names occur before (first: c0)")
    assert notes[1].startswith("1 gene names occur before (first: g)")


def test_everything_that_is_wrong_is_said_at_once():
    adata = section(changed(0, 0, -1))
    del adata.obsm["spatial"]
    with pytest.raises(DataError) as caught:
        check_section(adata, n_domains=9)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert [line.split()[0] for line in lines] == ["X", "obsm['spatial']", "n_domains"]


def test_notes_of_reading_come_first():
    adata = section()
    adata.uns[checks.NOTES] = np.array(["read this"])
    assert check_section(adata) == ["read this"]


@pytest.mark.parametrize("form", FORMS)
def test_a_section_that_stays_in_its_file_and_a_view_are_checked_too(tmp_path, form):
    section(changed(2, 1, np.nan), form).write_h5ad(tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    with pytest.raises(DataError, match="cell c2, gene g1"):
        check_section(backed)
    backed.file.close()
    view = section(changed(2, 1, np.nan), form)[1:]
    with pytest.raises(DataError, match="cell c2, gene g1"):
        check_section(view)
    assert view.is_view
