"""SpaGCN: its weights, its normalisation, its assignment, and a section with known domains."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from tenfold.methods.gates.spagcn import normalised, sharpened, spagcn, spatial_weights, student_t
from tenfold.platform.errors import DataError
from tenfold.platform.evaluation.clustering import agreement


def hexagonal(side, pitch=100.0):
    row, column = np.divmod(np.arange(side * side), side)
    return np.column_stack([pitch * (column + 0.5 * (row % 2)), pitch * row * np.sqrt(3) / 2])


def striped_section(side=16, num_domains=3, num_genes=60, seed=0):
    """Bands of a lattice, each with genes of its own."""
    generator = np.random.default_rng(seed)
    coordinates = hexagonal(side)
    truth = (coordinates[:, 1] / (coordinates[:, 1].max() + 1) * num_domains).astype(int)
    rate = np.where(np.arange(num_genes)[None] % num_domains == truth[:, None], 3.0, 1.0)
    return csr_matrix(generator.poisson(rate).astype(np.float32)), coordinates, truth


def test_others_weigh_a_half_on_average():
    coordinates = np.random.default_rng(0).random((300, 2)) * 50
    weights = spatial_weights(coordinates, 0.5)
    assert weights.sum() / 300 - 1 == pytest.approx(0.5, abs=0.011)
    assert np.allclose(weights.diagonal(), 1)
    assert abs(weights - weights.T).max() < 1e-12


def test_weights_are_gaussian_with_one_length():
    coordinates = np.random.default_rng(0).random((80, 2)) * 50
    weights = spatial_weights(coordinates, 0.5).toarray()
    squares = ((coordinates[:, None] - coordinates[None]) ** 2).sum(axis=2)
    receiver, sender = np.nonzero((weights > 1e-3) & ~np.eye(80, dtype=bool))
    lengths = np.sqrt(-squares[receiver, sender] / (2 * np.log(weights[receiver, sender])))
    assert np.allclose(lengths, lengths[0])
    whole = np.exp(-squares / (2 * lengths[0] ** 2))
    assert np.abs(whole - weights).max() <= 1e-4


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
def test_unit_of_the_coordinates_does_not_change_the_weights(scale):
    coordinates = hexagonal(8)
    assert abs(spatial_weights(coordinates * scale, 0.5) - spatial_weights(coordinates, 0.5)).max() < 1e-9


@pytest.mark.parametrize("contribution", [0.1, 0.5, 2.0])
def test_length_on_a_lattice_solves_its_equation(contribution):
    weights = spatial_weights(hexagonal(8), contribution)
    assert weights.sum() / 64 - 1 == pytest.approx(contribution, abs=0.011)


def test_sections_have_no_weight_between_them():
    coordinates = np.tile(hexagonal(6), (2, 1))
    sections = np.repeat(["a", "b"], 36)
    weights = spatial_weights(coordinates, 0.5, sections)
    single = spatial_weights(hexagonal(6), 0.5)
    assert weights[:36, 36:].nnz == 0
    assert abs(weights[:36, :36] - single).max() < 1e-9
    assert abs(weights[36:, 36:] - single).max() < 1e-9


@pytest.mark.parametrize("coordinates", [np.zeros((1, 2)), np.zeros((5, 2)), np.array([[0.0, 0.0], [1.0, 0.0]])])
def test_few_or_coinciding_cells_have_finite_weights(coordinates):
    weights = spatial_weights(coordinates, 0.5).toarray()
    assert np.isfinite(weights).all()
    assert np.allclose(weights.diagonal(), 1)


def test_normalisation_scales_to_the_median_total_of_the_kept_genes():
    counts = np.array([[1, 3, 50, 0], [2, 2, 9, 1], [6, 2, 7, 0], [0, 0, 5, 0]])
    got = normalised(csr_matrix(counts), ["A", "B", "MT-ND1", "C"]).toarray()
    # C is seen in one cell, MT-ND1 is dropped; totals 4, 4, 8, 0: median of the cells with counts 4
    assert np.allclose(got, np.log1p([[1, 3], [2, 2], [3, 1], [0, 0]]))


def test_no_gene_left_is_refused():
    with pytest.raises(DataError, match="none of 2 genes is left"):
        normalised(csr_matrix(np.ones((4, 2))), ["ERCC-1", "MT-CO1"])


def test_assignment_is_the_students_t_of_the_definition():
    latent = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    centroids = torch.tensor([[0.5, 0.0], [2.0, 2.0]], dtype=torch.float64)
    expected = np.array([[(1 + ((z - m) ** 2).sum().item() / 0.2) ** -1.2 for m in centroids] for z in latent])
    expected /= expected.sum(axis=1, keepdims=True)
    assert np.allclose(student_t(latent, centroids), expected)


def test_target_sharpens_the_assignment_and_divides_by_the_size_of_clusters():
    assignment = torch.tensor([[0.6, 0.4], [0.9, 0.1]], dtype=torch.float64)
    expected = np.array([[0.36 / 1.5, 0.16 / 0.5], [0.81 / 1.5, 0.01 / 0.5]])
    assert np.allclose(sharpened(assignment), expected / expected.sum(axis=1, keepdims=True))


def test_domains_of_a_section_are_found():
    counts, coordinates, truth = striped_section()
    seen = []
    labels = spagcn(
        counts, [f"G{i}" for i in range(60)], coordinates, 3, 0, progress=lambda *state: seen.append(state)
    )
    assert agreement(truth, labels)["ari"] > 0.8
    assert np.array_equal(np.sort(np.bincount(labels))[::-1], np.bincount(labels))
    assert [state[:2] for state in seen] == [(epoch + 1, 200) for epoch in range(len(seen))]
    assert 0 < len(seen) < 200  # labels stop changing


def test_same_seed_gives_the_same_domains():
    counts, coordinates, _ = striped_section(side=10)
    names = [f"G{i}" for i in range(60)]
    assert np.array_equal(spagcn(counts, names, coordinates, 3, 1), spagcn(counts, names, coordinates, 3, 1))


def test_progress_can_stop_it():
    counts, coordinates, _ = striped_section(side=8)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spagcn(counts, [f"G{i}" for i in range(60)], coordinates, 2, 0, progress=stop)


def test_edges_of_the_number_of_domains():
    counts, coordinates, _ = striped_section(side=3)
    names = [f"G{i}" for i in range(60)]
    assert (spagcn(counts, names, coordinates, 1, 0) == 0).all()
    assert spagcn(counts[:1], names, coordinates[:1], 1, 0).tolist() == [0]
    assert len(spagcn(counts, names, coordinates, 9, 0)) == 9
    with pytest.raises(DataError, match="n_domains = 10: there are 9 cells"):
        spagcn(counts, names, coordinates, 10, 0)
