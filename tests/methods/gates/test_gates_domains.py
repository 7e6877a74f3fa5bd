"""Domains of embeddings: numbering, kinds, choosing their number, and what is refused."""

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score
from tenfold.methods.gates import domains as domains_module
from tenfold.methods.gates.config import Clustering
from tenfold.methods.gates.domains import (
    Mixture,
    best_number,
    correlation_with_neighbours,
    find_domains,
    relabel,
    tied_mixture,
)
from tenfold.methods.gates.graph import Graph
from tenfold.methods.gates.mixture import fit_mixture, prepare_basis
from tenfold.platform.errors import DataError


def blobs(sizes, width=3, seed=0, distance=10.0):
    generator = np.random.default_rng(seed)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    generator.shuffle(groups)
    centres = distance * np.eye(len(sizes), width)
    return (centres[groups] + generator.normal(size=(len(groups), width))).astype(np.float32), groups


def test_groups_are_numbered_by_size_and_then_by_their_first_cell():
    labels, order = relabel(np.array([3, 1, 1, 0, 3, 1, 0]), 5)
    assert labels.tolist() == [1, 0, 0, 2, 1, 0, 2]
    assert order.tolist() == [2, 0, 4 - 1, 1, 4]


@pytest.mark.parametrize("kind", ["gmm", "kmeans", "leiden", "louvain"])
def test_every_kind_finds_separate_groups(kind):
    latent, groups = blobs([60, 50, 40])
    found = find_domains(latent, Clustering(kind=kind), 3, 0)
    assert adjusted_rand_score(groups, found.labels) == 1
    assert found.num_domains == 3
    assert found.labels.dtype == np.int64
    assert np.bincount(found.labels).tolist() == [60, 50, 40]
    assert (found.mixture is not None) == (kind == "gmm")
    assert found.probability.shape == (150,)
    assert kind == "gmm" or (found.probability == 1).all()


def test_the_mixture_labels_new_cells_as_it_labels_those_it_was_fitted_to(tmp_path):
    latent, _ = blobs([70, 60, 50], distance=3)
    found = tied_mixture(latent, 3, 0)
    found.mixture.save(tmp_path / "clusters.npz")
    labels, probability = Mixture.load(tmp_path / "clusters.npz").predict(latent)
    assert np.array_equal(labels, found.labels)
    assert np.array_equal(probability, found.probability)


def test_same_seed_gives_the_same_domains():
    latent, _ = blobs([70, 60, 50], distance=2)
    first, second = (tied_mixture(latent, 4, 7) for _ in range(2))
    assert np.array_equal(first.labels, second.labels)
    assert np.array_equal(first.probability, second.probability)


def test_order_of_the_cells_does_not_matter_below_the_limit_of_the_trees():
    latent, _ = blobs([70, 60, 50], distance=5)
    order = np.random.default_rng(1).permutation(len(latent))
    assert adjusted_rand_score(tied_mixture(latent[order], 3, 0).labels, tied_mixture(latent, 3, 0).labels[order]) == 1


@pytest.mark.parametrize("kind", ["gmm", "kmeans", "leiden", "louvain"])
def test_one_domain_holds_all_cells(kind):
    latent, _ = blobs([20, 20])
    assert (find_domains(latent, Clustering(kind=kind), 1, 0).labels == 0).all()


@pytest.mark.parametrize("kind", ["gmm", "kmeans", "leiden", "louvain"])
@pytest.mark.parametrize("n_domains", [1, "auto"])
def test_a_single_cell_is_a_domain(kind, n_domains):
    found = find_domains(np.ones((1, 3)), Clustering(kind=kind), n_domains, 0)
    assert found.labels.tolist() == [0]


@pytest.mark.parametrize("kind", ["gmm", "kmeans", "leiden", "louvain"])
@pytest.mark.parametrize("num_cells", [2, 3])
def test_every_cell_can_be_a_domain(kind, num_cells):
    latent = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 7.0]])[:num_cells]
    found = find_domains(latent, Clustering(kind=kind), num_cells, 0)
    assert found.labels.tolist() == list(range(num_cells))


@pytest.mark.parametrize("kind", ["gmm", "kmeans", "leiden", "louvain"])
def test_more_domains_than_cells_are_refused(kind):
    with pytest.raises(DataError, match=r"n_domains = 5: there are 4 cells; give 1 to 4"):
        find_domains(np.arange(8.0).reshape(4, 2), Clustering(kind=kind), 5, 0)


@pytest.mark.parametrize("kind", ["gmm", "kmeans"])
def test_cells_that_are_alike_make_fewer_domains_with_a_note(kind):
    latent = np.repeat([[0.0, 1.0], [5.0, 2.0]], 30, axis=0)
    found = find_domains(latent, Clustering(kind=kind), 4, 0)
    assert found.num_domains == 2
    assert found.labels.max() == 1
    assert any("2 domains were found, 4 were asked for" in note for note in found.notes)


def test_cells_that_are_not_finite_are_named():
    latent, _ = blobs([20, 20])
    latent[7, 1] = np.nan
    with pytest.raises(DataError, match=r"1 cells is not finite \(first: cell 7\)"):
        find_domains(latent, Clustering(), 2, 0)


def test_an_empty_embedding_is_refused():
    with pytest.raises(DataError, match="at least one cell"):
        find_domains(np.zeros((0, 3)), Clustering(), 1, 0)


def test_failing_em_leaves_k_means_groups(monkeypatch):
    monkeypatch.setattr(domains_module, "fit_mixture", lambda *_: (None, -np.inf, ["EM failed"]))
    latent, groups = blobs([60, 50, 40])
    found = tied_mixture(latent, 3, 0)
    assert adjusted_rand_score(groups, found.labels) == 1
    assert found.mixture is None
    assert found.notes[0] == "EM failed"
    assert "k-means" in found.notes[1]


def test_number_of_domains_is_the_one_with_the_least_bic():
    latent, groups = blobs([30, 25, 20, 15], width=3, distance=8)
    latent[groups == 3] += 9
    assert best_number(latent, 0, high=8) == 4
    assert best_number(latent, 0, low=5, high=6) == 5
    found = find_domains(latent, Clustering(), "auto", 0)
    assert found.num_domains == 4
    assert "4 domains have the least BIC" in found.notes


def test_bic_of_scikit_learn_chooses_the_same():
    from sklearn.mixture import GaussianMixture
    from threadpoolctl import threadpool_limits

    latent, _ = blobs([120, 100, 80], width=2, distance=4)
    with threadpool_limits(limits=1):
        fits = [
            GaussianMixture(number, covariance_type="tied", tol=1e-5, n_init=3, random_state=0).fit(latent)
            for number in range(2, 6)
        ]
    values = {fitted.n_components: fitted.bic(latent) for fitted in fits}
    assert best_number(latent, 0, high=5) == min(values, key=values.get)


def test_number_of_domains_leaves_ten_cells_to_each():
    latent = np.arange(60.0).reshape(30, 2) ** 2
    assert best_number(latent, 0) <= 3
    assert best_number(latent[:2], 0) == 2
    assert best_number(latent[:1], 0) == 1


def test_number_of_domains_of_many_cells_is_chosen_on_a_sample(monkeypatch):
    monkeypatch.setattr(domains_module, "BIC_CELLS", 80)
    latent, _ = blobs([300, 200, 100])
    seen = []
    prepare = domains_module.prepare_basis
    monkeypatch.setattr(
        domains_module, "prepare_basis", lambda values, seed: seen.append(len(values)) or prepare(values, seed)
    )
    found = find_domains(latent, Clustering(), "auto", 0)
    assert seen == [80, 600]
    assert found.num_domains == 3
    assert "80 cells drawn" in found.notes[0]


def test_a_given_resolution_is_used_as_it_is():
    latent, _ = blobs([60, 50, 40], distance=4)
    few, many = (
        find_domains(latent, Clustering(kind="leiden", resolution=resolution), 3, 0).num_domains
        for resolution in (0.01, 3.0)
    )
    assert few < 3 < many


def smoothed_stripes(rounds, side=24, width=4, num_stripes=3):
    """A lattice in stripes, each with its own mean, averaged over the four neighbours; and who is whose neighbour."""
    cells = np.arange(side * side).reshape(side, side)
    pairs = [(cells[1:].ravel(), cells[:-1].ravel()), (cells[:, 1:].ravel(), cells[:, :-1].ravel())]
    one, other = (np.concatenate(part) for part in zip(*pairs, strict=True))
    graph = Graph.from_edges(np.concatenate([one, other]), np.concatenate([other, one]), side * side)
    truth = np.arange(side * side) * num_stripes // (side * side)
    latent = 2.0 * np.eye(num_stripes, width)[truth] + np.random.default_rng(0).normal(size=(side * side, width))
    matrix = graph.with_self_loops().to_matrix()
    for _ in range(rounds):
        latent = matrix @ latent / matrix.sum(axis=1)
    return np.asarray(latent), truth, graph


def test_cells_that_resemble_their_neighbours_count_as_fewer_when_domains_are_counted():
    latent, truth, graph = smoothed_stripes(rounds=2)
    assert best_number(latent, 0, high=8) > 3  # as if they were independent
    assert best_number(latent, 0, graph, high=8) == 3
    found = find_domains(latent, Clustering(), "auto", 0, graph)
    assert adjusted_rand_score(truth, found.labels) > 0.9


def test_independent_cells_have_the_number_of_domains_of_the_plain_bic():
    latent, _, graph = smoothed_stripes(rounds=0)
    mixture, _, _ = fit_mixture(prepare_basis(latent, 0), 6, 0)
    assert correlation_with_neighbours(latent, mixture, graph) < 0.2
    assert best_number(latent, 0, graph, high=6) == best_number(latent, 0, high=6) == 3


def test_correlation_with_neighbours_is_that_of_the_whitened_residuals_pair_by_pair():
    latent, _, graph = smoothed_stripes(rounds=1, side=12)
    mixture, _, _ = fit_mixture(prepare_basis(latent, 0), 3, 0)
    labels, _ = mixture.predict(latent)
    root = np.linalg.cholesky(mixture.precision)
    white = np.array([(latent[cell] - mixture.means[label]) @ root for cell, label in enumerate(labels)])
    shared = sum(white[i] @ white[j] for i, j in zip(graph.receivers, graph.senders, strict=True))
    expected = shared / sum(row @ row for row in white)
    assert correlation_with_neighbours(latent, mixture, graph) == pytest.approx(expected, rel=1e-6)
    assert expected > 0.5  # smoothing made them alike
    # neighbours that differ more than any two cells do not make cells count as more
    opposite = latent * np.where(np.arange(144) // 12 % 2 != np.arange(144) % 2, 1, -1)[:, None]
    single, _, _ = fit_mixture(prepare_basis(opposite, 0), 1, 0)
    assert correlation_with_neighbours(opposite, single, graph) == 0


def test_a_sample_of_the_cells_has_fewer_neighbours_among_them(monkeypatch):
    latent, _, graph = smoothed_stripes(rounds=2)
    monkeypatch.setattr(domains_module, "BIC_CELLS", 144)
    given = []
    plain = domains_module.bic
    monkeypatch.setattr(
        domains_module, "bic", lambda score, cells, *more: given.append(cells) or plain(score, cells, *more)
    )
    monkeypatch.setattr(domains_module, "correlation_with_neighbours", lambda *_: 4.0)
    best_number(latent, 0, graph, high=4)
    assert given == [pytest.approx(144 / (1 + 4.0 * 144 / 576))] * 3
