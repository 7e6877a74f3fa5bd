"""Expanded models: what they compute before training, what is shared, what each stage trains, lifelong growth."""

import copy

import pytest
import torch
from tenfold.methods.layermoe.delta import load_delta, save_delta
from tenfold.methods.layermoe.expansion import attach_classifiers, expand, trainable
from tenfold.methods.layermoe.modeling import blocks_of, ffn_of, layout_of
from tenfold.methods.layermoe.state import collecting
from tenfold.platform.errors import ModelError
from tenfold.platform.models.manifest import model_digest
from tenfold.platform.models.source import ModelSource
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

IDS = torch.randint(3, 90, (3, 11), generator=torch.Generator().manual_seed(5))
# the specification's explicit list of totals, 21 of 28 layers dense
TOTALS_28 = [1] * 16 + [2, 1, 1, 1, 1, 6, 1, 4, 2, 2, 4, 3]


def qwen(layers=3):
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )


@pytest.fixture
def dense(tiny_llama):
    def make(family="llama", layers=3):
        return (tiny_llama(96, layers=layers) if family == "llama" else qwen(layers)).eval()

    return make


def expanded(model, counts, **options):
    return expand(model, counts, **{"languages": ["el"], "old_languages": ["en"], "seed": 1, **options})


def trained(model, scale=0.05):
    """Change what an expansion added, as training would."""
    draw = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".groups." in name or ".router." in name or ".classifier." in name:
                weight.add_(scale * torch.randn(weight.shape, generator=draw))
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_an_expanded_model_computes_what_the_dense_one_did(dense, family, top_k):
    model = dense(family)
    before = model(IDS).logits
    made = expanded(model, [3, 0, 1], top_k=top_k)
    assert made.config.model_type == f"layermoe-{family}"
    torch.testing.assert_close(made(IDS).logits, before, rtol=0, atol=1e-5)
    with torch.no_grad():
        for block in blocks_of(made).values():
            block.router.weight.mul_(30)
    torch.testing.assert_close(made(IDS).logits, before, rtol=0, atol=1e-5)


def test_it_writes_what_the_dense_one_wrote(dense):
    model = dense()
    before = model.generate(IDS, max_new_tokens=12, do_sample=False)
    assert torch.equal(expanded(model, [2, 1, 0]).generate(IDS, max_new_tokens=12, do_sample=False), before)


def test_the_specification_s_list_with_ones_is_built_saved_and_loaded(dense, tmp_path):
    from transformers import AutoModelForCausalLM

    made = trained(expanded(dense(layers=28), [total - 1 for total in TOTALS_28]))
    assert sum(layout_of(made.config).totals) == 44
    assert len(blocks_of(made)) == 7
    assert sum(".gate_proj" in name and ".groups." in name for name, _ in made.named_parameters()) == 16
    trainable(made, 1)
    made(IDS, labels=IDS).loss.backward()
    made.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, made.eval()(IDS).logits)


def test_routers_are_xavier_normal_and_experts_copies(dense):
    made = expanded(dense(), [40, 0, 0])
    block = blocks_of(made)[0]
    assert block.router.weight.std().item() == pytest.approx((2 / (32 + 41)) ** 0.5, rel=0.06)
    assert abs(block.router.weight.mean().item()) < 0.02
    for expert in block.experts[1:]:
        for (name, copied), own in zip(expert.named_parameters(), block.base.parameters(), strict=True):
            assert torch.equal(copied, own), name
            assert copied.data_ptr() != own.data_ptr()


def test_the_seed_decides_the_routers_and_nothing_else_does(dense):
    torch.manual_seed(1)
    first = expanded(dense(), [1, 1, 1], seed=7)
    torch.manual_seed(2)
    second, third = expanded(dense(), [1, 1, 1], seed=7), expanded(dense(), [1, 1, 1], seed=8)
    for one, two, three in zip(*(blocks_of(made).values() for made in (first, second, third)), strict=True):
        assert torch.equal(one.router.weight, two.router.weight)
        assert not torch.equal(one.router.weight, three.router.weight)


def test_the_expansion_is_written_into_the_configuration(dense):
    made = expanded(dense(), [2, 0, 1], languages=["el", "hu"], record={"delta": 7.5})
    again = expanded(made, [0, 1, 1], languages=["bn"], record={"delta": 3.0})
    assert again.config.layermoe["experts"] == [[2, 0], [0, 1], [1, 1]]
    assert again.config.layermoe["languages"] == {"old": ["en"], "expansions": [["el", "hu"], ["bn"]]}
    assert [entry["delta"] for entry in again.config.layermoe["history"]] == [7.5, 3.0]


def test_a_bfloat16_model_stays_one_and_computes_the_same_to_its_precision(dense):
    model = dense().bfloat16()
    before = model(IDS).logits.float()
    made = expanded(model, [2, 1, 0])
    assert {weight.dtype for weight in made.parameters()} == {torch.bfloat16}
    difference = (made(IDS).logits.float() - before).abs().max() / before.abs().max()
    assert difference < 0.02


def test_a_second_expansion_keeps_the_first_and_copies_the_original_ffn(dense):
    first = trained(expanded(dense(), [2, 0, 1]))
    before = copy.deepcopy(first.state_dict())
    second = expanded(first, [1, 2, 0], languages=["bn"], seed=4)
    assert layout_of(second.config).totals == [4, 3, 2]
    after = second.state_dict()
    for name, weight in before.items():
        if ".router." not in name:
            moved = name.replace("layers.1.mlp.", "layers.1.mlp.base.") if "layers.1.mlp" in name else name
            assert torch.equal(after[moved], weight), name
    for block in (blocks_of(second)[0], blocks_of(second)[1]):
        for expert in block.groups[1]:
            for own, original in zip(expert.parameters(), block.base.parameters(), strict=True):
                assert torch.equal(own, original)
    assert len(blocks_of(second)[2].groups[1]) == 0


def test_a_second_expansion_draws_routers_anew_or_extends_them(dense):
    first = expanded(dense(), [2, 0, 1])
    old = {layer: block.router.weight.detach().clone() for layer, block in blocks_of(first).items()}
    extended = blocks_of(expanded(copy.deepcopy(first), [1, 1, 1], router_init="extend", seed=4))
    anew = blocks_of(expanded(first, [1, 1, 1], seed=4))
    for layer, rows in old.items():
        assert torch.equal(extended[layer].router.weight[: len(rows)], rows)
        assert not torch.equal(anew[layer].router.weight[: len(rows)], rows)
    assert torch.equal(extended[1].router.weight, anew[1].router.weight)
    assert len(extended[0].router.weight) == 4


def test_a_second_expansion_drops_the_classifiers(dense):
    first = attach_classifiers(expanded(dense(), [2, 0, 1]), [0, 2], seed=1)
    second = expanded(first, [1, 1, 1])
    assert layout_of(second.config).classifier_layers == []
    assert not any("classifier" in name for name, _ in second.named_parameters())
    names = trainable(second, 1)
    second(IDS, labels=IDS).loss.backward()
    assert all(second.get_parameter(name).grad is not None for name in names)


def test_equal_sums_of_other_layouts_are_other_expansions(dense):
    assert layout_of(expanded(dense(), [2, 0, 1]).config) != layout_of(expanded(dense(), [1, 1, 1]).config)


def test_stage_1_trains_the_newest_experts_and_all_routers(dense):
    made = expanded(expanded(dense(), [2, 0, 1]), [1, 0, 0])
    names = trainable(made, 1)
    assert names == [name for name, _ in made.named_parameters() if ".groups.1." in name or ".router." in name]
    assert sum(".router." in name for name in names) == 2
    check_only_these_change(made, names)


def test_stage_2_trains_routers_and_classifiers(dense):
    made = attach_classifiers(expanded(dense(), [2, 0, 1]), [2], seed=1)
    names = trainable(made, 2)
    assert names == [name for name, _ in made.named_parameters() if ".router." in name or ".classifier." in name]
    assert len(names) == 3
    check_only_these_change(made, names)


def check_only_these_change(model, names):
    """One step of gradient descent: on exactly these parameters, all others to the bit."""
    trained(model)
    before = copy.deepcopy(model.state_dict())
    with collecting(model) as state:
        loss = model(IDS, labels=IDS).loss
    logits = [*state.router_logits.values(), *state.classifier_logits.values()]
    (loss + sum(some.square().mean() for some in logits)).backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is not None] == names
    torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1.0).step()
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    routed = {name for name in names if model.get_parameter(name).grad.ne(0).any()}
    assert changed == routed
    assert len(changed) > len(names) / 2


def test_stage_1_refuses_classifiers_which_would_keep_tokens_from_new_experts(dense):
    made = attach_classifiers(expanded(dense(), [2, 0, 1]), [2], seed=1)
    with pytest.raises(ModelError, match="remove them"):
        trainable(made, 1)
    assert trainable(attach_classifiers(made, [], seed=1), 1)


def test_a_dense_model_has_nothing_to_train(dense):
    with pytest.raises(ModelError, match="no layer has experts"):
        trainable(dense(), 1)


@pytest.mark.parametrize("counts", [[1, 1], [0, 0, 0], [1, -1, 1]])
def test_counts_that_do_not_fit_are_refused(dense, counts):
    with pytest.raises(ModelError, match="for each of the 3 layers"):
        expanded(dense(), counts)


def test_an_unknown_architecture_is_refused():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20))
    with pytest.raises(ModelError, match=r"only llama, qwen2 models can be expanded"):
        expanded(model, [1])


@pytest.mark.parametrize("layers", [[1], [3], [-1], [0, 0]])
def test_classifiers_belong_on_layers_with_experts_once(dense, layers):
    with pytest.raises(ModelError, match=r"Such layers: \[0, 2\]"):
        attach_classifiers(expanded(dense(), [2, 0, 1]), layers, seed=1)


def test_classifiers_are_drawn_by_their_seed(dense):
    made = attach_classifiers(expanded(dense(), [2, 0, 1]), [2, 0], classes=3, pool="prefix", seed=1)
    first = {layer: block.classifier.weight.detach().clone() for layer, block in blocks_of(made).items()}
    assert first[0].shape == (3, 32)
    assert made.config.layermoe["classifier_layers"] == [0, 2]
    assert made.config.layermoe["classifier_pool"] == "prefix"
    attach_classifiers(made, [2], classes=3, seed=1)
    assert blocks_of(made)[0].classifier is None
    attach_classifiers(made, [0, 2], classes=3, seed=1)
    assert all(torch.equal(block.classifier.weight, first[layer]) for layer, block in blocks_of(made).items())


def test_a_copied_model_routes_by_itself(dense):
    made = trained(attach_classifiers(expanded(dense(), [2, 0, 1]), [0, 2], seed=1))
    twin = copy.deepcopy(made)
    with torch.no_grad():
        blocks_of(twin)[0].classifier.weight.neg_()
    with collecting(made) as own, collecting(twin) as other:
        assert not torch.equal(made(IDS).logits, twin(IDS).logits)
    assert own.decisions[0].tolist() == [1 - route for route in other.decisions[0].tolist()]


def test_the_ffns_of_dense_and_expanded_models_are_found(dense):
    model = dense()
    before = ffn_of(model)
    made = expanded(model, [2, 0, 1])
    assert [type(ffn).__name__ for ffn in ffn_of(made)] == ["ExpertBlock", "LlamaMLP", "ExpertBlock"]
    assert torch.equal(ffn_of(made)[1].up_proj.weight, before[1].up_proj.weight)


@pytest.fixture
def base_folder(tmp_path, tiny_llama, tiny_tokenizer):
    tiny_llama(320, layers=3).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def delta(tmp_path, base_folder, tiny_llama):
    made = trained(attach_classifiers(expanded(tiny_llama(320, layers=3), [2, 0, 1]), [2], pool="prefix", seed=1))
    save_delta(made, tmp_path / "delta", str(base_folder), model_digest(base_folder))
    return made.eval(), tmp_path / "delta"


def test_what_was_added_and_its_base_are_the_model(delta, base_folder):
    made, folder = delta
    again = load_delta(folder)
    assert torch.equal(again(IDS).logits, made(IDS).logits)
    assert again.config.layermoe == made.config.layermoe
    assert (folder / "experts.safetensors").stat().st_size < (base_folder / "model.safetensors").stat().st_size


def test_the_base_may_have_moved(delta, base_folder):
    made, folder = delta
    base_folder.rename(base_folder.with_name("moved"))
    again = load_delta(folder, ModelSource(model=str(base_folder.with_name("moved"))))
    assert torch.equal(again(IDS).logits, made(IDS).logits)


def test_another_base_is_refused(delta, tmp_path, tiny_llama, tiny_tokenizer):
    tiny_llama(320, layers=3, seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="is not the one that was expanded"):
        load_delta(delta[1], ModelSource(model=str(tmp_path / "other")))


def test_a_delta_of_a_model_whose_other_weights_were_trained_is_refused(delta, tmp_path, base_folder):
    made, _ = delta
    with torch.no_grad():
        made.model.norm.weight.add_(0.1)
    save_delta(made, tmp_path / "all", str(base_folder))
    with pytest.raises(ModelError, match="other weights than experts were trained"):
        load_delta(tmp_path / "all")


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_weights_that_do_not_fit_the_layout_are_refused(delta, change):
    from safetensors.torch import load_file, save_file
    from tenfold.platform.models.manifest import read_manifest, write_manifest

    _, folder = delta
    name = "model.layers.2.mlp.classifier.weight"
    weights = load_file(folder / "experts.safetensors")
    if change == "shape":
        weights[name] = torch.zeros(3, 32)
    elif change == "missing":
        del weights[name]
    else:
        weights["model.layers.1.mlp.classifier.weight"] = torch.zeros(2, 32)
    save_file(weights, folder / "experts.safetensors")
    manifest = read_manifest(folder)
    write_manifest(folder, flavor=manifest.flavor, method=manifest.method, name=manifest.name)
    with pytest.raises(ModelError, match="classifier"):
        load_delta(folder)


def test_a_damaged_delta_is_refused(delta):
    (delta[1] / "experts.json").write_text("{}")
    with pytest.raises(ModelError, match=r"experts\.json: not what was written"):
        load_delta(delta[1])


def test_a_dense_model_has_no_delta(dense, tmp_path):
    with pytest.raises(ModelError, match="no experts to save"):
        save_delta(dense(), tmp_path / "delta", "base")
