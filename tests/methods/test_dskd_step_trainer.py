"""A whole optimizer step through the Trainer: exact means, on-policy cross-model attention, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from tenfold.methods.dskd.config import DSKDConfig
from tenfold.methods.dskd.method import DSKD
from tenfold.methods.dskd.preparation import prepare
from tenfold.methods.dskd.trainer import build_trainer
from tenfold.platform.data.examples import load_examples
from tenfold.platform.errors import ModelError
from tenfold.platform.models.randomness import seeded
from tenfold.platform.storage import Storage
from tenfold.platform.training.options import TrainingOptions
from tenfold.platform.training.worker import WorkerContext
from transformers import TrainingArguments

TEACHER = "sample:models/stories260K"
SHAPE = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
SHAPE |= {"num_attention_heads": 2, "max_position_embeddings": 256}


def options(objective, rows, passes, *, tokenizer="sample:tokenizers/gpt2", steps=2, **more):
    training = {"max_steps": steps, "per_device_train_batch_size": rows, "gradient_accumulation_steps": passes}
    training |= {
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-4,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
    }
    data = {"train": [{"path": "sample:instruct/short_instructions.json", "stop": 10}], "validation_ratio": 0.2}
    data |= {"template": "alpaca", "max_length": 256, "max_prompt_length": 200}
    # the teacher itself as the student agrees with it at first, a fresh one hardly ever
    student = {"model": TEACHER} if tokenizer == TEACHER else {"config": SHAPE, "tokenizer": tokenizer}
    own = {"student": student, "teacher": {"model": TEACHER}, "data": data}
    own |= {"teacher_dtype": "float32", "objective": objective, "training": training, "loss_chunk_rows": 32}
    return DSKDConfig.model_validate(own | more)


@pytest.fixture
def train(tmp_path):
    run = SimpleNamespace(
        cache=Storage(tmp_path / "cache"),
        compute=SimpleNamespace(workers=1, cpus_per_worker=1, gpus_per_worker=0),
        map=lambda function, items, **_: [function(item) for item in items],
        report=lambda metrics: None,
    )

    def finished(config):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            use_cpu=True,
            seed=1,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            average_tokens_across_devices=True,
            lr_scheduler_type="constant",
            **config.training.arguments(),
        )
        payload = prepare(config, run, load_examples(config.data))
        trainer = build_trainer(WorkerContext(payload, TrainingOptions(), arguments, 1, 0, 1, {}))
        with seeded(1):
            trainer.train()
        return trainer

    return finished


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(("tokenizer", "mode"), [("sample:tokenizers/gpt2", "cache"), (TEACHER, "live")])
def test_exact_means_do_not_depend_on_the_accumulation(train, tokenizer, mode):
    more = {"tokenizer": tokenizer, "teacher_mode": mode, "normaliser": "global"}
    whole, split = (train(options("dual_space_v2", rows, 4 // rows, **more)) for rows in (4, 1))
    assert logged(whole) == pytest.approx(logged(split), rel=1e-4)
    for name in ("student_space", "t2s_ce", "teacher_space", "t2s_agreement"):
        assert logged(whole, name) == pytest.approx(logged(split, name), rel=1e-4, abs=1e-6, nan_ok=True), name
    assert (logged(whole, "t2s_agreement")[0] > 0) == (tokenizer == TEACHER)
    for (name, one), other in zip(whole.model.named_parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("std", ["masked", "batch"])
def test_cross_model_attention_trains_on_what_the_student_writes(train, std):
    own = {"after_epochs": 1, "ratio": 1.0, "max_new_tokens": 6}
    trainer = train(options("dual_space_v1", 4, 1, steps=4, teacher_mode="live", on_policy=own, cma_std=std))
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ["on_policy_t2s_ce" in entry for entry in log] == [False, False, True, True]
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in log)


def test_exact_means_of_a_step_that_generates_in_some_passes(train):
    own = {"after_epochs": 0, "ratio": 0.5, "max_new_tokens": 6}
    more = {"teacher_mode": "live", "on_policy": own, "normaliser": "global"}
    trainer = train(options("dual_space_v2", 1, 4, steps=2, **more))
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert any("on_policy_t2s_ce" in entry and "t2s_ce" in entry for entry in log)
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in log)


def test_a_student_that_caps_its_logits_is_refused_by_the_plan():
    shape = {**SHAPE, "model_type": "gemma2", "head_dim": 8, "num_key_value_heads": 2}
    config = options("dual_space_v2", 4, 1, student={"config": shape, "tokenizer": TEACHER})
    context = SimpleNamespace(compute=SimpleNamespace(workers=1))
    with pytest.raises(ModelError, match=r"gemma2: final_logit_softcapping = 30.0"):
        DSKD().plan(config, context)
