"""What a network gives on request: names and shapes in the AnnData, values against the network itself."""

import anndata
import numpy as np
import pytest
import torch
from tenfold.methods.gates import tl
from tenfold.methods.gates.config import GATESOptions
from tenfold.methods.gates.preparing import prepare
from tenfold.methods.gates.readout import graph_names
from tenfold.methods.gates.saved import load_model
from tenfold.methods.gates.synthetic import synthetic_section
from tenfold.platform.errors import ConfigError

FAST = {"epochs": 3, "learning_rate": 1e-2, "random_state": 3}
DROPPED = [3, 50]


def section_of(cells=160):
    adata = synthetic_section(cells, num_genes=60, num_domains=3, density=0.3)
    counts = adata.X.tolil()
    counts[DROPPED] = 0
    adata.X = counts.tocsr()
    return adata


def run(adata, *, alpha=0.3, options=None, **more):
    # 40 of 60 genes: the network reads fewer than the section has
    narrow = {"hidden_dims": [16, 4], "preprocessing": {"num_genes": 40, "flavor": "seurat"}}
    tl.gates(adata, 3, alpha=alpha, options=narrow | (options or {}), **FAST, **more)
    return adata


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readout") / "model"
    return run(section_of(), denoised=True, attention=True, save=folder), folder


def dense_pass(network, adata):
    """Attention of both graphs and the reconstruction, with dense matrices (3.6)."""
    kept = np.isfinite(adata.obsm["X_gates"]).all(axis=1)
    counts = adata.X.toarray()[kept]
    scaled = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    X = torch.from_numpy(scaled[:, adata.var_names.get_indexer(adata.uns["gates"]["genes"])]).double()
    network = network.double()
    M, found, P = X @ network.weights[0], [], 0
    for name, graph, share in (("first", "spatial", 0.7), ("second", "expression", 0.3)):
        linked = adata.obsp[f"gates_{graph}_connectivities"][kept][:, kept].toarray() + np.eye(len(X)) > 0
        a, b = (network.attention[f"{name}_{side}_0"] for side in ("receiver", "sender"))
        scores = torch.sigmoid((M @ a)[:, None] + (M @ b)[None, :])
        found.append(torch.softmax(scores.masked_fill(~torch.from_numpy(linked), -torch.inf), dim=1))
        P = P + share * found[-1]
    Z = torch.nn.functional.elu(P @ M) @ network.weights[1]
    rebuilt = torch.nn.functional.elu(P @ (Z @ network.weights[1].T)) @ network.weights[0].T
    return kept, [one.detach().numpy() for one in found], rebuilt.detach().numpy()


def test_readout_is_that_of_the_dense_formula_and_dropped_cells_have_none(read):
    adata, folder = read
    kept, attention, rebuilt = dense_pass(load_model(folder).network, adata)
    assert np.flatnonzero(~kept).tolist() == DROPPED
    denoised = adata.obsm["gates_denoised"]
    assert denoised.dtype == np.float32
    assert denoised.shape == (160, 40)
    assert np.isnan(denoised[DROPPED]).all()
    np.testing.assert_allclose(denoised[kept], np.maximum(rebuilt, 0), atol=1e-4)
    for name, expected in zip(("spatial", "expression"), attention, strict=True):
        matrix = adata.obsp[f"gates_{name}_attention"]
        assert matrix.shape == (160, 160)
        assert matrix[DROPPED].nnz == matrix[:, DROPPED].nnz == 0
        np.testing.assert_allclose(matrix[kept][:, kept].toarray(), expected, atol=1e-5)
        np.testing.assert_allclose(matrix.sum(axis=1)[kept], 1, atol=1e-6)


def test_nothing_of_it_is_written_unasked_and_the_layers_stay(read):
    plain = run(section_of())
    assert "gates_denoised" not in plain.obsm
    assert not [name for name in plain.obsp if name.endswith("attention")]
    assert not read[0].layers
    np.testing.assert_array_equal(plain.obsm["X_gates"], read[0].obsm["X_gates"])


def test_a_saved_model_gives_the_same_readout_without_training(read):
    adata, folder = read
    again = section_of()
    tl.transform(again, folder, denoised=True, attention=True, key_added="again")
    np.testing.assert_allclose(again.obsm["again_denoised"], adata.obsm["gates_denoised"], atol=1e-5)
    difference = again.obsp["again_expression_attention"] - adata.obsp["gates_expression_attention"]
    assert abs(difference).max() < 1e-5


def test_readout_survives_a_file(read, tmp_path):
    adata, _ = read
    adata.write_h5ad(tmp_path / "section.h5ad")
    again = anndata.read_h5ad(tmp_path / "section.h5ad")
    np.testing.assert_array_equal(again.obsm["gates_denoised"], adata.obsm["gates_denoised"])
    assert (again.obsp["gates_spatial_attention"] != adata.obsp["gates_spatial_attention"]).nnz == 0


def test_with_alpha_zero_there_is_the_attention_of_one_graph():
    adata = run(section_of(), alpha=0.0, attention=True)
    assert [name for name in adata.obsp if name.endswith("attention")] == ["gates_spatial_attention"]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("spatial-similarity", ("spatial", "expression")),
        ("spatial-prune", ("spatial", "pruned")),
        ("prune-similarity", ("pruned", "expression")),
    ],
)
def test_attention_is_named_after_the_graphs_of_the_mode(mode, expected):
    adata = section_of(60)
    adata.obs["half"] = np.where(np.arange(60) % 2, "a", "b")
    options = {"mode": mode, "pre_labels": "half"}
    assert graph_names(prepare(adata, GATESOptions(**options), 0)) == expected
    run(adata, options=options, attention=True)
    assert {name for name in adata.obsp if name.endswith("attention")} == {
        f"gates_{one}_attention" for one in expected
    }
    pruned = adata.obsp.get("gates_pruned_attention")
    if pruned is not None:  # only cells of one label attend to each other
        rows, columns = pruned.nonzero()
        assert (rows % 2 == columns % 2).all()


@pytest.mark.parametrize("asked", ["denoised", "attention"])
def test_a_method_without_network_is_refused_before_anything_is_done(asked):
    adata = section_of(60)
    with pytest.raises(ConfigError, match=f"{asked} = True: pca_gmm trains no network"):
        tl.gates(adata, 3, method="pca_gmm", **{asked: True})
    assert "gates" not in adata.uns
