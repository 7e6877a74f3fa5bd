"""The trained network, at the settings of the published scripts, agrees with the known layers as measured (7.2)."""

from pathlib import Path

import anndata
import pytest
import torch
from tenfold.methods.gates import tl

BRAINS = Path(__file__).parents[4] / "shared" / "data" / "spatial" / "starmap_mpfc_3samples.h5ad"
SEED = 1  # of three that were measured (also 2 and 2024), all above the floors; 2024 is close to that of BZ9: 0.417

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BRAINS.is_file(), reason="needs the STARmap sections beside the repository"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# floors of 7.2, and at least 0.1 above principal components without space; measured here: 0.69, 0.59, 0.72
@pytest.mark.parametrize(("sample", "floor"), [("BZ5", 0.55), ("BZ9", 0.40), ("BZ14", 0.45)])
def test_agreement_with_the_layers_of_the_cortex_is_that_of_the_method(sample, floor):
    adata = anndata.read_h5ad(BRAINS)
    adata = adata[adata.obs["sample"] == sample].copy()
    tl.gates(adata, labels="domain", k=7, random_state=SEED)
    trained = adata.uns["gates"]
    assert (trained["params"]["epochs"], trained["params"]["learning_rate"], trained["params"]["alpha"]) == (
        500,
        1e-4,
        0.01,
    )
    assert trained["loss"][-1] < 0.75 * trained["loss"][0]  # 9.1, 10
    assert trained["metrics"]["num_domains"] == 4
    assert trained["metrics"]["ari"] >= floor
    tl.gates(adata, labels="domain", method="pca_gmm", random_state=SEED, key_added="pca")
    assert trained["metrics"]["ari"] >= adata.uns["pca"]["metrics"]["ari"] + 0.1
