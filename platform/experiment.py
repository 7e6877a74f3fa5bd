"""The experiment file: strict models, loading, dotted overrides, and every error at once.

One YAML file describes one run. Its `config` section belongs to the method and is checked by the method's own model,
the other sections are the platform's. A file with `base: method/name` (or a path) holds only what differs from that
experiment: sections are merged, values and lists replaced. Nothing here imports torch or ray: `tenfold --help` stays
quick.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from tenfold.platform.errors import ConfigError
from tenfold.platform.method import Method, load_method, method_names, packaged_experiments
from tenfold.platform.paths import expanded
from tenfold.platform.validation import did_you_mean, validate_all

DEEPSPEED_PRESETS = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


class StrictModel(BaseModel):
    """Base of all configuration: unknown keys and infinite numbers are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Workers(StrictModel):
    """Numbers of training processes between which an elastic job may change."""

    min: Annotated[int, Field(ge=1)] = Field(description="fewest training processes that a job goes on with")
    max: Annotated[int, Field(ge=1)] = Field(
        description="most training processes; the global batch is that of so many"
    )

    @model_validator(mode="after")
    def _in_order(self) -> Workers:
        if self.min > self.max:
            raise ValueError(f"workers needs min <= max; got min {self.min}, max {self.max}")
        return self


# one kind is told by what was given, so that a mistake is one error and not one for each kind
WorkersOption = Annotated[
    Annotated[int, Field(ge=1), Tag("int")] | Annotated[Workers, Tag("[range]")],
    Discriminator(lambda given: "[range]" if isinstance(given, dict | Workers) else "int"),
]


class Compute(StrictModel):
    """What a training job takes from the cluster."""

    workers: WorkersOption = Field(
        1,
        description="training processes (data-parallel ranks): a number, or {min: ..., max: ...} for as many as there "
        "is room for, with the same global batch",
    )
    cpus_per_worker: float = Field(1.0, gt=0, description="CPU cores each worker reserves; also its torch threads")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs each worker reserves; 0 trains on CPU")
    deepspeed: str | dict[str, Any] = Field(
        "zero2",
        description=f"one of {', '.join(DEEPSPEED_PRESETS)}, a path to a DeepSpeed JSON file, or its content",
    )
    max_failures: int = Field(
        3, ge=0, description="new starts after lost or hanging workers, or lost nodes; errors of the program end a run"
    )
    hang_timeout_s: float = Field(
        600.0,
        gt=0,
        description="seconds without any progress (a forward pass, a step, an evaluated batch, a saved checkpoint) "
        "after which a training worker counts as hanging and its job starts again",
    )
    start_timeout_s: float = Field(
        900.0,
        gt=0,
        description="seconds to wait for room in the cluster and for all workers to start; and for each to get to its "
        "first step, where that takes longer than hang_timeout_s",
    )

    @property
    def min_workers(self) -> int:
        """Fewest workers that a training job goes on with."""
        return self.workers if isinstance(self.workers, int) else self.workers.min

    @property
    def max_workers(self) -> int:
        """Workers of the global batch: a step's rows, and the number of steps, follow from so many."""
        return self.workers if isinstance(self.workers, int) else self.workers.max


class Tracking(StrictModel):
    """Where MLflow keeps the runs."""

    uri: str = Field("sqlite:///mlflow.db", description="MLflow tracking URI; a server's http(s) URI on clusters")
    experiment: str | None = Field(None, description="MLflow experiment; default: the method's name")


class Dimension(StrictModel):
    """One swept option: exactly one kind of range."""

    grid: list[Any] | None = Field(None, min_length=1, description="every value is tried")
    choice: list[Any] | None = Field(None, min_length=1, description="drawn at random from these values")
    uniform: tuple[float, float] | None = Field(None, description="drawn uniformly from [low, high]")
    loguniform: tuple[float, float] | None = Field(None, description="drawn log-uniformly from [low, high], low > 0")
    randint: tuple[int, int] | None = Field(None, description="integer drawn uniformly from [low, high)")

    @model_validator(mode="after")
    def _exactly_one(self) -> Dimension:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of grid, choice, uniform, loguniform, randint; got {given or 'none'}")
        value = getattr(self, given[0])
        if given[0] in ("uniform", "loguniform", "randint") and value[0] >= value[1]:
            raise ValueError(f"{given[0]} needs low < high; got {list(value)}")
        if given[0] == "loguniform" and value[0] <= 0:
            raise ValueError(f"loguniform needs low > 0; got {value[0]}")
        return self


class Sweep(StrictModel):
    """A study around the experiment; only `tenfold sweep` reads it."""

    metric: str = Field(description="metric to optimise, as the method reports it, e.g. eval/perplexity")
    mode: Literal["min", "max"] = Field(description="whether a smaller or a larger metric is better")
    space: dict[str, Dimension] = Field(min_length=1, description="dotted option -> range, e.g. config.training.seed")
    scheduler: Literal["fifo", "asha", "median"] = Field("fifo", description="early stopping of bad trials")
    search: Literal["random", "optuna"] = Field(
        "random", description="how values are drawn; optuna needs the extra tenfold[sweep] and no grid"
    )
    samples: int = Field(1, ge=1, description="draws for every point of the grid; for repetitions sweep the seed")
    max_concurrent: int = Field(1, ge=1, description="trials at the same time; each takes `compute`")
    grace_period: int = Field(1, ge=1, description="reports before asha or median may stop a trial")
    reduction_factor: int = Field(3, ge=2, description="asha keeps the best 1/factor of the trials at every rung")
    time_budget_s: float | None = Field(
        None, gt=0, description="start no new trial and stop all after so many seconds"
    )

    @model_validator(mode="after")
    def _search_fits_space(self) -> Sweep:
        grids = [key for key, dimension in self.space.items() if dimension.grid is not None]
        if self.samples > 1 and len(grids) == len(self.space):
            raise ValueError(
                f"samples = {self.samples} would repeat every trial of a grid with the same seed and the same result; "
                "to repeat with other seeds, sweep the seed: space: {seed: {grid: [10, 20, 30]}}"
            )
        if self.search == "optuna" and grids:
            raise ValueError(f"search optuna draws all values itself; write choice instead of grid for {grids}")
        return self


class Experiment(StrictModel):
    """A whole experiment file, resolved."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,79}$", description="names the run together with a hash")
    method: str = Field(description="a name from `tenfold methods`")
    description: str = Field("", description="one sentence for people")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(10, description="decides every random choice")
    config: dict[str, Any] = Field(default_factory=dict, description="the method's own options")
    compute: Compute = Compute()
    storage: str = Field("runs", description="folder or s3://, gs:// URI for checkpoints, models and caches")
    tracking: Tracking = Tracking()
    sweep: Sweep | None = None


@dataclass(frozen=True)
class LoadedExperiment:
    """An experiment that passed all checks, with its method and the method's checked configuration."""

    experiment: Experiment
    method: Method
    config: BaseModel
    source: str
    overrides: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """Hash of everything that decides the numbers: method, seed, configuration, workers and DeepSpeed settings.

        Of the workers it is the largest number, which decides the global batch: `workers: 2` and
        `workers: {min: 1, max: 2}` are the same run.
        """
        content = {
            "method": self.experiment.method,
            "seed": self.experiment.seed,
            "config": self.config.model_dump(mode="json"),
            "workers": self.experiment.compute.max_workers,
            "deepspeed": self.experiment.compute.deepspeed,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def run_id(self) -> str:
        """Name and identity: the same file gives the same run."""
        return f"{self.experiment.name}-{self.identity}"

    def resolved(self) -> dict[str, Any]:
        """Everything, defaults included, as plain data: the run can be repeated from this alone."""
        return {**self.experiment.model_dump(mode="json"), "config": self.config.model_dump(mode="json")}


class _YamlLoader(yaml.SafeLoader):
    """Safe YAML that refuses repeated keys and reads 1e-3 as a number (YAML 1.1 takes it for text)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key!r} is given twice; remove one")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_YamlLoader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:float"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str, source: str) -> Any:
    """Read one YAML document safely.

    Raises:
        ConfigError: it is not YAML, or a key is repeated.
    """
    try:
        return yaml.load(text, Loader=_YamlLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{source}, {error}") from error


def parse_experiment(text: str, source: str) -> dict[str, Any]:
    """Read an experiment file's content, as yet unchecked.

    Raises:
        ConfigError: it is not YAML, repeats a key, or holds no sections.
    """
    data = parse_yaml(text, source)
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: needs `key: value` lines at the top; found {type(data).__name__}")
    return data


def read_source(reference: str) -> tuple[str, str]:
    """Return (text, where it came from) for `method/name` or a path to a YAML file.

    Raises:
        ConfigError: there is no such experiment; the message lists what there is.
    """
    if reference.endswith((".yaml", ".yml")):
        path = expanded(reference)
        if not path.is_file():
            raise ConfigError(f"{reference}: no such file. Give a YAML file, or one of: {_experiment_list()}")
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{reference}: cannot be read as text: {error}. Give a YAML file in UTF-8") from error
    known = packaged_experiments()
    if reference not in known:
        raise ConfigError(
            f"{reference}: no such experiment{did_you_mean(reference, known)} "
            f"Known: {_experiment_list()}. A path to a file must end in .yaml"
        )
    return known[reference].read_text(encoding="utf-8"), reference


def _experiment_list() -> str:
    return ", ".join(sorted(packaged_experiments()))


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one `dotted.key=value` in place; the value is read as YAML, list items are addressed by number.

    Raises:
        ConfigError: no `=`, or the path runs through something that is not a section.
    """
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"override {override!r}: write it as section.key=value, e.g. config.training.max_steps=50")
    set_option(data, key.strip(), parse_yaml(text, f"override {override!r}"), f"override {override!r}")


def set_option(data: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Set one dotted option of plain data in place; missing sections are made, list items are addressed by number.

    Raises:
        ConfigError: the path runs through something that is not a section; the message starts with `source`.
    """
    parts = key.split(".")
    node: Any = data
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(f"{source}: {'.'.join(parts[:depth])} is a list of {len(node)} items")
            part_key: Any = int(part)
        elif isinstance(node, dict):
            part_key = part
            if not last and node.get(part) is None:
                node[part] = {}
        else:
            raise ConfigError(f"{source}: {'.'.join(parts[:depth])} is the value {node!r}, not a section")
        if last:
            node[part_key] = value
        else:
            node = node[part_key]


def load_experiment(reference: str, overrides: Sequence[str] = ()) -> LoadedExperiment:
    """Read, override and check an experiment.

    Args:
        reference: `method/name` of a packaged experiment or a path to a YAML file.
        overrides: `dotted.key=value` strings, applied in order.

    Raises:
        ConfigError: one message with every problem found: file, key, value, what is allowed, the nearest valid key.
    """
    data, source = _read_with_bases(reference, ())
    for override in overrides:
        apply_override(data, override)
    return check_experiment(data, source, tuple(overrides))


def _read_with_bases(reference: str, above: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """Return a file's content laid over that of its `base`, and where it came from."""
    text, source = read_source(reference)
    data = parse_experiment(text, source)
    base = data.pop("base", None)
    if base is None:
        return data, source
    if not isinstance(base, str):
        raise ConfigError(
            f"{source}: base = {base!r}: give method/name of a packaged experiment, or a YAML file's path"
        )
    if base in (*above, reference):
        raise ConfigError(f"{source}: base = {base!r}: the experiments are based on each other in a circle")
    try:
        under, _ = _read_with_bases(base, (*above, reference))
    except ConfigError as error:
        raise ConfigError(f"{source}: base: {error}") from error
    return _merged(under, data), source


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `under` with the values of `over`; sections are merged, anything else is replaced."""
    both = {
        key: _merged(under[key], value) if isinstance(value, dict) and isinstance(under.get(key), dict) else value
        for key, value in over.items()
    }
    return {**under, **both}


def check_experiment(data: dict[str, Any], source: str, overrides: tuple[str, ...] = ()) -> LoadedExperiment:
    """Validate plain data as an experiment; see `load_experiment`."""
    experiment, errors = validate_all(Experiment, data)
    name = data.get("method")
    method: Method | None = None
    if isinstance(name, str):
        if name in method_names():
            method = load_method(name)
        else:
            known = method_names()
            errors.append(f"method = {name!r}: unknown method{did_you_mean(name, known)} Known: {', '.join(known)}")
    config = None
    if method is not None:
        raw = data.get("config") or {}
        if isinstance(raw, dict):
            config, config_errors = validate_all(method.Config, raw, prefix="config")
            errors.extend(config_errors)
    if errors or experiment is None or method is None or config is None:
        lines = "\n".join(f"  - {error}" for error in errors)
        changed = f" with {' '.join(overrides)}" if overrides else ""
        raise ConfigError(f"{source}{changed}: {len(errors)} problem(s)\n{lines}")
    return LoadedExperiment(experiment, method, config, source, overrides)
