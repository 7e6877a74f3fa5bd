"""RTO by two processes under ZeRO: losses and weights of one process without it; resumed as if never stopped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tenfold.methods.aligndistil.config import AlignDistilConfig
from tenfold.methods.aligndistil.rto_trainer import build_trainer
from tenfold.platform.models.loading import load_causal_lm, load_tokenizer
from tenfold.platform.models.source import ModelSource
from tenfold.platform.training.deepspeed_config import deepspeed_config

pytestmark = [pytest.mark.slow]

SCRIPT = Path(__file__).parents[2] / "platform" / "training" / "training_ranks.py"
SAMPLE = {"model": "sample:models/stories260K"}
STEPS = 3
GREEDY = {"top_k": 1}
LORA = {"r": 4, "alpha": 8, "dropout": 0.0}
# name -> DeepSpeed preset, how responses are drawn, other options
CASES = {
    "zero2": ("zero2", GREEDY, {}),
    "zero3": ("zero3", GREEDY, {}),
    "lora-zero2": ("zero2", GREEDY, {"lora": LORA}),
    "lora-zero3": ("zero3", GREEDY, {"lora": LORA}),
    "sampled": ("zero2", {}, {}),
}


def saved(folder, *, seed, **shape):
    """Save a small model with the sample's tokenizer and weights of its own: drawn ones differ under ZeRO-3."""
    own = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    own |= {"num_attention_heads": 2, "max_position_embeddings": 256, **shape}
    source = ModelSource(config=own, tokenizer=SAMPLE["model"])
    model = load_causal_lm(source, seed=seed, dtype="float32")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    model.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    return {"model": str(folder)}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Data and models of all runs; the policy's head is its embedding, the critic is larger than the policy."""
    base = tmp_path_factory.mktemp("rto")
    words = ["cat", "dog", "bird", "tree", "sun", "moon", "boat", "ball"] * 2
    pairs = [
        {"prompt": f"{word} {number}: ", "chosen": f"a {word} and a {word}", "rejected": f"no {word}"}
        for number, word in enumerate(words)
    ]
    (base / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return {
        "data": str(base / "pairs.jsonl"),
        "policy": saved(base / "policy", seed=1, tie_word_embeddings=True),
        "dpo": saved(base / "dpo", seed=2),
        "critic": saved(base / "critic", seed=3, hidden_size=24),
    }


def payload_of(setting, rows, on_policy, **more):
    training = {"max_steps": STEPS, "per_device_train_batch_size": rows, "learning_rate": 1e-3, "logging_steps": 1}
    training |= {"adam_epsilon": 1e-4, "train_sampling_strategy": "sequential", "lr_scheduler_type": "constant"}
    training |= {"eval_strategy": "no", "save_strategy": "no"}
    data = {"train": [{"path": setting["data"]}], "validation_ratio": 0.2, "template": "none", "max_length": 64}
    data |= {"max_prompt_length": 32}
    config = AlignDistilConfig.model_validate(
        {
            "model": setting["policy"],
            "objective": "rto",
            "data": data,
            "on_policy": {"max_new_tokens": 5, "max_truncated": 1.0, **on_policy},
            "rto": {"critic": setting["critic"], "critic_learning_rate": 1e-2},
            "frozen_dtype": "float32",
            "training": training,
            "loss_chunk_rows": 6,
            **more,
        }
    )
    frozen = {"dpo": setting["dpo"], "reference": setting["policy"]}
    return {"aligndistil": config.model_dump(mode="json"), "frozen": frozen}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, setting):
    """Folder of each case, trained by one pair of processes."""
    base = tmp_path_factory.mktemp("trained")
    jobs, folders = [], {}
    for name, (preset, on_policy, more) in CASES.items():
        payload = payload_of(setting, 2, on_policy, **more)
        folders[name] = base / name
        job = {
            "build": "tenfold.methods.aligndistil.rto_trainer:build_trainer",
            "config": payload,
            "options": payload["aligndistil"]["training"],
            "deepspeed": deepspeed_config(preset),
            "seed": 1,
            "output": str(folders[name]),
        }
        jobs.append(job)
        if name == "sampled":
            job["options"] |= {"save_strategy": "steps", "save_steps": STEPS - 1}
            job["checkpoints"] = str(base / "checkpoints")
            folders["resumed"] = base / "resumed"
            checkpoint = str(base / "checkpoints" / "out" / f"checkpoint-{STEPS - 1}")
            jobs.append({**job, "resume": checkpoint, "output": str(folders["resumed"])})
    for folder in folders.values():
        folder.mkdir()
    (base / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run([sys.executable, str(SCRIPT), str(base / "jobs.json"), "2"], check=True, timeout=900)
    return folders


def losses(folder):
    return json.loads((folder / "result.json").read_text())["losses"]


def weights(folder):
    return load_causal_lm(ModelSource(model=str(folder)), dtype="float32").state_dict()


@pytest.fixture
def alone(setting, tmp_path, in_this_process, to_the_end):
    """Train in this process, without DeepSpeed, with the whole global batch in one forward pass."""

    def train(**more):
        payload = payload_of(setting, 4, GREEDY, **more)
        config = AlignDistilConfig.model_validate(payload["aligndistil"])
        trainer = to_the_end(in_this_process(build_trainer, config, payload["frozen"]))
        trainer.save_model(str(tmp_path / "saved"))
        return trainer, tmp_path / "saved"

    return train


@pytest.mark.parametrize("names", [("zero2", "zero3"), ("lora-zero2", "lora-zero3")], ids=["whole", "lora"])
def test_two_ranks_under_zero_train_as_one_process_without_it(ranks, alone, names):
    trainer, folder = alone(**CASES[names[0]][2])
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(set(expected)) == STEPS
    own = weights(folder)
    for name in names:
        assert losses(ranks[name]) == pytest.approx(expected, rel=1e-4), name
        for key, weight in weights(ranks[name]).items():
            torch.testing.assert_close(weight, own[key], rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")


def test_saved_policy_has_moved_and_holds_no_critic(ranks, setting):
    before = weights(Path(setting["policy"]["model"]))
    after = weights(ranks["zero3"])
    assert after.keys() == before.keys()
    assert (after["lm_head.weight"] - before["lm_head.weight"]).abs().max() > 1e-4


def test_a_run_resumed_from_a_checkpoint_samples_and_trains_as_if_nothing_had_happened(ranks):
    whole, resumed = losses(ranks["sampled"]), losses(ranks["resumed"])
    assert resumed == whole
    one, other = weights(ranks["sampled"]), weights(ranks["resumed"])
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_evaluation_reads_the_chosen_responses_of_held_out_pairs(alone):
    trainer, _ = alone()
    found = trainer.evaluate()
    assert {"eval_nll", "eval_rto_reward", "eval_kl_reference"} <= found.keys()
    assert found["eval_kl_reference"] > 0
    assert len(trainer.eval_dataset) == 3
