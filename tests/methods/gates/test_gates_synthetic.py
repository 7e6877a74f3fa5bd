import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors
from tenfold.methods.gates import synthetic
from tenfold.methods.gates.checks import check_section
from tenfold.methods.gates.synthetic import synthetic_section
from threadpoolctl import threadpool_limits


def test_shape_types_and_names():
    adata = synthetic_section(50, 40, 3)
    assert adata.shape == (50, 40)
    assert adata.X.format == "csr"
    assert adata.X.dtype == np.float32
    assert adata.X.has_canonical_format
    assert adata.obsm["spatial"].shape == (50, 2)
    assert adata.obs_names.is_unique
    assert list(adata.obs["domain"].cat.categories) == ["layer1", "layer2", "layer3"]
    assert check_section(adata, n_domains=3) == []


def test_counts_are_whole_positive_numbers_of_the_wanted_density():
    adata = synthetic_section(2000, 500, density=0.2)
    assert adata.X.data.min() == 1
    assert np.all(adata.X.data == np.rint(adata.X.data))
    assert adata.X.nnz / np.prod(adata.shape) == pytest.approx(0.2, abs=0.02)


def test_counts_have_the_mean_and_variance_of_a_negative_binomial_with_dispersion_one(monkeypatch):
    mean = 1.7
    profiles = np.full((1, 3), mean, dtype=np.float32)
    counts = synthetic._counts(
        profiles, np.zeros(40_000, dtype=int), np.ones(40_000, dtype=np.float32), np.random.default_rng(0)
    ).toarray()
    # Variance m + m^2; the standard error of the mean is 0.006.
    assert counts.mean() == pytest.approx(mean, abs=0.03)
    assert counts.var() == pytest.approx(mean + mean**2, rel=0.04)
    assert (counts == 0).mean() == pytest.approx(1 / (1 + mean), abs=0.01)


def test_one_seed_is_one_section_and_another_seed_another():
    first, again, other = (synthetic_section(60, 30, 3, seed) for seed in (1, 1, 2))
    assert (first.X != again.X).nnz == 0
    np.testing.assert_array_equal(first.obsm["spatial"], again.obsm["spatial"])
    assert (first.X != other.X).nnz > 0


@pytest.mark.parametrize(("cells", "domains"), [(1, 1), (7, 7), (8, 7), (500, 7)])
def test_every_domain_has_a_cell(cells, domains):
    adata = synthetic_section(cells, 20, domains)
    assert adata.obs["domain"].value_counts().min() >= 1
    assert adata.obs["domain"].nunique() == domains


def test_domains_are_layers_so_neighbours_mostly_share_theirs():
    adata = synthetic_section(2000, 20, 7)
    domain = adata.obs["domain"].cat.codes.to_numpy()
    near = NearestNeighbors(n_neighbors=7).fit(adata.obsm["spatial"]).kneighbors(return_distance=False)
    assert (domain[near] == domain[:, None]).mean() > 0.85


def test_no_two_cells_lie_in_one_place():
    places = synthetic_section(900, 5, 2).obsm["spatial"]
    assert len(np.unique(places, axis=0)) == 900


def test_expression_alone_is_clearly_worse_than_its_average_over_neighbours():
    adata = synthetic_section(1000, 200, 4)
    truth = adata.obs["domain"].cat.codes
    dense = adata.X.toarray()
    alone = PCA(20, random_state=0).fit_transform(np.log1p(1e4 * dense / dense.sum(axis=1, keepdims=True)))
    near = NearestNeighbors(n_neighbors=9).fit(adata.obsm["spatial"]).kneighbors(return_distance=False)
    near = np.column_stack([np.arange(1000), near])
    averaged = alone[near].mean(axis=1)[near].mean(axis=1)

    def found(embedding):
        mixture = GaussianMixture(4, covariance_type="tied", random_state=0).fit_predict(embedding)
        means = KMeans(4, n_init=2, random_state=0).fit_predict(embedding)
        return max(adjusted_rand_score(truth, labels) for labels in (mixture, means))

    with threadpool_limits(1):
        assert found(alone) < 0.3
        assert found(averaged) > 0.6


def test_blocks_do_not_change_the_profile_of_a_domain(monkeypatch):
    whole = synthetic_section(400, 50, 2)
    monkeypatch.setattr(synthetic, "_BLOCK_VALUES", 50 * 7)
    blocks = synthetic_section(400, 50, 2)
    assert whole.obs["domain"].equals(blocks.obs["domain"])
    assert blocks.X.shape == (400, 50)
    assert np.asarray(blocks.X.sum()) == pytest.approx(float(whole.X.sum()), rel=0.1)
    assert np.diff(blocks.X.indptr).min() >= 0


@pytest.mark.parametrize("numbers", [(0, 5, 1), (5, 0, 1), (5, 5, 0), (5, 5, 6)])
def test_numbers_that_make_no_section_are_refused(numbers):
    with pytest.raises(ValueError, match="need 1 or more"):
        synthetic_section(*numbers)
