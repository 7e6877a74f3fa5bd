"""LLaMA-Pro's copies of layers: where they stand, that nothing changes at first, what is trained, plain folders."""

import pytest
import torch
from tenfold.methods.layermoe.expansion import expand
from tenfold.methods.layermoe.insertion import copies_of, insert_layers, places_of, train_copies
from tenfold.methods.layermoe.sizes import copied_parameters
from tenfold.platform.errors import ConfigError, ModelError
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

IDS = torch.randint(3, 90, (3, 11), generator=torch.Generator().manual_seed(5))
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False)),
    # the last layers see the last four tokens only
    "qwen2 with a window": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    ),
}


@pytest.fixture
def dense():
    def make(name="llama"):
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # biases start at 0, norms at 1
                parameter.add_(0.02 * torch.randn(parameter.shape))
        return model

    return make


@pytest.mark.parametrize(
    ("layers", "inserted", "places"),
    [
        (24, None, [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23]),  # MoE-LPR's baseline: 12 copies
        (32, 8, [3, 7, 11, 15, 19, 23, 27, 31]),  # LLaMA-Pro itself
        (5, None, [1, 4]),
        (1, None, [0]),
        (3, 3, [0, 1, 2]),
        (10, 3, [2, 5, 9]),
    ],
)
def test_copies_are_evenly_spaced(layers, inserted, places):
    assert places_of(layers, inserted) == places
    order = sorted([*range(layers), *places])
    assert [order[number] for number in copies_of(places)] == places
    assert all(order[number] == order[number - 1] for number in copies_of(places))


def test_more_copies_than_layers_are_refused():
    with pytest.raises(ConfigError, match="inserted_layers = 5: the model has 4 layers"):
        places_of(4, 5)


@pytest.mark.parametrize("name", MODELS)
def test_a_deeper_model_computes_exactly_the_same_and_stays_a_plain_one(dense, name, tmp_path):
    model = dense(name)
    before, written = model(IDS).logits, model.generate(IDS, max_new_tokens=6, do_sample=False)
    size, added = sum(p.numel() for p in model.parameters()), copied_parameters(model, [1, 3])
    deeper = insert_layers(model, places_of(4))
    assert torch.equal(deeper(IDS).logits, before)
    assert torch.equal(deeper.generate(IDS, max_new_tokens=6, do_sample=False), written)
    assert sum(p.numel() for p in deeper.parameters()) == size + added
    deeper.save_pretrained(tmp_path)
    again, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    assert type(again) is type(dense(name))
    assert len(again.model.layers) == again.config.num_hidden_layers == 6
    assert torch.equal(again(IDS).logits, before)


@pytest.mark.parametrize("name", ["llama with biases", "qwen2 with a window"])
def test_only_the_copies_train_and_a_cache_has_a_place_for_each_layer(dense, name):
    deeper = insert_layers(dense(name), places_of(4))
    known = {name: parameter.detach().clone() for name, parameter in deeper.named_parameters()}
    trained = train_copies(deeper, [2, 5])
    assert {tuple(name.split(".")[:3]) for name in trained} == {("model", "layers", "2"), ("model", "layers", "5")}
    optimizer = torch.optim.SGD([p for p in deeper.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # behind a zero nothing else has a gradient in the first step
        deeper(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, parameter in deeper.named_parameters() if not torch.equal(parameter, known[name])}
    assert changed == set(trained)
    with torch.no_grad():
        whole = deeper(IDS, use_cache=False).logits
        cache = deeper(IDS[:, :7], use_cache=True).cache
        rest = [deeper(IDS[:, t : t + 1], cache=cache, use_cache=True).logits for t in range(7, 11)]
    torch.testing.assert_close(torch.cat(rest, dim=1), whole[:, 7:], rtol=1e-4, atol=1e-4)


def test_a_copy_has_the_attention_of_its_layer(dense):
    deeper = insert_layers(dense("qwen2 with a window"), [0, 1, 2])
    assert deeper.config.layer_types == ["full_attention"] * 4 + ["sliding_attention"] * 3
    assert deeper.config.max_window_layers == 4
    assert [layer.self_attn.layer_idx for layer in deeper.model.layers] == list(range(7))
    assert [layer.self_attn.sliding_window for layer in deeper.model.layers] == [None] * 4 + [4] * 3


def test_layers_are_not_inserted_between_experts(dense):
    made = expand(dense(), [1, 0, 0, 0], languages=["el"], seed=1)
    with pytest.raises(ModelError, match="llama_pro inserts layers into dense models, and this one has experts"):
        insert_layers(made, [1])
