"""What the platform asks of a method, and how the method table is read.

A method is a folder in `methods/` and one line in `methods/table.py`. The platform calls, in this order:

1. `Config`        the `config` section of the YAML is checked against it;
2. `plan`          on the driver, before anything is taken: check files, tokenizers, shapes; say sizes and steps;
3. `run`           on the driver: hand heavy work to `context.train` and `context.map`, give back an `Outcome`;
4. `evaluate`      on the driver, any time later: the paper's metrics for a model that `run` saved.

All four see only the configuration and the context. Nothing else of the platform calls into a method.
"""

from __future__ import annotations

import importlib
import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from tenfold.platform.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from tenfold.platform.context import PlanContext, RunContext

METHOD_TABLE = "tenfold.methods.table"


@dataclass(frozen=True)
class Paper:
    """The source of a method."""

    title: str
    arxiv: str
    year: int


@dataclass(frozen=True)
class Outcome:
    """What a run gives back.

    Attributes:
        metrics: final numbers, named `eval/<metric>`; they go to MLflow, to Tune and into the result table.
        artifacts: name -> path inside the run's storage, for files a person may want (tables, plots, predictions).
        model: folder of the model inside the run's storage, written by `context.save_model`; None if there is none.
    """

    metrics: Mapping[str, float]
    artifacts: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None


@dataclass(frozen=True)
class PlanSection:
    """A titled part of a plan: (label, value) rows for people."""

    title: str
    rows: tuple[tuple[str, str], ...]


class Method(Protocol):
    """A research paper as the platform sees it. Instances are stateless."""

    name: ClassVar[str]
    summary: ClassVar[str]
    papers: ClassVar[tuple[Paper, ...]]
    Config: ClassVar[type[BaseModel]]

    def plan(self, config: Any, context: PlanContext) -> list[PlanSection]:
        """Check everything that can be known before work starts, and say what will happen.

        Raises:
            TenfoldError: something does not fit; nothing was started.
        """
        ...

    def run(self, config: Any, context: RunContext) -> Outcome:
        """Do the whole method. Called again for an unfinished run, it continues from what `context` kept."""
        ...

    def evaluate(self, config: Any, model: str, context: RunContext) -> Mapping[str, float]:
        """Compute the paper's metrics for a model, given by its address in run storage: any node can read it."""
        ...

    # A method may have `sweep_figures(trials) -> {name: figure}` as well: pictures of a finished sweep
    # (`tenfold.platform.tuning.results.Trial`) beside the platform's own.


def method_table() -> dict[str, str]:
    """Return name -> "module:Class" as written in the method table."""
    return dict(importlib.import_module(METHOD_TABLE).METHODS)


def method_names() -> list[str]:
    """Return the known method names, sorted."""
    return sorted(method_table())


def load_method(name: str) -> Method:
    """Import and instantiate a method by name.

    Raises:
        ConfigError: the table has no such name.
    """
    table = method_table()
    if name not in table:
        raise ConfigError(f"method {name!r} is unknown; known: {', '.join(sorted(table))}")
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)()


def method_folder(name: str) -> Traversable:
    """Return the packaged folder of a method (its README and configs)."""
    module = method_table()[name].partition(":")[0].rpartition(".")[0]
    return importlib.resources.files(module)


def packaged_experiments() -> dict[str, Traversable]:
    """Return `method/name` -> file for every experiment that ships with a method."""
    found: dict[str, Traversable] = {}
    for name in method_names():
        configs = method_folder(name) / "configs"
        if configs.is_dir():
            for entry in configs.iterdir():
                if entry.name.endswith(".yaml"):
                    found[f"{name}/{entry.name.removesuffix('.yaml')}"] = entry
    return found
