"""Expanded models in transformers: saved, loaded, cast, refused; padding, checkpointing and what passes collect."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tenfold.methods.layermoe import modeling
from tenfold.methods.layermoe.expansion import attach_classifiers, expand, trainable
from tenfold.methods.layermoe.modeling import blocks_of, layout_of
from tenfold.methods.layermoe.state import RoutingState, collecting, routing_by
from tenfold.platform.errors import ModelError
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, Qwen2ForCausalLM

IDS = torch.randint(3, 90, (3, 11), generator=torch.Generator().manual_seed(5))


def changed(model, scale=0.05):
    """Change what was added, as training would: experts differ, and routers and classifiers have opinions."""
    draw = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".groups." in name or ".router." in name:
                weight.add_(scale * torch.randn(weight.shape, generator=draw))
    return model


@pytest.fixture
def expanded(tiny_llama):
    def make(counts=(2, 0, 1), classifiers=(0, 2), **options):
        model = tiny_llama(96, layers=len(counts))
        made = expand(model, list(counts), languages=["el"], old_languages=["en"], seed=1)
        return changed(attach_classifiers(made, classifiers, seed=3, **options)).eval()

    return make


@pytest.fixture
def folder(expanded, tmp_path):
    made = expanded()
    made.save_pretrained(tmp_path / "model")
    return made, tmp_path / "model"


def edit(folder, **changes):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["layermoe"] |= changes
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_saved_model_is_loaded_to_the_bit(expanded, tmp_path, shard):
    made = expanded()
    made.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or shard == "5GB"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(made)
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in made.state_dict().items())
    assert torch.equal(again(IDS).logits, made(IDS).logits)
    assert again.config.layermoe == made.config.layermoe
    assert again.config.intermediate_size == made.config.intermediate_size == 64


def test_a_loaded_model_is_saved_again_as_it_was(folder, tmp_path):
    _, place = folder
    AutoModelForCausalLM.from_pretrained(place).save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (place / name).read_bytes()


def test_weights_have_the_names_of_their_groups(folder):
    names = load_file(folder[1] / "model.safetensors").keys()
    own = {name.removeprefix("model.layers.0.mlp.") for name in names if "layers.0.mlp" in name}
    parts = [f"{name}_proj.weight" for name in ("gate", "up", "down")]
    experts = {f"{place}.{part}" for place in ("base", "groups.0.0", "groups.0.1") for part in parts}
    assert own == experts | {"router.weight", "classifier.weight"}
    assert "model.layers.1.mlp.gate_proj.weight" in names


def test_a_model_is_loaded_in_bfloat16_and_routes_in_float32(folder):
    made, place = folder
    again = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16)
    with collecting(again) as state:
        logits = again(IDS).logits
    assert logits.dtype == torch.bfloat16
    assert state.router_logits[0].dtype == state.classifier_logits[2].dtype == torch.float32
    assert (logits.float() - made(IDS).logits).abs().max() < 0.05


def test_the_class_of_the_dense_base_refuses_the_folder(folder):
    with pytest.raises(Exception, match=r"of each expert: import tenfold.methods.layermoe.modeling"):
        LlamaForCausalLM.from_pretrained(folder[1])
    with pytest.raises(Exception, match="of each expert"):
        Qwen2ForCausalLM.from_pretrained(folder[1])


def test_transformers_alone_does_not_know_the_type(folder, monkeypatch):
    from transformers import CONFIG_MAPPING

    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "layermoe-llama")
    with pytest.raises(ValueError, match="layermoe-llama"):
        AutoModelForCausalLM.from_pretrained(folder[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classifier_layers": [0]}, "unexpected model.layers.2.mlp.classifier.weight"),
        ({"experts": [[2], [0], [2]]}, r"missing model.layers.2.mlp.groups.0.1|size|mismatch"),
        ({"classes": 3}, "classifier.weight|size|mismatch"),
        ({"experts": [[2], [0]]}, "2 layers"),
        ({"experts": [[2], [0, 1], [1]]}, "all of one length"),
        ({"classifier_layers": [1]}, "1 is not"),
        ({"classifier_pool": "mean"}, "sequence or prefix"),
        ({"top_k": 0}, "top_k at least 1"),
        ({"gates": 3}, "gates"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(folder, change, words):
    edit(folder[1], **change)
    with pytest.raises((ModelError, RuntimeError), match=words):
        AutoModelForCausalLM.from_pretrained(folder[1])


def test_a_configuration_without_layout_is_refused(folder):
    content = json.loads((folder[1] / "config.json").read_text())
    del content["layermoe"]
    (folder[1] / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="no layermoe entry"):
        AutoModelForCausalLM.from_pretrained(folder[1])


def test_missing_weights_are_not_made_up(folder):
    path = folder[1] / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.0.mlp.router.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing model\.layers\.0\.mlp\.router\.weight"):
        AutoModelForCausalLM.from_pretrained(folder[1])


def test_a_third_family_is_one_line_of_the_table(monkeypatch):
    from transformers import MistralConfig, MistralForCausalLM

    family = modeling.Family("MistralConfig", "MistralForCausalLM")
    monkeypatch.setitem(modeling.FAMILIES, "mistral", family)
    monkeypatch.setitem(modeling.EXPANDED, "mistral", modeling._make("mistral", family))
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    dense = MistralForCausalLM(MistralConfig(vocab_size=96, num_hidden_layers=2, **shape)).eval()
    before = dense(IDS).logits
    made = expand(dense, [1, 2], languages=["el"], old_languages=["en"], seed=1)
    assert made.config.model_type == "layermoe-mistral"
    torch.testing.assert_close(made(IDS).logits, before, rtol=0, atol=1e-5)


def test_registering_twice_does_no_harm():
    modeling.register()
    assert AutoConfig.for_model("layermoe-qwen2").model_type == "layermoe-qwen2"


def padded(ids, left=0, right=0):
    """Return (ids, mask) with padding of token 7."""
    pad = ids.new_full
    wide = torch.cat([pad((len(ids), left), 7), ids, pad((len(ids), right), 7)], 1)
    mask = torch.cat([pad((len(ids), left), 0), torch.ones_like(ids), pad((len(ids), right), 0)], 1)
    return wide, mask


@pytest.mark.parametrize("pool", ["sequence", "prefix"])
@pytest.mark.parametrize(("left", "right"), [(0, 4), (5, 0), (2, 3)])
def test_padding_changes_no_output_and_no_decision(expanded, pool, left, right):
    model = expanded(pool=pool)
    ids, mask = padded(IDS, left, right)
    with collecting(model) as plain:
        expected = model(IDS).logits
    with collecting(model) as wide:
        found = model(ids, attention_mask=mask).logits[:, left : left + IDS.shape[1]]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    for layer, classes in plain.decisions.items():
        own = wide.decisions[layer]
        assert torch.equal(own if pool == "sequence" else own[:, left : left + IDS.shape[1]], classes)
        torch.testing.assert_close(wide.classifier_logits[layer], plain.classifier_logits[layer], rtol=0, atol=1e-5)


def test_a_decision_does_not_depend_on_the_others_of_the_batch(expanded):
    model = expanded()
    with collecting(model) as together:
        model(IDS)
    for row in range(3):
        with collecting(model) as alone:
            model(IDS[row : row + 1])
        assert all(alone.decisions[layer] == classes[row] for layer, classes in together.decisions.items())


def test_classifiers_that_say_old_on_all_layers_give_back_the_dense_model(tiny_llama):
    dense = tiny_llama(96, layers=3).eval()
    before = dense(IDS).logits
    made = expand(dense, [2, 1, 1], languages=["el"], old_languages=["en"], seed=1)
    changed(attach_classifiers(made, [0, 1, 2], seed=3), 0.5)
    assert not torch.allclose(made(IDS).logits, before, atol=1e-2)
    with collecting(made, groups=torch.zeros(3, dtype=torch.long), route_with="gold"):
        assert torch.equal(made(IDS).logits, before)


def test_gold_groups_beyond_the_classes_mean_the_last_class(expanded):
    model = expanded()
    with collecting(model, groups=torch.tensor([0, 1, 4]), route_with="gold") as state:
        model(IDS)
    assert {tuple(classes.tolist()) for classes in state.decisions.values()} == {(0, 1, 1)}


@pytest.mark.parametrize("groups", [None, torch.tensor([0, 1])])
def test_gold_needs_a_group_for_each_sequence(expanded, groups):
    model = expanded()
    with collecting(model, groups=groups, route_with="gold"), pytest.raises(ModelError, match="3 sequences"):
        model(IDS)


def test_a_pass_collects_logits_by_layer_and_only_when_asked(expanded):
    model = expanded()
    with collecting(model) as state:
        model(IDS)
    assert {layer: tuple(logits.shape) for layer, logits in state.router_logits.items()} == {
        0: (3, 11, 3),
        2: (3, 11, 2),
    }
    assert {layer: tuple(logits.shape) for layer, logits in state.classifier_logits.items()} == {0: (3, 2), 2: (3, 2)}
    seen = state.router_logits[0]
    model(IDS[:, :4])
    assert state.router_logits[0] is seen
    with routing_by(model, RoutingState()) as quiet:
        model(IDS)
    assert quiet.router_logits == {}
    assert set(quiet.decisions) == {0, 2}


def test_a_pass_of_the_decoder_alone_collects_too(expanded):
    from tenfold.platform.models.hidden import final_hidden

    model = expanded()
    ids, mask = padded(IDS, right=3)
    with collecting(model) as whole:
        model(ids, attention_mask=mask)
    with collecting(torch.nn.ModuleDict({"exported": model})) as inner:
        final_hidden(model, ids, mask)
    for layer, logits in whole.router_logits.items():
        assert torch.equal(inner.router_logits[layer], logits)
        assert torch.equal(inner.classifier_logits[layer], whole.classifier_logits[layer])


def test_a_dense_model_collects_nothing(tiny_llama):
    with pytest.raises(ModelError, match="Expand it first"), collecting(tiny_llama(96)):
        pass


def test_class_1_of_three_uses_the_first_expansion_alone(expanded):
    second = expand(expanded(), [2, 1, 1], languages=["bn"], seed=2)
    model = attach_classifiers(second, [0, 1, 2], classes=3, seed=5).eval()
    with torch.no_grad():
        for block in blocks_of(model).values():
            for expert in block.groups[1]:
                for weight in expert.parameters():
                    weight.fill_(float("nan"))
    for group, finite in ((0, True), (1, True), (2, False)):
        with collecting(model, groups=torch.full((3,), group), route_with="gold"):
            assert model(IDS).logits.isfinite().all() == finite


def gradients(model, *, recompute, reentrant=False, passes=1):
    model = copy.deepcopy(model).train()
    trainable(model, 2)
    for block in blocks_of(model).values():
        for weight in block.groups.parameters():
            weight.requires_grad_(True)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    total = torch.zeros(())
    for number in range(passes):
        ids, mask = padded(IDS[number:], right=2 * number)
        with collecting(model) as state:
            loss = model(ids, attention_mask=mask, labels=ids).loss
        aux = [*state.router_logits.values(), *state.classifier_logits.values()]
        total = total + loss + sum(logits.logsumexp(-1).square().mean() for logits in aux)
    total.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("pool", ["sequence", "prefix"])
@pytest.mark.parametrize("passes", [1, 2], ids=["one-pass", "two-passes-before-backward"])
def test_checkpointing_gives_the_same_gradients(expanded, pool, passes):
    model = expanded(pool=pool)
    plain = gradients(model, recompute=False, passes=passes)
    again = gradients(model, recompute=True, passes=passes)
    assert plain.keys() == again.keys()
    assert any(".classifier." in name and grad.ne(0).any() for name, grad in plain.items())
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-5, atol=1e-8)


def test_reentrant_checkpointing_is_refused_where_losses_would_lose_their_gradient(expanded):
    with pytest.raises(ModelError, match="use_reentrant: false"):
        gradients(expanded(), recompute=True, reentrant=True)


def test_checkpointing_without_collected_losses_works_as_transformers_does_it(expanded):
    def of(recompute):
        model = expanded().train()
        if recompute:
            model.gradient_checkpointing_enable()
        model(IDS, labels=IDS).loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    plain, again = of(False), of(True)
    assert all(torch.allclose(again[name], grad, atol=1e-7) for name, grad in plain.items())


def test_label_rows_and_perplexity_read_an_expanded_model(expanded):
    from tenfold.platform.evaluation.perplexity import token_nll
    from tenfold.platform.models.heads import check_head
    from tenfold.platform.training.label_rows import check_whole_head, label_rows

    model = expanded()
    check_head(model)
    check_whole_head(model)
    labels = IDS.clone()
    labels[:, :4] = -100
    side = label_rows(model, IDS, torch.ones_like(IDS), labels)
    expected = model(IDS).logits[:, 3:-1].reshape(-1, 96)
    torch.testing.assert_close(side.hidden @ side.head.T, expected, rtol=0, atol=1e-5)
    rows = [
        {"input_ids": ids[:length].tolist(), "labels": ids[:length].tolist()}
        for ids, length in zip(IDS, (11, 7, 4), strict=True)
    ]
    nll, count = token_nll(model, rows, batch_size=2)
    alone = [
        model(ids[None, :length], labels=ids[None, :length]).loss * (length - 1)
        for ids, length in zip(IDS, (11, 7, 4), strict=True)
    ]
    assert count == 10 + 6 + 3
    assert nll == pytest.approx(sum(alone).item(), rel=1e-5)


@pytest.mark.parametrize("pool", ["sequence", "prefix"])
def test_any_form_of_the_mask_says_what_is_real(expanded, pool):
    model = expanded(pool=pool)
    ids, mask = padded(IDS, left=3)
    expected = model(ids, attention_mask=mask).logits[:, 3:]
    seen = torch.ones(14, 14, dtype=torch.bool).tril() & mask.bool()[:, None, None, :]
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    for form in (seen, added):
        found = model(ids, attention_mask=form, position_ids=torch.arange(14)[None]).logits[:, 3:]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_mask_of_no_known_form_is_refused_where_there_are_classifiers(expanded):
    with pytest.raises(ModelError, match=r"attention_mask \[3, 5\]: classifiers need"):
        expanded()(IDS, attention_mask=torch.ones(3, 5))


def test_embeddings_in_place_of_ids_and_positional_arguments_are_routed(expanded):
    model = expanded()
    expected = model.model(IDS).last_hidden_state
    embedded = model.model(inputs_embeds=model.model.embed_tokens(IDS)).last_hidden_state
    assert torch.equal(embedded, expected)
    assert torch.equal(model.model(IDS, torch.ones_like(IDS)).last_hidden_state, expected)


def test_the_layout_survives_a_copy_of_the_folder(folder, tmp_path):
    shutil.copytree(folder[1], tmp_path / "copy")
    assert layout_of(AutoConfig.from_pretrained(tmp_path / "copy")) == layout_of(folder[0].config)
