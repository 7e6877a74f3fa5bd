"""The heat map of a sweep over two grids."""

import math

from tenfold.platform.experiment import Sweep
from tenfold.platform.tuning.results import SweepResult, Trial, heat_map

GRIDS = {"config.method": {"grid": ["a", "b"]}, "config.sections.0.path": {"grid": ["x/one.h5ad", "x/two.h5ad"]}}


def result(values, space):
    sweep = Sweep.model_validate({"metric": "eval/ari", "mode": "max", "space": space})
    trials = [
        Trial(f"run{index}", "", dict(zip(sweep.space, point, strict=True)), "finished", {}, [], None, value)
        for index, (point, value) in enumerate(values)
    ]
    return SweepResult("sweep", "uri", sweep, trials)


def test_a_cell_is_the_mean_over_the_seeds_with_its_deviation():
    space = {**GRIDS, "seed": {"grid": [1, 2]}}
    values = [
        (("a", "x/one.h5ad", 1), 0.2),
        (("a", "x/one.h5ad", 2), 0.4),
        (("b", "x/two.h5ad", 1), 0.9),
        (("b", "x/one.h5ad", 1), math.nan),
    ]
    axis = heat_map(result(values, space)).axes[0]
    shown = axis.images[0].get_array()
    assert shown[0, 0] == 0.30000000000000004
    assert shown[1, 1] == 0.9
    assert [text.get_text() for text in axis.texts] == ["0.3 \u00b1 0.141", "0.9"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["one.h5ad", "two.h5ad"]
    assert math.isnan(float(shown.filled(math.nan)[1, 0]))


def test_one_grid_has_no_heat_map():
    space = {"config.method": GRIDS["config.method"], "seed": {"grid": [1, 2]}}
    assert heat_map(result([(("a", 1), 0.2)], space)) is None


def test_a_grid_of_one_value_is_no_axis():
    space = {"config.method": GRIDS["config.method"], "config.rate": {"grid": [4]}}
    assert heat_map(result([(("a", 4), 0.2)], space)) is None
