"""The points of a sweep: products, values put into experiments, and every invalid point found beforehand."""

import pytest
from tenfold.platform.errors import ConfigError
from tenfold.platform.experiment import load_experiment
from tenfold.platform.tuning.space import check_space, grid_points, label, short_names, trial_count, with_values
from tenfold.platform.tuning.study import sweep_identity


def swept(space, *more):
    return load_experiment("dskd/demo", ["sweep={metric: eval/nll, mode: min}", f"sweep.space={space}", *more])


def test_the_grid_is_the_product_and_drawn_options_stand_at_their_lower_end():
    loaded = swept("{config.kd_rate: {grid: [0.1, 0.9]}, seed: {grid: [1, 2, 3]}}")
    points = grid_points(loaded.experiment.sweep)
    assert len(points) == 6
    assert points[1] == {"config.kd_rate": 0.1, "seed": 2}
    drawn = swept("{config.kd_rate: {grid: [0.1, 0.9]}, seed: {randint: [7, 9]}}", "sweep.samples=4")
    assert grid_points(drawn.experiment.sweep)[0] == {"config.kd_rate": 0.1, "seed": 7}
    assert trial_count(drawn.experiment.sweep) == 8


def test_values_reach_the_experiment_and_its_identity():
    loaded = swept("{config.training.learning_rate: {grid: [1.0e-3, 1.0e-4]}, seed: {grid: [1, 2]}}")
    one = with_values(loaded, {"config.training.learning_rate": 1e-4, "seed": 2})
    assert one.config.training.learning_rate == 1e-4
    assert one.experiment.seed == 2
    assert one.experiment.sweep is None
    identities = {each.identity for each in check_space(loaded)}
    assert len(identities) == 4
    assert one.identity in identities
    assert loaded.config.training.learning_rate != 1e-4


def test_an_unknown_option_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean config\.kd_rate"):
        check_space(swept("{config.kd_rat: {grid: [0.5]}}"))


def test_every_bad_value_is_found_also_at_the_far_end_of_a_range():
    with pytest.raises(ConfigError, match=r"kd_rate = 1\.5") as caught:
        check_space(swept("{config.kd_rate: {uniform: [0.5, 1.5]}, config.objective: {choice: [kl, magic]}}"))
    assert "magic" in str(caught.value)


def test_a_bad_combination_is_found():
    with pytest.raises(ConfigError, match="ablation of dual_space_v2"):
        check_space(swept("{config.objective: {grid: [dual_space_v2, kl]}, config.spaces: {grid: [both, teacher]}}"))


@pytest.mark.parametrize("key", ["name", "storage", "tracking.uri", "sweep.metric"])
def test_only_what_decides_the_numbers_can_be_swept(key):
    with pytest.raises(ConfigError, match="can be swept"):
        check_space(swept(f"{{{key}: {{grid: [a]}}}}"))


def test_an_experiment_without_sweep_says_so():
    with pytest.raises(ConfigError, match="no sweep section"):
        check_space(load_experiment("dskd/demo"))


@pytest.mark.parametrize(
    ("space", "more", "message"),
    [
        ("{seed: {grid: [1]}}", "sweep.samples=2", "sweep the seed"),
        ("{seed: {grid: [1]}}", "sweep.search=optuna", "choice instead of grid"),
        ("{seed: {grid: [1], choice: [1]}}", "seed=1", "exactly one"),
        ("{config.kd_rate: {loguniform: [0, 1]}}", "seed=1", "low > 0"),
        ("{config.kd_rate: {uniform: [1, 0]}}", "seed=1", "low < high"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(space, more, message):
    with pytest.raises(ConfigError, match=message):
        swept(space, more)


def test_names_are_short_where_that_is_clear():
    assert short_names(["config.a.lr", "config.b.lr", "seed"]) == {
        "config.a.lr": "config.a.lr",
        "config.b.lr": "config.b.lr",
        "seed": "seed",
    }
    loaded = swept("{config.training.learning_rate: {loguniform: [1.0e-4, 1.0e-2]}}")
    assert label({"config.training.learning_rate": 0.00123456}, loaded.experiment.sweep) == "learning_rate=0.001235"


def test_another_space_is_another_sweep():
    first, second = swept("{seed: {grid: [1, 2]}}"), swept("{seed: {grid: [1, 3]}}")
    assert sweep_identity(first) == sweep_identity(swept("{seed: {grid: [1, 2]}}"))
    assert sweep_identity(first) != sweep_identity(second)
