"""`make cluster-demo`: a cluster on this machine grows from no worker for a submitted job, and shrinks again.

It listens on the loopback interface, has its own ports, folder and token, and leaves no process behind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import psutil
import yaml
from tenfold.platform.errors import ClusterError, TenfoldError
from tenfold.platform.node_counts import NodeRecord, node_types

REPOSITORY = Path(__file__).parents[2]
CLUSTER = REPOSITORY / "cluster.local.yaml"
EXPERIMENT = Path(__file__).parent / "experiment.yaml"
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
START_SECONDS = 240
JOB_SECONDS = 900
IDLE_SECONDS = 300
LOOK_SECONDS = 0.5
END_SECONDS = 10
OBJECT_STORE_BYTES = 2**28
WORKER_CLASS = "RayTrainWorker"
MAX_ACTORS = 1000


def say(text: str) -> None:
    """Print a line at once: it stands between those of Ray and of the job."""
    print(text, flush=True)


def main() -> None:
    """Run the demo; exits with 1 when something went otherwise than it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/cluster-demo"), help="where the results go")
    results = parser.parse_args().folder.absolute()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    interrupted = []

    def interrupt(*_: object) -> NoReturn:
        interrupted.append(True)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        with local_cluster(results) as address:
            run(address, results)
    except (TenfoldError, KeyboardInterrupt) as error:
        # Python drops what a handler raises while it finalises an object; then the job fails, which had Ctrl-C as well
        sys.exit("interrupted; the cluster is gone" if interrupted else f"error: {error}")


def _leave(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


@contextlib.contextmanager
def local_cluster(results: Path) -> Iterator[str]:
    """Start a head node with an autoscaler; yields the dashboard's address. Sets this process's environment for it.

    Raises:
        ClusterError: it did not start, or what was done with it failed; Ray's logs are then in `results`.
    """
    # in /tmp: the path of a socket has at most 107 characters, and Ray's lie below
    folder = Path(tempfile.mkdtemp(prefix="tenfold-cluster-", dir="/tmp"))
    try:
        _set_environment(folder)
        port, dashboard, agent, client = _free_ports(4)
        config = yaml.safe_load(CLUSTER.read_text(encoding="utf-8"))
        config["provider"]["gcs_address"] = f"127.0.0.1:{port}"
        (folder / "cluster.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        head = config["available_node_types"][config["head_node_type"]]["resources"]
        command = [*RAY, "start", "--head", "--block", "--disable-usage-stats", f"--num-cpus={head['CPU']}"]
        command += ["--num-gpus=0", f"--autoscaling-config={folder / 'cluster.yaml'}", f"--temp-dir={folder}"]
        command += ["--node-ip-address=127.0.0.1", f"--port={port}", "--min-worker-port=0", "--max-worker-port=0"]
        command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
        address = f"http://127.0.0.1:{dashboard}"
        say(f"starting a head node without CPUs; its dashboard: {address}")
        with (folder / "head.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        _wait_for(address, process, folder / "head.log")
        yield address
    except ClusterError as error:
        logs = results / "ray-logs"
        for source in (folder / "session_latest" / "logs", folder):
            shutil.copytree(source, logs, ignore=_no_logs, dirs_exist_ok=True)
        raise ClusterError(f"{error}\nRay's logs are in {logs}") from error
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # whoever is impatient now would leave processes behind
        end_processes(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _no_logs(folder: str, names: list[str]) -> list[str]:
    """Return the names in a folder that are no log files: sockets, the token, folders."""
    return [name for name in names if not name.endswith((".log", ".out", ".err"))]


def _set_environment(folder: Path) -> None:
    """Set what the cluster's processes, the clients and this process need, before ray is imported; write the token."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        del os.environ[name]  # another cluster's
    os.environ |= {
        "RAY_TMPDIR": str(folder),  # nobody finds this cluster by looking into /tmp/ray
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listens on the loopback interface only
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",  # as `ray up` does
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE

    os.environ |= {"RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_NODE_TYPE_NAME": FAKE_HEAD_NODE_TYPE}


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


def _wait_for(address: str, head: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            node_types(address)
            return
        except ClusterError as error:
            if head.poll() is not None or time.monotonic() > end:
                said = log.read_text(encoding="utf-8")
                raise ClusterError(f"the head node did not start within {START_SECONDS} s: {error}\n{said}") from error
        time.sleep(LOOK_SECONDS)


def end_processes(folder: Path) -> None:
    """End every process of the cluster in `folder`, and no other: the folder is in their environment.

    Ray's workers overwrite their own environment with their title; they are children of those that have it.
    """
    while found := _processes(folder):
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(found, timeout=END_SECONDS)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=END_SECONDS)


def _processes(folder: Path) -> list[psutil.Process]:
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get("RAY_TMPDIR") == str(folder):
                found |= {process, *process.children(recursive=True)}
    return [process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def run(address: str, results: Path) -> None:
    """Submit the experiment, watch the nodes until the job has ended and they are gone, and save the record.

    Raises:
        ClusterError: the job failed, took too long, or nodes stayed.
    """
    record = NodeRecord(address, say)
    record.look()
    command = [*RAY, "job", "submit", "--address", address, "--submission-id", "cluster-demo", "--"]
    command += ["tenfold", "run", str(EXPERIMENT), "--new", f"storage={results / 'runs'}"]
    command += [f"tracking.uri=sqlite:///{results / 'mlflow.db'}"]
    results.mkdir(parents=True, exist_ok=True)
    try:
        record.mark("job submitted")
        job = subprocess.Popen(command, cwd=results)
        _look_until(record, lambda: job.poll() is not None, JOB_SECONDS, "the job")
        record.mark("job finished" if job.returncode == 0 else "job failed")
        if job.returncode:
            raise ClusterError("the job failed; its log is above")
        workers = training_workers(record)
        for worker in workers:
            say(f"          a training worker ran on {worker['type']} node {worker['node']}")
        (results / "workers.json").write_text(json.dumps(workers, indent=1) + "\n", encoding="utf-8")
        _look_until(record, lambda: record.counts[-1].total == 0, IDLE_SECONDS, "the idle nodes")
    finally:
        data, picture = record.save(results)
    say(f"node counts over time: {picture}, {data}")


def _look_until(record: NodeRecord, done: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise ClusterError(f"{what} did not end within {seconds} s")
        record.look()
        time.sleep(LOOK_SECONDS)


def training_workers(record: NodeRecord) -> list[dict[str, str]]:
    """Return the node, with its type, of each worker of the training, as Ray has it."""
    from ray.util.state import list_actors

    actors = list_actors(record.address, limit=MAX_ACTORS, raise_on_missing_output=False)
    nodes = [actor.node_id for actor in actors if actor.class_name == WORKER_CLASS and actor.node_id]
    return [{"node": node, "type": record.types[node]} for node in nodes]


if __name__ == "__main__":
    main()
