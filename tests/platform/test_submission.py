"""What `tenfold submit` checks, sends and says; tests/test_job_submission.py does it on a cluster."""

import http.server
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import yaml
from ray.job_submission import JobStatus
from tenfold.platform import submission
from tenfold.platform.errors import ClusterError
from tenfold.platform.experiment import load_experiment, parse_experiment
from tenfold.platform.submission import JobServer, pack
from tenfold.platform.tuning.study import sweep_identity

MODEL = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
SAMPLE = "sample:models/stories260K"


@pytest.fixture
def experiment(tmp_path):
    """A function that writes an experiment whose addresses can travel, with some sections replaced."""

    def write(**sections):
        content = {
            "name": "sent",
            "method": "dskd",
            "storage": str(tmp_path / "runs"),
            "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
            "config": {
                "student": {"config": {**MODEL, "num_attention_heads": 2}, "tokenizer": SAMPLE},
                "teacher": {"model": SAMPLE},
                "data": {
                    "train": [{"path": "sample:instruct/short_instructions.json", "stop": 40}],
                    "validation_ratio": 0.2,
                    "template": "none",
                    "max_length": 128,
                    "max_prompt_length": 96,
                },
                "training": {"max_steps": 2, "learning_rate": 1e-5},
            },
            **sections,
        }
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


SWEEP = {"metric": "eval/perplexity", "mode": "min", "space": {"seed": {"grid": [1, 2]}}}


def test_relative_storage_and_tracking_are_refused_together(tenfold):
    code, _, errors = tenfold("submit", "dskd/demo")
    assert code == 2
    assert "error: storage = 'runs' and tracking.uri = 'sqlite:///mlflow.db': relative, and Ray deletes" in errors


def test_data_that_lies_beside_the_experiment_is_refused_though_it_is_there(tenfold, experiment, tmp_path):
    (tmp_path / "mine.json").write_text('[{"instruction": "a", "output": "b"}]')
    path = experiment()
    code, _, errors = tenfold("submit", path, "config.data.train.0.path=mine.json")
    assert code == 2
    assert "mine.json: no such file; relative paths start at the empty folder of the job. Your files do not" in errors


def test_a_mistake_in_the_experiment_is_found_before_anything_is_sent(tenfold, experiment):
    code, _, errors = tenfold("submit", experiment(), "config.objectiv=kl", "--address", "http://127.0.0.1:1")
    assert code == 2
    assert "did you mean config.objective?" in errors


def test_a_plan_is_printed_and_nothing_sent(tenfold, experiment):
    code, output, _ = tenfold("submit", experiment(), "--plan", "--address", "http://127.0.0.1:1")
    assert code == 0
    assert "the plan fits; nothing was sent" in output


@pytest.mark.parametrize(("sections", "file"), [({}, "run.json"), ({"sweep": SWEEP}, "sweep.json")])
def test_what_is_finished_is_not_sent_again(tenfold, experiment, tmp_path, sections, file):
    path = experiment(**sections)
    loaded = load_experiment(str(path))
    name = sweep_identity(loaded) if sections else loaded.run_id
    (tmp_path / "runs" / name).mkdir(parents=True)
    state = '{"status": "finished", "created": 1, "mlflow_run_id": "x", "mlflow_uri": "y"}'
    (tmp_path / "runs" / name / file).write_text(state)
    code, _, errors = tenfold("submit", path, *(["--sweep"] if sections else []))
    assert code == 2
    assert f"{name} is finished already" in errors


def test_addresses_in_the_order_that_is_documented(monkeypatch):
    for name in submission.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert submission.job_server() == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "https://two:1/")
    assert submission.job_server() == "https://two:1"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://one:1")
    assert submission.job_server() == "http://one:1"
    assert submission.job_server("http://given:1") == "http://given:1"
    with pytest.raises(ClusterError, match=r"--address = 'head:8265': jobs go to .*--address http://HEAD:8265"):
        submission.job_server("head:8265")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(ClusterError, match="RAY_ADDRESS = 'head:6379': jobs go to"):
        submission.job_server()


@pytest.fixture
def answering():
    """A function that starts an HTTP server with one answer to everything, and returns its address."""
    servers = []

    def start(status, body):
        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (401, b"Unauthorized", r"wants a token, and none was sent \(401\).*RAY_AUTH_MODE=token"),
        (403, b"Forbidden", r"refuses our token \(403\), which is another cluster's. Copy the head's to .*/mine"),
        (404, b"", r"takes no Ray jobs: .*--address http://HEAD:8265"),
        (200, b"<html>", r"takes no Ray jobs: .*--address http://HEAD:8265"),
    ],
    ids=["no-token", "wrong-token", "not-found", "another-server"],
)
def test_who_does_not_take_the_job_and_what_to_do(answering, monkeypatch, tmp_path, status, body, told):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "mine"))
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:1")  # Ray would go there
    with pytest.raises(ClusterError, match=told):
        JobServer.at(answering(status, body))
    assert os.environ["RAY_ADDRESS"] == "http://elsewhere:1"


def test_an_address_where_nothing_listens(free_port):
    with pytest.raises(ClusterError, match=r"nothing listens there. Give the address"):
        JobServer.at(f"http://127.0.0.1:{free_port()}")


class Jobs:
    """Stands for Ray's client: keeps what it is given, and says what it is told to."""

    def __init__(self, *jobs):
        self.jobs, self.sent = list(jobs), []

    def list_jobs(self):
        return self.jobs

    def submit_job(self, **job):
        if any(other.submission_id == job["submission_id"] for other in self.jobs):
            raise RuntimeError(f"Job with submission_id {job['submission_id']} already exists.")
        self.sent.append(job)
        return job["submission_id"]


def job(name, status, **metadata):
    return SimpleNamespace(submission_id=name, status=JobStatus(status), metadata=metadata or None)


def of_run(loaded):
    return {"tenfold.run": loaded.run_id, "tenfold.storage": loaded.experiment.storage, "tenfold.new": "False"}


def test_a_run_that_is_running_is_not_sent_again(experiment):
    loaded = load_experiment(str(experiment()))
    known = of_run(loaded)
    jobs = Jobs(job(loaded.run_id, "FAILED", **known), job("second", "RUNNING", **known), job("x", "RUNNING"))
    assert JobServer("", jobs).submit(loaded, sweep=False, new=False) == ("second", True)
    assert jobs.sent == []


def test_failed_and_other_runs_jobs_leave_the_next_name(experiment):
    loaded = load_experiment(str(experiment()))
    other = {**of_run(loaded), "tenfold.storage": "/elsewhere"}
    jobs = Jobs(job(loaded.run_id, "FAILED", **of_run(loaded)), job(f"{loaded.run_id}-2", "RUNNING", **other))
    assert JobServer("", jobs).submit(loaded, sweep=False, new=False) == (f"{loaded.run_id}-3", False)
    assert jobs.sent[0]["entrypoint"] == "python -m tenfold.platform.cli run experiment.yaml"
    assert jobs.sent[0]["metadata"] == of_run(loaded)


def test_a_job_of_a_quicker_submitter_is_found(experiment):
    loaded = load_experiment(str(experiment()))
    quicker = job(loaded.run_id, "PENDING", **of_run(loaded))

    class Late(Jobs):
        def list_jobs(self):
            seen, self.jobs = self.jobs, [quicker]
            return seen

    assert JobServer("", Late()).submit(loaded, sweep=False, new=False) == (loaded.run_id, True)


def test_new_and_sweep_are_told_to_the_job(experiment):
    loaded = load_experiment(str(experiment(sweep=SWEEP)))
    jobs = Jobs(job("running", "RUNNING", **of_run(loaded)))
    name, _ = JobServer("", jobs).submit(loaded, sweep=True, new=True)
    assert name == sweep_identity(loaded)
    assert jobs.sent[0]["entrypoint"] == "python -m tenfold.platform.cli sweep experiment.yaml --new"


def test_what_is_sent_runs_alone_and_is_the_same_run(experiment, tmp_path):
    loaded = load_experiment(str(experiment()), ["seed=3"])
    folder = tmp_path / "sent"
    folder.mkdir()
    pack(loaded, folder)
    data = parse_experiment((folder / "experiment.yaml").read_text(), "sent")
    assert data["seed"] == 3
    # without this environment's own tenfold, which is found through a file of site-packages that -S does not read
    code = (
        "import sys, site; site.ENABLE_USER_SITE = False\n"
        "sys.path.append(sys.argv[1])\n"
        "import importlib.metadata, tenfold.platform.run as run\n"
        "from tenfold.platform.experiment import load_experiment\n"
        "print(run.__file__, importlib.metadata.version('tenfold'), load_experiment('experiment.yaml').run_id)"
    )
    import mlflow

    packages = os.path.dirname(os.path.dirname(mlflow.__file__))  # noqa: PTH120
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, packages],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.split() == [str(folder / "tenfold/platform/run.py"), "0.1.0", loaded.run_id]
    assert (folder / "tenfold/methods/dskd/configs/demo.yaml").is_file()


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", -9, 137), ("STOPPED", None, 1), ("SUCCEEDED", None, 0)],
)
def test_the_exit_code_is_the_commands(status, code, expected):
    ended = SimpleNamespace(submission_id="x", status=JobStatus(status), driver_exit_code=code, message="m")
    client = SimpleNamespace(get_job_info=lambda name: ended, tail_job_logs=_nothing)
    assert JobServer("", client).follow("x", print) == expected


async def _nothing(name):
    return
    yield


def test_a_job_that_never_began_is_an_error_with_its_cause():
    ended = SimpleNamespace(
        submission_id="x", status=JobStatus.FAILED, driver_exit_code=None, message="no space\nleft"
    )
    client = SimpleNamespace(get_job_info=lambda name: ended, tail_job_logs=_nothing)
    with pytest.raises(ClusterError, match="job x failed without an exit code: no space left"):
        JobServer("", client).follow("x", print)


def test_a_log_whose_contact_breaks_is_shown_once(monkeypatch):
    monkeypatch.setattr(submission.time, "sleep", lambda seconds: None)
    states = [JobStatus.RUNNING, JobStatus.SUCCEEDED]
    shown, parts = [], [["one ", "two "], ["one two ", "three"]]

    async def tail(name):
        for text in parts.pop(0):
            yield text
        if parts:
            raise RuntimeError("WebSocket connection closed unexpectedly")

    client = SimpleNamespace(
        tail_job_logs=tail,
        get_job_info=lambda name: SimpleNamespace(submission_id="x", status=states.pop(0), driver_exit_code=0),
    )
    assert JobServer("", client).follow("x", shown.append) == 0
    assert "".join(shown) == "one two three"
