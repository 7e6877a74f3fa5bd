"""What all benchmarks share: the options --quick and --json, a table, and one closing line per target."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Target:
    """A number that a benchmark must reach.

    Attributes:
        name: what is measured, without spaces.
        measured: the value, None if it could not be measured, which counts as missed.
        limit: the bound it is held against.
        at_most: whether the bound is an upper one (a time, a memory) or a lower one (a rate).
        reason: why there is no value, or a remark on how it was taken.
    """

    name: str
    measured: float | None
    limit: float
    at_most: bool = True
    reason: str = ""

    @property
    def is_met(self) -> bool:
        """Whether the value exists and keeps the bound."""
        if self.measured is None:
            return False
        return self.measured <= self.limit if self.at_most else self.measured >= self.limit

    def line(self) -> str:
        """Return `target NAME: MEASURED (wanted LIMIT): met|missed`."""
        measured = "not measured" if self.measured is None else f"{self.measured:.4g}"
        bound = f"{'<=' if self.at_most else '>='} {self.limit:.4g}"
        remark = f" [{self.reason}]" if self.reason else ""
        return f"target {self.name}: {measured} (wanted {bound}): {'met' if self.is_met else 'missed'}{remark}"


@dataclass
class Report:
    """Measured rows and targets of one benchmark."""

    benchmark: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def show(self, columns: Mapping[str, str]) -> None:
        """Print the rows as a table.

        Args:
            columns: key of a row to the heading of its column, in order. Floats get three significant digits.
        """
        table = Table(
            title=self.benchmark, caption=", ".join(f"{key} {value}" for key, value in self.settings.items())
        )
        for heading in columns.values():
            table.add_column(heading, justify="right", overflow="fold")
        for row in self.rows:
            table.add_row(*(_cell(row.get(key)) for key in columns))
        # A pipe or a log file gets the whole width instead of 80 columns.
        Console(width=None if sys.stdout.isatty() else 160).print(table)

    def finish(self, json_path: Path | None) -> int:
        """Write the JSON file if one is wanted, print the targets, and return the exit code: 1 if one was missed."""
        if json_path is not None:
            content = {
                "benchmark": self.benchmark,
                "settings": self.settings,
                "machine": machine(),
                "rows": self.rows,
                "targets": [asdict(target) | {"is_met": target.is_met} for target in self.targets],
            }
            json_path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for target in self.targets:
            print(target.line())
        return 0 if all(target.is_met for target in self.targets) else 1


def argument_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about a minute: fewer cases, the same limits")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings, rows and targets to this file")
    return parser


def machine() -> dict[str, Any]:
    """Return what the numbers depend on: cores, memory, threads, versions, accelerator."""
    return {
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def median(values: Sequence[float]) -> float:
    """Return the middle value, the mean of the middle two for an even number."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
