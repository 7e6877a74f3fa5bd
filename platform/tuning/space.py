"""The search space of a sweep: its values put into experiments, checked before any trial starts, and given to Tune."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from tenfold.platform.errors import ConfigError
from tenfold.platform.experiment import Dimension, LoadedExperiment, Sweep, check_experiment, set_option

SWEPT = ("seed", "config", "compute")


def with_values(loaded: LoadedExperiment, values: Mapping[str, Any]) -> LoadedExperiment:
    """Return the experiment of one trial: `loaded` with some dotted options changed and without its sweep.

    Raises:
        ConfigError: the changed experiment is not valid.
    """
    data = copy.deepcopy(loaded.resolved())
    data["sweep"] = None
    for key, value in values.items():
        set_option(data, key, value, f"sweep.space.{key}")
    return check_experiment(data, loaded.source, tuple(f"{key}={value}" for key, value in values.items()))


def check_space(loaded: LoadedExperiment) -> list[LoadedExperiment]:
    """Check every point of the grid, with the ends and choices of what is drawn.

    Returns:
        The experiments of the grid, one per point.

    Raises:
        ConfigError: no sweep section, an option that cannot be swept, or values that give an invalid experiment; all
            problems in one message.
    """
    sweep = loaded.experiment.sweep
    if sweep is None:
        raise ConfigError(
            f"{loaded.source}: has no sweep section; add one (sweep: {{metric: ..., mode: min, space: ...}}), "
            "or use `tenfold run`"
        )
    errors = [
        f"sweep.space.{key}: only options of {', '.join(SWEPT)} can be swept"
        for key in sweep.space
        if key.split(".")[0] not in SWEPT
    ]
    if errors:
        raise ConfigError(f"{loaded.source}: {len(errors)} problem(s)\n" + "\n".join(f"  - {line}" for line in errors))
    grid: list[LoadedExperiment] = []
    found: dict[str, dict[str, Any]] = {}
    for values in grid_points(sweep) + _drawn_points(sweep):
        try:
            experiment = with_values(loaded, values)
        except ConfigError as error:
            found.setdefault(str(error).partition("\n")[2] or str(error), values)
        else:
            grid.append(experiment)
    if found:
        lines = "\n".join(f"with {label(values, sweep)}:\n{problem}" for problem, values in found.items())
        raise ConfigError(f"{loaded.source}: the sweep has points that are not valid\n{lines}")
    return grid[: len(grid_points(sweep))]


def grid_points(sweep: Sweep) -> list[dict[str, Any]]:
    """Return the product of all grids; what is drawn has its first choice or its lower end."""
    axes = [dimension.grid or _ends(dimension)[:1] for dimension in sweep.space.values()]
    return [dict(zip(sweep.space, point, strict=True)) for point in itertools.product(*axes)]


def _drawn_points(sweep: Sweep) -> list[dict[str, Any]]:
    first = grid_points(sweep)[0]
    return [
        {**first, key: value}
        for key, dimension in sweep.space.items()
        if dimension.grid is None
        for value in _ends(dimension)[1:]
    ]


def _ends(dimension: Dimension) -> list[Any]:
    if dimension.choice is not None:
        return list(dimension.choice)
    if dimension.randint is not None:
        return [dimension.randint[0], dimension.randint[1] - 1]
    return list(dimension.uniform or dimension.loguniform or ())


def trial_count(sweep: Sweep) -> int:
    """Return the number of trials."""
    return len(grid_points(sweep)) * sweep.samples


def tune_space(sweep: Sweep) -> dict[str, Any]:
    """Return the space as Ray Tune takes it."""
    from ray import tune

    makers = {
        "grid": tune.grid_search,
        "choice": tune.choice,
        "uniform": lambda ends: tune.uniform(*ends),
        "loguniform": lambda ends: tune.loguniform(*ends),
        "randint": lambda ends: tune.randint(*ends),
    }
    return {
        key: next(make(value) for name, make in makers.items() if (value := getattr(dimension, name)) is not None)
        for key, dimension in sweep.space.items()
    }


def varied(sweep: Sweep) -> list[str]:
    """Return the options besides the seed that take more than one value: what a picture is drawn over."""
    values = {key: dimension.grid or dimension.choice for key, dimension in sweep.space.items()}
    return [key for key, listed in values.items() if key != "seed" and (listed is None or len(listed) > 1)]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the last part of every dotted key, or the whole key where that would be ambiguous."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def label(values: Mapping[str, Any], sweep: Sweep) -> str:
    """Name a trial by its values."""
    names = short_names(list(sweep.space))
    return " ".join(f"{names[key]}={show(values[key])}" for key in sweep.space)


def show(value: Any) -> str:
    """Return a value as tables and plots show it: of a list with one item the item, of a path the last part."""
    if isinstance(value, list) and len(value) == 1:
        return show(value[0])
    if isinstance(value, str):
        return value.rstrip("/").rpartition("/")[2] or value
    return f"{value:.4g}" if isinstance(value, float) else str(value)
