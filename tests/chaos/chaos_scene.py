"""Where the chaos test plays: a Ray cluster whose nodes are processes of this machine, an S3 store, an MLflow server.

Every process is a descendant of this one; at the end of the scene, however it comes, none is left.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from chaos_job import Attempt, recorded
from chaos_plan import SAVED

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
TOY = TESTS / "platform" / "training"
WAIT_SECONDS, LOOK_SECONDS = 600.0, 0.1
SLOW_SECONDS = 1.5  # a step, while an event has not had its effect yet
ROWS, SEED, BATCH, NODES = 22, 10, 2, 2
EVER = 10**9
JOB = "train/train"


def module_of(path: Path) -> Any:
    """Import a file that pytest imports by itself otherwise."""
    spec = importlib.util.spec_from_file_location(f"chaos_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_shared = module_of(TESTS / "conftest.py")  # sets the environment that tests have, before Ray is imported
S3 = module_of(TESTS / "platform" / "conftest.py").S3

from tenfold.platform.patience import patiently  # noqa: E402
from tenfold.platform.storage import Storage  # noqa: E402
from tenfold.platform.tracking_spool import Spool  # noqa: E402
from tenfold.platform.training.checkpoints import list_checkpoints  # noqa: E402
from tenfold.platform.training.deepspeed_config import deepspeed_config  # noqa: E402
from tenfold.platform.training.options import TrainingOptions  # noqa: E402


class Ended(Exception):
    """The training has ended while an event waited for something."""


def options(steps: int) -> TrainingOptions:
    """Return the options of all trainings here; every step is logged."""
    return TrainingOptions(
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-2,
        adam_epsilon=1e-3,  # with the default the sign of a gradient of 1e-9 would decide about whole updates
        logging_steps=1,
        eval_strategy="no",
        save_strategy="steps",
        save_steps=SAVED,
        save_total_limit=2,
    )


@dataclass
class Scene:
    """What there is, and what can be done to it.

    Attributes:
        folder: for all files of this run.
        cluster: Ray's.
        s3: the store, which can be cut.
        storage: the run's folder in it.
        nodes: those that train, of one core each; the head has none.
        mlflow: address of the MLflow server.
        ended: set when the training is over.
    """

    folder: Path
    cluster: Any
    s3: Any
    storage: Storage
    mlflow: str
    nodes: list[Any] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    _server: Any = None

    @property
    def records(self) -> Path:
        """Folder of what the workers write down."""
        return self.folder / "rows"

    @property
    def spool(self) -> Spool:
        """What MLflow has not got yet."""
        return Spool(self.folder / "unsent.jsonl")

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        """Return what a condition gives as soon as it holds."""
        end = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < end:
            if found := condition():
                return found
            if self.ended.is_set():
                raise Ended(f"training has ended before there was {what}")
            time.sleep(LOOK_SECONDS)
        raise TimeoutError(f"no {what} within {WAIT_SECONDS:g} s")

    def permit(self, last: int, pause_s: float) -> None:
        """Let steps up to `last` begin, each after a pause."""
        temporary = self.folder / "permit.tmp"
        temporary.write_text(f"{last} {pause_s}")
        temporary.replace(self.folder / "permit")

    def go_on(self) -> None:
        """Let steps begin, slowly: what has happened shows in one of the next."""
        self.permit(EVER, SLOW_SECONDS)

    def progress(self) -> tuple[str, Attempt, int]:
        """Return name and records of the newest attempt that trains, and the step that it has begun."""
        found = recorded(self.records)
        if not found:
            return "", Attempt(0), 0
        name, attempt = list(found.items())[-1]
        return name, attempt, max(attempt.rows, default=0)

    def attempt_after(self, name: str) -> tuple[str, Attempt, int]:
        """Return `progress` as soon as a later attempt trains."""

        def later() -> Any:
            found = self.progress()
            return found if found[0] > name else None

        return self.wait(later, f"training after {name}")

    def newest_checkpoint(self) -> int:
        """Return the step of the newest whole checkpoint."""
        records = list_checkpoints(self.storage, JOB)
        return records[0].step if records else 0

    def training_workers(self) -> list[psutil.Process]:
        """Return the processes of Ray Train's workers."""
        return [process for process in descendants() if "RayTrainWorker" in command(process)]

    def add_nodes(self, number: int) -> None:
        """Start nodes of one core and wait until they are there."""
        import ray

        added = [self.cluster.add_node(wait=False, num_cpus=1) for _ in range(number)]
        self.nodes.extend(added)

        def alive() -> bool:
            there = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            return there.issuperset(node.node_id for node in added)

        self.wait(alive, "new node")

    def kill_node(self, node: Any) -> int:
        """SIGKILL all processes of a node at once; return their number."""
        self.nodes.remove(node)
        own = [psutil.Process(info.process.pid) for infos in node.all_processes.values() for info in infos]
        processes = [*own, *(child for process in own for child in process.children(recursive=True))]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.cluster.remove_node(node, allow_graceful=False)  # only takes it off the list now
        return len(processes)

    def end_node(self, node: Any) -> None:
        """End a node as a cloud does after its notice: it says goodbye to the cluster."""
        self.nodes.remove(node)
        self.cluster.remove_node(node)

    def start_mlflow(self) -> None:
        """Start the server, or start it again with the same database; return when it answers."""
        folder = self.folder / "mlflow"
        folder.mkdir(exist_ok=True)
        port = int(self.mlflow.rpartition(":")[2])
        self._server = _shared.MLflowServer(folder, port, f"sqlite:///{folder}/mlflow.db")

    def stop_mlflow(self) -> None:
        """SIGKILL all processes of the server."""
        if self._server is not None:
            self._server.kill()


def command(process: psutil.Process) -> str:
    """Return the command line of a process; empty when it has gone."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def descendants() -> list[psutil.Process]:
    """Return all processes that this one has started, and those that they have."""
    return psutil.Process().children(recursive=True)


@contextlib.contextmanager
def no_process_left() -> Iterator[None]:
    """Kill what is still there of the processes that this one has started meanwhile."""
    before = set(descendants())
    started: set[psutil.Process] = set()
    try:
        yield
        started = set(descendants()) - before
    finally:
        started |= set(descendants()) - before
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(started, timeout=30)


@contextlib.contextmanager
def scene(folder: Path) -> Iterator[Scene]:
    """Put up store, MLflow server and a cluster of two nodes, connect to it, and take all down at the end."""
    import ray
    from ray.cluster_utils import Cluster
    from tenfold.platform.training import launch, room, watch

    with contextlib.ExitStack() as stack:
        stack.enter_context(no_process_left())
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for path in (TOY, HERE):
            patch.syspath_prepend(str(path))
            patch.setenv("PYTHONPATH", str(path), prepend=os.pathsep)
        patch.delenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", raising=False)  # as on clusters that one joins
        patch.delenv("RAY_ADDRESS", raising=False)
        # what a cluster of many machines waits for in vain: room that comes late
        patch.setattr(room, "SETTLE_SECONDS", 5.0)
        patch.setattr(watch, "GROW_SECONDS", 1.0)
        patch.setattr(launch, "PLACEMENT_SECONDS", 30.0)

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
        s3 = S3()
        stack.callback(s3.stop)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        # what the first request loads takes longer than a client waits, on a busy machine
        place = patiently(lambda: s3.uri("runs/chaos"), WAIT_SECONDS, "of this test")
        made = Scene(folder, None, s3, Storage(place), f"http://127.0.0.1:{port}")
        made.permit(0, 0)
        stack.callback(made.stop_mlflow)
        starting = threading.Thread(target=made.start_mlflow)
        starting.start()
        stack.callback(starting.join)
        head = {
            "num_cpus": 0,
            "include_dashboard": False,
            # the default takes up to half a minute to find a node dead
            "_system_config": {"health_check_period_ms": 1000, "health_check_failure_threshold": 10},
        }
        # Ray's own handlers for the end of this process cannot be set from the thread that adds nodes later
        made.cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
        stack.callback(made.cluster.shutdown)
        stack.callback(ray.shutdown)
        ray.init(address=made.cluster.address, log_to_driver=False)
        made.add_nodes(NODES)
        starting.join()
        yield made


@dataclass(frozen=True)
class Reference:
    """An undisturbed training: losses by step, rows by step, and the folder with its model."""

    losses: dict[int, float]
    rows: dict[int, list[int]]
    folder: Path


@contextlib.contextmanager
def undisturbed(folder: Path, steps: int, deepspeed: str, workers: int) -> Iterator[Callable[[], Reference]]:
    """Train on so many plain processes, without Ray, beside what is done here; yield a function that waits for it."""
    place = folder / f"undisturbed-{workers}"
    place.mkdir()
    name = f"plain-{workers}"
    job = {
        "build": "chaos_job:build",
        "config": {"rows": ROWS, "record": str(place / "rows"), "attempt": name},
        "options": {**options(steps).model_dump(mode="json"), "save_strategy": "no"},
        "deepspeed": deepspeed_config(deepspeed),
        "seed": SEED,
        "max_workers": NODES,
        "shares": NODES,
        "output": str(place),
    }
    (place / "jobs.json").write_text(json.dumps([job]))
    paths = os.pathsep.join([str(HERE), str(TOY), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (place / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(TOY / "training_ranks.py"), str(place / "jobs.json"), str(workers)],
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,
        )

    def result() -> Reference:
        if process.wait(WAIT_SECONDS) != 0:
            raise RuntimeError(f"the undisturbed training failed: {(place / 'log').read_text()[-2000:]}")
        attempt = recorded(place / "rows")[name]
        rows = {step: attempt.whole_rows(step) for step in attempt.rows}
        return Reference(attempt.losses, {step: found for step, found in rows.items() if found}, place)

    try:
        yield result
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
