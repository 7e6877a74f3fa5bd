"""The whole analysis on small sections: what is written, what is refused, what a saved model gives back."""

import json

import anndata
import numpy as np
import pytest
from tenfold.methods.gates import pl, saved, tl
from tenfold.methods.gates.analysis import analyse, num_domains
from tenfold.methods.gates.config import Clustering, GATESOptions
from tenfold.methods.gates.prepared_files import read_prepared, write_prepared
from tenfold.methods.gates.preparing import prepare
from tenfold.methods.gates.synthetic import synthetic_section
from tenfold.platform.errors import ConfigError, DataError, ModelError

SMALL = {"hidden_dims": [16, 4]}
FAST = {"epochs": 3, "learning_rate": 1e-2, "options": SMALL}


@pytest.fixture
def section():
    return synthetic_section(160, num_genes=60, num_domains=3, density=0.3)


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    adata = synthetic_section(160, num_genes=60, num_domains=3, density=0.3)
    folder = tmp_path_factory.mktemp("gates") / "model"
    tl.gates(adata, 3, labels="domain", refine="majority", save=folder, **FAST)
    tl.umap(adata)
    return adata, folder


def test_results_have_the_names_that_scanpy_users_expect_and_x_stays(section):
    before = section.X.copy()
    assert tl.gates(section, 3, **FAST) is None
    assert abs(section.X - before).nnz == 0
    assert section.obsm["X_gates"].shape == (160, 4)
    assert section.obsm["X_gates"].dtype == np.float32
    assert list(section.obs["gates_domain"].cat.categories) == ["0", "1", "2"]
    sizes = section.obs["gates_domain"].value_counts().loc[["0", "1", "2"]].tolist()
    assert sizes == sorted(sizes, reverse=True)
    assert section.obs["gates_domain_prob"].between(0, 1).all()
    assert section.obsp["gates_spatial_connectivities"].shape == (160, 160)
    assert (np.diff(section.obsp["gates_expression_connectivities"].indptr) == 6).all()


def test_results_survive_a_file(analysed, tmp_path):
    adata, _ = analysed
    adata.write_h5ad(tmp_path / "section.h5ad")
    again = anndata.read_h5ad(tmp_path / "section.h5ad")
    assert again.uns["gates"]["params"]["epochs"] == 3
    assert len(again.uns["gates"]["loss"]) == 3
    assert again.uns["gates"]["loss_epoch"].tolist() == [1, 2, 3]
    assert list(again.uns["gates"]["genes"]) == list(adata.uns["gates"]["genes"])
    np.testing.assert_array_equal(again.obsm["X_gates"], adata.obsm["X_gates"])


def test_labels_give_agreement_and_number_but_are_not_learned_from(section):
    tl.gates(section, labels="domain", **FAST)
    assert {"ari", "nmi", "pas", "chaos"} <= set(section.uns["gates"]["metrics"])
    assert section.obs["gates_domain"].nunique() == 3
    other = section.copy()
    other.obs["domain"] = np.random.default_rng(0).permutation(other.obs["domain"].to_numpy())
    tl.gates(other, labels="domain", **FAST)
    np.testing.assert_array_equal(other.obsm["X_gates"], section.obsm["X_gates"])


def test_the_number_of_domains_comes_from_the_option_then_the_labels_then_the_data():
    labels = np.array(["a", "b", None, float("nan"), "b"], dtype=object)
    assert num_domains(Clustering(n_domains=5), labels) == 5
    assert num_domains(Clustering(), labels) == 2
    assert num_domains(Clustering(), None) == "auto"
    assert num_domains(Clustering(), np.array([None, None], dtype=object)) == "auto"


def test_a_copy_leaves_the_original_alone_and_a_view_is_taken(section):
    changed = tl.gates(section, 3, copy=True, **FAST)
    assert "gates_domain" in changed.obs
    assert "gates_domain" not in section.obs
    view = section[section.obs["domain"] != "layer1"]
    tl.gates(view, 2, **FAST)
    assert view.obs["gates_domain"].notna().all()
    assert "gates_domain" not in section.obs


def test_cells_without_counts_get_no_domain_and_keep_their_place(section):
    counts = section.X.tolil()
    counts[[3, 50]] = 0
    section.X = counts.tocsr()
    tl.gates(section, 3, **FAST)
    missing = section.obs["gates_domain"].isna().to_numpy()
    assert np.flatnonzero(missing).tolist() == [3, 50]
    assert np.isnan(section.obsm["X_gates"][3]).all()
    assert section.obsp["gates_spatial_connectivities"][3].nnz == 0


def test_the_same_seed_gives_the_same_result_and_another_one_does_not(section):
    first, second, third = (tl.gates(section, 3, random_state=seed, copy=True, **FAST) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.obsm["X_gates"], second.obsm["X_gates"])
    assert not np.allclose(first.obsm["X_gates"], third.obsm["X_gates"])


def test_training_here_leaves_the_callers_random_numbers_alone(section):
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    tl.gates(section, 3, **FAST)
    assert np.random.random() == expected


@pytest.mark.parametrize("method", ["stagate", "stagate_pyg", "pca_gmm", "pca_leiden", "spatial_pca", "spagcn"])
def test_every_competitor_writes_the_same_keys(section, method):
    options = FAST if "stagate" in method else {"options": {"num_components": 8}}
    tl.gates(section, 3, method=method, **options)
    assert section.obs["gates_domain"].nunique() == 3
    assert ("X_gates" in section.obsm) == (method != "spagcn")


def test_precomputed_results_are_measured_by_the_same_table(section):
    section.obs["mine"] = section.obs["domain"].astype(str)
    tl.gates(section, labels="domain", method="precomputed", options={"precomputed_key": "mine"})
    assert section.uns["gates"]["metrics"]["ari"] == 1.0


@pytest.mark.parametrize(
    ("mode", "first_is_spatial", "second_is_expression"),
    [("spatial-similarity", True, True), ("spatial-prune", True, False), ("prune-similarity", False, True)],
)
def test_a_mode_decides_which_graphs_are_fused(section, mode, first_is_spatial, second_is_expression):
    section.obs["half"] = np.where(section.obsm["spatial"][:, 0] > np.median(section.obsm["spatial"][:, 0]), "r", "l")
    config = GATESOptions(mode=mode, pre_labels="half")
    ready = prepare(section, config, 0)
    assert (ready.graphs[0] is ready.neighbours) == first_is_spatial
    assert (np.diff(ready.graphs[1].offsets) == 6).all() == second_is_expression


def test_alpha_zero_builds_no_second_graph_and_has_no_parameters_for_it(section):
    config = GATESOptions(alpha=0.0, epochs=1, hidden_dims=[16, 4])
    ready = prepare(section, config, 0)
    assert ready.graphs[1] is None
    found = analyse(section, ready, config, 0)
    assert not [name for name, _ in found.fitted.network.named_parameters() if "second" in name]


def test_a_saved_model_gives_the_same_section_the_same_domains(analysed):
    adata, folder = analysed
    again = synthetic_section(160, num_genes=60, num_domains=3, density=0.3)
    tl.transform(again, folder)
    np.testing.assert_allclose(again.obsm["X_gates"], adata.obsm["X_gates"], atol=1e-5)
    assert again.obs["gates_domain"].tolist() == adata.obs["gates_domain"].tolist()


def test_genes_are_matched_by_name_in_another_section(analysed):
    _, folder = analysed
    other = synthetic_section(160, num_genes=60, num_domains=3, density=0.3)
    shuffled = other[:, np.random.default_rng(0).permutation(60)].copy()
    tl.transform(other, folder)
    tl.transform(shuffled, folder)
    np.testing.assert_allclose(shuffled.obsm["X_gates"], other.obsm["X_gates"], atol=1e-5)
    few = other[:, :20].copy()
    with pytest.raises(DataError, match="genes"):
        tl.transform(few, folder)


def test_a_model_folder_holds_nothing_pickled_and_a_damaged_one_is_refused(analysed, tmp_path):
    _, folder = analysed
    assert {path.name for path in folder.iterdir()} == set(saved.FILES)
    with np.load(folder / saved.MIXTURE, allow_pickle=False) as stored:
        assert all(stored[name].dtype != object for name in stored)
    with pytest.raises(ModelError, match="missing"):
        saved.load_model(tmp_path)
    for name in saved.FILES:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="spatial encoder"):
        saved.load_model(tmp_path)


def test_a_method_without_network_has_no_model_to_save(section, tmp_path):
    with pytest.raises(ModelError, match="trains no network"):
        tl.gates(section, 3, method="pca_gmm", options={"num_components": 5}, save=tmp_path / "model")


def test_what_progress_raises_stops_the_training(section):
    class Stop(Exception):
        pass

    seen = []

    def progress(epoch, epochs, loss):
        seen.append((epoch, epochs))
        assert np.isfinite(loss)
        if epoch == 2:
            raise Stop

    with pytest.raises(Stop):
        tl.gates(section, 3, progress=progress, epochs=5, options=SMALL)
    assert seen == [(1, 5), (2, 5)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"options": {"epoch": 3}}, "epochs"),
        ({"alpha": 2.0}, "alpha"),
        ({"n_domains": 0}, "n_domains"),
        ({"method": "stagate", "alpha": 0.1}, "one graph"),
        ({"radius": -1.0}, "positive"),
    ],
)
def test_a_wrong_option_is_named_before_anything_is_done(section, arguments, words):
    with pytest.raises(ConfigError, match=words):
        tl.gates(section, **arguments)
    assert "gates" not in section.uns


def test_more_domains_than_cells_and_unknown_columns_are_refused(section):
    with pytest.raises(DataError, match="n_domains = 500"):
        tl.gates(section, 500, **FAST)
    with pytest.raises(DataError, match="no such column"):
        tl.gates(section, 3, sample_key="slide", **FAST)


def test_a_prepared_section_comes_back_from_its_folder_as_it_was(section, tmp_path):
    ready = prepare(section, GATESOptions(), 0, sections=np.repeat(["a", "b"], 80))
    write_prepared(tmp_path, ready)
    again = read_prepared(tmp_path)
    assert (again.expression != ready.expression).nnz == 0
    assert again.genes == ready.genes
    np.testing.assert_array_equal(again.sections, ready.sections)
    for ours, theirs in zip(ready.graphs, again.graphs, strict=True):
        np.testing.assert_array_equal(ours.senders, theirs.senders)
    assert again.notes == ready.notes
    assert json.dumps(again.statistics) == json.dumps(ready.statistics)


def test_no_edge_in_space_crosses_sections(section):
    sections = np.repeat(["a", "b"], 80)
    ready = prepare(section, GATESOptions(), 0, sections=sections)
    assert (sections[ready.neighbours.receivers] == sections[ready.neighbours.senders]).all()


def test_pictures_are_drawn_and_an_unknown_colour_names_the_nearest(analysed):
    adata, _ = analysed
    assert len(pl.spatial(adata, ["domain", "gates_domain", "gene3"]).axes) == 4  # a colour bar for the gene
    assert pl.umap(adata).axes[0].collections
    assert pl.loss(adata).axes[0].lines[0].get_xdata().tolist() == [1, 2, 3]
    assert pl.agreement(adata, "domain").axes[0].images
    assert len(pl.neighbours(adata).axes) == 2
    with pytest.raises(DataError, match="gates_domain"):
        pl.spatial(adata, "gates_domian")


def test_scanpy_draws_the_domains_in_our_colours(analysed):
    adata, _ = analysed
    pl.set_colours(adata)
    assert adata.uns["gates_domain_colors"].tolist() == list(pl.PALETTE[:3])
