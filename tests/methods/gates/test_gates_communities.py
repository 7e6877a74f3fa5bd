"""Communities: the search for their number, and agreement with scanpy."""

import random

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.metrics import adjusted_rand_score
from tenfold.methods.gates.communities import _search, communities, communities_of_number, neighbour_matrix


def cliques(num_cliques, size, bridge=1.0):
    """Complete graphs in a ring, each tied by one edge to the next."""
    number = num_cliques * size
    matrix = np.kron(np.eye(num_cliques), np.ones((size, size))) - np.eye(number)
    ends = size * np.arange(num_cliques)
    matrix[ends, np.roll(ends, -1)] = matrix[np.roll(ends, -1), ends] = bridge
    return csr_matrix(matrix)


@pytest.mark.parametrize("kind", ["leiden", "louvain"])
def test_cliques_are_communities_and_resolution_decides_how_many(kind):
    matrix = cliques(12, 5)
    truth = np.repeat(np.arange(12), 5)
    assert adjusted_rand_score(truth, communities(matrix, kind, 1.0, 0)) == 1
    assert communities(matrix, kind, 0.3, 0).max() + 1 < 12
    assert communities(matrix, kind, 3.0, 0).max() + 1 >= 12


@pytest.mark.parametrize("kind", ["leiden", "louvain"])
def test_search_finds_a_resolution_for_the_number(kind):
    matrix = cliques(12, 5)
    groups, resolution = communities_of_number(matrix, kind, 4, 0)
    assert groups.max() + 1 == 4
    assert np.array_equal(groups, communities(matrix, kind, resolution, 0))


def test_search_halves_the_interval_until_the_number_is_met():
    tried = []

    def partition(resolution):
        tried.append(resolution)
        return np.arange(1 + int(resolution * 4))

    groups, resolution = _search(partition, 3)
    assert len(groups) == 3
    assert tried == pytest.approx([1.505, 0.7575, 0.38375, 0.570625])
    assert resolution == tried[-1]


def test_search_that_cannot_succeed_takes_the_nearest_count():
    tried = []

    def partition(resolution):
        tried.append(resolution)
        return np.arange(2 if resolution < 0.9 else 7)

    groups, resolution = _search(partition, 6)
    assert len(groups) == 7
    assert resolution >= 0.9
    assert len(tried) <= 30


def test_leiden_is_that_of_scanpy():
    import scanpy
    from anndata import AnnData

    generator = np.random.default_rng(0)
    values = 4 * np.eye(5)[generator.integers(0, 5, 250)] + generator.normal(size=(250, 5))
    adata = AnnData(obsm={"values": values.astype(np.float32)})
    scanpy.pp.neighbors(adata, n_neighbors=15, use_rep="values", random_state=0)
    scanpy.tl.leiden(adata, resolution=0.6, flavor="igraph", n_iterations=2, directed=False, random_state=0)
    matrix = neighbour_matrix(values, 15, 0)
    assert abs(matrix - adata.obsp["connectivities"]).max() == 0
    assert adjusted_rand_score(adata.obs["leiden"], communities(matrix, "leiden", 0.6, 0)) > 0.95


def test_communities_leave_pythons_random_numbers_alone():
    random.seed(5)
    expected = random.random()
    random.seed(5)
    communities(cliques(6, 4), "leiden", 1.0, 0)
    assert random.random() == expected


def test_same_seed_gives_the_same_communities():
    generator = np.random.default_rng(2)
    matrix = csr_matrix(np.triu(generator.random((60, 60)) < 0.1, 1).astype(float))
    matrix = matrix + matrix.T
    for kind in ("leiden", "louvain"):
        assert np.array_equal(communities(matrix, kind, 1.0, 3), communities(matrix, kind, 1.0, 3))


def test_few_cells_have_a_neighbour_graph():
    matrix = neighbour_matrix(np.array([[0.0], [1.0], [3.0]]), 15, 0)
    assert matrix.shape == (3, 3)
    assert abs(matrix - matrix.T).max() == 0


def test_more_cells_than_scanpy_searches_exactly_by_itself():
    values = np.random.default_rng(0).normal(size=(8300, 4)).astype(np.float32)
    matrix = neighbour_matrix(values, 5, 0)
    nearest = np.argsort(((values - values[17]) ** 2).sum(axis=1))[1:5]
    assert set(nearest) <= set(matrix[17].indices)
