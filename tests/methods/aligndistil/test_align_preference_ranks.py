"""The preference objectives trained for three steps by two processes: losses and weights of one without DeepSpeed."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tenfold.methods.aligndistil.config import AlignDistilConfig
from tenfold.platform.models.loading import load_causal_lm, load_tokenizer
from tenfold.platform.models.source import ModelSource
from tenfold.platform.training.deepspeed_config import deepspeed_config
from tenfold.platform.training.worker import make_trainer

pytestmark = [pytest.mark.slow]

SCRIPT = Path(__file__).parents[2] / "platform" / "training" / "training_ranks.py"
MODEL = "sample:models/stories260K"  # its head is its embedding
STEPS = 3
LORA = {"lora": {"r": 4, "alpha": 8, "dropout": 0.0}}
PAIRED = {"kto": {"reference_point": "paired"}}
# name -> objective, DeepSpeed settings, further options
RUNS = {
    "dpo-zero2": ("dpo", "zero2", {}),
    "dpo-zero3": ("dpo", "zero3", {}),
    "dpo-offload": ("dpo", "zero2", {"frozen_offload": "cpu"}),
    "lora-zero3": ("dpo", "zero3", LORA),
    "tdpo2-zero2": ("tdpo2", "zero2", {"nll_weight": 0.2}),
    "tdpo2-zero3": ("tdpo2", "zero3", {"nll_weight": 0.2}),
    "paired-zero3": ("kto", "zero3", PAIRED),
    "kto-zero2": ("kto", "zero2", {}),
    "kto-zero3": ("kto", "zero3", {}),
}


def expected_of(name):
    """Return the run that this one must be like: mismatched answers are those of the rank's own rows."""
    return "kto-zero2" if name.startswith("kto") else f"{name.split('-')[0]}-alone"


@pytest.fixture(scope="module")
def pairs(uneven_pairs):
    return uneven_pairs(12)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Save a model beside the policy's: otherwise no run would show a wrong reference in its first step."""
    folder = tmp_path_factory.mktemp("reference")
    source = ModelSource(model=MODEL)
    model = load_causal_lm(source, dtype="float32")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=draw))
    model.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    return str(folder)


def options(pairs, objective, rows, more):
    source = [{"path": pairs}]
    return AlignDistilConfig.model_validate(
        {
            "model": {"model": MODEL},
            "objective": objective,
            "data": {"train": source, "validation": source, "template": "none", "max_length": 64}
            | {"max_prompt_length": 32},
            "training": {
                "max_steps": STEPS,
                "per_device_train_batch_size": rows,
                "gradient_accumulation_steps": 1,
                "learning_rate": 3e-4,
                "adam_epsilon": 1e-4,  # with the default the sign of a gradient of 1e-9 would decide about updates
                "logging_steps": 1,
                # every rank takes part in it, with batches of unequal sizes
                "eval_strategy": "steps",
                "eval_steps": STEPS,
                "per_device_eval_batch_size": 5,
                "save_strategy": "no",
                "train_sampling_strategy": "sequential",
            },
            "frozen_dtype": "float32",
            "loss_chunk_rows": 16,
            **more,
        }
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pairs, reference):
    """Folder of each run of two processes, and of a plain one of this process for each objective."""
    base = tmp_path_factory.mktemp("trained")
    jobs = []
    for name, (objective, settings, more) in RUNS.items():
        (base / name).mkdir()
        jobs.append(job_of(options(pairs, objective, 2, more), reference, deepspeed_config(settings), base / name))
        alone = base / expected_of(name)
        if not alone.exists():
            alone.mkdir()
            train_alone(job_of(options(pairs, objective, 4, more), reference, {}, alone))
    listed = base / "jobs.json"
    listed.write_text(json.dumps(jobs))
    subprocess.run([sys.executable, str(SCRIPT), str(listed), "2"], check=True, timeout=900)
    return base


def job_of(config, reference, settings, folder):
    return {
        "build": "tenfold.methods.aligndistil.preference_trainer:build_trainer",
        "config": {
            "aligndistil": config.model_dump(mode="json"),
            "frozen": {name: {"model": reference} for name in config.frozen_names},
        },
        "options": config.training.model_dump(mode="json"),
        "deepspeed": settings,
        "seed": 10,
        "output": str(folder),
    }


def train_alone(job):
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer({"cpus_per_worker": 1, "gpus_per_worker": 0, **job}, 0, 1, Path(scratch))
        trainer.train()
        trainer.save_model(job["output"])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    Path(job["output"], "result.json").write_text(json.dumps({"losses": losses}))


@pytest.mark.parametrize("name", RUNS)
def test_ranks_and_settings_give_the_same_losses(trained, name):
    found, expected = (json.loads((trained / one / "result.json").read_text()) for one in (name, expected_of(name)))
    assert len(set(found["losses"])) == STEPS
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_the_saved_policy_is_whole_and_has_the_same_weights(trained, name):
    def weights_of(model):
        return load_causal_lm(ModelSource(model=model), dtype="float32").state_dict()

    weights, expected, before = (
        weights_of(model) for model in (str(trained / name), str(trained / expected_of(name)), MODEL)
    )
    assert weights.keys() == before.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(weight, expected[key], rtol=1e-3, atol=1e-5, msg=key)
    moved = {key for key, weight in weights.items() if (weight - before[key]).abs().max() > 1e-4}
    if name.startswith("lora"):
        assert moved == {key for key in before if "q_proj" in key or "v_proj" in key}
    else:
        assert "lm_head.weight" in moved
