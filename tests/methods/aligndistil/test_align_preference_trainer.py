"""The preference objectives through the Trainer on one process: exact means, evaluation, and metrics of their own."""

import json
import math
from types import SimpleNamespace

import numpy
import pytest
import torch
from tenfold.methods.aligndistil.config import AlignDistilConfig
from tenfold.methods.aligndistil.preference_trainer import build_trainer, find_partners, pair_metrics, single_metrics

MODEL = "sample:models/stories260K"
ANSWERS = [
    ("Once upon a time", " there was a little girl.", " the dog."),
    ("Tom and Lily", " went to the park to play.", " sad sad sad."),
    ("The sun", " was warm.", " was cold and the bird ran away from it."),
    ("A big cat", " sat on the mat.", " is."),
    ("One day, Ben", " found a red ball in the box.", " no."),
    ("The bird", " sang a song.", " lost a shoe in the rain."),
    ("Mom said", " it was time for bed.", " go."),
    ("In the garden", " there was a tree.", " nothing."),
]


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, good, bad in ANSWERS]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def options(pairs, objective, rows, passes, *, steps=2, data=None, **more):
    training = {"max_steps": steps, "per_device_train_batch_size": rows, "gradient_accumulation_steps": passes}
    training |= {
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-4,  # with the default the sign of a gradient of 1e-9 would decide about whole updates
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
    }
    source = [{"path": pairs}]
    own = {"train": source, "validation": source, "template": "none", "max_length": 64, "max_prompt_length": 32}
    return AlignDistilConfig.model_validate(
        {
            "model": {"model": MODEL},
            "objective": objective,
            "data": own | (data or {}),
            "training": training,
            "frozen_dtype": "float32",
            "loss_chunk_rows": 16,
            **more,
        }
    )


@pytest.fixture
def made(in_this_process):
    return lambda config: in_this_process(build_trainer, config, {"reference": {"model": MODEL}})


@pytest.fixture
def train(made, to_the_end):
    return lambda config: to_the_end(made(config))


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("objective", ["dpo", "simpo", "tdpo2"])
def test_losses_and_weights_do_not_depend_on_the_accumulation(pairs, train, objective):
    whole, split = (train(options(pairs, objective, rows, 4 // rows)) for rows in (4, 1))
    assert logged(whole) == pytest.approx(logged(split), rel=1e-4)
    for name in ("reward_chosen", "reward_margin", "reward_accuracy", "logp_rejected"):
        assert logged(whole, name) == pytest.approx(logged(split, name), rel=1e-3, abs=1e-5), name
    for (name, one), other in zip(whole.model.named_parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=name)


def test_the_first_step_of_dpo_begins_at_ln_2_and_later_ones_below(pairs, train):
    trainer = train(options(pairs, "dpo", 8, 1, steps=4))
    found = logged(trainer)
    assert found[0] == pytest.approx(math.log(2), abs=1e-5)
    assert found[3] < found[1] < found[0]
    margins = logged(trainer, "reward_margin")
    assert margins[0] == pytest.approx(0, abs=1e-5)
    assert margins[3] > margins[1] > 0


def test_swapped_preferences_train_the_other_way(pairs, train):
    plain, reverse = (
        train(options(pairs, "dpo", 8, 1, steps=3, data={"swap_preferences": swap})) for swap in (False, True)
    )
    better = [logged(trainer, "logp_chosen") for trainer in (plain, reverse)]
    worse = [logged(trainer, "logp_rejected") for trainer in (plain, reverse)]
    # chosen of the swapped data are the rejected ones
    assert better[0][0] == pytest.approx(worse[1][0], rel=1e-5)
    assert better[0][2] - worse[0][2] > better[0][0] - worse[0][0]
    assert worse[1][2] - better[1][2] < worse[1][0] - better[1][0]


def test_evaluation_of_an_untrained_policy_finds_only_ties_and_the_models_own_loss(pairs, made):
    trainer = made(options(pairs, "dpo", 2, 1))
    found = trainer.evaluate()
    assert found["eval_reward_accuracy"] == 0
    assert found["eval_reward_tie_rate"] == 100
    assert found["eval_reward_margin"] == 0
    assert found["eval_preference_nll"] == pytest.approx(math.log(2))
    model, total, count = trainer.model.exported, 0.0, 0
    for row in trainer.eval_dataset:
        labels = torch.tensor([row["labels"]])
        number = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss.item() * number
        count += number
    assert found["eval_nll"] == pytest.approx(total / count, rel=1e-5)


def test_evaluation_does_not_depend_on_its_batches(pairs, train):
    trainer = train(options(pairs, "tdpo2", 4, 1, steps=3))
    found = []
    for size in (1, 3, 8):
        trainer.args.per_device_eval_batch_size = size
        found.append(trainer.evaluate())
    for name in ("reward_accuracy", "reward_tie_rate", "reward_margin", "preference_nll", "nll"):
        values = [one[f"eval_{name}"] for one in found]
        assert values == pytest.approx([values[0]] * 3, rel=1e-4), name
    assert found[0]["eval_reward_accuracy"] > 50
    assert found[0]["eval_preference_nll"] < math.log(2)


@pytest.mark.parametrize("point", ["mismatched", "paired"])
def test_kto_learns_from_pairs_taken_apart_and_is_measured_on_pairs(pairs, train, point):
    trainer = train(options(pairs, "kto", 16, 1, steps=4, kto={"reference_point": point}))
    found = logged(trainer)
    assert found[0] == pytest.approx(0.5, abs=1e-6)
    assert found[3] < found[0]
    assert logged(trainer, "reward_desirable")[3] > logged(trainer, "reward_undesirable")[3]
    assert all(value >= 0 for value in logged(trainer, "reference_point"))
    assert len(trainer.eval_dataset) == 16
    measured = trainer.evaluate()
    assert measured["eval_reward_accuracy"] > 50
    assert measured["eval_reward_margin"] > 0
    assert measured["eval_preference_nll"] < 0.5


def test_mismatched_answers_of_kto_are_cut_as_all_rows_are(pairs, made):
    trainer = made(options(pairs, "kto", 16, 1, data={"max_length": 20, "max_prompt_length": 12}))
    batch = next(iter(trainer.get_eval_dataloader()))
    assert batch["mismatched_input_ids"].shape[1] == 20
    assert (batch["mismatched_labels"][:, 1:] != -100).any(1).all()


def test_simpo_has_no_frozen_model(pairs, made):
    trainer = made(options(pairs, "simpo", 4, 1))
    assert trainer.model.frozen == {}
    assert trainer.evaluate()["eval_preference_nll"] > 0


def test_an_adapter_alone_is_trained(pairs, train):
    trainer = train(options(pairs, "dpo", 4, 1, lora={"r": 4, "alpha": 8, "dropout": 0.0}))
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert logged(trainer)[1] < math.log(2)


def test_the_number_of_pairs_is_an_integer_that_no_dtype_rounds(pairs, made):
    trainer = made(options(pairs, "dpo", 4, 1))
    batches = [{"labels": torch.zeros(6, 3)}, {"labels": torch.zeros(2, 5)}]
    counts = [batch["num_examples"] for batch in trainer.prepare_step(batches)]
    assert [count.item() for count in counts] == [4, 4]
    assert all(count.dtype == torch.int64 for count in counts)


def prediction(*columns):
    return SimpleNamespace(predictions=numpy.array(columns, dtype=numpy.float32).T)


def test_metrics_of_pairs_count_ties_as_wrong():
    found = pair_metrics(prediction([1, 2, 3, 0], [0, 2, 5, -4], [0.1, 0.2, 0.3, 0.6], [2, 4, 6, 8], [1, 2, 3, 4]))
    assert found == pytest.approx(
        {"reward_accuracy": 50, "reward_tie_rate": 25, "reward_margin": 0.75, "preference_nll": 0.3, "nll": 2.0}
    )


def test_metrics_of_singles_compare_partners_and_read_good_answers_alone():
    given = prediction([3, 1, 5, 5, 9], [1, 0, 1, 0, 1], [0.1] * 5, [2, 100, 4, 100, 6], [1, 1, 1, 1, 1])
    found = single_metrics(given, [(0, 1), (2, 3)])
    assert found == pytest.approx(
        {"reward_accuracy": 50, "reward_tie_rate": 50, "reward_margin": 1.0, "preference_nll": 0.1, "nll": 4.0}
    )
    assert set(single_metrics(given, [])) == {"preference_nll", "nll"}


def test_nothing_to_average_is_nan():
    assert math.isnan(single_metrics(prediction([1], [0], [0.5], [3], [2]), [])["nll"])


def test_partners_answer_the_same_prompt():
    def row(prompt, answer, desirable):
        return {
            "input_ids": prompt + answer,
            "labels": [-100] * len(prompt) + answer,
            "desirable": desirable,
        }

    rows = [
        row([5, 6], [1, 2], True),
        row([5], [6, 1], False),
        row([5, 6], [7, 2], False),
        row([8], [1], True),
        row([5, 6], [9, 2], False),
        row([5, 6], [4, 2], True),
    ]
    assert find_partners(rows) == [(0, 2), (5, 4)]
