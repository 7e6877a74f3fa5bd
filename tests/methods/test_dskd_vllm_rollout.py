"""What DSKD asks of vLLM and makes of its responses; a stand-in takes the engine's place, since it needs a GPU."""

import pytest
import torch
from pydantic import ValidationError
from tenfold.methods.dskd import on_policy
from tenfold.methods.dskd.collator import TeachingCollator
from tenfold.methods.dskd.config import DSKDConfig
from tenfold.methods.dskd.on_policy import Rollout

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
    monkeypatch.setattr(
        on_policy, "VllmEngine", lambda *arguments, **place: started.append((arguments, place)) or "engine"
    )
    for name in ("transformers", "vllm"):
        rollout = Rollout(options(engine=name), tiny_tokenizer, None, TeachingCollator(0, 0), seed=1)
        rollout.start_engine("model", "accelerator")
    assert rollout.engine == "engine"
    (((generation, *rest), place),) = started
    assert rest == ["model", "accelerator", tiny_tokenizer]
    assert (generation.max_new_tokens, generation.temperature) == (8 - 5, 0.7)
    assert place == {"memory": 0.3, "max_prompt_length": 5}


def test_a_student_without_a_folder_and_an_adapter_are_refused():
    fresh = {"config": {"model_type": "llama"}, "tokenizer": "t"}
    with pytest.raises(ValidationError, match="a fresh one"):
        options(fresh)
    assert options(fresh, engine="transformers").on_policy.engine == "transformers"
    with pytest.raises(ValidationError, match="not an adapter"):
        DSKDConfig.model_validate(options().model_dump() | {"lora": {}})
