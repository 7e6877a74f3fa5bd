"""The seam through which vLLM writes on-policy responses; a stand-in takes its place, since it needs a GPU."""

import importlib.util
import inspect
from types import SimpleNamespace

import pytest
from tenfold.platform.errors import ConfigError
from tenfold.platform.models.options import GenerationOptions
from tenfold.platform.models.vllm_rollout import VllmEngine, check_engine, engine_arguments

EOS = 2
PLACE = {"memory": 0.4, "max_prompt_length": 5}


def test_arguments_fit_trls_class_and_say_what_is_sampled():
    from trl.generation.vllm_generation import VLLMGeneration

    generation = GenerationOptions(max_new_tokens=3, temperature=0.7, top_p=0.9, top_k=4)
    arguments = engine_arguments(generation, **PLACE)
    inspect.signature(VLLMGeneration.__init__).bind(None, "model", "accelerator", "tokenizer", **arguments)
    inspect.signature(VLLMGeneration.generate).bind(None, prompts=[[1]], images=None, num_generations=1)
    sampled = {name: arguments[name] for name in ("temperature", "top_p", "top_k", "max_completion_length")}
    assert sampled == {"temperature": 0.7, "top_p": 0.9, "top_k": 4, "max_completion_length": 3}
    assert (arguments["max_model_length"], arguments["gpu_memory_utilization"]) == (8, 0.4)
    # without it the weights would be those of the start
    assert arguments["enable_sleep_mode"] is True


def test_an_engine_asks_trl_with_seed_and_ends_and_cuts_after_the_first(monkeypatch):
    asked = []

    class Stand:
        def __init__(self, *arguments, **settings):
            asked.append(arguments)

        def generate(self, prompts, images, num_generations):
            asked.append((prompts, dict(self.generation_kwargs)))
            return prompts, [[7, 9, 8], [7, 8]], None, None

    monkeypatch.setattr("tenfold.platform.models.vllm_rollout.check_engine", lambda name: None)
    monkeypatch.setattr("trl.generation.vllm_generation.VLLMGeneration", Stand)
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=9))
    tokenizer = SimpleNamespace(eos_token_id=EOS)
    generation = GenerationOptions(max_new_tokens=3, min_new_tokens=1)
    engine = VllmEngine(generation, model, "accelerator", tokenizer, **PLACE)
    assert engine.generate([(4, 5), (6,)], 77) == [[7, 9], [7, 8]]
    rules = {"seed": 77, "min_tokens": 1, "stop_token_ids": [EOS, 9]}
    assert asked == [(model, "accelerator", tokenizer), ([[4, 5], [6]], rules)]


def test_missing_packages_are_named_with_their_extras(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else found(name))
    with pytest.raises(
        ConfigError, match=r"config.engine = vllm: vllm not installed here. Install tenfold\[gpu,align\]"
    ):
        check_engine("config.engine")
    with pytest.raises(ConfigError, match=r"tenfold\[gpu,align\]"):
        VllmEngine(GenerationOptions(), None, None, None, **PLACE)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    check_engine("config.engine")
