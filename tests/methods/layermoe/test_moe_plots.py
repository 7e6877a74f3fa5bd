"""Pictures of an expansion: what is drawn is what was given, and edge cases draw as well."""

import math
import random

import numpy as np
import pytest
from tenfold.methods.layermoe.plots import (
    ParetoRow,
    allocation_figure,
    pareto_figure,
    pareto_front,
    routing_figure,
    similarity_figure,
)
from tenfold.methods.layermoe.similarity import layer_similarity

PAIRS = {
    ("el", "hu"): np.array([0.04, 0.12, 0.05]),
    ("el", "en"): np.array([0.03, 0.10, 0.04]),
    ("hu", "en"): np.array([0.02, 0.08, 0.04]),
}
ROWS = [
    ParetoRow("base", "base", 0, 5.6, 2.30),
    ParetoRow("full ft", "full_ft", 0, 1.9, 4.19),
    ParetoRow("24", "layermoe", 0.8e9, 3.42, 2.38),
    ParetoRow("48", "layermoe", 1.6e9, 3.19, 2.35),
    ParetoRow("48u", "moe_lpr", 1.6e9, 3.27, 2.44),
    ParetoRow("120", "moe_lpr", 4.1e9, 3.16, 2.47),
]


def drawn(figure):
    """Draw for real: layout and fonts fail only then."""
    figure.canvas.draw()
    return figure


def lines(axes):
    return {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in axes.get_lines()}


def bars(axes):
    """Label -> heights of a stack."""
    return {part.get_label(): [bar.get_height() for bar in part] for part in axes.containers}


def test_the_similarity_picture_has_both_means_their_mean_and_every_pair():
    found = layer_similarity(PAIRS, ["en"], ["el", "hu"])
    axes = drawn(similarity_figure(found)).axes[0]
    shown = lines(axes)
    assert shown["new and new, $S_{nn}$"] == found.nn.tolist()
    assert shown["new and old, $S_{no}$"] == found.no.tolist()
    assert shown["combined, $S$"] == found.combined.tolist()
    assert len(axes.get_lines()) == 3 + len(PAIRS)
    assert "new el, hu; old en" in axes.get_title()


@pytest.mark.parametrize(("old", "new", "missing"), [(["en"], ["el"], "S_{nn}"), ([], ["el", "hu"], "S_{no}")])
def test_a_mean_that_is_not_there_is_not_drawn(old, new, missing):
    axes = drawn(similarity_figure(layer_similarity(PAIRS, old, new))).axes[0]
    assert not any(missing in label for label in lines(axes))
    assert "combined, $S$" in lines(axes)


def test_the_allocation_picture_stacks_the_original_ffn_and_the_expansions():
    experts = [[4, 5], [0, 1], [2, 0]]
    figure = drawn(allocation_figure(experts, expansions=["el, hu", "bn"], classifier_layers=[1]))
    axes = figure.axes[0]
    assert bars(axes) == {"original FFN: 3": [1, 1, 1], "el, hu: 6": [4, 0, 2], "bn: 6": [5, 1, 0]}
    tops = [bar.get_y() + bar.get_height() for bar in axes.containers[-1]]
    assert tops == [10, 2, 3]
    assert [text.get_text() for text in axes.texts] == ["10", "2", "3"]
    (marks,) = axes.get_lines()
    assert list(marks.get_xdata()) == [1]
    assert axes.get_title() == "15 experts on 3 layers, 12 of them new"


def test_the_allocation_picture_shows_the_similarity_above():
    figure = drawn(allocation_figure([[1], [2]], similarity=[0.1, 0.05]))
    above, below = figure.axes
    assert list(above.get_lines()[0].get_ydata()) == [0.1, 0.05]
    assert bars(below) == {"original FFN: 2": [1, 1], "expansion 1: 3": [1, 2]}


def test_the_routing_picture_has_a_row_a_language_old_ones_first():
    load = {"el": [[0.2, 0.8], [1.0], [0.1, 0.4, 0.5]], "en": [[0.9, 0.1], [], [0.6, 0.3, 0.1]]}
    figure = drawn(routing_figure(load, old=["en"], classifier_layers=[2]))
    rows = [axes for axes in figure.axes if axes.get_ylabel() in load]
    assert [axes.get_ylabel() for axes in rows] == ["en", "el"]
    for axes in rows:
        grid = axes.collections[0].get_array().reshape(3, 3)
        shares = load[axes.get_ylabel()]
        assert grid[:2, 0].tolist() == shares[0]
        assert grid[:, 2].tolist() == shares[2]
        assert np.ma.getmaskarray(np.ma.masked_invalid(grid))[:, 1].all()
        assert axes.collections[0].get_clim() == (0, 1)


def test_a_routing_picture_of_dense_layers_alone_can_be_drawn():
    drawn(routing_figure({"en": [[], [1.0]]}))


def test_the_front_by_hand():
    points = [(1, 5), (2, 3), (3, 4), (4, 1), (2, 3), (5, 1), (1, 6)]
    assert pareto_front(points) == [0, 1, 4, 3]
    assert pareto_front([]) == []
    assert pareto_front([(0, math.nan), (1, 2)]) == [1]


def test_the_front_in_the_plane_is_that_of_a_sweep():
    generator = random.Random(0)
    for _ in range(200):
        points = [(generator.randint(0, 8), generator.randint(0, 8)) for _ in range(generator.randint(1, 25))]
        best, expected = math.inf, set()
        for x, y in sorted(set(points)):
            if y < best:
                best = y
                expected.add((x, y))
        front = pareto_front(points)
        assert front == sorted(front, key=lambda index: points[index])
        assert sorted(front) == [index for index, point in enumerate(points) if point in expected]


def test_a_third_coordinate_keeps_points_in_the_front():
    assert pareto_front([(1, 1, 5), (2, 2, 1), (2, 2, 6)]) == [0, 1]


def points_of(axes):
    """Every point that is drawn, with whether it is filled."""
    found = {}
    for part in axes.collections:
        for (x, y), colour in zip(part.get_offsets().tolist(), part.get_facecolors().tolist(), strict=False):
            found[round(x, 6), round(y, 6)] = colour[:3] != [1, 1, 1]
    return found


def test_the_pareto_picture_has_a_panel_a_loss_over_billions_of_parameters():
    new, old = drawn(pareto_figure(ROWS)).axes
    assert new.get_xlabel() == "added parameters (billions)"
    assert new.get_ylabel() == "loss on new languages (nats per byte)"
    assert old.get_ylabel() == "loss on old languages (nats per byte)"
    assert {(0.8, 3.42), (1.6, 3.19), (1.6, 3.27), (4.1, 3.16)} <= set(points_of(new))
    assert {(0.0, 2.3), (0.8, 2.38), (1.6, 2.35), (1.6, 2.44), (4.1, 2.47)} <= set(points_of(old))


def test_points_that_another_beats_in_everything_are_hollow():
    new, _ = drawn(pareto_figure(ROWS)).axes
    filled = points_of(new)
    assert not filled[1.6, 3.27]
    assert filled[1.6, 3.19]
    assert filled[4.1, 3.16]


def test_the_dashed_front_joins_the_best_models_with_added_parameters():
    new, old = drawn(pareto_figure(ROWS)).axes
    (front,) = new.get_lines()
    assert np.asarray(front.get_xydata()).tolist() == [[0.8, 3.42], [1.6, 3.19], [4.1, 3.16]]
    (front,) = old.get_lines()
    assert np.asarray(front.get_xydata()).tolist() == [[0.8, 2.38], [1.6, 2.35]]


def test_models_without_added_parameters_far_away_sit_at_the_edge_with_their_loss():
    new, old = drawn(pareto_figure(ROWS)).axes
    assert "base: 5.60, above" in [text.get_text() for text in new.texts]
    assert "full ft: 1.90, below" in [text.get_text() for text in new.texts]
    assert "base" in [text.get_text() for text in old.texts]
    for axes in (new, old):
        low, high = axes.get_ylim()
        assert all(low < y < high for _, y in points_of(axes))
        assert high - low < 1.5


def test_texts_of_close_points_do_not_cover_each_other():
    rows = [ParetoRow(f"model {number}", "layermoe", 1e6, 3.0 + number / 1000, 2.0) for number in range(4)]
    figure = drawn(pareto_figure(rows))
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert not any(a.overlaps(b) for number, a in enumerate(boxes) for b in boxes[:number])


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[:2], ROWS[2:3], [ParetoRow("x", "base", 0, 0.0, 0.0)]])
def test_few_models_can_be_drawn(rows):
    drawn(pareto_figure(rows))
