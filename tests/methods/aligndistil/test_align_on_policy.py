"""Rollouts: what the policy writes becomes a batch; a stand-in takes the place of vLLM."""

import logging

import pytest
import torch
from tenfold.methods.aligndistil import on_policy
from tenfold.methods.aligndistil.config import AlignDistilConfig
from tenfold.methods.aligndistil.on_policy import Rollout
from tenfold.platform.data.collator import CausalCollator
from torch.nn.functional import softmax

PAD, EOS, NO = 0, 2, -100


def options(**policy):
    data = {"train": [{"path": "p.jsonl"}], "max_length": 16, "max_prompt_length": 5}
    return AlignDistilConfig.model_validate({"model": {"model": "a"}, "data": data, "on_policy": policy})


class StandIn:
    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def generate(self, prompts, seed):
        self.asked.append((prompts, seed))
        return self.answers.pop(0)


@pytest.fixture
def batch():
    return CausalCollator(PAD)([{"input_ids": ids, "labels": [NO] * len(ids)} for ids in ([5, 6], [9, 10, 11])])


@pytest.fixture
def rollout(tiny_tokenizer):
    return lambda **policy: Rollout(options(**policy), tiny_tokenizer, CausalCollator(PAD), seed=1)


def test_what_an_engine_writes_becomes_the_batch_with_labels_on_the_response(rollout, batch, monkeypatch):
    monkeypatch.setattr(on_policy, "generate_tokens", None)
    writer = rollout(engine="vllm", max_new_tokens=3)
    writer.engine = StandIn([[20, 21, EOS], [30]])
    found = writer.generate(None, batch, seed=77)
    assert writer.engine.asked == [([[5, 6], [9, 10, 11]], 77)]
    assert found["input_ids"].tolist() == [[5, 6, 20, 21, EOS], [9, 10, 11, 30, PAD]]
    assert found["labels"].tolist() == [[NO, NO, 20, 21, EOS], [NO, NO, NO, 30, NO]]
    assert found["attention_mask"].sum(1).tolist() == [5, 4]


def test_samples_of_one_prompt_stand_together_and_an_engine_draws_each_with_another_seed(rollout, batch):
    writer = rollout(engine="vllm", samples_per_prompt=2)
    writer.engine = StandIn([[20], [30]], [[21], [31]])
    found = writer.generate(None, batch, seed=77)
    assert [seed for _, seed in writer.engine.asked] == [77, 78]
    starts = [[5, 6, 20], [5, 6, 21], [9, 10, 11, 30], [9, 10, 11, 31]]
    assert [ids[: len(start)] for ids, start in zip(found["input_ids"].tolist(), starts, strict=True)] == starts


def test_a_seed_decides_what_is_written_and_the_global_state_is_untouched(rollout, batch, tiny_llama):
    writer, model = rollout(max_new_tokens=6, samples_per_prompt=3), tiny_llama().train()
    before = torch.random.get_rng_state()
    first, again, other = (writer.generate(model, batch, seed=seed)["input_ids"] for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    # the samples of a prompt are drawn each for itself
    assert len({tuple(row) for row in first[:3].tolist()}) == 3


def test_seeds_differ_between_steps_passes_and_ranks(rollout):
    writer = rollout()
    seeds = {writer.seed_of(*place) for place in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
    assert len(seeds) == 4
    assert writer.seed_of(3, 1, 0) == rollout().seed_of(3, 1, 0)


def test_nothing_stands_after_the_first_end_and_it_is_a_label(rollout, batch, tiny_llama):
    model = tiny_llama()
    model.lm_head = torch.nn.Linear(32, 320)
    with torch.no_grad():  # the first four tokens are equally probable: one pads, one ends
        model.lm_head.weight.zero_()
        model.lm_head.bias.fill_(-100)[:4] = 0
    writer = rollout(max_new_tokens=8, samples_per_prompt=20)
    found = writer.generate(model, batch, seed=3)
    cut = writer.truncated(model, found)
    for ids, labels, is_cut in zip(found["input_ids"], found["labels"], cut, strict=True):
        response = labels[labels != NO].tolist()
        assert (EOS in response) != is_cut
        assert EOS not in response[:-1]
        assert len(response) == 8 or not is_cut
        assert response == ids[labels != NO].tolist()
    assert 0 < cut.sum() < len(cut)
    assert (found["input_ids"][found["labels"] != NO] == PAD).any()


def test_tokens_are_drawn_from_the_policy_itself(rollout, tiny_llama):
    model = tiny_llama().eval()
    prompt = torch.tensor([[5, 6, 7]])
    rows = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    found = rollout(max_new_tokens=1, samples_per_prompt=4000).generate(model, rows, seed=1)
    with torch.no_grad():
        expected = softmax(model(prompt).logits[0, -1], -1)
    expected[EOS] = 0  # a response has one token at least
    share = torch.bincount(found["input_ids"][:, 3], minlength=len(expected)) / 4000
    # four standard deviations of a share
    assert ((share - expected / expected.sum()).abs() < 4 * (expected / 4000).sqrt() + 1e-3).all()


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_the_engine_is_started_only_where_it_is_asked_for(rollout, tiny_tokenizer, monkeypatch, engine):
    started = []
    monkeypatch.setattr(on_policy, "VllmEngine", lambda *arguments, **place: started.append((arguments, place)))
    rollout(engine=engine, temperature=0.7).start_engine("model", "accelerator")
    if engine == "transformers":
        assert started == []
        return
    (((generation, *rest), place),) = started
    assert rest == ["model", "accelerator", tiny_tokenizer]
    assert (generation.max_new_tokens, generation.min_new_tokens, generation.temperature) == (1024, 1, 0.7)
    assert place == {"memory": 0.3, "max_prompt_length": 5}


@pytest.mark.parametrize(
    ("how", "is_told"),
    [({}, False), ({"temperature": 0.7}, True), ({"top_p": 0.9}, True), ({"top_k": 5}, True)],
)
def test_responses_that_are_not_the_policys_own_are_told(rollout, caplog, how, is_told):
    with caplog.at_level(logging.INFO):
        rollout(**how)
    assert ("not from the policy itself" in caplog.text) == is_told


def test_a_response_is_not_cut_to_max_length(rollout, batch):
    writer = rollout(engine="vllm", max_new_tokens=20)
    writer.engine = StandIn([list(range(20, 40)), [30]])
    found = writer.generate(None, batch, seed=1)
    assert found["attention_mask"].sum(1).tolist() == [22, 4]  # max_length is 16: the plan refuses such options
