"""Training options: the number of steps, impossible combinations, what reaches TrainingArguments."""

import math

import pytest
from pydantic import ValidationError
from tenfold.platform.errors import ConfigError
from tenfold.platform.training.options import TrainingOptions


@pytest.mark.parametrize(
    ("rows", "workers", "batch", "accumulation", "epochs", "expected"),
    [
        (8, 1, 4, 1, 1, 2),
        (9, 1, 4, 1, 1, 3),  # a last, smaller batch counts
        (9, 2, 4, 1, 1, 2),  # 5 and 4 rows: two batches each
        (9, 1, 4, 2, 1, 2),  # 3 batches: a step of two and a step of one
        (9, 1, 4, 4, 2, 2),  # fewer batches than are accumulated are still a step
        (16, 2, 4, 1, 0.5, 1),
        (10, 1, 2, 1, 1.5, 8),  # 7.5 steps are rounded up
        (1, 4, 8, 4, 3, 3),
    ],
)
def test_steps_of_epochs(rows, workers, batch, accumulation, epochs, expected):
    options = TrainingOptions(
        num_train_epochs=epochs, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
    )
    assert options.steps(rows, workers) == expected


def test_max_steps_override_the_epochs():
    assert TrainingOptions(max_steps=7).steps(1000, 1) == 7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_steps": 0}, "max_steps must be -1"),
        ({"eval_strategy": "steps", "save_strategy": "steps"}, "needs eval_steps"),
        ({"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "epoch"}, "must be equal"),
        ({"eval_strategy": "epoch", "save_strategy": "steps"}, "must be equal"),
        ({"learning_rat": 1}, "Extra inputs"),
        ({"learning_rate": math.inf}, "finite number"),
        ({"weight_decay": math.nan}, "finite number"),
        ({"max_steps": 10**30}, "less than 2147483648"),
        ({"eval_steps": 2**31}, "less than 2147483648"),
        ({"metric_for_best": "eval/"}, "match pattern"),
    ],
)
def test_impossible_options_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        TrainingOptions(**values)


def test_either_strategy_may_be_off():
    assert TrainingOptions(eval_strategy="no", save_strategy="steps").save_strategy == "steps"
    assert TrainingOptions(eval_strategy="epoch", save_strategy="no").eval_strategy == "epoch"


def test_arguments_are_taken_by_transformers(tmp_path):
    from transformers import TrainingArguments

    options = TrainingOptions(learning_rate=3e-4, adam_beta2=0.95, gradient_checkpointing=True)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options.arguments())
    assert (arguments.learning_rate, arguments.adam_beta2) == (3e-4, 0.95)
    assert arguments.gradient_checkpointing


@pytest.mark.parametrize(
    ("asked", "has_units", "used"), [("auto", True, True), ("auto", False, False), (False, True, False)]
)
def test_bf16_follows_the_hardware_only_when_asked(monkeypatch, asked, has_units, used):
    monkeypatch.setattr("tenfold.platform.hardware.supports_bf16", lambda: has_units)
    assert TrainingOptions(bf16=asked).use_bf16() is used


def test_bf16_is_refused_where_it_would_be_emulated(monkeypatch):
    monkeypatch.setattr("tenfold.platform.hardware.supports_bf16", lambda: False)
    with pytest.raises(ConfigError, match="no bfloat16 units"):
        TrainingOptions(bf16=True).use_bf16()
