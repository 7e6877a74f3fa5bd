"""What a training writes of a model whose head is the embedding."""

import pytest
import torch
from safetensors.torch import load_file
from tenfold.platform.models.saving import without_tied_copies
from torch import nn
from transformers import AutoModelForCausalLM

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def gathered(model):
    """Return the weights as DeepSpeed gathers them: without shared memory."""
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def test_a_tied_head_is_written_once_and_there_again_when_loaded(tiny_llama, tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path, state_dict=without_tied_copies(model, gathered(model)))
    written = load_file(tmp_path / "model.safetensors")
    assert HEAD not in written
    assert EMBEDDING in written
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], weight, rtol=0, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_its_own_is_kept(tied, tiny_llama):
    model = tiny_llama(tied=tied)
    weights = gathered(model)
    weights[HEAD] += 1
    assert without_tied_copies(model, weights).keys() == weights.keys()


def test_another_kind_of_model_is_kept_whole():
    assert without_tied_copies(nn.Linear(2, 2), nn.Linear(2, 2).state_dict()).keys() == {"weight", "bias"}
