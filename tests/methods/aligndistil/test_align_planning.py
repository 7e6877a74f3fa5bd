"""What the plan says and refuses before anything starts."""

import json

import pytest
from tenfold.methods.aligndistil.config import AlignDistilConfig
from tenfold.methods.aligndistil.planning import describe_run
from tenfold.platform.context import PlanContext
from tenfold.platform.errors import ConfigError
from tenfold.platform.experiment import Compute
from tenfold.platform.models.loading import load_tokenizer
from tenfold.platform.models.source import ModelSource
from tenfold.platform.storage import Storage

MODEL = {"model": "sample:models/stories260K"}
LONGEST = "Once upon a time there was a little girl who"


@pytest.fixture
def plan(tmp_path):
    """Return a function: options -> rows of the plan's sections by their titles."""
    path = tmp_path / "pairs.jsonl"
    prompts = [LONGEST, *(f"Tom {number}" for number in range(7))]
    answers = {"chosen": "a girl and a dog " * 9, "rejected": "c"}
    path.write_text("\n".join(json.dumps({"prompt": text, **answers}) for text in prompts))
    source = [{"path": str(path)}]
    data = {"train": source, "validation": source, "template": "none", "max_prompt_length": 30}

    def make(*, max_length=64, **more):
        own = {"model": MODEL, "data": data | {"max_length": max_length}, "training": {"max_steps": 2}, **more}
        context = PlanContext(1, Compute(), Storage(tmp_path))
        return {
            section.title: section.rows for section in describe_run(AlignDistilConfig.model_validate(own), context)
        }

    return make


@pytest.fixture(scope="module")
def longest():
    """Return the tokens of the longest prompt: more than of all the others, and fewer than `max_prompt_length`."""
    return len(load_tokenizer(ModelSource(**MODEL))(LONGEST, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("objective", ["aligndistil", "rto"])
def test_own_responses_that_max_length_has_no_room_for_are_refused(plan, longest, objective):
    own = {"objective": objective, "on_policy": {"max_new_tokens": 20}}
    assert plan(max_length=longest + 20, **own)
    with pytest.raises(ConfigError) as refused:
        plan(max_length=longest + 19, **own)
    told = str(refused.value)
    assert "config.on_policy.max_new_tokens = 20" in told
    assert f"{longest} tokens" in told
    assert f"{longest + 20} tokens, config.data.max_length is {longest + 19}" in told


def test_the_limit_is_what_the_prompts_need_and_not_what_they_may(plan, longest):
    assert longest < 30
    assert plan(max_length=49, on_policy={"max_new_tokens": 20})


def test_given_responses_are_cut_and_not_refused(plan):
    assert dict(plan(max_length=30)["preferences"])["responses cut at max_length"] == "8"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, ["dpo", "reverse", "policy"]),
        ({"objective": "simpo"}, ["dpo", "reverse", "simpo"]),
        ({"evaluation": {}}, ["dpo"]),
        ({"preference_training": {"max_steps": 5}}, ["dpo", "reverse", "dpo"]),
    ],
)
def test_a_policy_that_is_the_dpo_model_is_no_stage_of_its_own(plan, more, expected):
    rows = plan(**{"objective": "dpo", "evaluation": {"contrast_reward": True}} | more)["stages"]
    assert [name for name, _ in rows] == expected
    assert ("not trained twice" in rows[-1][1]) == (expected[-1] == "policy")
