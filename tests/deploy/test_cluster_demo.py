"""`make cluster-demo`: a cluster grows from no worker for a submitted job, and shrinks again."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
DEMO = [sys.executable, str(REPOSITORY / "deploy" / "local" / "demo.py")]
SECONDS = 1500  # its own limits end it before


def environment():
    return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}


def processes_of_the_demo():
    """Processes that have a demo's folder in their command, their environment or an open file."""
    found = []
    for process in psutil.process_iter():
        try:
            seen = [*process.cmdline(), *process.environ().values(), process.cwd()]
            seen += [file.path for file in process.open_files()]
        except psutil.Error:
            continue
        if any("tenfold-cluster-" in text for text in seen):
            found.append(" ".join(process.cmdline()))
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [*DEMO, "--folder", str(folder)],
        env=environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout, json.loads((folder / "nodes.json").read_text())


def test_the_cluster_grows_from_nothing_to_two_nodes_and_back(demo):
    _, output, record = demo
    totals = [sum(count["nodes"].values()) for count in record["counts"]]
    assert (totals[0], max(totals), totals[-1]) == (0, 2, 0)
    most = [count["nodes"] for count in record["counts"] if sum(count["nodes"].values()) == 2]
    # the spot node first, and an on-demand one because no other is to be had
    assert most[0] == {"cpu_on_demand": 1, "cpu_spot": 1}
    said = [int(count) for count in re.findall(r"^ *[\d.]+ s  (\d+) worker node", output, re.MULTILINE)]
    assert said == totals


def test_nodes_come_for_the_job_and_go_after_it(demo):
    *_, record = demo
    submitted, finished = record["events"]
    assert (submitted["text"], finished["text"]) == ("job submitted", "job finished")
    first = next(count for count in record["counts"] if count["nodes"])
    assert submitted["seconds"] <= first["seconds"] < finished["seconds"]
    assert record["counts"][-1]["seconds"] > finished["seconds"]
    assert record["seconds"] >= record["counts"][-1]["seconds"]


def test_the_jobs_two_workers_ran_on_two_nodes(demo):
    folder, *_ = demo
    workers = json.loads((folder / "workers.json").read_text())
    assert len({worker["node"] for worker in workers}) == 2
    assert {worker["type"] for worker in workers} == {"cpu_spot", "cpu_on_demand"}


def test_the_job_trained_a_model(demo):
    folder, *_ = demo
    [state] = (folder / "runs").glob("cluster-demo-*/run.json")
    assert json.loads(state.read_text())["status"] == "finished"
    assert (state.parent / "models" / "student" / "model.safetensors").is_file()


def test_the_plot_is_a_picture(demo):
    folder, *_ = demo
    from PIL import Image

    with Image.open(folder / "nodes.png") as picture:
        assert picture.width > 1000


def test_nothing_is_left_of_the_cluster(demo):
    assert processes_of_the_demo() == []


def test_ctrl_c_leaves_nothing_behind_either(tmp_path):
    process = subprocess.Popen(
        [*DEMO, "--folder", str(tmp_path)],
        env=environment(),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        for line in process.stdout:
            if "0 worker node(s)" in line:  # the head runs
                break
        assert len(processes_of_the_demo()) > 3
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            process.kill()
    assert "interrupted; the cluster is gone" in output
    assert process.returncode == 1
    end = time.monotonic() + 30
    while processes_of_the_demo() and time.monotonic() < end:
        time.sleep(0.2)
    assert processes_of_the_demo() == []
