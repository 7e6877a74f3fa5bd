"""The head of a model and what it reads: together they must give the model's own logits."""

import json

import pytest
import torch
from tenfold.platform.errors import ModelError
from tenfold.platform.models.heads import check_head, final_hidden, head_from_folder, head_of, head_shape

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
SHAPES = {
    "llama": {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2},
    "qwen2": {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2},
    "gpt2": SMALL,
    "gpt_neox": {**SMALL, "intermediate_size": 48},
    "opt": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "phi": {**SMALL, "intermediate_size": 48},
}


def make(model_type, seed=0, **options):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    values = {**SHAPES.get(model_type, SHAPES["llama"]), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**values, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and norms start at 0 and 1, where a forgotten one would not show.
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("model_type", SHAPES)
def test_head_and_final_hidden_states_give_the_logits(model_type):
    model = make(model_type)
    ids = torch.randint(3, 64, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    weight, bias = head_of(model)
    hidden = final_hidden(model, ids, mask)
    assert hidden.shape == (2, 7, 32)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    torch.testing.assert_close(logits, model(input_ids=ids, attention_mask=mask).logits)
    assert head_shape(model) == (64, 32)
    check_head(model)


def test_gradients_flow_through_hidden_states_and_head():
    model = make("llama")
    ids = torch.tensor([[5, 6, 7]])
    weight, _ = head_of(model)
    (final_hidden(model, ids, torch.ones_like(ids)) @ weight.T).logsumexp(-1).sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("model_type", "options"),
    [("gemma2", {"final_logit_softcapping": 0.5, "head_dim": 16}), ("cohere", {"logit_scale": 0.0625})],
)
def test_a_model_that_caps_or_scales_its_logits_is_refused(model_type, options):
    model = make(model_type, **options)
    with pytest.raises(ModelError, match=f"{model_type}: its logits are not the head applied"):
        check_head(model)


def test_checking_the_head_leaves_the_mode_of_every_module():
    model = make("llama").train()
    model.model.layers[0].eval()
    check_head(model)
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training


def test_a_model_without_head_is_refused():
    with pytest.raises(ModelError, match="llama: no output head"):
        head_of(make("llama").model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["10KB", "1GB"])
def test_the_head_of_a_folder_is_the_models(tmp_path, tiny_llama, tied, shard):
    model = tiny_llama(320, tied=tied)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "10KB")
    assert torch.equal(head_from_folder(tmp_path), model.lm_head.weight)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "opt", "qwen2"])
def test_heads_of_other_architectures_are_found(tmp_path, model_type):
    model = make(model_type)
    model.save_pretrained(tmp_path)
    assert torch.equal(head_from_folder(tmp_path), head_of(model)[0])


def test_a_folder_with_the_base_model_alone_gives_its_tied_head(tmp_path):
    model = make("gpt2")
    model.transformer.save_pretrained(tmp_path)
    assert torch.equal(head_from_folder(tmp_path), head_of(model)[0])


def test_the_head_of_a_folder_has_the_dtype_of_the_file(tmp_path, tiny_llama):
    tiny_llama(320).to(torch.bfloat16).save_pretrained(tmp_path)
    assert head_from_folder(tmp_path).dtype == torch.bfloat16


def test_reading_a_head_does_not_read_the_other_weights(tmp_path, tiny_llama):
    model = tiny_llama(320, tied=False)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for name in set(weight_map.values()) - {weight_map["lm_head.weight"]}:
        (tmp_path / name).write_bytes(b"damaged")
    assert torch.equal(head_from_folder(tmp_path), model.lm_head.weight)


def test_a_head_with_a_bias_is_not_given_without_it(tmp_path):
    make("phi").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="the head of a phi has a bias"):
        head_from_folder(tmp_path)


def test_damage_is_named_when_a_head_is_read(tmp_path, tiny_llama):
    tiny_llama(320).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:50])
    with pytest.raises(ModelError, match="damaged weights"):
        head_from_folder(tmp_path)
    weights.write_bytes(good)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 330}))
    with pytest.raises(ModelError, match=r"is \[320, 32\], config.json says \[330, 32\]"):
        head_from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neox"}))
    with pytest.raises(ModelError, match=r"none of .*embed_out.weight among the weights"):
        head_from_folder(tmp_path)
