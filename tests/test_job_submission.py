"""`tenfold submit` and `ray job submit` to a cluster with token authentication, as docs/operations.md tells it."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import yaml
from tenfold.platform.experiment import load_experiment
from tenfold.platform.storage import Storage
from tenfold.platform.training.checkpoints import list_checkpoints

pytestmark = [pytest.mark.ray, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[1]
CONTRACT = REPOSITORY / "tests" / "methods" / "dskd" / "contract.yaml"
START_SECONDS = 180
JOB_SECONDS = 600
STEPS = 20


def ray(*arguments, env, **options):
    return subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
        **options,
    )


def answers(url):
    try:
        urllib.request.urlopen(url, timeout=2)
    except urllib.error.HTTPError as error:
        return error.code == 401
    except OSError:
        return False
    return True


def stop(head):
    """End the head's process group, and no other Ray."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(timeout=5)


@pytest.fixture(scope="module")
def folder(short_folder):
    return short_folder


@pytest.fixture(scope="module")
def job_folder(folder):
    """The tree as docs/operations.md sends it, made from a copy: building writes into its source."""
    source = folder / "source"
    source.mkdir()
    for name in ("platform", "methods", "serve", "samples"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "runtime_env.yaml"):
        shutil.copy(REPOSITORY / name, source)
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target", "build/job", "."]
    subprocess.run([sys.executable, "-m", "pip", *install], cwd=source, check=True, timeout=120)
    return source


@pytest.fixture(scope="module")
def without(folder):
    """The environment of the cluster's shell and of a client that has no token."""
    without = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return without | {
        "RAY_TMPDIR": str(folder / "ray"),  # nobody finds this cluster by looking into /tmp/ray
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listens on the loopback interface only
        "HF_HUB_OFFLINE": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"],
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


@pytest.fixture(scope="module")
def env(folder, without):
    """The same with the token."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    return without | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


@pytest.fixture(scope="module")
def start_head(folder, env, free_port):
    """A function that starts a head node and returns its process and its URL."""
    heads = []

    def start():
        url_port, log_path = free_port(), folder / f"head-{len(heads)}.log"
        command = ["start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2"]
        command += ["--temp-dir", env["RAY_TMPDIR"], f"--object-store-memory={2**28}"]
        command += ["--node-ip-address=127.0.0.1", f"--port={free_port()}", f"--ray-client-server-port={free_port()}"]
        command += [f"--dashboard-port={url_port}", f"--dashboard-agent-listen-port={free_port()}"]
        with log_path.open("w") as log:
            head = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", *command],
                env=env,
                cwd=folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        heads.append(head)
        url, end = f"http://127.0.0.1:{url_port}", time.monotonic() + START_SECONDS
        while not answers(f"{url}/api/version"):
            assert head.poll() is None, log_path.read_text()
            assert time.monotonic() < end, log_path.read_text()
            time.sleep(0.3)
        return head, url

    yield start
    for head in heads:
        stop(head)


@pytest.fixture(scope="module")
def first_head(start_head):
    return start_head()


@pytest.fixture(scope="module")
def cluster(first_head, env, without):
    """A head node with token authentication: its URL, and the environments of a client with and without the token."""
    return first_head[1], env, without


@pytest.mark.parametrize(
    ("auth", "told"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "Authentication required"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, "Authentication failed"),
    ],
    ids=["no-token", "wrong-token"],
)
def test_without_the_token_nothing_is_submitted(cluster, auth, told):
    url, env, without = cluster
    refused = ray("job", "submit", "--address", url, "--", "tenfold", "methods", env=without | auth)
    assert refused.returncode == 1
    assert told in refused.stderr
    jobs = ray("job", "list", "--address", url, env=env)
    assert jobs.returncode == 0, jobs.stderr
    assert "SubmissionId" not in jobs.stdout + jobs.stderr


def test_a_submitted_run_uses_the_sent_tree_and_the_running_cluster(cluster, job_folder, folder):
    url, env, _ = cluster
    experiment = yaml.safe_load(CONTRACT.read_text())
    experiment |= {
        "storage": str(folder / "runs"),
        "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
        "compute": {"workers": 1, "deepspeed": "zero2"},
    }
    experiment["config"]["training"]["max_steps"] = 1
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(experiment))
    worker = job_folder / "build" / "job" / "tenfold" / "platform" / "training" / "worker.py"
    worker.write_text(worker.read_text() + '\nprint("this is the sent tree")\n')
    command = ["job", "submit", "--address", url, "--runtime-env", "runtime_env.yaml", "--"]
    command += ["python", "-m", "tenfold.platform.cli", "run", str(path)]
    done = ray(*command, env=env, cwd=job_folder)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    [state] = (folder / "runs").glob("dskd-contract-*/run.json")
    assert json.loads(state.read_text())["status"] == "finished"
    assert (state.parent / "models" / "student" / "model.safetensors").is_file()
    assert any("RayTrainWorker" in line and "this is the sent tree" in line for line in output.splitlines()), output
    # A local cluster beside the running one would have made a second session.
    assert len(list((folder / "ray").glob("session_2*"))) == 1


def write_experiment(folder, **sections):
    content = yaml.safe_load(CONTRACT.read_text()) | {
        "storage": str(folder / "runs"),
        "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
        "compute": {"workers": 1, "deepspeed": "zero2"},
        **sections,
    }
    content["config"]["training"] |= {"max_steps": STEPS, "save_total_limit": STEPS}
    path = folder / f"{content['name']}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


class Submit:
    """`tenfold submit`, as a process that may be waited for."""

    def __init__(self, folder, env, *arguments):
        self.log = folder / f"submit-{time.monotonic_ns()}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tenfold.platform.cli", "submit", *map(str, arguments)],
                env=env | {"PYTHONUNBUFFERED": "1"},
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def end(self):
        """Return exit code and output."""
        try:
            self.process.wait(JOB_SECONDS)
        finally:
            self.process.kill()
        return self.process.returncode, self.log.read_text()

    def until(self, condition):
        """Return when a condition holds; the command must not end before."""
        end = time.monotonic() + JOB_SECONDS
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)


def test_submit_ends_with_the_exit_code_and_the_message_of_the_job(cluster, folder):
    url, env, without = cluster
    path = write_experiment(folder, name="too-large", compute={"workers": 1, "cpus_per_worker": 50})
    code, output = Submit(folder, env, path, "--address", url).end()
    assert code == 2, output
    assert "error: the run asks for 1 worker(s) with 50 CPU each" in output
    assert "ended with exit code 2" in output
    code, output = Submit(folder, without | {"RAY_AUTH_MODE": "disabled"}, path, "--address", url).end()
    assert code == 2
    assert f"error: {url}: wants a token, and none was sent (401)" in output


def test_a_bad_experiment_fails_the_job_with_its_one_message(cluster):
    url, env, _ = cluster
    command = ["job", "submit", "--address", url, "--", "tenfold", "run", "dskd/demo", "config.objectiv=kl"]
    done = ray(*command, env=env)
    assert done.returncode == 1
    log = done.stdout + done.stderr
    assert "error: dskd/demo with config.objectiv=kl: 1 problem(s)" in log
    assert "did you mean config.objective?" in log
    assert "failed with exit code 2" in log
    assert "Traceback" not in log


def test_a_run_whose_head_was_lost_is_submitted_again_and_resumes(first_head, start_head, env, folder):
    head, url = first_head
    path = write_experiment(folder, name="lost")
    run_id = load_experiment(str(path)).run_id
    first = Submit(folder, env, path, "--address", url)
    storage = Storage(folder / "runs" / run_id)
    first.until(lambda: "is submitted" in first.log.read_text())

    # the same command again follows the job that is there; Ctrl-C leaves it alone
    second = Submit(folder, env | {"RAY_ADDRESS": url}, path)
    second.until(lambda: "starting run" in second.log.read_text())
    second.process.send_signal(signal.SIGINT)
    code, output = second.end()
    assert code == 130, output
    assert f"job {run_id} runs already: {url}" in output
    assert f"job {run_id} goes on without us" in output

    first.until(lambda: list_checkpoints(storage, "train/train"))
    for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    code, output = first.end()
    assert code == 2, output
    assert f"job {run_id} is submitted: {url}" in output
    assert f"job {run_id}: contact with {url} was lost" in output
    saved = list_checkpoints(storage, "train/train")[0].step
    assert saved < STEPS

    _, url = start_head()
    code, output = Submit(folder, env, path, "--address", url).end()
    assert code == 0, output
    assert f"resuming run {run_id}" in output
    assert f"resuming after step {saved}" in output
    assert f"job {run_id} finished" in output
    assert json.loads(storage.read_text("run.json"))["status"] == "finished"

    code, output = Submit(folder, env, path, "--address", url).end()
    assert code == 2
    assert f"error: run {run_id} is finished already" in output
