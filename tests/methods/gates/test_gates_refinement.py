"""Neighbours, refinement, PAS and CHAOS: worked numbers, definitions by brute force, sections, coinciding cells."""

import numpy as np
import pytest
from tenfold.methods.gates.config import Clustering
from tenfold.methods.gates.nearest import by_section, nearest_others
from tenfold.methods.gates.refinement import automatic_neighbours, majority, refine, spagcn_rule
from tenfold.methods.gates.spatial_metrics import chaos, pas

LINE = np.array([0, 1, 2, 3.1, 4.3, 5.6, 7])
LABELS = np.array([0, 0, 1, 0, 1, 1, 1])


@pytest.fixture
def tissue():
    generator = np.random.default_rng(0)
    coordinates = generator.random((120, 2))
    labels = (3 * coordinates[:, 0]).astype(int)
    labels[generator.choice(120, 30, replace=False)] = generator.integers(0, 3, 30)
    return labels, coordinates


def others_by_distance(coordinates, cell):
    distances = np.linalg.norm(coordinates - coordinates[cell], axis=1)
    order = np.argsort(distances, kind="stable")
    return order[order != cell]


def majority_by_loops(labels, coordinates, count):
    refined = []
    for cell in range(len(labels)):
        around = [labels[other] for other in others_by_distance(coordinates, cell)[:count]]
        votes = {label: around.count(label) for label in around}
        refined.append(next(label for label in around if votes[label] == max(votes.values())))
    return refined


def spagcn_by_loops(labels, coordinates, count):
    refined = []
    for cell in range(len(labels)):
        voters = [labels[cell], *(labels[other] for other in others_by_distance(coordinates, cell)[:count])]
        most = max(set(voters), key=voters.count)
        change = voters.count(labels[cell]) < count / 2 and voters.count(most) > count / 2
        refined.append(most if change else labels[cell])
    return refined


def options(refine="majority", neighbours="auto"):
    return Clustering(refine=refine, refine_neighbours=neighbours)


def test_worked_example_of_the_majority():
    assert majority(LABELS, LINE, 3).tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_worked_example_of_pas():
    assert pas(LABELS, LINE, num_neighbours=3, threshold=2) == pytest.approx(2 / 7)


def test_worked_example_of_chaos():
    assert LINE.std() == pytest.approx(2.326511, abs=1e-6)
    assert chaos(LABELS, LINE) == pytest.approx(0.638602, abs=1e-6)


@pytest.mark.parametrize("count", [1, 4, 6, 7, 50])
def test_rules_are_those_of_loops_over_the_cells(tissue, count):
    assert majority(*tissue, count).tolist() == majority_by_loops(*tissue, count)
    assert spagcn_rule(*tissue, count).tolist() == spagcn_by_loops(*tissue, count)


def test_rules_differ_and_change_something(tissue):
    results = [tissue[0], majority(*tissue, 6), spagcn_rule(*tissue, 6)]
    assert all((results[i] != results[j]).any() for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("rule", ["majority", "spagcn"])
def test_constant_labelling_is_unchanged(tissue, rule):
    labels = np.full(120, 4)
    assert np.array_equal(refine(labels, tissue[1], options(rule)), labels)


def test_spagcn_rule_keeps_a_cell_with_enough_of_its_own():
    coordinates = np.array([0, 1.0, -1.1, 1.2, -1.3])  # the first cell and its four nearest
    lonely, supported = np.array([0, 1, 1, 1, 0]), np.array([0, 1, 1, 2, 2])
    assert spagcn_rule(np.array([0, 1, 1, 1, 2]), coordinates, 4)[0] == 1
    assert spagcn_rule(lonely, coordinates, 4)[0] == 0  # 2 of 5 is not fewer than 4 / 2
    assert spagcn_rule(supported, coordinates, 4)[0] == 0  # no label has more than 4 / 2


def test_tie_goes_to_the_nearest_of_the_tied_labels():
    labels, coordinates = np.array([9, 2, 1, 1, 2, 5]), np.array([0, 1, -1.1, 1.2, -1.3, 1.4])
    assert majority(labels, coordinates, 5)[0] == 2


def test_refining_uses_the_old_labels_only(tissue):
    labels, coordinates = tissue
    order = np.random.default_rng(3).permutation(120)
    assert np.array_equal(majority(labels[order], coordinates[order], 6), majority(labels, coordinates, 6)[order])


@pytest.mark.parametrize(("num_cells", "count"), [(20, 6), (120, 6), (140, 7), (999, 49), (1000, 50), (50_000, 50)])
def test_automatic_number_of_voters(num_cells, count):
    assert automatic_neighbours(num_cells) == count


def test_automatic_voters_are_counted_in_each_section(tissue):
    labels, coordinates = tissue
    sections = np.repeat(["a", "b"], 60)
    expected = np.concatenate([majority(labels[:60], coordinates[:60], 6), majority(labels[60:], coordinates[60:], 6)])
    assert np.array_equal(refine(labels, coordinates, options(), sections), expected)
    assert np.array_equal(refine(labels, coordinates, options("spagcn")), spagcn_rule(labels, coordinates, 6))
    assert np.array_equal(refine(labels, coordinates, options(neighbours=9)), majority(labels, coordinates, 9))


def test_without_refinement_labels_are_a_copy(tissue):
    refined = refine(tissue[0], tissue[1], options("none"))
    assert np.array_equal(refined, tissue[0])
    assert refined is not tissue[0]


def test_sections_on_top_of_each_other_do_not_see_each_other():
    coordinates = np.tile(np.arange(12.0)[:, None], (2, 2))
    labels, sections = np.repeat([0, 1], 12), np.repeat([7, 3], 12)
    assert np.array_equal(refine(labels, coordinates, options(), sections), labels)
    assert pas(labels, coordinates, sections) == 0
    assert pas(labels, coordinates) < 1
    assert chaos(labels, coordinates, sections) == pytest.approx(chaos(labels[:12], coordinates[:12]))


def test_interleaved_sections_are_taken_apart():
    sections = np.array(["b", "a", "b", "a", "b"])
    assert [cells.tolist() for cells in by_section(5, sections)] == [[1, 3], [0, 2, 4]]
    assert [cells.tolist() for cells in by_section(3, None)] == [[0, 1, 2]]
    with pytest.raises(ValueError, match="2 entries for 3 cells"):
        by_section(3, np.array([0, 1]))


def test_cells_at_the_same_place_are_neighbours_and_never_of_themselves():
    coordinates = np.concatenate([np.zeros((5, 2)), np.ones((3, 2))])
    seen = np.zeros(8, dtype=int)
    for cells, neighbours in nearest_others(coordinates, 2):
        seen[cells] += 1
        assert neighbours.shape == (8, 2)
        assert (neighbours != cells[:, None]).all()
        assert (coordinates[neighbours] == coordinates[cells][:, None]).all()
        assert (neighbours[:, 0] != neighbours[:, 1]).all()
    assert (seen == 1).all()


def test_blocks_cover_every_cell_once(tissue, monkeypatch):
    whole = majority(*tissue, 6)
    metric = pas(*tissue)
    monkeypatch.setattr("tenfold.methods.gates.nearest.BLOCK", 7)
    assert np.array_equal(majority(*tissue, 6), whole)
    assert pas(*tissue) == metric


@pytest.mark.parametrize("num_cells", [1, 2, 4])
@pytest.mark.parametrize("rule", ["majority", "spagcn"])
def test_few_cells_are_refined_by_those_there_are(num_cells, rule):
    labels = np.array([1, 0, 0, 0])[:num_cells]
    expected = {1: [1], 2: [0, 1] if rule == "majority" else [1, 0], 4: [0, 0, 0, 0]}[num_cells]
    assert refine(labels, np.arange(2.0 * num_cells).reshape(-1, 2), options(rule)).tolist() == expected


def test_pas_is_the_definition_by_loops(tissue):
    labels, coordinates = tissue
    abnormal = [
        sum(labels[other] != labels[cell] for other in others_by_distance(coordinates, cell)[:10]) >= 6
        for cell in range(120)
    ]
    assert 0 < sum(abnormal) < 120
    assert pas(labels, coordinates) == pytest.approx(np.mean(abnormal))
    assert pas(labels.astype(str), coordinates) == pytest.approx(np.mean(abnormal))


def test_pas_scales_its_threshold_where_cells_are_few():
    labels, coordinates = np.array([0, 1, 1, 1]), np.arange(8.0).reshape(4, 2)
    assert pas(labels, coordinates) == 0.25  # the first cell: 3 of 3; the others: 1 of 3
    assert pas(labels[:1], coordinates[:1]) == 0
    assert np.isnan(pas(labels[:0], coordinates[:0]))


def test_chaos_is_the_definition_by_loops(tissue):
    labels, coordinates = tissue
    scores = (coordinates - coordinates.mean(axis=0)) / coordinates.std(axis=0)
    total = 0.0
    for cell in range(120):
        alike = [other for other in range(120) if other != cell and labels[other] == labels[cell]]
        total += min(np.linalg.norm(scores[alike] - scores[cell], axis=1))
    assert chaos(labels, coordinates) == pytest.approx(total / 120)
    assert chaos(labels, coordinates * [3.0, 0.1] + 5) == pytest.approx(total / 120)


def test_chaos_of_single_members_and_flat_axes_is_defined():
    assert chaos(np.arange(3), np.arange(6.0).reshape(3, 2)) == 0
    flat = np.column_stack([LINE, np.full(7, 2.0)])
    assert chaos(LABELS, flat) == pytest.approx(chaos(LABELS, LINE))
    assert np.isnan(chaos(np.array([]), np.zeros((0, 2))))
