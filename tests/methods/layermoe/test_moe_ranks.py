"""Two processes under ZeRO-3 whose tokens use other experts: they end, with the weights of one process."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tenfold.methods.layermoe.expansion import attach_classifiers, expand
from tenfold.platform.models.saving import save_model

SCRIPT = Path(__file__).with_name("expert_ranks.py")


@pytest.fixture(scope="module")
def ranks():
    specification = importlib.util.spec_from_file_location("expert_ranks", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_ranks_that_use_other_experts_train_what_one_process_trains(tmp_path, ranks, tiny_llama, tiny_tokenizer):
    model = expand(tiny_llama(320, layers=3), [2, 0, 1], languages=["el"], old_languages=["en"], seed=1)
    attach_classifiers(model, [0, 2], seed=2)
    save_model(model, tiny_tokenizer, tmp_path / "model", flavor="moe-causal-lm", method="layermoe", name="model")
    output = tmp_path / "trained.safetensors"
    ended = subprocess.run([sys.executable, SCRIPT, tmp_path / "model", output], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]

    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.SGD(ranks.choose(model.train()), lr=ranks.RATE)
    for _ in range(ranks.STEPS):
        optimizer.zero_grad()
        (sum(ranks.loss_of(model, model, rank) for rank in (0, 1)) / 2).backward()
        optimizer.step()
    found = load_file(output)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(
            found[name], weight.detach(), rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert torch.equal(weight, before[name]) == (not weight.requires_grad), name
