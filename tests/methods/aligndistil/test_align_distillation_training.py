"""Whole optimizer steps of the distilled objectives through the Trainer, off-policy and on-policy."""

import importlib.resources
import itertools
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from tenfold.methods.aligndistil.config import AlignDistilConfig
from tenfold.methods.aligndistil.distillation_module import SUMS
from tenfold.methods.aligndistil.distillation_trainer import DistillationTrainer, build_trainer, distillation_metrics
from tenfold.platform.models.loading import load_causal_lm, load_tokenizer
from tenfold.platform.models.source import ModelSource
from transformers import TrainerCallback

START = {"model": "sample:models/stories260K"}
STEPS = 3
NO = -100


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """Return two models that differ from the start, each in its own way."""
    sources, tokenizer = {}, load_tokenizer(ModelSource(**START))
    for seed, name in enumerate(("dpo", "reverse")):
        model = load_causal_lm(ModelSource(**START), dtype="float32")
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.02)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        sources[name] = {"model": str(folder)}
    return sources


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    """Return a file of pairs: the answer of a task, and that of the next one."""
    sample = importlib.resources.files("tenfold.samples") / "instruct" / "short_instructions.json"
    rows = json.loads(sample.read_text())[:25]
    pairs = [
        {"prompt": row["instruction"], "chosen": row["output"], "rejected": other["output"]}
        for row, other in itertools.pairwise(rows)
    ]
    path = tmp_path_factory.mktemp("preferences") / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return str(path)


def options(preferences, rows=4, passes=1, **more):
    training = {
        "max_steps": STEPS,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": passes,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-4,  # with the default the sign of a gradient of 1e-9 would decide about whole updates
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        **more.pop("training", {}),
    }
    data = {"train": [{"path": preferences}], "template": "none", "max_length": 96, "max_prompt_length": 80}
    own = {"model": START, "data": data, "training": training, "loss_chunk_rows": 16, "frozen_dtype": "float32"}
    return AlignDistilConfig.model_validate(own | more)


ON_POLICY = {"on_policy": {"max_new_tokens": 5}}


@pytest.fixture
def build(in_this_process, frozen):
    return lambda config: in_this_process(build_trainer, config, {"reference": START, **frozen})


@pytest.fixture
def train(build, to_the_end):
    return lambda config: to_the_end(build(config))


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_the_loss_does_not_depend_on_the_accumulation(train, preferences):
    whole, split = (train(options(preferences, rows, 4 // rows)) for rows in (4, 1))
    assert logged(whole) == pytest.approx(logged(split), rel=1e-4)
    for name in ("kl", "alpha", "tvd", "token_weight", "reward", "kl_dpo_sequence", "response_length"):
        assert logged(whole, name) == pytest.approx(logged(split, name), rel=1e-4), name
    for (name, one), other in zip(whole.model.named_parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("objective", ["contrast_const", "theorem1_const", "theorem1_adaptive", "gkd"])
def test_the_other_teachers_train_and_are_evaluated(build, preferences, objective):
    trainer = build(options(preferences, objective=objective, training={"max_steps": 6}))
    before = trainer.evaluate()
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] < before["eval_loss"]
    assert metrics["eval_kl"] < before["eval_kl"]
    assert {"eval_kl", "eval_kl_dpo", "eval_nll", "eval_perplexity"} <= set(metrics)
    assert ("eval_reward" in metrics) == (objective != "gkd")
    assert ("eval_kl_reference" in metrics) == objective.startswith("theorem1")


def test_the_policy_approaches_its_teacher_on_held_out_responses(build, preferences):
    trainer = build(options(preferences, training={"max_steps": 10}, extrapolation=2.0))
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_kl"] < before["eval_kl"]
    assert after["eval_reward"] > before["eval_reward"]
    assert after["eval_dpo_reward"] == pytest.approx(before["eval_dpo_reward"])


def test_costly_statistics_are_taken_only_in_steps_that_are_reported(build, preferences):
    trainer = build(options(preferences, training={"logging_steps": 3}))
    measured, forward = [], trainer.model.forward

    def spy(**batch):
        measured.append(batch["is_measured"])
        return forward(**batch)

    trainer.model.forward = spy
    trainer.train()
    assert measured == [False, False, True]
    assert len(logged(trainer, "kl_reverse")) == 1


class Watcher(TrainerCallback):
    """Keeps a fingerprint of the weights after every step."""

    def __init__(self):
        self.after = []

    def on_step_end(self, arguments, state, control, model, **_):
        self.after.append(fingerprint(model.exported))


def fingerprint(model):
    return sum(parameter.double().abs().sum().item() for parameter in model.parameters())


def test_responses_come_from_the_weights_after_the_step_before(build, preferences):
    trainer, watcher, seen = build(options(preferences, 2, 2, **ON_POLICY)), Watcher(), []
    rollout = trainer._rollout
    generate = rollout.generate

    def spy(model, batch, seed):
        seen.append((fingerprint(model), seed, model.training))
        return generate(model, batch, seed)

    rollout.generate = spy
    trainer.add_callback(watcher)
    start = fingerprint(trainer.model.exported)
    trainer.train()
    weights = [start, *watcher.after[:-1]]
    assert [found for found, *_ in seen] == [one for one in weights for _ in range(2)]
    assert len(set(watcher.after)) == STEPS
    assert len({seed for _, seed, _ in seen}) == 2 * STEPS


def test_on_policy_training_is_repeatable_and_reports_its_responses(train, preferences):
    first, again = (train(options(preferences, 2, 2, **ON_POLICY)) for _ in range(2))
    assert logged(first) == logged(again)
    assert len(set(logged(first))) == STEPS
    for name in ("realised_reward", "truncated", "response_length", "alpha_max", "token_loss_max"):
        assert len(logged(first, name)) == STEPS
    assert all(1 <= length <= 5 for length in logged(first, "response_length"))
    metrics = first.evaluate()
    assert metrics["eval_nll"] > 0  # of the chosen responses, which it never saw


def test_every_sample_of_a_prompt_is_a_sequence_of_the_step(build, preferences):
    trainer = build(options(preferences, 2, 2, on_policy={"max_new_tokens": 3, "samples_per_prompt": 3}))
    prompts = [next(iter(trainer.get_train_dataloader())) for _ in range(2)]
    trainer.state.logging_steps = 1
    batches = trainer.prepare_step(prompts)
    assert [len(batch["input_ids"]) for batch in batches] == [6, 6]
    assert [int(batch["num_sequences"]) for batch in batches] == [12, 12]
    assert not any(torch.is_floating_point(value) for value in batches[0].values() if torch.is_tensor(value))


@pytest.mark.parametrize(("limit", "expected"), [(0.5, 1), (1.0, 0)])
def test_responses_that_are_mostly_cut_are_told_once(train, preferences, caplog, limit, expected):
    with caplog.at_level(logging.WARNING):
        train(options(preferences, on_policy={"max_new_tokens": 2, "max_truncated": limit}))
    told = [record.getMessage() for record in caplog.records if "cut at max_new_tokens" in record.getMessage()]
    assert len(told) == expected
    assert not expected or told[0].startswith("step 1: 100 % of the responses")


def test_frozen_models_are_compared_once_before_the_first_step(build, preferences, frozen, caplog):
    trainer = build(options(preferences))
    trainer.model._frozen[0]["reverse"] = trainer.model.frozen["dpo"]
    with caplog.at_level(logging.INFO, logger="tenfold.methods.aligndistil.agreement"):
        trainer.train()
    texts = [record.getMessage() for record in caplog.records if "held-out pairs" in record.getMessage()]
    assert len(texts) == 2
    assert "nearly the same" in texts[1]


def test_adapters_train_alone(build, preferences):
    trainer = build(options(preferences, lora={"r": 2, "alpha": 4, "dropout": 0.0}, training={"max_steps": 6}))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)
    assert trainer.evaluate()["eval_loss"] < before


def test_metrics_are_ratios_of_sums_over_all_sequences():
    names = DistillationTrainer.evaluated
    assert names == ("nll", "num_labels", *SUMS)
    rows = [dict.fromkeys(names, 0.0) for _ in range(2)]
    rows[0] |= {"nll": 8.0, "num_labels": 4.0, "kl": 2.0, "kl_dpo": 6.0, "kl_other": 10.0, "reward": 1.0, "tvd": 1.0}
    rows[1] |= {"nll": 1.0, "num_labels": 2.0, "kl": 1.0, "kl_dpo": 3.0, "kl_other": 2.0, "reward": 2.0, "alpha": 3.0}
    given = SimpleNamespace(predictions=[[row[name] for name in names] for row in rows])
    found = distillation_metrics(given, "reverse")
    expected = {"nll": 1.5, "kl": 0.5, "kl_dpo": 1.5, "kl_dpo_sequence": 4.5, "kl_reverse": 2.0}
    expected |= {"reward": 1.5, "dpo_reward": 0.0, "alpha": 0.5, "tvd": 1 / 6}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert set(found) == {*expected, "perplexity"}
    assert set(distillation_metrics(given, None)) == {"nll", "perplexity", "kl", "kl_dpo", "kl_dpo_sequence"}
