"""Heads with a bias, and options of a configuration that change logits after the head."""

import pytest
import torch
from tenfold.platform.errors import ModelError
from tenfold.platform.models.heads import check_logit_options, head_and_bias_from_folder, head_from_folder
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def test_the_bias_of_a_saved_head_is_read_with_it(tmp_path):
    model = PhiForCausalLM(PhiConfig(**SMALL, **TOKENS))
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path)
    weight, bias = head_and_bias_from_folder(tmp_path)
    assert torch.equal(weight, model.lm_head.weight)
    assert torch.equal(bias, model.lm_head.bias)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_without_bias_has_none(tmp_path, tied):
    model = LlamaForCausalLM(LlamaConfig(**SMALL, **TOKENS, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    weight, bias = head_and_bias_from_folder(tmp_path)
    assert torch.equal(weight, model.lm_head.weight)
    assert bias is None


def test_a_folder_without_its_untied_head_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    LlamaForCausalLM(LlamaConfig(**SMALL, **TOKENS, tie_word_embeddings=False)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for read in (head_from_folder, head_and_bias_from_folder):
        with pytest.raises(ModelError, match=r"none of lm_head.weight among the weights. Get the model again"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "options", "named"),
    [
        ("gemma2", {}, "final_logit_softcapping = 30.0"),
        ("cohere", {}, "logit_scale = 0.0625"),
        ("granite", {"logits_scaling": 8.0}, "logits_scaling = 8.0"),
    ],
)
def test_options_that_change_logits_are_named(model_type, options, named):
    with pytest.raises(ModelError, match=f"{model_type}: {named} in its config.json"):
        check_logit_options(AutoConfig.for_model(model_type, **options))


@pytest.mark.parametrize(
    ("model_type", "options"),
    [("llama", {}), ("gemma2", {"final_logit_softcapping": None}), ("granite", {"logits_scaling": 1.0}), ("gpt2", {})],
)
def test_options_that_change_nothing_are_accepted(model_type, options):
    check_logit_options(AutoConfig.for_model(model_type, **options))
