"""The seam through which vLLM writes on-policy responses; a stand-in takes its place, since it needs a GPU."""

import importlib.util
import inspect

import pytest
import torch
from pydantic import ValidationError
from tenfold.methods.dskd import on_policy
from tenfold.methods.dskd.collator import TeachingCollator
from tenfold.methods.dskd.config import DSKDConfig
from tenfold.methods.dskd.on_policy import Rollout
from tenfold.methods.dskd.vllm_rollout import VllmEngine, check_engine, engine_arguments, up_to_end
from tenfold.platform.errors import ConfigError
from tenfold.platform.models.options import GenerationOptions

EOS = 2


def options(student=None, **policy):
    return DSKDConfig.model_validate(
        {
            "student": student or {"model": "a"},
            "teacher": {"model": "b"},
            "data": {"train": [{"path": "c.json"}], "max_length": 8, "max_prompt_length": 5},
            "objective": "kl",
            "teacher_mode": "live",
            "on_policy": {"engine": "vllm", "temperature": 0.7, "top_p": 0.9, **policy},
        }
    )


class StandIn:
    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def generate(self, prompts, seed):
        self.asked.append((prompts, seed))
        return self.answers


@pytest.fixture
def batch():
    ids = torch.tensor([[5, 6, 7, 8, EOS], [9, 10, 11, EOS, 0]])
    labels = torch.tensor([[-100, -100, 7, 8, EOS], [-100, -100, -100, EOS, -100]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def test_what_the_engine_writes_becomes_the_batch(tiny_tokenizer, batch, monkeypatch):
    def never(*arguments, **more):
        raise AssertionError("transformers was asked")

    monkeypatch.setattr(on_policy, "generate_tokens", never)
    rollout = Rollout(options(), tiny_tokenizer, None, TeachingCollator(0, 0), seed=1)
    rollout.engine = StandIn([[20, 21, EOS], [30, 31, 32, 33, 34, 35]])
    found = rollout.generate(None, batch, seed=77)
    assert rollout.engine.asked == [([[5, 6], [9, 10, 11]], 77)]
    # cut at max_length = 8; the response that ended has its EOS as a label
    assert found["input_ids"].tolist() == [[5, 6, 20, 21, EOS, 0, 0, 0], [9, 10, 11, 30, 31, 32, 33, 34]]
    no = -100
    assert found["labels"].tolist() == [[no, no, 20, 21, EOS, no, no, no], [no, no, no, 30, 31, 32, 33, 34]]
    assert found["attention_mask"].sum(1).tolist() == [5, 8]


def test_the_engine_is_started_only_where_it_is_asked_for(tiny_tokenizer, monkeypatch):
    started = []
    monkeypatch.setattr(on_policy, "VllmEngine", lambda *arguments: started.append(arguments) or "engine")
    for name in ("transformers", "vllm"):
        rollout = Rollout(options(engine=name), tiny_tokenizer, None, TeachingCollator(0, 0), seed=1)
        rollout.start_engine("model", "accelerator")
    assert rollout.engine == "engine"
    ((config, generation, *rest),) = started
    assert rest == ["model", "accelerator", tiny_tokenizer]
    assert (generation.max_new_tokens, generation.temperature) == (8 - 5, 0.7)
    assert config.on_policy.engine == "vllm"


def test_arguments_fit_trls_class_and_say_what_is_sampled():
    from trl.generation.vllm_generation import VLLMGeneration

    generation = GenerationOptions(max_new_tokens=3, temperature=0.7, top_p=0.9, top_k=4)
    arguments = engine_arguments(options(vllm_memory=0.4), generation)
    inspect.signature(VLLMGeneration.__init__).bind(None, "model", "accelerator", "tokenizer", **arguments)
    inspect.signature(VLLMGeneration.generate).bind(None, prompts=[[1]], images=None, num_generations=1)
    sampled = {name: arguments[name] for name in ("temperature", "top_p", "top_k", "max_completion_length")}
    assert sampled == {"temperature": 0.7, "top_p": 0.9, "top_k": 4, "max_completion_length": 3}
    assert (arguments["max_model_length"], arguments["gpu_memory_utilization"]) == (8, 0.4)
    # without it the weights would be those of the start
    assert arguments["enable_sleep_mode"] is True


def test_an_answer_ends_with_its_first_end_token():
    assert up_to_end([4, 5, EOS, 6, EOS], [EOS, 9]) == [4, 5, EOS]
    assert up_to_end([4, 9, 5], [EOS, 9]) == [4, 9]
    assert up_to_end([4, 5], [EOS]) == [4, 5]
    assert up_to_end([], [EOS]) == []


def test_missing_packages_are_named_with_their_extras(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else found(name))
    with pytest.raises(ConfigError, match=r"vllm not installed here. Install tenfold\[gpu,align\]"):
        check_engine(options())
    with pytest.raises(ConfigError, match=r"tenfold\[gpu,align\]"):
        VllmEngine(options(), GenerationOptions(), None, None, None)
    check_engine(options(engine="transformers"))


def test_a_student_without_a_folder_and_an_adapter_are_refused():
    fresh = {"config": {"model_type": "llama"}, "tokenizer": "t"}
    with pytest.raises(ValidationError, match="a fresh one"):
        options(fresh)
    assert options(fresh, engine="transformers").on_policy.engine == "transformers"
    with pytest.raises(ValidationError, match="not an adapter"):
        DSKDConfig.model_validate(options().model_dump() | {"lora": {}})
