"""The same global batch gives the same losses and weights however it is split over ranks and forward passes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tenfold.methods.dskd.config import DSKDConfig
from tenfold.platform.data.examples import load_examples
from tenfold.platform.data.tokenise import tokenised_dataset
from tenfold.platform.models.loading import load_causal_lm, load_tokenizer
from tenfold.platform.training.deepspeed_config import deepspeed_config

pytestmark = [pytest.mark.slow]

SCRIPT = Path(__file__).with_name("training_ranks.py")
TEACHER = "sample:models/stories260K"
# ranks, rows in a forward pass, forward passes in a step
SPLITS = {"whole": (1, 4, 1), "accumulated": (1, 2, 2), "ranks": (2, 2, 1)}


def options(student, objective, rows, accumulation, *, stop=16, **training):
    data = {
        "train": [{"path": "sample:instruct/short_instructions.json", "stop": stop}],
        "validation_ratio": 0.2,
        "template": "none",
        "max_length": 96,
        "max_prompt_length": 32,
    }
    training = {
        "max_steps": 2,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,  # with the default the sign of a gradient of 1e-9 would decide about whole updates
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        **training,
    }
    return DSKDConfig(
        student=student,
        teacher={"model": TEACHER},
        teacher_mode="live",
        teacher_dtype="float32",
        data=data,
        objective=objective,
        training=training,
    )


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    shape = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 256}
    fresh = options({"config": shape, "tokenizer": TEACHER}, "sft", 4, 1).student
    folder = tmp_path_factory.mktemp("student")
    load_causal_lm(fresh, seed=3, dtype="float32").save_pretrained(folder)
    load_tokenizer(fresh).save_pretrained(folder)
    return {"model": str(folder)}


def training_rows(config):
    return tokenised_dataset(load_examples(config.data).train, load_tokenizer(config.student), config.data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, student):
    """(folder, configuration) of every job; the jobs of one world size share their processes."""
    base = tmp_path_factory.mktemp("trained")
    configs = {
        (objective, name): (ranks, options(student, objective, rows, accumulation))
        for objective in ("sft", "kl", "dual_space_v1")
        for name, (ranks, rows, accumulation) in SPLITS.items()
    }
    configs["sft", "sequential"] = (2, options(student, "sft", 2, 1, train_sampling_strategy="sequential"))
    for accumulation in (3, 4):
        short = options(student, "dual_space_v2", 2, accumulation, stop=7, max_steps=-1, num_train_epochs=2)
        configs["dual_space_v2", f"accumulate {accumulation}"] = (1, short)
    found = {}
    for world_size in (1, 2):
        jobs = []
        for key, (ranks, config) in configs.items():
            if ranks == world_size:
                folder = base / "-".join(key)
                folder.mkdir()
                found[key] = (folder, config)
                jobs.append(
                    {
                        "build": "tenfold.methods.dskd.trainer:build_trainer",
                        "config": {
                            "dskd": config.model_dump(mode="json"),
                            "cache": str(base / "cache"),
                            "alignment": "none",
                        },
                        "options": config.training.model_dump(mode="json"),
                        "deepspeed": deepspeed_config("zero2"),
                        "seed": 10,
                        "output": str(folder),
                    }
                )
        (base / "jobs.json").write_text(json.dumps(jobs))
        command = [sys.executable, str(SCRIPT), str(base / "jobs.json"), str(world_size)]
        subprocess.run(command, check=True, timeout=900)
    return found


def result_of(trained, *key):
    return json.loads((trained[key][0] / "result.json").read_text())


def weights_of(trained, *key):
    from safetensors.torch import load_file

    return load_file(trained[key][0] / "model.safetensors")


def assert_equal_training(trained, first, second):
    one, two = result_of(trained, *first)["losses"], result_of(trained, *second)["losses"]
    assert len(one) == 2
    assert one == pytest.approx(two, rel=1e-5)
    other = weights_of(trained, *second)
    for name, weight in weights_of(trained, *first).items():
        torch.testing.assert_close(weight, other[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("objective", ["sft", "kl", "dual_space_v1"])
@pytest.mark.parametrize("split", ["accumulated", "ranks"])
def test_split_of_the_global_batch_changes_nothing(trained, objective, split):
    assert_equal_training(trained, (objective, "whole"), (objective, split))


def test_last_step_with_fewer_forward_passes_averages_over_those_it_has(trained):
    # 6 rows by 2 are 3 forward passes: with 4 accumulated the only step of an epoch is short, with 3 it is full
    assert len(training_rows(trained["dual_space_v2", "accumulate 4"][1])) == 6
    assert_equal_training(trained, ("dual_space_v2", "accumulate 3"), ("dual_space_v2", "accumulate 4"))


def test_loss_is_the_mean_over_label_tokens_of_rows_with_unequal_lengths(trained):
    _, config = trained["sft", "sequential"]
    model = load_causal_lm(config.student, dtype="float32")
    total, counts = 0.0, []
    for row in list(training_rows(config))[:4]:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].double()
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100).item()
        counts.append(int((labels != -100).sum()))
    assert len(set(counts)) > 1
    mean = total / sum(counts)
    assert result_of(trained, "sft", "sequential")["losses"][0] == pytest.approx(mean, rel=1e-5)


def test_plan_and_trainer_agree_on_the_number_of_steps(trained):
    for key, (_, config) in trained.items():
        ranks = 2 if key[1] in ("ranks", "sequential") else 1
        assert result_of(trained, *key)["steps"] == config.training.steps(len(training_rows(config)), ranks)
