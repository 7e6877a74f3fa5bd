"""The tasks of a run, called as the cluster calls them: what they leave in the run's storage."""

import anndata
import numpy as np
import pytest
from tenfold.methods.gates import pl
from tenfold.methods.gates.config import GATESConfig
from tenfold.methods.gates.fit import fit
from tenfold.methods.gates.method import GATES
from tenfold.methods.gates.pieces import RESULT, domains_piece, figures, prepare_piece
from tenfold.methods.gates.prepared_files import read_prepared
from tenfold.platform.context import PlanContext
from tenfold.platform.errors import ConfigError
from tenfold.platform.experiment import Compute
from tenfold.platform.storage import Storage

SECTION = {"path": "synthetic:120", "labels": "domain"}


@pytest.fixture(scope="module")
def item(tmp_path_factory):
    """A prepared section and a trained network where a run has them."""
    top = tmp_path_factory.mktemp("pieces")
    gates = {"sections": [SECTION], "hidden_dims": [16, 4], "epochs": 5, "tile_cells": 30, "learning_rate": 1e-2}
    gates |= {"preprocessing": {"num_genes": 50, "flavor": "seurat"}, "clustering": {"refine": "majority"}}
    made = {"gates": gates, "seed": 1, "cache": str(top / "cache"), "folder": "section"}
    prepare_piece(made)
    prepared = read_prepared(top / "cache" / "section")
    config = GATESConfig.model_validate(gates)
    fitted = fit(prepared.expression, prepared.graphs, config, 1, coordinates=prepared.coordinates)
    fitted.network.save_pretrained(top / "run" / "checkpoint")
    # 5 epochs of 4 tiles, reported every 8 steps and at the end
    log = [[8, 30.0], [16, 20.0], [20, 10.0]]
    return made | {"storage": str(top / "run"), "checkpoint": "checkpoint", "log": log, "pictures": False}


def result(item):
    return anndata.read_h5ad(Storage(item["storage"]).local_path(f"{RESULT}/result.h5ad"))


def test_losses_of_a_run_are_kept_and_drawn_at_their_epochs(item):
    domains_piece(item)
    adata = result(item)
    assert adata.uns["gates"]["loss"].tolist() == [30.0, 20.0, 10.0]
    assert adata.uns["gates"]["loss_epoch"].tolist() == [2.0, 4.0, 5.0]
    line = pl.loss(adata).axes[0].lines[0]
    assert line.get_xdata().tolist() == [2.0, 4.0, 5.0]


def test_without_pictures_there_is_no_umap_and_the_metrics_are_the_same(item):
    plain = domains_piece(item)
    assert "X_gates_umap" not in result(item).obsm
    drawn = domains_piece(item | {"pictures": True})
    adata = result(item)
    assert np.isfinite(adata.obsm["X_gates_umap"]).all()
    assert drawn == plain
    assert {"ari", "refined_ari", "silhouette", "pas"} <= set(plain)
    assert set(figures(adata, GATESConfig.model_validate(item["gates"]).sections)) == {
        "tissue",
        "neighbours",
        "umap",
        "agreement",
    }


@pytest.mark.parametrize("method", ["gates", "pca_gmm"])
def test_the_plan_refuses_zero_3_for_the_methods_that_train(method, tmp_path):
    config = GATESConfig.model_validate({"sections": [SECTION], "method": method})
    context = PlanContext(1, Compute(deepspeed="zero3"), Storage(tmp_path))
    if method == "pca_gmm":
        assert GATES().plan(config, context)
        return
    with pytest.raises(ConfigError, match="use zero0"):
        GATES().plan(config, context)
