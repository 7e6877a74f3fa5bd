"""Low-rank adapters: what they train, what merging them gives, and folders that hold an adapter alone."""

import json

import pytest
import torch
from tenfold.platform.errors import ModelError
from tenfold.platform.models.adapters import LoraOptions, add_adapter, base_model, merged_weights, num_trained
from tenfold.platform.models.heads import head_from_folder
from tenfold.platform.models.loading import describe, load_causal_lm, load_tokenizer, outline
from tenfold.platform.models.manifest import verify_manifest
from tenfold.platform.models.references import resolve
from tenfold.platform.models.source import ModelSource
from transformers import AutoModelForCausalLM

LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1}
SHAPES = {
    "llama": LLAMA,
    "tied qwen2": {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True},  # has biases
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2},  # keeps weights transposed
}
IDS = torch.arange(12)[None]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def fresh(tiny_model_folder):
    def make(shape):
        return ModelSource(config=SHAPES[shape], tokenizer=str(tiny_model_folder))

    return make


def teach(model):
    """Give the adapter something to add: B is zero at first."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw))


def adapted(source, **options):
    model = load_causal_lm(source, seed=1)
    add_adapter(model, LoraOptions(r=4, **options), seed=2)
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_new_adapter_changes_nothing_and_is_all_that_is_trained(fresh, shape):
    plain = load_causal_lm(fresh(shape), seed=1)
    model = adapted(fresh(shape))
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)


def test_default_targets_are_query_and_value_and_their_size_is_r_times_both_sides(fresh):
    model = adapted(fresh("llama"))
    layers = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert layers == {f"model.layers.{n}.self_attn.{part}_proj" for n in (0, 1) for part in "qv"}
    # two layers of q: 16 -> 16 and v: 16 -> 8, each with A [4, in] and B [out, 4]
    assert num_trained(model) == 2 * (4 * (16 + 16) + 4 * (16 + 8))


@pytest.mark.parametrize("shape", SHAPES)
def test_size_is_known_without_weights(fresh, shape):
    model = outline(fresh(shape))
    add_adapter(model, LoraOptions(r=4))
    assert next(model.parameters()).device.type == "meta"
    assert num_trained(model) == num_trained(adapted(fresh(shape)))


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("shape", SHAPES)
def test_merged_weights_load_as_a_plain_model_with_the_same_logits(fresh, tmp_path, shape, targets):
    plain = load_causal_lm(fresh(shape), seed=1)
    model = adapted(fresh(shape), target_modules=targets)
    teach(model)
    model.save_pretrained(tmp_path / "merged", state_dict=merged_weights(model, model.state_dict()))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.state_dict().keys() == plain.state_dict().keys()
    expected = model(IDS).logits
    assert (expected - plain(IDS).logits).abs().max() > 1e-2
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_merged_weight_is_the_sum_by_hand_and_others_are_not_copied():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(2, 1, bias=False)
            self.other = torch.nn.Linear(2, 2)

    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(r=1, lora_alpha=3, target_modules=["inner"]), Model())
    weights = dict(model.state_dict())
    weights["inner.base_layer.weight"] = torch.tensor([[1.0, 2.0]])
    weights["inner.lora_A.default.weight"] = torch.tensor([[1.0, -1.0]])
    weights["inner.lora_B.default.weight"] = torch.tensor([[0.5]])
    merged = merged_weights(model, weights)
    assert merged.keys() == {"inner.weight", "other.weight", "other.bias"}
    assert merged["inner.weight"].tolist() == [[1 + 3 * 0.5, 2 - 3 * 0.5]]
    assert merged["other.weight"] is weights["other.weight"]


def test_model_without_adapter_has_its_weights_as_they_are(fresh):
    model = load_causal_lm(fresh("llama"), seed=1)
    weights = model.state_dict()
    merged = merged_weights(model, weights)
    assert list(merged) == list(weights)
    assert all(merged[name] is weights[name] for name in weights)


def test_seed_decides_the_adapter_and_leaves_the_global_state_alone(fresh):
    state = torch.get_rng_state()
    one, two, other = (load_causal_lm(fresh("llama"), seed=1) for _ in range(3))
    for model, seed in ((one, 7), (two, 7), (other, 8)):
        add_adapter(model, LoraOptions(r=4), seed=seed)
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(one.state_dict()[name], two.state_dict()[name])
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_acts_in_training_only(fresh):
    model = adapted(fresh("llama"), dropout=0.5)
    teach(model)
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)


def test_alpha_scales_what_the_adapter_adds(fresh):
    moved = []
    for alpha in (4, 8):
        model = adapted(fresh("llama"), alpha=alpha)
        teach(model)
        weights = merged_weights(model, model.state_dict())
        name = "model.layers.0.self_attn.q_proj"
        moved.append(weights[f"{name}.weight"] - model.state_dict()[f"{name}.base_layer.weight"])
    torch.testing.assert_close(moved[1], 2 * moved[0])


def test_adapter_learns_with_recomputed_activations(fresh):
    model = adapted(fresh("llama"), dropout=0.0)
    teach(model)
    model.train()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        model.gradient_checkpointing_enable()
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["c_attn"], r"target_modules = \['c_attn'\]: does not fit a llama"),
        (["q_proj", "lm_head"], r"lm_head is an embedding or the head"),
        (["embed_tokens"], r"embed_tokens is an embedding or the head"),
    ],
)
def test_layers_that_cannot_have_an_adapter_are_refused(fresh, targets, message):
    with pytest.raises(ModelError, match=message):
        adapted(fresh("llama"), target_modules=targets)


@pytest.fixture
def saved(fresh, tmp_path):
    """(base folder, adapter folder as peft saves it, logits of the adapted model)."""
    from peft import LoraConfig, get_peft_model

    base = tmp_path / "base"
    load_causal_lm(fresh("llama"), seed=1).save_pretrained(base)
    load_tokenizer(fresh("llama")).save_pretrained(base)
    wrapped = get_peft_model(load_causal_lm(ModelSource(model=str(base))), LoraConfig(r=4, lora_alpha=8))
    teach(wrapped)
    wrapped.eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter", wrapped(IDS).logits


def rewrite(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_adapter_folder_is_merged_once_and_used_like_any_model(saved):
    base, adapter, logits = saved
    source = ModelSource(model=str(adapter))
    torch.testing.assert_close(load_causal_lm(source)(IDS).logits, logits, rtol=1e-5, atol=1e-5)
    assert load_tokenizer(source).get_vocab() == load_tokenizer(ModelSource(model=str(base))).get_vocab()
    folder = resolve(str(adapter))
    assert [parent.kind for parent in verify_manifest(folder).parents] == ["adapter", "base"]
    assert torch.equal(head_from_folder(folder), head_from_folder(base))
    assert resolve(str(adapter)) == folder
    facts, plain = describe(source), describe(ModelSource(model=str(base)))
    assert (facts.num_parameters, facts.vocabulary_size, facts.dtype) == (
        plain.num_parameters,
        plain.vocabulary_size,
        plain.dtype,
    )


def test_plan_of_an_adapter_folder_merges_nothing(saved, tmp_path):
    describe(ModelSource(model=str(saved[1])))
    assert not (tmp_path / "cache" / "tenfold" / "adapters").exists()


def test_changed_adapter_is_merged_anew(saved):
    first = resolve(str(saved[1]))
    rewrite(saved[1], lora_alpha=16)
    assert resolve(str(saved[1])) != first


@pytest.mark.parametrize("use", [describe, load_tokenizer, load_causal_lm])
def test_missing_base_model_is_named(saved, use):
    rewrite(saved[1], base_model_name_or_path="/nowhere/llama")
    with pytest.raises(ModelError, match=r"is an adapter, and its base model /nowhere/llama is not there"):
        use(ModelSource(model=str(saved[1])))


def test_adapter_config_without_base_is_refused(saved):
    rewrite(saved[1], base_model_name_or_path=None)
    with pytest.raises(ModelError, match=r"does not tell the adapter's base model"):
        base_model(saved[1])


def test_adapter_of_another_shape_is_refused(saved, fresh):
    base, adapter, _ = saved
    small = {**LLAMA, "num_hidden_layers": 1}
    model = load_causal_lm(ModelSource(config=small, tokenizer=str(base)), seed=1)
    other = base.with_name("other")
    model.save_pretrained(other)
    load_tokenizer(ModelSource(model=str(base))).save_pretrained(other)
    rewrite(adapter, base_model_name_or_path=str(other))
    with pytest.raises(ModelError, match=r"cannot be merged into .*other.*4 of its weights do not belong"):
        resolve(str(adapter))


def test_adapter_without_safetensors_is_refused(saved):
    (saved[1] / "adapter_model.safetensors").rename(saved[1] / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        resolve(str(saved[1]))


def test_whole_model_with_an_adapter_beside_it_is_refused(saved):
    base, adapter, _ = saved
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (base / name).write_bytes((adapter / name).read_bytes())
    with pytest.raises(ModelError, match=r"holds a whole model and an adapter"):
        load_causal_lm(ModelSource(model=str(base)))
