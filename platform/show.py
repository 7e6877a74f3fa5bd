"""What the command line prints: tables for people, JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from tenfold.platform.errors import ConfigError
from tenfold.platform.method import PlanSection, load_method, method_folder, method_names, packaged_experiments
from tenfold.platform.run import FinishedRun, RunResult
from tenfold.platform.storage import Storage
from tenfold.platform.tuning.results import SweepResult
from tenfold.platform.tuning.space import short_names
from tenfold.platform.tuning.space import show as show_value
from tenfold.platform.validation import did_you_mean, option_rows

console = Console(highlight=False, soft_wrap=False)


def methods(name: str | None, as_json: bool) -> None:
    """List all methods, or explain one: papers, experiments, options, README."""
    if name is not None and name not in method_names():
        known = method_names()
        raise ConfigError(f"{name}: unknown method{did_you_mean(name, known)} Known: {', '.join(known)}")
    chosen = [name] if name else method_names()
    facts = []
    for each in chosen:
        method = load_method(each)
        facts.append(
            {
                "name": each,
                "summary": method.summary,
                "papers": [paper.__dict__ for paper in method.papers],
                "experiments": sorted(key for key in packaged_experiments() if key.startswith(f"{each}/")),
                "options": [row._asdict() for row in option_rows(method.Config, "config.")],
            }
        )
    if as_json:
        print(json.dumps(facts, indent=1, default=str))
        return
    if name is None:
        table = Table("method", "papers", "what it does", "experiments")
        for fact in facts:
            papers = ", ".join(paper["arxiv"] for paper in fact["papers"])
            table.add_row(fact["name"], papers, fact["summary"], "\n".join(fact["experiments"]))
        console.print(table)
        return
    console.print((method_folder(name) / "README.md").read_text(encoding="utf-8"), markup=False)
    table = Table("option", "default", "meaning", title=f"options of {name}")
    for row in facts[0]["options"]:
        table.add_row(row["key"], str(row["default"]), row["description"])
    console.print(table)


def plan(sections: Sequence[PlanSection]) -> None:
    """Print a plan."""
    for section in sections:
        table = Table(title=section.title, show_header=False, title_justify="left", box=None, padding=(0, 2))
        for label, value in section.rows:
            table.add_row(label, value)
        console.print(table)


def metrics(title: str, values: Mapping[str, float]) -> None:
    """Print named numbers."""
    table = Table("metric", "value", title=title, title_justify="left")
    for name in sorted(values):
        table.add_row(name, _number(values[name]))
    console.print(table)


def result(finished: RunResult, tracking_uri: str) -> None:
    """Print what a run measured and what to do next."""
    metrics(finished.run_id, finished.outcome.metrics)
    console.print(f"run folder     {finished.uri}", soft_wrap=True)
    if finished.outcome.model:
        model = Storage(finished.uri).uri_of(finished.outcome.model)
        console.print(f"model          {model}", soft_wrap=True)
    console.print(f"in MLflow      mlflow ui --backend-store-uri {tracking_uri}", soft_wrap=True)
    if finished.outcome.model:
        from tenfold.platform.models.export import HUGGING_FACE_FLAVORS
        from tenfold.platform.models.manifest import MANIFEST_NAME

        run, model = finished.run_id, f"{finished.outcome.model}/{MANIFEST_NAME}"
        flavor = json.loads(Storage(finished.uri).read_text(model))["flavor"]
        served = f"; tenfold serve {run}" if flavor in HUGGING_FACE_FLAVORS else ""
        console.print(f"next           tenfold evaluate {run}; tenfold export {run} folder/{served}", soft_wrap=True)


def sweep(found: SweepResult, tracking_uri: str) -> None:
    """Print every trial of a sweep, means over seeds, and what to do next."""
    metric, place = found.sweep.metric, Storage(found.uri)
    names = short_names(list(found.sweep.space))
    table = Table(*names.values(), metric, "status", title=found.sweep_id, title_justify="left")
    table.add_column("run", overflow="fold")
    for trial in found.trials:
        table.add_row(*[show_value(trial.values[k]) for k in names], _number(trial.value), trial.status, trial.run_id)
    console.print(table)
    if groups := found.groups():
        others = [key for key in names if key != "seed"]
        table = Table(*[names[key] for key in others], metric, "deviation", "seeds", title="mean over the seeds")
        for group in groups:
            values = [show_value(group.values[key]) for key in others]
            table.add_row(*values, _number(group.mean), _number(group.deviation), str(group.trials))
        console.print(table)
    if found.best is not None:
        console.print(f"best           {found.best.label}: {metric} {_number(found.best.value)}", soft_wrap=True)
        console.print(f"its experiment {place.uri_of('best.yaml')}", soft_wrap=True)
        console.print(f"next           tenfold evaluate {found.best.run_id}", soft_wrap=True)
    console.print(f"table          {place.uri_of('results.csv')}", soft_wrap=True)
    console.print(f"in MLflow      mlflow ui --backend-store-uri {tracking_uri}", soft_wrap=True)


def comparison(runs: Sequence[FinishedRun]) -> None:
    """Print the metrics of several runs side by side."""
    table = Table("metric", *[run.run_id for run in runs], title="comparison", title_justify="left")
    names = sorted({name for run in runs for name in run.state.get("metrics", {})})
    for name in names:
        table.add_row(name, *[_number(run.state.get("metrics", {}).get(name)) for run in runs])
    console.print(table)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if math.isfinite(value) else str(value)
