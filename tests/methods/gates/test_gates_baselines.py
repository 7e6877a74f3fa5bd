"""Principal components against a dense SVD, averaging by loops, and the reference numbers on real sections."""

from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix, random_array
from scipy.spatial import cKDTree
from tenfold.methods.gates.baselines import pca_embedding, spatial_pca_embedding
from tenfold.methods.gates.domains import tied_mixture
from tenfold.methods.gates.graph import Graph
from tenfold.methods.gates.refinement import majority
from tenfold.methods.gates.spatial_metrics import pas
from tenfold.platform.evaluation.clustering import agreement

SPATIAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "spatial"


def expression(num_cells, num_genes, seed=0):
    generator = np.random.default_rng(seed)
    return csr_matrix(random_array((num_cells, num_genes), density=0.3, rng=generator), dtype=np.float32)


@pytest.mark.parametrize(("num_genes", "count"), [(40, 10), (1200, 10), (8, 7), (1, 1)])
def test_components_are_those_of_a_dense_svd(num_genes, count):
    matrix = expression(60, num_genes)
    dense = matrix.toarray().astype(np.float64)
    left, singular, _ = np.linalg.svd(dense - dense.mean(axis=0), full_matrices=False)
    got = pca_embedding(matrix, 10, 0)
    assert got.dtype == np.float32
    assert got.shape == (60, count)
    assert np.allclose(np.abs(got), np.abs(left * singular)[:, :count], atol=1e-4)


def test_components_are_fewer_than_cells():
    assert pca_embedding(expression(5, 20), 30, 0).shape == (5, 4)
    assert pca_embedding(expression(2, 20), 30, 0).shape == (2, 1)
    assert np.array_equal(pca_embedding(expression(1, 20), 30, 0), np.zeros((1, 1)))


def test_same_seed_gives_the_same_components():
    matrix = expression(60, 1200)
    assert np.array_equal(pca_embedding(matrix, 10, 3), pca_embedding(matrix, 10, 3))


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_averages_are_over_the_neighbours_and_the_cell_itself(rounds):
    matrix = expression(6, 20)
    graph = Graph.from_edges(np.array([0, 1, 1, 2, 4]), np.array([1, 0, 2, 1, 0]), 6)
    values = pca_embedding(matrix, 30, 0).astype(np.float64)
    senders = [[0, 1], [0, 1, 2], [1, 2], [3], [0, 4], [5]]
    for _ in range(rounds):
        values = np.stack([values[own].mean(axis=0) for own in senders])
    assert np.allclose(spatial_pca_embedding(matrix, graph, 30, 0, rounds=rounds), values, atol=1e-5)
    looped = graph.with_self_loops()
    assert np.allclose(spatial_pca_embedding(matrix, looped, 30, 0, rounds=rounds), values, atol=1e-5)


def real_section(name):
    """Normalised expression of all genes, the radius graph, coordinates and true domains of a published section."""
    import anndata

    file = SPATIAL / name.split(":")[0]
    if not file.is_file():
        pytest.skip(f"needs ../shared/data/spatial/{file.name}")
    adata = anndata.read_h5ad(file)
    if ":" in name:
        adata = adata[adata.obs["sample"] == name.split(":")[1]]
    matrix = csr_matrix(adata.X, dtype=np.float64)
    matrix = csr_matrix(matrix.multiply(1e4 / np.maximum(matrix.sum(axis=1), 1))).log1p().astype(np.float32)
    coordinates = np.asarray(adata.obsm["spatial"], dtype=np.float64)
    tree = cKDTree(coordinates)
    pairs = tree.query_pairs(1.1 * np.median(tree.query(coordinates, k=7)[0][:, -1]), output_type="ndarray")
    graph = Graph.from_edges(pairs.T.ravel(), pairs[:, ::-1].T.ravel(), len(coordinates))
    return matrix, graph, coordinates, np.asarray(adata.obs["domain"], dtype=object)


# Measured with seed 0 (shared/data/spatial/README.md): number of domains, voters of the refinement; ARI of PCA, of
# spatial PCA, of its refined labels; PAS of both. BZ5's spatial value belongs to this seed: EM ends in another local
# optimum from each start by k-means, and seeds 0 to 7 give 0.38 to 0.85.
REFERENCE = {
    "starmap_mpfc_3samples.h5ad:BZ5": (4, 20, 0.311, 0.847, 0.861, 0.357, 0.024),
    "starmap_mpfc_3samples.h5ad:BZ9": (4, 20, 0.233, 0.694, 0.710, 0.309, 0.037),
    "starmap_mpfc_3samples.h5ad:BZ14": (4, 20, 0.166, 0.833, 0.845, 0.360, 0.017),
    "dlpfc_151510_svg500.h5ad": (7, 50, 0.370, 0.463, 0.464, 0.222, 0.027),
    "osmfish_sscortex.h5ad": (11, 50, 0.062, 0.587, 0.645, 0.893, 0.055),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_real_sections_give_the_reference_numbers(name):
    number, voters, *expected = REFERENCE[name]
    matrix, graph, coordinates, truth = real_section(name)
    plain = tied_mixture(pca_embedding(matrix, 30, 0), number, 0).labels
    spatial = tied_mixture(spatial_pca_embedding(matrix, graph, 30, 0), number, 0).labels
    refined = majority(spatial, coordinates, voters)
    got = [agreement(truth, labels)["ari"] for labels in (plain, spatial, refined)]
    got += [pas(plain, coordinates), pas(spatial, coordinates)]
    assert got == pytest.approx(expected, abs=0.02)
