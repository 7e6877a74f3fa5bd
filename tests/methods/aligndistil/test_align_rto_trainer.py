"""RTO's steps through the Trainer: exact means, own responses alone, two learning rates, a toy preference."""

import itertools

import pytest
import torch
from tenfold.methods.aligndistil.config import AlignDistilConfig
from tenfold.methods.aligndistil.on_policy import Rollout
from tenfold.methods.aligndistil.rto_module import Critic, RTOModule
from tenfold.methods.aligndistil.rto_trainer import RTOTrainer, load_critic, rto_metrics
from tenfold.platform.data.collator import CausalCollator
from tenfold.platform.errors import ModelError
from tenfold.platform.models.loading import load_tokenizer
from tenfold.platform.models.randomness import seeded
from tenfold.platform.models.source import ModelSource
from transformers import EvalPrediction

PAD, EOS, NO = 0, 2, -100
COLLATE = CausalCollator(PAD)


def options(*, rto=None, passes=1, rows=4, steps=2, rate=1e-2, **on_policy):
    training = {"max_steps": steps, "per_device_train_batch_size": rows, "gradient_accumulation_steps": passes}
    training |= {"learning_rate": rate, "adam_epsilon": 1e-4, "logging_steps": 1, "lr_scheduler_type": "constant"}
    training |= {"eval_strategy": "no", "save_strategy": "no", "train_sampling_strategy": "sequential"}
    return AlignDistilConfig.model_validate(
        {
            "model": {"model": "none"},
            "objective": "rto",
            "data": {"train": [{"path": "none.jsonl"}]},
            "on_policy": on_policy,
            "rto": {"critic_learning_rate": 3e-2, **(rto or {})},
            "training": training,
            "loss_chunk_rows": 5,
        }
    )


class Scripted(Rollout):
    """Writes what the prompt alone decides, of unequal lengths, and notes the policy that it was given."""

    def __init__(self, config):
        super().__init__(config, None, COLLATE, 1)
        self.seeds, self.policies = [], []

    def generate(self, model, batch, seed):
        self.seeds.append(seed)
        self.policies.append(model.lm_head.weight.detach().clone())
        sizes = batch["attention_mask"].sum(1).tolist()
        prompts = [ids[:size] for ids, size in zip(batch["input_ids"].tolist(), sizes, strict=True)]
        answers = [[3 + (sum(prompt) * k) % 17 for k in range(1, 2 + sum(prompt) % 5)] for prompt in prompts]
        return COLLATE(
            [
                {"input_ids": prompt + answer, "labels": [NO] * len(prompt) + answer}
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
        )

    def truncated(self, model, batch):
        return torch.zeros(len(batch["labels"]), dtype=torch.bool)


@pytest.fixture
def trainer_of(local_arguments, tiny_llama):
    def make(config, rollout, frozen=None, prompts=16, policy=None):
        frozen = frozen or {"dpo": tiny_llama(seed=2, tied=False), "reference": tiny_llama(seed=1, tied=False)}
        for model in frozen.values():
            with torch.no_grad():
                model.lm_head.weight.mul_(10)
            model.requires_grad_(False).eval()
        module = RTOModule(
            policy or tiny_llama(seed=1, tied=False),
            config,
            frozen,
            num_columns=320,
            critic=Critic(tiny_llama(seed=4)),
        )
        rows = [{"input_ids": [5, 7 + n, 9][: 1 + n % 3], "labels": [NO] * (1 + n % 3)} for n in range(prompts)]
        return RTOTrainer(
            model=module,
            args=local_arguments(config.training),
            train_dataset=rows,
            data_collator=COLLATE,
            projector_learning_rate=config.rto.critic_learning_rate,
            rollout=rollout,
            compared=[],
        )

    return make


def trained(trainer):
    with seeded(1):
        trainer.train()
    return trainer


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


STATISTICS = ("policy_loss", "value_loss", "rto_reward", "kl_reference", "advantage_std", "value", "response_length")


def test_steps_do_not_depend_on_the_accumulation(trainer_of):
    whole, split = (
        trained(trainer_of(config, Scripted(config)))
        for config in (options(rows=rows, passes=4 // rows, steps=3) for rows in (4, 1))
    )
    assert logged(whole) == pytest.approx(logged(split), rel=1e-4)
    assert len(set(logged(whole))) == 3
    for name in STATISTICS:
        assert logged(whole, name) == pytest.approx(logged(split, name), rel=1e-4, abs=1e-6), name
    for (name, one), other in zip(whole.model.named_parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=name)


def test_first_step_has_the_numbers_of_section_6(trainer_of):
    config = options(steps=1)
    trainer = trainer_of(config, Scripted(config))
    batch = Scripted(config).generate(trainer.model.exported, COLLATE(trainer.train_dataset[:4]), 0)
    seen = trainer.model.experience(**batch)
    lengths = (batch["labels"] != NO).sum(1).tolist()
    dense = 0.1 * (seen.log_dpo - seen.log_reference)
    rewards = (dense - 0.01 * (seen.log_policy - seen.log_reference)).double().split(lengths)
    advantages = []
    for row in rewards:  # the values are 0: an advantage is the sum of what is to come, 0.95 for each token more
        advantages.append([sum(0.95 ** (k - t) * row[k].item() for k in range(t, len(row))) for t in range(len(row))])
    flat = torch.tensor([a for row in advantages for a in row], dtype=torch.float64)
    mean, std = flat.mean().item(), flat.std(unbiased=False).item()
    policy = sum(-sum((a - mean) / std for a in row) / len(row) for row in advantages) / 4
    value = sum(0.5 * sum(a * a for a in row) / len(row) for row in advantages) / 4
    trained(trainer)
    assert logged(trainer, "policy_loss") == pytest.approx([policy], rel=1e-4)
    assert logged(trainer, "value_loss") == pytest.approx([value], rel=1e-4)
    assert logged(trainer) == pytest.approx([policy + value], rel=1e-4)
    assert logged(trainer, "rto_reward") == pytest.approx([dense.sum().item() / 4], rel=1e-4)
    assert logged(trainer, "advantage_std") == pytest.approx([std], rel=1e-4)
    assert logged(trainer, "response_length") == [sum(lengths) / 4]
    assert logged(trainer, "clipped") == [0.0]


def test_responses_are_written_with_the_weights_of_their_step_and_with_other_seeds_each_time(trainer_of):
    config = options(rows=2, passes=2, steps=3)
    rollout = Scripted(config)
    trained(trainer_of(config, rollout))
    first, second = rollout.policies[0::2], rollout.policies[1::2]
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(first))
    assert len(set(rollout.seeds)) == 6


def test_policy_and_critic_have_their_own_learning_rates(trainer_of):
    config = options(steps=1)
    trainer = trained(trainer_of(config, Scripted(config)))
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in trainer.model.exported.parameters()} == {1e-2}
    assert {rates[id(p)] for p in trainer.model.critic.parameters()} == {3e-2}


def test_checkpoints_keep_the_policy_alone(trainer_of, tmp_path):
    from safetensors import safe_open

    config = options(steps=1)
    trainer = trained(trainer_of(config, Scripted(config)))
    trainer.save_model(str(tmp_path / "saved"))
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
    assert names == set(trainer.model.exported.state_dict())


def test_what_the_dpo_model_prefers_becomes_more_probable(trainer_of, tiny_llama, tiny_tokenizer):
    liked, disliked = 40, 41
    rto = {"reward_beta": 1.0, "kl_coefficient": 0.0, "critic_learning_rate": 1e-3}
    config = options(steps=25, rows=16, rate=2e-3, max_new_tokens=2, max_truncated=1.0, rto=rto)
    models = {name: tiny_llama(seed=1, tied=False).eval() for name in ("policy", "dpo", "reference")}
    trainer = trainer_of(
        config,
        Rollout(config, tiny_tokenizer, COLLATE, seed=1),
        frozen={name: models[name] for name in ("dpo", "reference")},
        policy=models["policy"],
    )
    prompts = COLLATE(trainer.train_dataset)["input_ids"]

    def probabilities(name):
        with torch.no_grad():
            return models[name](input_ids=prompts).logits.softmax(-1).mean((0, 1))[[liked, disliked]].tolist()

    # logits that hardly depend on the state: two tokens are frequent, and the DPO model prefers the first of them
    with torch.no_grad():
        mean = models["reference"].model(input_ids=prompts).last_hidden_state.mean((0, 1))
        for name, more, less in (("policy", 9, 9), ("reference", 9, 9), ("dpo", 9.5, 8.5)):
            head = models[name].lm_head.weight.zero_()
            head[liked], head[disliked] = more * mean / mean.square().sum(), less * mean / mean.square().sum()
    before, wanted = probabilities("policy"), probabilities("dpo")
    trained(trainer)
    after = probabilities("policy")
    assert before[0] == before[1]
    assert wanted[0] > before[0] + 0.05
    # scalar rewards have no optimum between: the policy goes beyond the DPO model
    assert after[0] > wanted[0]
    assert after[1] < wanted[1]
    rewards = logged(trainer, "rto_reward")
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 1


def test_metrics_are_means_over_tokens_and_responses():
    columns = torch.tensor([[6.0, 3.0, 0.5, 0.3], [2.0, 1.0, 0.3, 0.5], [0.0, 0.0, 0.0, 0.0]])
    found = rto_metrics(EvalPrediction(predictions=columns.numpy(), label_ids=None))
    assert found == pytest.approx({"nll": 2.0, "rto_reward": 0.4, "kl_reference": 0.2})


def test_metrics_of_no_tokens_are_not_numbers():
    found = rto_metrics(EvalPrediction(predictions=torch.zeros(2, 4).numpy(), label_ids=None))
    assert all(value != value for value in found.values())


def test_a_critic_with_another_tokenizer_is_refused():
    model = {"model": "sample:models/stories260K"}
    critic = {"config": {"model_type": "llama", "hidden_size": 8}, "tokenizer": "sample:tokenizers/gpt2"}
    config = options().model_copy(update={"model": ModelSource(**model)})
    config = config.model_copy(update={"rto": config.rto.model_copy(update={"critic": ModelSource(**critic)})})
    with pytest.raises(ModelError, match=r"rto\.critic = fresh llama.*another tokenizer"):
        load_critic(config, load_tokenizer(config.model), seed=1)
