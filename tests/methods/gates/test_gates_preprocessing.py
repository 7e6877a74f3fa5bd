"""From counts to expression: the worked example, scanpy's own pipeline, kinds of input, what is refused."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy
from scipy.sparse import coo_matrix, csc_matrix, csr_array, csr_matrix
from tenfold.methods.gates import preprocessing
from tenfold.methods.gates.config import Preprocessing
from tenfold.methods.gates.graph import Graph
from tenfold.methods.gates.preprocessing import align, preprocess, smooth
from tenfold.platform.errors import DataError

DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "spatial"


def section(number=40, genes=30, seed=0, dtype=np.float32):
    draw = np.random.default_rng(seed)
    counts = draw.poisson(
        (0.3 + draw.gamma(0.5, size=genes)) * draw.gamma(4.0, size=(number, 1)), size=(number, genes)
    )
    counts[:, 0] += 1
    counts[0] += 1
    return anndata.AnnData(
        csr_matrix(counts.astype(dtype)), var=pd.DataFrame(index=[f"gene{index}" for index in range(genes)])
    )


def normalised_slowly(counts, target=1e4):
    return np.array(
        [[np.log(1 + target * value / sum(row)) for value in row] for row in counts.astype(float).tolist()]
    )


def test_the_worked_example():
    adata = anndata.AnnData(np.array([[1, 3, 0], [0, 0, 10]], dtype=np.float32))
    ready = preprocess(adata, Preprocessing())
    np.testing.assert_allclose(ready.expression.toarray(), [[7.824446, 8.922792, 0], [0, 0, 9.210440]], atol=1e-6)
    assert ready.expression.dtype == np.float32
    assert ready.genes == ["0", "1", "2"]
    assert ready.kept.tolist() == [True, True]
    assert ready.gene_choice == "all 3"
    assert ready.notes == []


@pytest.mark.parametrize(
    "form",
    [csr_matrix, csc_matrix, csr_array, np.asarray, lambda x: csr_matrix(x.astype(int)), lambda x: x.astype(np.int32)],
)
def test_any_form_of_the_counts_gives_the_same_and_is_not_changed(form):
    counts = section().X.toarray()
    adata = anndata.AnnData(form(counts))
    before = adata.copy()
    ready = preprocess(adata, Preprocessing())
    np.testing.assert_allclose(ready.expression.toarray(), normalised_slowly(counts), rtol=1e-6)
    assert isinstance(ready.expression, csr_matrix)
    assert ready.expression.has_sorted_indices
    assert type(adata.X) is type(before.X)
    assert adata.X.dtype == before.X.dtype
    assert abs(adata.X - before.X).max() == 0


def test_entries_that_are_stored_in_parts_are_added_before_the_logarithm():
    parts = csr_matrix(coo_matrix((np.ones(5), ([0, 0, 0, 1, 1], [1, 0, 1, 1, 1])), shape=(2, 2)))
    stored = csr_matrix((np.ones(5), np.array([1, 0, 1, 1, 1]), np.array([0, 3, 5])), shape=(2, 2))
    assert stored.nnz == 5
    assert parts.nnz == 3
    adata = anndata.AnnData(stored)
    ready = preprocess(adata, Preprocessing())
    np.testing.assert_allclose(ready.expression.toarray(), normalised_slowly(parts.toarray()), rtol=1e-6)
    assert adata.X.nnz == 5


def test_a_file_backed_section_and_a_view_are_read(tmp_path):
    adata = section()
    expected = preprocess(adata, Preprocessing()).expression.toarray()
    for name, matrix in (("sparse", adata.X), ("dense", adata.X.toarray())):
        path = tmp_path / f"{name}.h5ad"
        anndata.AnnData(matrix, var=adata.var).write_h5ad(path)
        backed = anndata.read_h5ad(path, backed="r")
        np.testing.assert_array_equal(preprocess(backed, Preprocessing()).expression.toarray(), expected)
        backed.file.close()
    view = adata[5:20, ::-1]
    np.testing.assert_allclose(
        preprocess(view, Preprocessing()).expression.toarray(), normalised_slowly(view.X.toarray()), rtol=1e-6
    )
    assert view.is_view


def test_a_layer_is_read_in_place_of_x():
    adata = section()
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X / 7
    ready = preprocess(adata, Preprocessing(), layer="counts")
    np.testing.assert_allclose(ready.expression.toarray(), normalised_slowly(section().X.toarray()), rtol=1e-6)


def test_a_cell_counted_twice_as_deep_has_the_same_expression():
    adata = section()
    deep = adata.copy()
    deep.X = csr_matrix(adata.X.multiply(np.arange(1, 41)[:, None])).astype(np.float32)
    np.testing.assert_allclose(
        preprocess(deep, Preprocessing()).expression.toarray(),
        preprocess(adata, Preprocessing()).expression.toarray(),
        rtol=1e-6,
    )


def test_the_total_is_that_of_all_genes_and_not_of_the_chosen_ones():
    adata = section(60, 50)
    ready = preprocess(adata, Preprocessing(num_genes=12))
    assert len(ready.genes) == 12
    full = normalised_slowly(adata.X.toarray())[:, adata.var_names.get_indexer(ready.genes)]
    np.testing.assert_allclose(ready.expression.toarray(), full, rtol=1e-6)
    assert preprocess(adata, Preprocessing(num_genes=12, target_sum=100)).expression.max() < ready.expression.max()


@pytest.mark.parametrize("flavor", ["seurat_v3", "seurat", "cell_ranger"])
def test_genes_are_those_that_scanpy_chooses(flavor):
    adata = section(120, 200, seed=3)
    adata = adata[:, np.asarray(adata.X.sum(axis=0)).ravel() > 0].copy()
    ready = preprocess(adata, Preprocessing(num_genes=40, flavor=flavor))
    expected = adata.copy()
    if flavor != "seurat_v3":
        scanpy.pp.normalize_total(expected, target_sum=1e4)
        scanpy.pp.log1p(expected)
    scanpy.pp.highly_variable_genes(expected, n_top_genes=40, flavor=flavor)
    assert ready.genes == list(expected.var_names[expected.var["highly_variable"]])
    assert ready.gene_choice == f"40 of {adata.n_vars} by {flavor}"


def test_the_whole_is_scanpys_pipeline_on_a_real_transcriptome():
    path = DATA / "mouse_olfactory_bulb.h5ad"
    if not path.is_file():
        pytest.skip("needs ../shared/data/spatial/mouse_olfactory_bulb.h5ad")
    adata = anndata.read_h5ad(path)
    ready = preprocess(adata, Preprocessing())
    scanpy.pp.highly_variable_genes(adata, flavor="seurat_v3", n_top_genes=3000)
    scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)
    expected = adata[:, adata.var["highly_variable"]]
    assert ready.genes == list(expected.var_names)
    np.testing.assert_allclose(ready.expression.toarray(), expected.X.toarray(), rtol=1e-5)


def test_genes_of_several_sections_are_chosen_in_each():
    adata = section(120, 150, seed=4)
    adata = adata[:, np.asarray((adata.X > 0).sum(axis=0)).ravel() > 12].copy()
    sections = np.arange(120) % 2
    boosted = adata.X.toarray()
    boosted[sections == 1, :40] *= 20  # as a batch effect: variable among sections, not within
    adata.X = csr_matrix(boosted)
    ready = preprocess(adata, Preprocessing(num_genes=20), sections=sections)
    adata.obs["section"] = pd.Categorical(sections.astype(str))
    scanpy.pp.highly_variable_genes(adata, flavor="seurat_v3", n_top_genes=20, batch_key="section")
    assert ready.genes == list(adata.var_names[adata.var["highly_variable"]])
    assert ready.genes != preprocess(adata, Preprocessing(num_genes=20)).genes
    alone = preprocess(adata, Preprocessing(num_genes=20), sections=np.zeros(120))
    assert alone.genes == preprocess(adata, Preprocessing(num_genes=20)).genes


def test_where_seurat_v3_cannot_be_fitted_wider_spans_and_then_seurat_are_tried(monkeypatch):
    adata = section(60, 50)
    spans = []
    own = scanpy.pp.highly_variable_genes

    def fails_up_to(limit):
        def choose(cells, **arguments):
            if arguments["flavor"] == "seurat_v3":
                spans.append(arguments["span"])
                if arguments["span"] <= limit:
                    raise ValueError(b"reciprocal condition number  2.6e-15\n")
            return own(cells, **arguments)

        return choose

    monkeypatch.setattr(scanpy.pp, "highly_variable_genes", fails_up_to(0.5))
    ready = preprocess(adata, Preprocessing(num_genes=10))
    assert spans == [0.3, 0.5, 1.0]
    assert ready.gene_choice == "10 of 50 by seurat_v3"
    assert len(ready.notes) == 2
    assert "span 0.5 cannot be fitted" in ready.notes[1]
    monkeypatch.setattr(scanpy.pp, "highly_variable_genes", fails_up_to(2.0))
    ready = preprocess(adata, Preprocessing(num_genes=10))
    monkeypatch.undo()
    assert ready.gene_choice == "10 of 50 by seurat"
    assert "by flavor seurat" in ready.notes[-1]
    assert ready.genes == preprocess(adata, Preprocessing(num_genes=10, flavor="seurat")).genes


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("sections", [None, 2])
def test_genes_of_a_handful_of_cells_are_chosen_somehow(number, sections):
    parts = None if sections is None else np.arange(number) % sections
    ready = preprocess(section(number, 60), Preprocessing(num_genes=10), sections=parts)
    assert len(ready.genes) == (10 if number > 1 else 60)
    assert ready.expression.shape == (number, len(ready.genes))


def test_cells_without_counts_or_outside_of_the_tissue_are_left_out():
    adata = section()
    dense = adata.X.toarray()
    dense[[3, 8]] = 0
    adata = anndata.AnnData(
        csr_matrix(dense), obs=pd.DataFrame({"in_tissue": [0, *[1] * 39]}, index=map(str, range(40)))
    )
    ready = preprocess(adata, Preprocessing())
    assert np.flatnonzero(~ready.kept).tolist() == [0, 3, 8]
    np.testing.assert_allclose(ready.expression.toarray(), normalised_slowly(dense[ready.kept]), rtol=1e-6)
    assert align(adata, ready.genes, Preprocessing()).kept.tolist() == ready.kept.tolist()


def test_genes_without_counts_and_rare_ones_are_dropped():
    dense = section().X.toarray()
    dense[:, 5] = 0
    dense[:, 6] = 0
    dense[:2, 6] = 4
    adata = anndata.AnnData(csr_matrix(dense))
    ready = preprocess(adata, Preprocessing())
    assert "5" not in ready.genes
    assert "6" in ready.genes
    assert ready.notes[0].endswith("genes without counts were left out")
    rare = preprocess(adata, Preprocessing(min_cells=3))
    assert "6" not in rare.genes
    assert "seen in fewer than 3 cells" in rare.notes[0]
    with pytest.raises(DataError, match="no gene is left"):
        preprocess(adata, Preprocessing(min_cells=41))


def test_large_panels_lose_rare_genes_by_default():
    draw = np.random.default_rng(0)
    dense = draw.poisson(2.0, size=(10, 3001))
    dense[:, 7] = [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    for genes, kept in ((3001, False), (3000, True)):
        ready = preprocess(anndata.AnnData(csr_matrix(dense[:, :genes])), Preprocessing(num_genes=5000))
        assert ("7" in ready.genes) == kept


def test_repeated_gene_names_are_told_apart():
    adata = section(20, 3)
    adata.var_names = ["a", "b", "a"]
    ready = preprocess(adata, Preprocessing())
    assert ready.genes == ["a", "b", "a-1"]
    aligned = align(adata, ready.genes, Preprocessing())
    assert (aligned.expression != ready.expression).nnz == 0
    assert list(adata.var_names) == ["a", "b", "a"]


def test_data_that_are_normalised_already_are_refused():
    # the official code chooses genes from them with seurat_v3, which is nonsense
    adata = section()
    adata.X = csr_matrix(normalised_slowly(adata.X.toarray()))
    for options in (Preprocessing(), Preprocessing(flavor="seurat"), Preprocessing(num_genes=10)):
        with pytest.raises(DataError, match="look log-normalised already"):
            preprocess(adata, options)
        with pytest.raises(DataError, match="look log-normalised already"):
            align(adata, ["gene1"], options)
    taken = preprocess(adata, Preprocessing(enabled=False))
    np.testing.assert_allclose(taken.expression.toarray(), adata.X.toarray(), rtol=1e-6)
    np.testing.assert_array_equal(
        align(adata, taken.genes, Preprocessing(enabled=False)).expression.toarray(), taken.expression.toarray()
    )


def test_fractional_counts_are_no_input_of_seurat_v3():
    adata = section(60, 50)
    adata.X = adata.X * 100.5
    with pytest.raises(DataError, match=r"not whole numbers.*flavor = seurat"):
        preprocess(adata, Preprocessing(num_genes=10))
    ready = preprocess(adata, Preprocessing())
    np.testing.assert_allclose(ready.expression.toarray(), normalised_slowly(adata.X.toarray()), rtol=1e-6)
    assert len(preprocess(adata, Preprocessing(num_genes=10, flavor="seurat")).genes) == 10


def test_normalised_data_have_genes_chosen_by_seurat():
    adata = section(60, 50)
    raw = preprocess(adata, Preprocessing(num_genes=10, flavor="seurat"))
    adata.X = csr_matrix(normalised_slowly(adata.X.toarray()).astype(np.float32))
    ready = preprocess(adata, Preprocessing(num_genes=10, enabled=False))
    assert ready.genes == raw.genes
    assert ready.gene_choice == "10 of 50 by seurat"
    assert "in place of seurat_v3" in ready.notes[-1]


def test_a_section_in_which_too_few_genes_vary_does_not_reach_the_regression():
    # skmisc's loess ends the process where span x genes is below 1
    counts = np.full((6, 30), 4.0)
    counts[:, 1:4] = np.arange(18).reshape(6, 3)
    ready = preprocess(anndata.AnnData(csr_matrix(counts)), Preprocessing(num_genes=10))
    assert "needs 20 genes that vary in each section; one has 3" in ready.notes[0]
    assert ready.gene_choice.endswith("by seurat")
    varied = section(6, 30)
    assert "one has 0" in preprocess(varied, Preprocessing(num_genes=10), sections=np.array([0] * 5 + [1])).notes[-2]


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_values_that_cannot_be_counts_are_refused(value):
    for form in (np.asarray, csr_matrix):
        dense = section().X.toarray()
        dense[3, 4] = value
        with pytest.raises(DataError, match="finite numbers, none below 0"):
            preprocess(anndata.AnnData(form(dense)), Preprocessing())


def test_a_section_without_counts_is_refused():
    for adata in (anndata.AnnData(csr_matrix((4, 3))), anndata.AnnData(np.zeros((0, 3)))):
        with pytest.raises(DataError, match="has counts"):
            preprocess(adata, Preprocessing())


def test_a_model_reads_its_genes_by_name_and_0_for_missing_ones():
    adata = section()
    ready = preprocess(adata, Preprocessing())
    genes = ["gene7", "absent", "gene2", "gene3"]
    aligned = align(adata, genes, Preprocessing())
    dense = ready.expression.toarray()
    np.testing.assert_array_equal(aligned.expression.toarray()[:, [0, 2, 3]], dense[:, [7, 2, 3]])
    assert (aligned.expression.toarray()[:, 1] == 0).all()
    assert aligned.expression.has_sorted_indices
    assert aligned.genes == genes
    assert aligned.notes == ["1 of the model's 4 genes are missing and count 0"]
    whole = align(adata, ready.genes, Preprocessing())
    assert (whole.expression != ready.expression).nnz == 0
    assert whole.notes == []


def test_a_section_with_less_than_half_of_the_genes_is_refused():
    assert align(section(), ["gene1", "x"], Preprocessing()).genes == ["gene1", "x"]
    with pytest.raises(DataError, match=r"1 of the model's 3 genes \(such as x, gene1, y\)"):
        align(section(), ["x", "gene1", "y"], Preprocessing())


def test_smoothing_is_the_mean_over_neighbours_and_the_cell():
    values = section(6, 4).X
    graph = Graph.from_edges([0, 0, 1, 2, 2, 2, 5], [1, 2, 0, 2, 3, 4, 0], 6)
    groups = [[0, 1, 2], [1, 0], [2, 3, 4], [3], [4], [5, 0]]
    once = np.array([values.toarray()[group].mean(axis=0) for group in groups])
    twice = np.array([once[group].mean(axis=0) for group in groups])
    np.testing.assert_allclose(smooth(values, graph, 1).toarray(), once, rtol=1e-6)
    found = smooth(values, graph, 2)
    np.testing.assert_allclose(found.toarray(), twice, rtol=1e-6)
    assert found.dtype == np.float32
    assert smooth(values, graph, 0) is values


def test_a_large_sparse_section_never_becomes_dense(monkeypatch):
    def dense(*_):
        raise AssertionError("a dense copy was made")

    adata = section(50, 40)
    monkeypatch.setattr(csr_matrix, "toarray", dense)
    monkeypatch.setattr(csr_matrix, "todense", dense)
    assert preprocess(adata, Preprocessing(num_genes=10)).expression.shape == (50, 10)
    assert preprocessing.align(adata, ["gene3"], Preprocessing()).expression.shape == (50, 1)
