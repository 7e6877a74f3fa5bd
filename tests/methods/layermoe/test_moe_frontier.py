"""The Pareto picture of a sweep: one point a setting, in the mean over seeds."""

import math

import pytest
from tenfold.methods.layermoe.frontier import ADDED, NEW, OLD, frontier_rows, sweep_figures
from tenfold.platform.tuning.results import Trial


def trial(values, metrics):
    return Trial("run", "label", values, "finished", metrics, [], None, math.nan)


def test_seeds_of_a_setting_are_one_point_and_the_strategy_is_its_kind():
    rows = frontier_rows(
        [
            trial({"config.strategy": "moe_lpr", "seed": seed}, {NEW: 2.0 + seed, OLD: 1.0, ADDED: 30.0})
            for seed in (1, 2, 3)
        ]
    )
    assert [tuple(row) for row in rows] == [("moe_lpr", "moe_lpr", 30.0, pytest.approx(4.0), 1.0)]


def test_a_budget_is_written_beside_the_point_and_the_order_is_its_kind():
    space = {"config.allocation.total_experts": 18, "config.allocation.order": "inverse", "seed": 1}
    more = space | {"config.allocation.total_experts": 24}
    rows = frontier_rows([trial(values, {NEW: 2.0, OLD: 1.0, ADDED: 5.0}) for values in (space, more)])
    assert [(row.name, row.kind) for row in rows] == [("total_experts 18", "inverse"), ("total_experts 24", "inverse")]


def test_what_all_settings_have_in_common_is_not_written_beside_them():
    rows = frontier_rows(
        [
            trial({"config.strategy": name, "config.allocation.uniform": 4}, {NEW: 2.0, OLD: 1.0, ADDED: 5.0})
            for name in ("layermoe", "moe_lpr")
        ]
    )
    assert [(row.name, row.kind) for row in rows] == [("layermoe", "layermoe"), ("moe_lpr", "moe_lpr")]


def test_trials_without_measures_are_left_out_and_one_point_is_no_picture():
    failed = trial({"config.strategy": "mola", "seed": 1}, {})
    good = trial({"config.strategy": "base", "seed": 1}, {NEW: 5.0, OLD: 2.0, ADDED: 0.0})
    assert len(frontier_rows([failed, good])) == 1
    assert sweep_figures([failed, good]) == {}


def test_two_settings_are_a_picture():
    trials = [
        trial({"config.strategy": name, "seed": 1}, {NEW: new, OLD: 2.0, ADDED: added})
        for name, new, added in (("layermoe", 3.0, 12.0), ("moe_lpr", 3.1, 30.0))
    ]
    assert list(sweep_figures(trials)) == ["pareto"]
