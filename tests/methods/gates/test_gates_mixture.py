"""The multi-start tied mixture: densities by scipy, the recipe by hand, saving, and data that break EM."""

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from tenfold.methods.gates import mixture as mixtures
from tenfold.methods.gates.mixture import Mixture, bic, fit_mixture, k_means, prepare_basis
from tenfold.platform.errors import ModelError


def blobs(sizes, width=3, seed=0, distance=8.0):
    """Groups with one common, correlated covariance."""
    generator = np.random.default_rng(seed)
    shear = np.eye(width) + 0.4 * generator.normal(size=(width, width))
    centres = distance * generator.normal(size=(len(sizes), width))
    groups = np.repeat(np.arange(len(sizes)), sizes)
    return centres[groups] + generator.normal(size=(len(groups), width)) @ shear, groups


def log_densities(mixture, latent):
    """Weighted log density of each component, by scipy."""
    covariance = np.linalg.inv(mixture.precision)
    return np.column_stack(
        [
            np.log(weight) + multivariate_normal(mean, covariance).logpdf(latent)
            for weight, mean in zip(mixture.weights, mixture.means, strict=True)
        ]
    )


@pytest.fixture(scope="module")
def fitted():
    latent, groups = blobs([150, 90, 60], distance=2.0)
    basis = prepare_basis(latent, 0)
    return latent, groups, basis, *fit_mixture(basis, 3, 0)


def test_labels_and_probabilities_are_those_of_the_densities(fitted):
    latent, _, _, mixture, _, _ = fitted
    joint = log_densities(mixture, latent)
    labels, probability = mixture.predict(latent)
    assert np.array_equal(labels, joint.argmax(axis=1))
    assert np.allclose(probability, np.exp(joint.max(axis=1) - logsumexp(joint, axis=1)), atol=1e-9)
    assert labels.dtype == np.int64
    assert probability.min() < 0.9  # the groups overlap, so there is something to compare


def test_score_is_the_mean_log_likelihood(fitted):
    latent, _, _, mixture, score, _ = fitted
    assert score == pytest.approx(logsumexp(log_densities(mixture, latent), axis=1).mean(), abs=1e-8)


def test_em_has_reached_a_fixed_point(fitted):
    latent, _, _, mixture, _, notes = fitted
    joint = log_densities(mixture, latent)
    shares = np.exp(joint - logsumexp(joint, axis=1)[:, None])
    means = shares.T @ latent / shares.sum(axis=0)[:, None]
    assert np.allclose(shares.mean(axis=0), mixture.weights, atol=1e-2)
    assert np.allclose(means, mixture.means, atol=5e-2)
    assert notes == []


def test_the_likeliest_of_the_three_starts_is_kept(fitted, monkeypatch):
    _, _, basis, _, score, _ = fitted
    starts = list(mixtures._start_partitions(basis, 3, 0))
    singles = []
    for start in starts:
        monkeypatch.setattr(mixtures, "_start_partitions", lambda *_, start=start: iter([start]))
        singles.append(fit_mixture(basis, 3, 0)[1])
    assert len(singles) == 3
    assert score == pytest.approx(max(singles), abs=1e-9)


def test_starts_are_ward_of_the_transform_ward_of_the_standardised_columns_and_k_means(fitted):
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import adjusted_rand_score

    latent, _, basis, *_ = fitted
    standardised = (latent - latent.mean(axis=0)) / latent.std(axis=0, ddof=1)
    left, singular, right = np.linalg.svd(standardised, full_matrices=False)
    transform = standardised @ right.T / np.sqrt(singular)
    assert np.allclose(np.abs(basis.transformed), np.abs(transform), atol=1e-9)
    assert np.allclose(basis.transformed, left * np.sqrt(singular), atol=1e-9)
    starts = [groups for _, groups in mixtures._start_partitions(basis, 4, 0)]
    for groups, values in zip(starts, (transform, standardised), strict=False):
        ward = AgglomerativeClustering(4, linkage="ward").fit_predict(values)
        assert adjusted_rand_score(groups, ward) == pytest.approx(1)
    assert np.array_equal(starts[2], k_means(basis.transformed, 4, 0))


def test_trees_are_about_at_most_2000_cells_drawn_by_the_seed():
    latent = np.random.default_rng(0).normal(size=(2100, 2))
    rows = prepare_basis(latent, 3).rows
    drawn = np.random.default_rng(3).choice(2100, 2000, replace=False)
    assert np.array_equal(rows, np.sort(drawn))
    assert len(prepare_basis(latent[:2000], 3).rows) == 2000


def test_mixture_of_more_cells_than_the_trees_hold_labels_all_of_them():
    latent, groups = blobs([1200, 700, 300], width=2)
    mixture, _, _ = fit_mixture(prepare_basis(latent, 0), 3, 0)
    labels, _ = mixture.predict(latent)
    assert len(labels) == 2200
    assert all(len(np.unique(labels[groups == group])) == 1 for group in range(3))


def test_few_cells_are_clustered_on_their_principal_components():
    latent, _ = blobs([40, 30, 20], width=5, distance=4)  # 90 < 30 * 5
    basis = prepare_basis(latent, 0)
    assert basis.values.shape == (90, 3)
    centred = latent - latent.mean(axis=0)
    assert np.allclose((basis.values**2).sum(axis=0), np.linalg.svd(centred, compute_uv=False)[:3] ** 2)
    mixture, _, _ = fit_mixture(basis, 3, 0)
    assert mixture.means.shape == (3, 5)
    noise = np.linalg.svd(centred)[2][4]  # a direction outside of the components
    moved = mixture.predict(latent + 100 * noise)
    assert np.array_equal(moved[0], mixture.predict(latent)[0])
    assert np.allclose(moved[1], mixture.predict(latent)[1], atol=1e-6)


@pytest.mark.parametrize(("num_cells", "columns"), [(3, 2), (89, 2), (90, 3), (149, 4), (150, 5), (1, 1)])
def test_number_of_clustered_columns_follows_the_number_of_cells(num_cells, columns):
    latent = np.random.default_rng(0).normal(size=(num_cells, 5))
    assert prepare_basis(latent, 0).values.shape[1] == columns


def test_shift_of_the_embedding_does_not_change_the_domains():
    latent, _ = blobs([60, 50, 40], distance=3)
    near, far = (fit_mixture(prepare_basis(values, 0), 3, 0) for values in (latent, latent + 1e5))
    assert far[1] == pytest.approx(near[1], abs=1e-6)
    assert np.array_equal(near[0].predict(latent)[0], far[0].predict(latent + 1e5)[0])


def test_constant_column_changes_nothing():
    latent, _ = blobs([60, 50, 40], width=2, distance=3)
    wider = np.column_stack([latent, np.full(150, 1e6 / 3)])
    labels = fit_mixture(prepare_basis(latent, 0), 3, 0)[0].predict(latent)[0]
    assert np.array_equal(labels, fit_mixture(prepare_basis(wider, 0), 3, 0)[0].predict(wider)[0])


def test_embedding_without_any_variation_gives_one_group():
    latent = np.full((40, 3), 0.1)
    mixture, score, _ = fit_mixture(prepare_basis(latent, 0), 3, 0)
    assert np.isfinite(score)
    assert len(np.unique(mixture.predict(latent)[0])) == 1


@pytest.mark.parametrize("num_cells", [1, 2, 50])
def test_one_component_is_the_gaussian_of_all_cells(num_cells):
    latent = np.random.default_rng(1).normal(size=(num_cells, 2)) @ np.array([[2.0, 1.0], [0.0, 0.5]])
    mixture, score, _ = fit_mixture(prepare_basis(latent, 0), 1, 0)
    assert np.allclose(mixture.means, latent.mean(axis=0))
    labels, probability = mixture.predict(latent)
    assert np.array_equal(labels, np.zeros(num_cells))
    assert np.array_equal(probability, np.ones(num_cells))
    if num_cells == 50:
        covariance = np.cov(latent.T, bias=True) + 1e-6 * np.eye(2)
        density = multivariate_normal(latent.mean(axis=0), covariance)
        assert score == pytest.approx(density.logpdf(latent).mean(), abs=1e-9)


def test_every_cell_can_be_a_component():
    latent = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [5.0, 5.0]])
    labels, _ = fit_mixture(prepare_basis(latent, 0), 4, 0)[0].predict(latent)
    assert len(np.unique(labels)) == 4


def test_failing_em_is_tried_with_more_regularisation_and_then_given_up(monkeypatch):
    import sklearn.mixture

    tried = []

    class Failing(sklearn.mixture.GaussianMixture):
        def fit(self, values):
            tried.append(self.reg_covar)
            raise ValueError("ill-conditioned")

    monkeypatch.setattr(sklearn.mixture, "GaussianMixture", Failing)
    latent, _ = blobs([30, 30], width=2)
    mixture, score, notes = fit_mixture(prepare_basis(latent, 0), 2, 0)
    assert mixture is None
    assert score == -np.inf
    assert notes
    assert tried == [1e-6, 1e-5, 1e-4, 1e-3, 1e-2] * 3


def test_em_that_stops_at_the_limit_is_noted(monkeypatch):
    monkeypatch.setattr(mixtures, "MAX_ITERATIONS", 1)
    latent = np.random.default_rng(0).normal(size=(200, 2))
    _, _, notes = fit_mixture(prepare_basis(latent, 0), 3, 0)
    assert "had not converged after 1 iterations" in notes[0]


def test_bic_counts_means_weights_and_one_covariance():
    # K = 3, d = 2: 6 means + 2 weights + 3 entries of the covariance = 11 parameters
    assert bic(-4.5, 100, 2, 3) == pytest.approx(900 + 11 * np.log(100))


def test_saved_mixture_predicts_the_same(tmp_path, fitted):
    latent, _, _, mixture, _, _ = fitted
    named = Mixture(mixture.weights, mixture.means, mixture.precision, np.array([2, 0, 1]))
    named.save(tmp_path / "clusters.npz")
    loaded = Mixture.load(tmp_path / "clusters.npz")
    for got, expected in zip(loaded.predict(latent), named.predict(latent), strict=True):
        assert np.array_equal(got, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["clusters.npz"]


def test_labels_of_components_follow_their_order():
    mixture = Mixture(np.array([0.5, 0.5]), np.array([[0.0], [10.0]]), np.eye(1), np.array([1, 0]))
    labels, probability = mixture.predict(np.array([[0.0], [10.0], [5.0]], dtype=np.float32))
    assert labels.tolist()[:2] == [1, 0]
    assert probability[2] == pytest.approx(0.5)


def test_damaged_mixtures_are_refused(tmp_path):
    good = {"weights": np.ones(1), "means": np.zeros((1, 2)), "precision": np.eye(2), "order": np.zeros(1, np.int64)}
    bad = {
        "weights": np.ones(2),
        "means": np.zeros((1, 3)),
        "precision": np.full((2, 2), np.nan),
        "order": np.ones(1, np.int64),
    }
    for name, value in bad.items():
        np.savez(tmp_path / "bad.npz", **{**good, name: value})
        with pytest.raises(ModelError, match="do not make a mixture"):
            Mixture.load(tmp_path / "bad.npz")
    np.savez(tmp_path / "good.npz", **good)
    content = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(content[: len(content) // 2])
    np.savez(tmp_path / "pickled.npz", **{**good, "means": np.array([[None, {}]], dtype=object)})
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name in ("short.npz", "pickled.npz", "array.npy", "missing.npz"):
        with pytest.raises(ModelError, match=name):
            Mixture.load(tmp_path / name)


def test_embedding_of_another_width_is_refused(fitted):
    mixture = fitted[3]
    with pytest.raises(ModelError, match="3 columns"):
        mixture.predict(np.zeros((4, 2)))
