"""The server's configuration: what is refused before anything starts."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tenfold.platform.errors import ConfigError, ModelError
from tenfold.serve.config import ApiKeys, parse_config

MODEL = {"name": "m", "model": "somewhere"}


def refused(data):
    with pytest.raises(ConfigError) as caught:
        parse_config(data)
    return str(caught.value)


def test_one_model_is_enough():
    config = parse_config({"models": [MODEL]})
    assert config.engine == "transformers"
    assert config.api_keys is None


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "models: missing"),
        ({"models": []}, "at least 1 item"),
        ({"models": [MODEL, MODEL]}, "two models have the name m"),
        ({"models": [MODEL | {"max_contxt": 8}]}, "did you mean models.0.max_context?"),
        ({"models": [MODEL], "limits": {"max_running": 0}}, "limits.max_running = 0"),
        ({"models": [MODEL], "replicas": {"min": 3, "max": 2}}, "max = 2 is less than min = 3"),
        ({"models": [MODEL], "api_keys": {}}, "exactly one of env and file"),
        ({"models": [MODEL], "api_keys": {"keys": ["secret"]}}, "unknown key"),
        ({"models": [MODEL], "engine": "vllm", "api_keys": {"env": "KEYS"}}, "does not know api_keys"),
        ({"models": [MODEL | {"cache_gb": 2.0}], "engine": "vllm"}, "does not know models.0.cache_gb"),
        ({"models": [MODEL], "engine": "vllm", "replicas": {"gpus": 0.5}}, "whole GPUs"),
    ],
)
def test_a_wrong_configuration_is_refused_with_key_and_reason(data, words):
    assert words in refused(data)


def test_all_errors_are_named_at_once():
    message = refused({"models": [MODEL | {"dtype": "int3"}], "limits": {"max_messages": 0}, "engin": "vllm"})
    assert all(key in message for key in ("models.0.dtype", "limits.max_messages", "engin = "))


def test_keys_come_from_an_environment_variable(monkeypatch):
    monkeypatch.setenv("MY_KEYS", "first, second,")
    assert ApiKeys(env="MY_KEYS").load() == ["first", "second"]


def test_keys_come_from_a_file_with_comments(tmp_path):
    (tmp_path / "keys").write_text("# team A\nfirst\n\nsecond  # of team B\n")
    assert ApiKeys(file=str(tmp_path / "keys")).load() == ["first", "second"]


def test_a_missing_variable_or_file_is_an_error_not_an_open_server(monkeypatch, tmp_path):
    monkeypatch.delenv("MY_KEYS", raising=False)
    with pytest.raises(ConfigError, match=r"api_keys.env = 'MY_KEYS': holds no key"):
        ApiKeys(env="MY_KEYS").load()
    with pytest.raises(ConfigError, match="cannot be read"):
        ApiKeys(file=str(tmp_path / "none")).load()
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(ConfigError, match="holds no key"):
        ApiKeys(file=str(tmp_path / "empty")).load()


def test_the_cache_is_bounded_by_memory_and_by_what_can_be_used():
    from tenfold.serve.engine import PAGE_SIZE, num_cache_blocks

    block_bytes = 1024 * PAGE_SIZE
    forty = 40.5 * block_bytes / 2**30
    assert num_cache_blocks(1024, cache_gb=forty, max_context=10 * PAGE_SIZE, max_running=16) == 40
    assert num_cache_blocks(1024, cache_gb=forty, max_context=10 * PAGE_SIZE, max_running=3) == 30


def test_a_cache_too_small_for_one_request_names_both_numbers():
    from tenfold.serve.engine import PAGE_SIZE, num_cache_blocks

    with pytest.raises(ConfigError, match=r"holds the keys and values of 320 tokens, max_context = 321 needs 0\.344"):
        num_cache_blocks(2**20, cache_gb=320 / 1024, max_context=10 * PAGE_SIZE + 1, max_running=4)


def test_cache_bytes_count_keys_and_values_of_all_layers(tiny_llama):
    import torch
    from tenfold.serve.engine import cache_bytes_per_token

    config = tiny_llama(hidden=32, layers=3).config  # 2 key-value heads of 16
    assert cache_bytes_per_token(config, torch.float32) == 2 * 3 * 2 * 16 * 4
    assert cache_bytes_per_token(config, torch.bfloat16) == 2 * 3 * 2 * 16 * 2


def test_the_shipped_serve_file_is_valid_for_serve_and_for_us():
    from ray.serve.schema import ServeDeploySchema
    from tenfold.serve.app import build

    file = Path(__file__).parents[2] / "serve" / "serve.yaml"
    schema = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text()))
    (application,) = [found for found in schema.applications if found.route_prefix == "/"]
    assert application.import_path == "tenfold.serve.app:build"
    assert schema.http_options.host == "127.0.0.1"
    assert parse_config(application.args).models[0].model == "sample:models/stories260K"
    assert build(application.args)._bound_deployment.name == "LanguageModels"


def test_limits_and_replicas_reach_the_deployment():
    from tenfold.serve.app import build

    data = {
        "models": [MODEL],
        "limits": {"max_running": 3, "max_waiting": 5, "retry_after_s": 7},
        "replicas": {"min": 2, "max": 4, "cpus": 1.5, "drain_s": 9},
    }
    deployment = build(data)._bound_deployment
    assert deployment.max_ongoing_requests >= 8
    assert deployment.backpressure_config.status_code == 429
    assert deployment.backpressure_config.retry_after_s == 7
    assert deployment.ray_actor_options["num_cpus"] == 1.5
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 4, 3)
    assert deployment._deployment_config.graceful_shutdown_timeout_s == 9


def test_vllm_that_is_not_installed_names_the_extra():
    from importlib.util import find_spec

    from tenfold.serve.app import build

    if find_spec("vllm") is not None:
        pytest.skip("vllm is installed here")
    with pytest.raises(ConfigError, match=r"pip install 'tenfold\[gpu\]'"):
        build({"models": [MODEL], "engine": "vllm"})


def test_a_missing_model_is_found_before_ray_is_started(tmp_path):
    import ray
    from tenfold.serve.launch import run_server

    config = parse_config({"models": [{"name": "m", "model": str(tmp_path / "nothing")}]})
    with pytest.raises(ModelError, match="nothing"):
        run_server(config, blocking=False)
    assert not ray.is_initialized()


def test_places_are_fixed_before_they_go_to_other_processes(tiny_model_folder, tmp_path, monkeypatch):
    from tenfold.serve.launch import _with_fixed_places

    monkeypatch.chdir(tiny_model_folder.parent)
    data = {"models": [{"name": "m", "model": tiny_model_folder.name}], "api_keys": {"file": "keys"}}
    fixed = _with_fixed_places(parse_config(data))
    assert fixed.models[0].model == str(tiny_model_folder)
    assert fixed.api_keys.file == str(tiny_model_folder.parent / "keys")
    # What was not said stays unsaid: engine: vllm refuses options that it does not know.
    assert fixed.models[0].model_fields_set == {"name", "model"}


def test_the_configuration_is_checked_without_heavy_imports():
    code = (
        "import sys, tenfold.serve.config, tenfold.serve.launch; "
        "print([name for name in ('torch', 'transformers', 'ray', 'fastapi') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_vllm_is_not_asked_for_an_architecture_of_a_method(tmp_path):
    from tenfold.serve.launch import _with_fixed_places

    (tmp_path / "config.json").write_text('{"model_type": "layermoe-llama"}')
    config = parse_config({"engine": "vllm", "models": [{"name": "grown", "model": str(tmp_path)}]})
    with pytest.raises(ConfigError, match="grown: engine vllm has no layermoe-llama model; use engine: transformers"):
        _with_fixed_places(config)
