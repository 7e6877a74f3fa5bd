"""AlignDistil trained for three steps by one and by two processes, and resumed: the same losses and weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tenfold.methods.aligndistil.config import AlignDistilConfig
from tenfold.platform.models.loading import load_causal_lm, load_tokenizer
from tenfold.platform.models.source import ModelSource
from tenfold.platform.training.deepspeed_config import deepspeed_config

pytestmark = [pytest.mark.slow]

SCRIPT = Path(__file__).parents[2] / "platform" / "training" / "training_ranks.py"
MODEL = "sample:models/stories260K"  # its head is its embedding
STEPS = 3
OWN = {"on_policy": {"max_new_tokens": 5, "samples_per_prompt": 2}, "objective": "theorem1_adaptive"}
# name -> ranks, DeepSpeed settings, further options; the first of each case is what the others are like
RUNS = {
    "given-whole": (1, "zero2", {}),
    "given-zero2": (2, "zero2", {}),
    "given-zero3": (2, "zero3", {}),
    "given-offload": (2, "zero2", {"frozen_offload": "cpu"}),
    # ranks draw by themselves: not the same on one rank
    "own-zero2": (2, "zero2", OWN),
    "own-zero3": (2, "zero3", OWN),
}
RESUMED = ("given-zero2", "own-zero3")  # from the checkpoint before the last step


def first_of(name):
    return next(run for run in RUNS if run.split("-")[0] == name.split("-")[0])


@pytest.fixture(scope="module")
def pairs(uneven_pairs):
    return uneven_pairs(18)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """Save models beside the policy's, which disagree with each other."""
    sources = {}
    for seed, name in enumerate(("dpo", "reverse", "reference")):
        folder = tmp_path_factory.mktemp(name)
        source = ModelSource(model=MODEL)
        model = load_causal_lm(source, dtype="float32")
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.02 * torch.randn(weight.shape, generator=draw))
        model.save_pretrained(folder)
        load_tokenizer(source).save_pretrained(folder)
        sources[name] = {"model": str(folder)}
    return sources


def options(pairs, rows, more):
    data = {"train": [{"path": pairs}], "validation": [{"path": pairs}], "template": "none"}
    return AlignDistilConfig.model_validate(
        {
            "model": {"model": MODEL},
            "data": data | {"max_length": 64, "max_prompt_length": 32},
            "training": {
                "max_steps": STEPS,
                "per_device_train_batch_size": rows,
                "gradient_accumulation_steps": 1,
                "learning_rate": 1e-3,
                "adam_epsilon": 1e-4,  # with the default the sign of a gradient of 1e-9 would decide about updates
                "logging_steps": 1,
                "eval_strategy": "no",
                "save_strategy": "steps",
                "save_steps": STEPS - 1,
            },
            "frozen_dtype": "float32",
            "loss_chunk_rows": 16,
            **more,
        }
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pairs, frozen):
    """Folder of each run, and of each that was resumed; those of one world size share their processes."""
    base = tmp_path_factory.mktemp("trained")
    for world_size in (1, 2):
        jobs = []
        for name, (ranks, settings, more) in RUNS.items():
            if ranks != world_size:
                continue
            config = options(pairs, 4 // ranks, more)
            job = {
                "build": "tenfold.methods.aligndistil.distillation_trainer:build_trainer",
                "config": {
                    "aligndistil": config.model_dump(mode="json"),
                    "frozen": {one: frozen[one] for one in config.frozen_names},
                },
                "options": config.training.model_dump(mode="json"),
                "deepspeed": deepspeed_config(settings),
                "seed": 10,
                "output": str(base / name),
                "checkpoints": str(base / "checkpoints" / name),
            }
            jobs.append(job)
            if name in RESUMED:
                checkpoint = base / "checkpoints" / name / "out" / f"checkpoint-{STEPS - 1}"
                jobs.append({**job, "resume": str(checkpoint), "output": str(base / f"{name}-resumed")})
        for job in jobs:
            Path(job["output"]).mkdir()
        listed = base / f"jobs-{world_size}.json"
        listed.write_text(json.dumps(jobs))
        subprocess.run([sys.executable, str(SCRIPT), str(listed), str(world_size)], check=True, timeout=900)
    return base


def losses(folder):
    return json.loads((folder / "result.json").read_text())["losses"]


def weights(folder):
    return load_causal_lm(ModelSource(model=str(folder)), dtype="float32").state_dict()


@pytest.mark.parametrize("name", RUNS)
def test_ranks_and_settings_give_the_same_losses_and_weights(trained, name):
    found, expected = losses(trained / name), losses(trained / first_of(name))
    assert len(set(found)) == STEPS
    assert found == pytest.approx(expected, rel=1e-4)
    before = load_causal_lm(ModelSource(model=MODEL), dtype="float32").state_dict()
    after, same = weights(trained / name), weights(trained / first_of(name))
    assert after.keys() == before.keys()
    for key, weight in after.items():
        torch.testing.assert_close(weight, same[key], rtol=1e-3, atol=1e-5, msg=key)
    assert (after["lm_head.weight"] - before["lm_head.weight"]).abs().max() > 1e-4


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumed_in_the_middle_of_an_epoch_ends_as_if_nothing_had_happened(trained, name):
    assert losses(trained / f"{name}-resumed") == losses(trained / name)
    again = weights(trained / f"{name}-resumed")
    assert all(torch.equal(weight, again[key]) for key, weight in weights(trained / name).items())
