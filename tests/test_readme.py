"""Every command that README.md shows is run by a test: EXECUTED says by which, and most of those tests are here."""

import ast
import contextlib
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
PROGRAMS = ("tenfold", "make", "mlflow", "ray", "serve")
START_SECONDS = 300
SECONDS = 600

# Command as README.md shows it -> FILE::TEST that runs it, or a part of it that takes less time. A new command needs
# a line.
HERE = "tests/test_readme.py::"
EXECUTED = {
    "make demo": HERE + "test_the_demo_trains_compares_and_answers",
    "make test": HERE + "test_make_test_runs_all_tests",
    "make cluster-demo": "tests/deploy/test_cluster_demo.py::"
    "test_the_cluster_grows_from_nothing_to_two_nodes_and_back",
    "make chaos SEED=3": "tests/chaos/test_chaos.py::"
    "test_a_training_that_loses_workers_nodes_store_and_tracker_ends_as_if_undisturbed",
    "tenfold doctor": HERE + "test_doctor_finds_this_machine_fit",
    "tenfold methods": HERE + "test_methods_are_listed",
    "tenfold methods dskd": HERE + "test_methods_are_listed",
    "tenfold run dskd/demo --plan": HERE + "test_a_plan_starts_nothing",
    "tenfold run dskd/demo config.objective=kl config.training.max_steps=50": HERE + "test_a_plan_starts_nothing",
    "tenfold sweep dskd/sweep_objectives": "tests/platform/tuning/test_study.py::"
    "test_a_sweep_stops_poor_trials_early_and_goes_on_after_failures",
    "tenfold sweep dskd/sweep_seeds": HERE + "test_a_plan_starts_nothing",
    "tenfold sweep dskd/cross_vocabulary": HERE + "test_a_plan_starts_nothing",
    "tenfold run aligndistil/demo": "tests/methods/test_contract.py::test_method_runs_saves_resumes_and_evaluates",
    "tenfold sweep aligndistil/compare": HERE + "test_a_plan_starts_nothing",
    "tenfold run layermoe/demo": "tests/methods/test_contract.py::test_method_runs_saves_resumes_and_evaluates",
    "tenfold sweep layermoe/expert_budget": HERE + "test_a_plan_starts_nothing",
    "tenfold run gates/demo": HERE + "test_a_section_is_analysed_and_exported",
    "tenfold sweep gates/compare": HERE + "test_a_plan_starts_nothing",
    "tenfold sweep gates/fusion": HERE + "test_a_plan_starts_nothing",
    "serve run serve/serve.yaml": HERE + "test_the_configuration_file_serves_models_and_sections",
    "tenfold compare RUN RUN": HERE + "test_commands_for_runs",
    "tenfold evaluate RUN": HERE + "test_commands_for_runs",
    "tenfold export RUN folder/": HERE + "test_commands_for_runs",
    "tenfold serve RUN": HERE + "test_a_served_run_answers_over_http",
    "tenfold submit dskd/demo --address http://HEAD:8265": "tests/test_job_submission.py::"
    "test_a_run_whose_head_was_lost_is_submitted_again_and_resumes",
    "ray job submit ... -- tenfold run dskd/demo": "tests/test_job_submission.py::"
    "test_a_submitted_run_uses_the_sent_tree_and_the_running_cluster",
    "mlflow ui --backend-store-uri sqlite:///mlflow.db": HERE + "test_mlflow_shows_its_page",
}

# What makes the demo's two trainings take seconds.
SMALL = [
    "compute.workers=1",
    "config.training.max_steps=2",
    "config.data.max_train_rows=16",
    "config.data.max_validation_rows=4",
    "config.evaluation.max_rows=2",
]


def shown_commands(text):
    """Commands in code blocks (indented or fenced) and between backticks."""
    blocks = re.findall(r"^(?: {4}|\t)(.+)$", text, re.MULTILINE)
    for fenced in re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        blocks += fenced.splitlines()
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    lines = [re.sub(r"\s+#.*", "", line).strip().removeprefix("$ ") for line in blocks + spans]
    return {line for line in lines if line.partition(" ")[0] in PROGRAMS and " " in line}


@pytest.fixture(scope="module")
def folder(short_folder, tracking_uri):
    tracking_uri(short_folder)  # the demo's own would be made here
    return short_folder


@pytest.fixture(scope="module")
def env(folder):
    kept = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    (folder / "ray").mkdir()
    return kept | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_TMPDIR": str(folder / "ray"),  # joins no cluster of this machine
        "COLUMNS": "200",
    }


@pytest.fixture(scope="module")
def shell(folder, env):
    """Run a command in a folder outside the repository; returns what it printed."""

    def run(command, *more, cwd=folder):
        done = subprocess.run(
            [*command.split(), *more], cwd=cwd, env=env, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


@contextlib.contextmanager
def server(command, url, folder, env):
    """Start a command that serves until it is stopped; yields the page at `url`, once there is one."""
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            command.split(), cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True
        )
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < end, (folder / "server.log").read_text()
            try:
                with urllib.request.urlopen(url, timeout=10) as answer:
                    assert answer.status == 200
                    page = answer.read().decode()
                break
            except OSError:
                time.sleep(0.5)
        yield page
    finally:
        for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)


def test_every_command_of_the_readme_is_run_by_a_test_and_none_is_stale():
    shown = shown_commands((REPOSITORY / "README.md").read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(EXECUTED)


@pytest.mark.parametrize("test", sorted(set(EXECUTED.values())))
def test_the_test_that_runs_a_command_exists(test):
    path, _, name = test.partition("::")
    tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_commands_are_found_in_blocks_tables_and_text():
    text = (
        "Do `make it` or\n\n    tenfold run a/b  # why\n    echo no\n\n| `ray job submit -- x` | `tenfold` |\n"
        "```bash\n$ mlflow ui\n```\n"
    )
    assert shown_commands(text) == {"make it", "tenfold run a/b", "ray job submit -- x", "mlflow ui"}


def test_links_of_the_readme_lead_to_files():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


def test_help_takes_less_than_two_seconds_of_the_processor(folder, env):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(["tenfold", "--help"], cwd=folder, env=env, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "--help" in done.stdout
    # Not the clock: other work on this machine must not fail the test.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0


def test_help_and_methods_import_nothing_heavy(shell):
    for arguments in (["--help"], ["run", "--help"], ["methods", "dskd"]):
        code = (
            f"import sys; sys.argv = ['tenfold', *{arguments!r}]\nfrom tenfold.platform import cli\n"
            "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
            "print(sorted({'torch', 'ray', 'transformers', 'deepspeed', 'mlflow'} & set(sys.modules)))"
        )
        assert shell(sys.executable, "-c", code).splitlines()[-1] == "[]", arguments


def test_methods_are_listed(shell):
    assert "dskd" in shell("tenfold methods")
    assert "config.objective" in shell("tenfold methods dskd")
    [fact] = json.loads(shell("tenfold methods dskd --json"))
    assert (fact["name"], "dskd/demo" in fact["experiments"]) == ("dskd", True)


def test_make_test_runs_all_tests():
    """The command itself runs this test; a dry run shows that it leaves none out."""
    done = subprocess.run(
        ["make", "-n", "--no-print-directory", "test"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    commands = [line for line in done.stdout.splitlines() if "-m pytest" in line]
    assert [shlex.split(line.partition(" || ")[0])[:5] for line in commands] == [
        [".venv/bin/python", "-m", "pytest", "-m", which] for which in ("not ray", "ray")
    ]


@pytest.mark.parametrize(
    "command",
    [
        "tenfold run dskd/demo --plan",
        "tenfold run dskd/demo config.objective=kl config.training.max_steps=50 --plan",
        "tenfold sweep dskd/sweep_objectives --plan",
        "tenfold sweep dskd/sweep_seeds --plan",
        "tenfold sweep dskd/cross_vocabulary --plan",
        "tenfold sweep aligndistil/compare --plan",
        "tenfold sweep gates/compare --plan",
        "tenfold sweep gates/fusion --plan",
    ],
)
def test_a_plan_starts_nothing(tenfold, tmp_path, command):
    code, output, errors = tenfold(*command.split()[1:])
    assert code == 0, errors
    assert "the plan fits; nothing was started" in output
    assert ("310" in output) == (command.split()[2] in ("dskd/demo", "dskd/sweep_seeds") and "=50" not in command)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.ray
def test_doctor_finds_this_machine_fit(shell):
    assert "a local cluster starts" in shell("tenfold doctor").replace("\n", " ")


@pytest.mark.slow
def test_mlflow_shows_its_page(folder, env, free_port):
    [command] = [command for command in EXECUTED if command.startswith("mlflow ui")]
    port = free_port()
    with server(f"{command} --port {port}", f"http://127.0.0.1:{port}/", folder, env) as page:
        assert "MLflow" in page


def demo_lines():
    """The commands of `make demo`, as the Makefile has them."""
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE).group(1)
    return re.findall(r"^\t\$\(BIN\)/(tenfold .+)$", recipe, re.MULTILINE)


@pytest.fixture(scope="module")
def demo(shell, folder):
    """Run the demo's trainings on a small part of its data; returns the two runs' ids."""
    for line in demo_lines():
        if line.startswith("tenfold run "):
            shell(line, *SMALL)
    distilled, plain = sorted(path.parent.name for path in (folder / "runs").glob("*/run.json"))
    return distilled, plain


@pytest.mark.slow
@pytest.mark.ray
def test_the_demo_trains_compares_and_answers(demo, shell, folder, free_port):
    for run, name in zip(demo, ("demo-distilled", "demo-sft"), strict=True):
        assert run.startswith(f"{name}-")
        assert json.loads((folder / "runs" / run / "run.json").read_text())["status"] == "finished"
    others = [line for line in demo_lines() if not line.startswith("tenfold run ")]
    assert [line.split()[1] for line in others] == ["compare", "serve"]
    compared = shell(others[0])
    assert all(run in compared for run in demo)
    assert "eval/perplexity" in compared
    command, question = others[1].split(' "')
    answer = shell(command, question.removesuffix('"'), "--port", str(free_port()))
    assert "Convert 45 kilometers to meters.\n-> " in answer


@pytest.mark.slow
@pytest.mark.ray
def test_commands_for_runs(demo, shell, folder):
    distilled, plain = demo
    compared = shell(f"tenfold compare {distilled} {plain}")
    assert "eval/rouge_l" in compared
    state = json.loads((folder / "runs" / plain / "run.json").read_text())
    assert f"{state['metrics']['eval/perplexity']:.4g}" in compared
    assert f"{state['metrics']['eval/perplexity']:.4g}" in shell(f"tenfold evaluate {plain}")
    assert "verified" in shell(f"tenfold export {plain} folder/")
    code = (
        "import sys, transformers\n"
        "print(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).num_parameters())"
    )
    assert int(shell(sys.executable, "-c", code, str(folder / "folder")).split()[-1]) > 10**6


@pytest.mark.slow
@pytest.mark.ray
def test_a_section_is_analysed_and_exported(shell, tmp_path):
    few = "config.sections=[{path: 'synthetic:200', labels: domain}]"
    assert "eval/ari" in shell("tenfold run gates/demo", few, "config.epochs=2", cwd=tmp_path)
    [run] = [path.parent.name for path in (tmp_path / "runs").glob("*/run.json")]
    assert "eval/ari" in shell(f"tenfold evaluate {run}", cwd=tmp_path)
    assert "verified" in shell(f"tenfold export {run} folder/", cwd=tmp_path)
    assert {"clusters.npz", "model.safetensors", "gates.json"} <= {
        path.name for path in (tmp_path / "folder").iterdir()
    }


@pytest.mark.slow
@pytest.mark.ray
def test_a_served_run_answers_over_http(demo, folder, env, free_port):
    run, port = demo[0], free_port()
    with server(f"tenfold serve {run} --port {port}", f"http://127.0.0.1:{port}/v1/models", folder, env) as page:
        assert [model["id"] for model in json.loads(page)["data"]] == [run]
        body = {"model": run, "messages": [{"role": "user", "content": "Say it."}], "max_tokens": 4}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.loads(answer.read())["usage"]["completion_tokens"] > 0


@pytest.mark.slow
@pytest.mark.ray
def test_the_configuration_file_serves_models_and_sections(folder, env, free_port):
    port, text = free_port(), (REPOSITORY / "serve" / "serve.yaml").read_text(encoding="utf-8")
    # the file as it is, but for a port that is free and a storage that goes away
    text = text.replace("port: 8000", f"port: {port}").replace("~/.tenfold/spatial", str(folder / "sections"))
    (folder / "serve.yaml").write_text(text, encoding="utf-8")
    with server("serve run serve.yaml", f"http://127.0.0.1:{port}/spatial/", folder, env) as page:
        assert "Tissue domains" in page
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=60) as answer:
            assert [model["id"] for model in json.load(answer)["data"]] == ["stories"]
