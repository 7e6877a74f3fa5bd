"""Measures on held-out lines: loss per byte, forgetting, and where tokens go."""

import json
import math

import pytest
import torch
from tenfold.methods.layermoe.block import ExpertBlock
from tenfold.methods.layermoe.evaluation import (
    LanguageLoss,
    LayerCounts,
    bits_by_language,
    count_routing,
    counts_from_json,
    counts_to_json,
    group_means,
    line_rows,
    load_shares,
    loss_by_language,
    loss_metrics,
    routing_by_language,
    routing_metrics,
)
from tenfold.methods.layermoe.expansion import attach_classifiers, expand
from tenfold.methods.layermoe.modeling import blocks_of
from tenfold.methods.layermoe.state import RoutingState
from tenfold.platform.errors import ModelError
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

LINES = {
    "en": ["A cat sat.", "The dog is big and it runs.", "Yes"],
    "el": ["\u0397 \u03b3\u03ac\u03c4\u03b1 \u03ba\u03ac\u03b8\u03b5\u03c4\u03b1\u03b9.", "\u039d\u03b1\u03b9"],
}
GROUPS = {"en": 0, "el": 1}


@pytest.fixture(scope="module")
def tokenizer():
    from importlib.resources import files

    return AutoTokenizer.from_pretrained(str(files("tenfold.samples") / "models" / "stories260K"))


@pytest.fixture(scope="module")
def dense(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.3, **sizes)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def expanded(dense):
    """Two new experts on layer 0, none on layer 1, one on layer 2, which has a classifier."""
    model = expand(dense, [2, 0, 1], languages=["el"], old_languages=["en"], seed=1)
    attach_classifiers(model, [2], seed=2)
    return model.eval()


def plain_loss(model, tokenizer, line, first):
    """One line at a time, whole logits, float64."""
    ids = [first, *tokenizer.encode(line, add_special_tokens=False), tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    return -sum(logits[place].log_softmax(-1)[token].item() for place, token in enumerate(ids[1:])), len(ids) - 1


@pytest.mark.parametrize("kind", ["dense", "expanded"])
def test_the_loss_is_that_of_a_slow_loop_for_each_language(kind, dense, expanded, tokenizer):
    model = dense if kind == "dense" else expanded
    found = loss_by_language(model, tokenizer, LINES, batch_size=2, chunk=3)
    for language, lines in LINES.items():
        parts = [plain_loss(model, tokenizer, line, tokenizer.bos_token_id) for line in lines]
        loss = found[language]
        assert loss.nats == pytest.approx(sum(nats for nats, _ in parts), rel=1e-5)
        assert loss.tokens == sum(count for _, count in parts)
        assert loss.lines == len(lines)
        assert loss.bytes == sum(len(line.encode()) for line in lines)
    assert found["el"].bytes == 33  # 15 Greek letters of two bytes, two spaces and a stop
    assert loss_by_language(model, tokenizer, LINES, batch_size=16)["el"].nats == pytest.approx(found["el"].nats)


def test_a_uniform_model_costs_the_log_of_its_vocabulary_a_token(dense, tokenizer):
    import copy

    model = copy.deepcopy(dense)
    torch.nn.init.zeros_(model.lm_head.weight)
    [loss] = loss_by_language(model, tokenizer, {"en": ["abc"]}).values()
    assert loss.nats == pytest.approx(loss.tokens * math.log(len(tokenizer)))
    assert loss.perplexity == pytest.approx(len(tokenizer))
    assert loss.nats_per_byte == pytest.approx(loss.nats / 3)
    assert loss.bits_per_byte == pytest.approx(loss.tokens * math.log2(len(tokenizer)) / 3)
    assert bits_by_language(model, tokenizer, {"en": ["abc"]}) == {"en": loss.bits_per_byte}


def test_a_line_is_between_bos_and_eos_and_all_but_bos_is_counted(tokenizer):
    ids = tokenizer.encode("Yes", add_special_tokens=False)
    [row] = line_rows(["Yes"], tokenizer)
    assert row == {"input_ids": [1, *ids, 2], "labels": [-100, *ids, 2]}


def test_without_bos_a_line_follows_an_eos_as_documents_do_in_training(tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    [row] = line_rows(["Yes"], bare)
    assert row["input_ids"][0] == bare.eos_token_id
    assert row["labels"][0] == -100
    bare.eos_token = None
    with pytest.raises(ModelError, match="no EOS token"):
        line_rows(["Yes"], bare)


def test_group_means_are_plain_means_over_languages():
    values = {"en": 1.0, "es": 2.0, "el": 5.0}
    groups = {"old": ["en", "es", "zh"], "new": ["el"], "earlier": [], "later": ["bn"]}
    assert group_means(values, groups) == {"old": 1.5, "new": 5.0}


def test_forgetting_and_plasticity_are_changes_of_the_group_means():
    groups = {"old": ["en", "es"], "new": ["el"], "earlier": ["tr"]}
    before, after = (
        {name: LanguageLoss(total, 10, 10, 1) for name, total in nats.items()}
        for nats in ({"en": 10, "es": 20, "el": 60, "tr": 30}, {"en": 12, "es": 26, "el": 35, "tr": 31})
    )
    metrics = loss_metrics(after, groups, before)
    assert metrics["eval/forgetting"] == pytest.approx((0.2 + 0.6) / 2)
    assert metrics["eval/forgetting_earlier"] == pytest.approx(0.1)
    assert metrics["eval/plasticity"] == pytest.approx(2.5)
    assert metrics["eval/old/nats_per_byte"] == pytest.approx(1.9)
    assert metrics["eval/el/bits_per_byte"] == pytest.approx(3.5 / math.log(2))
    without = loss_metrics(after, groups)
    assert without == {name: value for name, value in metrics.items() if name.count("/") == 2}
    only_new = loss_metrics({"el": after["el"]}, groups, before)
    assert {name for name in only_new if name.count("/") == 1} == {"eval/plasticity"}


def block_of(sizes, top_k=2, classes=0):
    experts = {"base": torch.nn.Linear(4, 4), "new_expert": lambda: torch.nn.Linear(4, 4)}
    return ExpertBlock(**experts, hidden_size=4, sizes=sizes, layer=0, top_k=top_k, classes=classes)


def test_counts_of_a_pass_are_those_of_the_worked_numbers():
    # the specification's routing examples, and a padded token that counts nowhere
    logits = torch.tensor([[[1.0, 0.5, -1.0], [-2.0, 0.3, 0.4], [9.0, 0.0, 0.0]]])
    state = RoutingState(router_logits={0: logits})
    counts = {}
    mask = torch.tensor([[True, True, False]])
    count_routing(state, {0: block_of([2])}, mask, 0, counts)
    assert counts[0].tokens == 2
    assert counts[0].base_mass == pytest.approx(0.5741 + 0.0455, abs=1e-4)
    assert counts[0].base_first == 1
    assert counts[0].load == [1, 2, 1]
    assert (counts[0].sequences, counts[0].right) == (0, 0)
    count_routing(state, {0: block_of([2])}, mask, 0, counts)
    assert counts[0].tokens == 4
    assert counts[0].load == [2, 4, 2]


@pytest.mark.parametrize("running", [False, True])
def test_what_a_classifier_sends_to_the_original_ffn_loads_no_other_expert(running):
    # two lines of two tokens; the router always prefers experts 1 and 2
    logits = torch.tensor([0.0, 2.0, 1.0]).expand(2, 2, 3)
    decisions = torch.tensor([0, 1])
    state = RoutingState(
        router_logits={0: logits},
        classifier_logits={0: torch.tensor([[2.0, -1.0], [0.0, 0.5]])},
        decisions={0: decisions[:, None].expand(2, 2) if running else decisions},
    )
    counts, mask = {}, torch.ones(2, 2, dtype=torch.bool)
    count_routing(state, {0: block_of([2], classes=2)}, mask, 0, counts)
    assert counts[0].load == [2, 2, 2]
    assert (counts[0].sequences, counts[0].right) == (2, 1)
    assert counts[0].base_first == 0  # the router's own choice, before the classifier


def test_classes_between_use_the_experts_of_their_expansions():
    logits = torch.tensor([0.0, 1.0, 5.0, 9.0]).expand(1, 3, 4)
    counts, mask = {}, torch.ones(1, 3, dtype=torch.bool)
    state = RoutingState(
        router_logits={0: logits},
        classifier_logits={0: torch.tensor([[0.0, 2.0, 1.0]])},
        decisions={0: torch.tensor([1])},
    )
    count_routing(state, {0: block_of([1, 2], classes=3)}, mask, 1, counts)
    assert counts[0].load == [3, 3, 0, 0]
    assert counts[0].right == 1
    # a group beyond the classes is of the last class; one without a group is of none
    count_routing(state, {0: block_of([1, 2], classes=3)}, mask, 7, counts)
    count_routing(state, {0: block_of([1, 2], classes=3)}, mask, None, counts)
    assert (counts[0].sequences, counts[0].right) == (2, 1)


def ffn_inputs(model, ids):
    """Return layer -> what enters its experts, [1, T, H]."""
    seen = {}
    hooks = [
        block.register_forward_pre_hook(lambda _, given, layer=layer: seen.__setitem__(layer, given[0]))
        for layer, block in blocks_of(model).items()
    ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return seen


def test_routing_of_lines_is_that_of_single_passes_without_padding(expanded, tokenizer):
    found = routing_by_language(expanded, tokenizer, LINES, GROUPS, batch_size=2)
    blocks = blocks_of(expanded)
    for language, lines in LINES.items():
        assert sorted(found[language]) == [0, 2]
        tokens, mass, first, right = 0, dict.fromkeys([0, 2], 0.0), dict.fromkeys([0, 2], 0), 0
        for line in lines:
            ids = [1, *tokenizer.encode(line, add_special_tokens=False), 2]
            seen = ffn_inputs(expanded, ids)
            tokens += len(ids)
            for layer, hidden in seen.items():
                probability = (hidden[0] @ blocks[layer].router.weight.T).softmax(-1)
                mass[layer] += probability[:, 0].sum().item()
                first[layer] += (probability.argmax(-1) == 0).sum().item()
            decided = (seen[2][0].mean(0) @ blocks[2].classifier.weight.T).argmax().item()
            right += decided == GROUPS[language]
        for layer, own in found[language].items():
            assert own.tokens == tokens
            assert own.base_mass == pytest.approx(mass[layer], rel=1e-5)
            assert own.base_first == first[layer]
        assert (found[language][0].sequences, found[language][2].sequences) == (0, len(lines))
        assert found[language][2].right == right
        assert sum(found[language][0].load) == 2 * tokens


def test_classifiers_decide_where_tokens_go_in_the_report(expanded, tokenizer):
    torch.nn.init.zeros_(blocks_of(expanded)[2].classifier.weight)  # a tie: the first class, for all
    counts = routing_by_language(expanded, tokenizer, LINES, GROUPS)
    metrics = routing_metrics(counts, GROUPS)
    assert metrics["routing/old/classifier_accuracy"] == 1.0
    assert metrics["routing/new/classifier_accuracy"] == 0.0
    assert metrics["routing/new/base_load/layer_002"] == 1.0
    assert metrics["routing/new/base_load/layer_000"] < 1.0
    assert load_shares(counts, 3)["el"][2] == [1.0, 0.0]


def test_metrics_weigh_tokens_within_a_layer_and_layers_alike():
    counts = {
        "en": {0: LayerCounts(10, 5.0, 4, [10, 10]), 2: LayerCounts(10, 1.0, 0, [5, 5, 10], 4, 3)},
        "zh": {0: LayerCounts(30, 27.0, 28, [30, 30]), 2: LayerCounts(30, 3.0, 0, [20, 20, 20], 6, 6)},
        "el": {0: LayerCounts(20, 2.0, 1, [10, 30]), 2: LayerCounts(20, 4.0, 2, [0, 20, 20], 5, 4)},
        "fr": {0: LayerCounts(20, 20.0, 20, [40, 0]), 2: LayerCounts(20, 20.0, 20, [40, 0, 0])},
    }
    metrics = routing_metrics(counts, {"en": 0, "zh": 0, "el": 1})
    assert metrics["routing/old/p0/layer_000"] == pytest.approx(32 / 40)
    assert metrics["routing/old/p0/layer_002"] == pytest.approx(4 / 40)
    assert metrics["routing/old/p0"] == pytest.approx((0.8 + 0.1) / 2)
    assert metrics["routing/new/p0"] == pytest.approx((0.1 + 0.2) / 2)
    assert metrics["routing/old/top1_base"] == pytest.approx((0.8 + 0.0) / 2)
    assert metrics["routing/old/base_load/layer_002"] == pytest.approx(25 / 80)
    assert metrics["routing/old/classifier_accuracy"] == pytest.approx(9 / 10)
    assert metrics["routing/new/classifier_accuracy"] == pytest.approx(4 / 5)
    assert "routing/old/classifier_accuracy/layer_000" not in metrics
    assert load_shares(counts, 3)["el"] == [[0.25, 0.75], [], [0.0, 0.5, 0.5]]
    assert not any(name.startswith("routing/new") for name in routing_metrics(counts, {"en": 0}))


def test_counts_survive_json():
    counts = {"en": {0: LayerCounts(10, 5.0, 4, [10, 10]), 11: LayerCounts(10, 1.0, 0, [5, 5, 10], 4, 3)}}
    assert counts_from_json(json.loads(json.dumps(counts_to_json(counts)))) == counts


def test_a_dense_model_has_no_routing(dense, tokenizer):
    with pytest.raises(ModelError, match="routes nothing"):
        routing_by_language(dense, tokenizer, LINES, GROUPS)


def test_the_model_stays_in_its_mode(expanded, tokenizer):
    expanded.train()
    routing_by_language(expanded, tokenizer, LINES, GROUPS)
    loss_by_language(expanded, tokenizer, LINES)
    assert expanded.training
