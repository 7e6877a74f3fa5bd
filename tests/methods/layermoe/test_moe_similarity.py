"""Similarity of languages by layer: the double sum by brute force, batches, parts, documents, and the means' rules."""

import json
import logging
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from tenfold.methods.layermoe.expansion import attach_classifiers, expand
from tenfold.methods.layermoe.similarity import (
    Similarity,
    check_finite,
    layer_similarity,
    measure_language,
    pairwise,
    unit_sums,
)
from tenfold.platform.errors import ConfigError, DataError, ModelError

LAYERS, HIDDEN = 3, 32
DOCUMENTS = ["He goes to the park every day.", "Paris", "45 kilometers is 45000 meters, the chef cooks.", "a b c d"]


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(layers=LAYERS, hidden=HIDDEN).float()


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 320, (length,), generator=generator) for length in (5, 1, 9, 2, 7, 7, 3)]


def ffn_inputs(model, row):
    """What enters every FFN, [L, T, H], rebuilt from the hidden states that transformers returns, and by hand."""
    kept = []
    handles = [
        layer.post_attention_layernorm.register_forward_hook(lambda module, inputs, output: kept.append(output))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=row[None])
    for handle in handles:
        handle.remove()
    return torch.stack([states[0] for states in kept])


def mean_cosine(a, b):
    """The definition: the mean over all pairs of tokens, one pair at a time, [L]."""
    result = []
    for first, second in zip(a.double(), b.double(), strict=True):
        total = 0.0
        for x in first:
            for y in second:
                total += float(x @ y) / math.sqrt(float(x @ x) * float(y @ y))
        result.append(total / (len(first) * len(second)))
    return result


class GivenStates(torch.nn.Module):
    """A model whose "token" t enters every FFN as the row `states[t]`; it keeps what it was called with."""

    def __init__(self, states, layers=1):
        super().__init__()
        self.states = states
        self.layers = torch.nn.ModuleList()
        for _ in range(layers):
            layer = torch.nn.Module()
            layer.mlp = torch.nn.Identity()
            self.layers.append(layer)
        self.widths, self.masks, self.modes = [], [], []

    @property
    def model(self):
        return self

    base_model = model
    device = torch.device("cpu")

    @property
    def config(self):
        hidden = self.states.shape[-1]

        class Config:
            model_type = "llama"
            hidden_size = hidden

            def get_text_config(self):
                return self

        return Config()

    def forward(self, input_ids, attention_mask, use_cache):
        self.widths.append(tuple(input_ids.shape))
        self.masks.append(attention_mask.tolist())
        self.modes.append(self.training)
        for layer in self.layers:
            layer.mlp(self.states[input_ids])


def given(states, **options):
    states = torch.tensor(states)
    return unit_sums(GivenStates(states), [torch.arange(len(states))], len(states), **options)


def test_the_small_example_by_hand():
    (a, count_a), (b, count_b) = given([[1.0, 0], [0, 1]]), given([[1.0, 0], [1, 1]])
    assert (a / count_a)[0].tolist() == pytest.approx([0.5, 0.5])
    assert (b / count_b)[0].tolist() == pytest.approx([0.85355, 0.35355], abs=1e-5)
    assert pairwise({"a": a / count_a, "b": b / count_b})["a", "b"].tolist() == pytest.approx([0.60355], abs=1e-5)


def test_products_of_mean_unit_vectors_are_the_mean_over_all_pairs(model, rows):
    first, second = rows[:3], rows[3:]
    states_a = torch.cat([ffn_inputs(model, row) for row in first], dim=1)
    states_b = torch.cat([ffn_inputs(model, row) for row in second], dim=1)
    means = {}
    for name, part in (("a", first), ("b", second)):
        sums, count = unit_sums(model, part, 10_000)
        assert sums.dtype == np.float64
        assert sums.shape == (LAYERS, HIDDEN)
        assert count == sum(map(len, part))
        means[name] = sums / count
    assert pairwise(means)["a", "b"].tolist() == pytest.approx(mean_cosine(states_a, states_b), abs=1e-7)


def test_similarity_of_a_language_with_itself_is_its_squared_mean_and_at_most_one(model, rows):
    sums, count = unit_sums(model, rows, 100)
    mean = sums / count
    own = pairwise({"a": mean, "b": mean})["a", "b"]
    assert own.tolist() == pytest.approx((np.linalg.norm(mean, axis=1) ** 2).tolist())
    assert (own <= 1 + 1e-12).all()
    states = torch.cat([ffn_inputs(model, row) for row in rows], dim=1)
    assert own.tolist() == pytest.approx(mean_cosine(states, states), abs=1e-7)


def test_similarity_is_symmetric_and_within_one():
    generator = np.random.default_rng(1)
    states = {name: generator.normal(size=(4, 20, 6)) for name in "abc"}
    means = {n: (x / np.linalg.norm(x, axis=-1, keepdims=True)).mean(axis=1) for n, x in states.items()}
    pairs = pairwise(means)
    turned = pairwise(dict(reversed(means.items())))
    assert list(pairs) == [("a", "b"), ("a", "c"), ("b", "c")]
    for (a, b), values in pairs.items():
        assert values.tolist() == turned[b, a].tolist()
        assert (np.abs(values) <= 1).all()


@pytest.mark.parametrize("batch_tokens", [1, 9, 20, 30, 10_000])
def test_batches_and_their_padding_change_nothing(model, rows, batch_tokens):
    expected, _ = unit_sums(model, rows, 10_000, batch_tokens=1)
    sums, count = unit_sums(model, rows, 10_000, batch_tokens=batch_tokens)
    assert count == 34
    np.testing.assert_allclose(sums, expected, rtol=0, atol=2e-5)


def test_batches_hold_as_many_tokens_as_allowed_and_a_longer_row_runs_alone():
    model = GivenStates(torch.ones(20, 2))
    rows = [torch.arange(length) for length in (4, 4, 5, 12, 1, 1, 1, 1)]
    unit_sums(model, rows, 1000, batch_tokens=10)
    assert model.widths == [(2, 4), (1, 5), (1, 12), (4, 1)]


def test_the_model_sees_which_tokens_are_padding_and_has_no_dropout():
    model = GivenStates(torch.ones(20, 2))
    assert model.training
    unit_sums(model, [torch.arange(3), torch.arange(1)], 1000)
    assert model.masks == [[[1, 1, 1], [1, 0, 0]]]
    assert model.modes == [False]


@pytest.mark.parametrize("batch_tokens", [1, 12, 10_000])
@pytest.mark.parametrize("limit", [1, 5, 6, 14, 33, 34])
def test_exactly_the_first_tokens_count(model, rows, limit, batch_tokens):
    states = torch.cat([ffn_inputs(model, row) for row in rows], dim=1)[:, :limit].double()
    expected = (states / states.norm(dim=-1, keepdim=True)).sum(dim=1)
    sums, count = unit_sums(model, rows, limit, batch_tokens=batch_tokens)
    assert count == limit
    np.testing.assert_allclose(sums, expected, rtol=0, atol=2e-5)


def test_documents_are_read_no_further_than_needed(model):
    read = []

    def endless():
        while True:
            read.append(1)
            yield torch.full((10,), 5)

    _, count = unit_sums(model, endless(), 25, batch_tokens=15)
    assert count == 25
    assert len(read) == 3


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_sums_of_parts_add_up_to_the_whole(model, rows, parts):
    whole, count = unit_sums(model, rows, 10_000)
    results = [unit_sums(model, rows[part::parts], 10_000) for part in range(parts)]
    np.testing.assert_allclose(sum(sums for sums, _ in results), whole, rtol=0, atol=2e-5)
    assert sum(number for _, number in results) == count


def test_scaling_single_tokens_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(12, 5, generator=generator)
    scale = torch.logspace(-3, 6, 12)[:, None]
    plain, _ = given(states.tolist())
    scaled, _ = given((states * scale).tolist())
    np.testing.assert_allclose(scaled, plain, atol=1e-5)


def test_huge_finite_states_in_bfloat16_do_not_overflow():
    states = torch.tensor([[1e38, 1e38], [1.0, -1.0]], dtype=torch.bfloat16)
    sums, _ = unit_sums(GivenStates(states), [torch.arange(2)], 2)
    assert sums[0].tolist() == pytest.approx([math.sqrt(2), 0], abs=1e-9)


def test_a_vector_of_zeros_adds_nothing_but_counts():
    sums, count = given([[0.0, 0.0], [3.0, 4.0]])
    assert sums[0].tolist() == pytest.approx([0.6, 0.8])
    assert count == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_states_that_are_no_numbers_are_refused_with_their_layers(bad):
    with pytest.raises(ModelError, match=r"layers \[0\].*float16 overflows"):
        given([[1.0, bad], [1.0, 0.0]])


def test_the_model_is_left_as_it_was(model, rows):
    model.train()
    model.model.layers[0].eval()
    unit_sums(model, rows, 10)
    assert model.training
    assert not model.model.layers[0].training
    assert all(not layer.mlp._forward_pre_hooks for layer in model.model.layers)
    model.eval()


def test_hooks_are_gone_after_an_error(model):
    with pytest.raises(IndexError):
        unit_sums(model, [torch.tensor([10_000])], 10)
    assert all(not layer.mlp._forward_pre_hooks for layer in model.model.layers)


def test_an_expanded_model_is_measured_where_the_dense_one_is(tiny_llama, rows):
    dense = tiny_llama(layers=LAYERS, hidden=HIDDEN).float()
    expected, _ = unit_sums(dense, rows, 100)
    expanded = expand(dense, [2, 0, 1], languages=["el"], old_languages=["en"], seed=1)
    # new experts are copies: the model still computes the same
    np.testing.assert_allclose(unit_sums(expanded, rows, 100)[0], expected, rtol=0, atol=2e-5)


def test_an_expanded_models_own_routing_is_active(tiny_llama, rows):
    expanded = expand(tiny_llama(layers=LAYERS, hidden=HIDDEN).float(), [1, 0, 0], languages=["el"], seed=1)
    before, _ = unit_sums(expanded, rows, 100)
    with torch.no_grad():
        for parameter in expanded.model.layers[0].mlp.groups.parameters():
            parameter.add_(0.1)
    after, _ = unit_sums(expanded, rows, 100)
    np.testing.assert_allclose(after[0], before[0], rtol=0, atol=1e-9)
    assert (np.abs(after[1:] - before[1:]).max(axis=1) > 1e-3).all()


@pytest.mark.parametrize("batch_tokens", [12, 10_000])
def test_classifiers_decide_by_whole_documents_also_in_batches(tiny_llama, rows, batch_tokens):
    expanded = expand(tiny_llama(layers=LAYERS, hidden=HIDDEN).float(), [1, 1, 1], languages=["el"], seed=1)
    attach_classifiers(expanded, [0, 1], seed=2)
    with torch.no_grad():
        for name, parameter in expanded.named_parameters():
            if ".groups." in name:
                parameter.add_(0.1)
    alone, _ = unit_sums(expanded, rows, 20, batch_tokens=1)
    together, count = unit_sums(expanded, rows, 20, batch_tokens=batch_tokens)
    assert count == 20
    np.testing.assert_allclose(together, alone, rtol=0, atol=2e-5)


def measured(model, tokenizer, texts, **options):
    return measure_language(model, tokenizer, texts, **{"tokens": 10, **options})


def test_documents_have_the_tokenizers_special_tokens_and_run_apart(model, tiny_tokenizer):
    rows = [torch.tensor(tiny_tokenizer(text)["input_ids"]) for text in DOCUMENTS]
    total = sum(map(len, rows))
    states = [ffn_inputs(model, row).double() for row in rows]
    expected = sum((x / x.norm(dim=-1, keepdim=True)).sum(dim=1) for x in states)
    found = measured(model, tiny_tokenizer, iter(DOCUMENTS), tokens=total)
    np.testing.assert_allclose(found.sums, expected, rtol=0, atol=2e-5)
    assert (found.count, found.skipped) == (total, 0)


def test_a_beginning_of_sequence_token_is_one_of_the_tokens(model):
    class Tokenizer:
        def __call__(self, text, *, add_special_tokens=True, verbose=True):
            return {"input_ids": [1] * add_special_tokens + [5] * len(text)}

    assert measured(model, Tokenizer(), ["abc", "de"], tokens=7).count == 7


def lengths(tokenizer):
    return [len(tokenizer(text)["input_ids"]) for text in DOCUMENTS]


def test_too_long_documents_are_skipped_and_counted(model, tiny_tokenizer):
    first, second, third, fourth = lengths(tiny_tokenizer)
    bound = max(first, second, fourth)
    assert third > bound
    result = measured(model, tiny_tokenizer, DOCUMENTS, tokens=10_000, max_document=bound)
    assert (result.count, result.skipped) == (first + second + fourth, 1)
    at_the_bound = measured(model, tiny_tokenizer, DOCUMENTS, tokens=10_000, max_document=third)
    assert at_the_bound.skipped == 0


def test_long_documents_are_cut_to_their_first_tokens(model, tiny_tokenizer):
    cut = [torch.tensor(tiny_tokenizer(text)["input_ids"][:4]) for text in DOCUMENTS]
    expected, number = unit_sums(model, cut, 10_000)
    found = measured(model, tiny_tokenizer, DOCUMENTS, tokens=10_000, truncate=4)
    np.testing.assert_allclose(found.sums, expected, rtol=0, atol=1e-12)
    assert (found.count, found.skipped) == (number, 0)


def test_documents_are_cut_to_the_models_positions(model, tiny_tokenizer):
    text = "park " * 400
    assert len(tiny_tokenizer(text, verbose=False)["input_ids"]) > 256
    assert measured(model, tiny_tokenizer, [text], tokens=10_000).count == 256


def test_documents_after_the_last_wanted_token_are_not_read(model, tiny_tokenizer):
    def texts():
        yield DOCUMENTS[0]
        raise AssertionError("read on")

    assert measured(model, tiny_tokenizer, texts(), tokens=3).count == 3


def test_fewer_tokens_than_wanted_warn_and_are_used(model, tiny_tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        result = measured(model, tiny_tokenizer, DOCUMENTS, tokens=10_000)
    assert result.count == sum(lengths(tiny_tokenizer))
    assert f"{result.count:,} tokens of 10,000 wanted" in caplog.text
    caplog.clear()
    measured(model, tiny_tokenizer, DOCUMENTS, tokens=result.count)
    assert not caplog.records


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_tokens_are_an_error(model, tiny_tokenizer, texts):
    with pytest.raises(DataError, match="documents have none"):
        measured(model, tiny_tokenizer, texts)


def test_nothing_but_too_long_documents_is_an_error_that_says_so(model, tiny_tokenizer):
    with pytest.raises(DataError, match="4 documents of more than 1 tokens"):
        measured(model, tiny_tokenizer, DOCUMENTS, max_document=1)


def pairs_of(names, layers=4, seed=0):
    generator = np.random.default_rng(seed)
    return {pair: generator.uniform(0.02, 0.2, layers) for pair in combinations(names, 2)}


def test_the_combined_similarity_is_a_mean_of_two_means_and_not_of_all_pairs():
    pairs = pairs_of(["en", "es", "zh", "el", "hu", "tr"])
    found = layer_similarity(pairs, ["en", "es", "zh"], ["el", "hu", "tr"])
    for layer in range(4):
        nn = sum(pairs[pair][layer] for pair in [("el", "hu"), ("el", "tr"), ("hu", "tr")]) / 3
        no = sum(pairs[a, b][layer] for a in ("en", "es", "zh") for b in ("el", "hu", "tr")) / 9
        assert found.nn[layer] == pytest.approx(nn)
        assert found.no[layer] == pytest.approx(no)
        assert found.combined[layer] == pytest.approx((nn + no) / 2)
        assert found.pooled[layer] == pytest.approx((3 * nn + 9 * no) / 12)
    assert len(found.pairs) == 12
    assert ("en", "es") not in found.pairs


def test_a_second_expansion_has_eighteen_pairs_of_a_new_and_an_old_language():
    old, new = ["en", "es", "zh", "el", "hu", "tr"], ["bn", "hi", "ne"]
    pairs = pairs_of(old + new)
    found = layer_similarity(pairs, old, new)
    assert len(found.pairs) == 18 + 3
    expected = sum(pairs[a, b] for a in old for b in new) / 18
    assert found.no.tolist() == pytest.approx(expected.tolist())


def test_published_llama_means_combine_to_the_published_similarity():
    # layers 0, 12 and 27 of section 3.2, whose new-new and new-old means are given with five digits
    pairs = {("el", "hu"): np.array([0.03907, 0.12710, 0.04993]), ("el", "en"): np.array([0.03281, 0.10579, 0.04076])}
    pairs["hu", "en"] = pairs["el", "en"]
    found = layer_similarity(pairs, ["en"], ["el", "hu"])
    assert found.combined.tolist() == pytest.approx([0.03594, 0.11644, 0.04534], abs=6e-6)


def test_one_new_language_is_compared_with_the_old_ones_alone():
    pairs = pairs_of(["en", "es", "el"])
    found = layer_similarity(pairs, ["en", "es"], ["el"])
    expected = (pairs["en", "el"] + pairs["es", "el"]) / 2
    assert found.nn is None
    assert found.combined.tolist() == found.no.tolist() == found.pooled.tolist()
    assert found.combined.tolist() == pytest.approx(expected.tolist())
    with pytest.raises(ConfigError, match="second new language"):
        found.indicator("nn")


def test_new_languages_without_old_ones_are_compared_with_each_other():
    pairs = pairs_of(["el", "hu"])
    found = layer_similarity(pairs, [], ["el", "hu"])
    assert found.no is None
    assert found.combined.tolist() == pairs["el", "hu"].tolist()
    with pytest.raises(ConfigError, match="old: none"):
        found.indicator("no")


def test_every_indicator_is_what_its_name_says():
    found = layer_similarity(pairs_of(["en", "el", "hu"]), ["en"], ["el", "hu"])
    values = {name: found.indicator(name).tolist() for name in ("combined", "nn", "no", "pooled")}
    assert values == {
        "combined": found.combined.tolist(),
        "nn": found.nn.tolist(),
        "no": found.no.tolist(),
        "pooled": found.pooled.tolist(),
    }
    assert len({tuple(row) for row in values.values()}) == 4


@pytest.mark.parametrize("old", [["en", "es"], ["en"], []])
def test_similarity_survives_json_bit_by_bit(old):
    found = layer_similarity(pairs_of(["en", "es", "el", "hu"], seed=5), old, ["el", "hu"])
    again = Similarity.from_json(json.loads(json.dumps(found.to_json())))
    assert (again.old, again.new) == (found.old, found.new)
    assert list(again.pairs) == list(found.pairs)
    for pair, values in found.pairs.items():
        assert again.pairs[pair].tolist() == values.tolist()
    assert again.combined.tolist() == found.combined.tolist()
    assert again.to_json() == found.to_json()


def test_json_shows_the_means_to_people():
    found = layer_similarity(pairs_of(["en", "el"]), ["en"], ["el"])
    data = found.to_json()
    assert data["combined"] == found.combined.tolist()
    assert data["nn"] is None


@pytest.mark.parametrize("data", [{}, {"old": [], "new": ["a"], "pairs": 3}, {"old": [], "new": [], "pairs": [[1]]}])
def test_json_of_something_else_is_refused(data):
    with pytest.raises(DataError, match="Measure it again"):
        Similarity.from_json(data)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (["en"], ["en", "el"], "more than once: en"),
        (["en"], ["el", "el"], "more than once: el"),
        ([], ["el"], "no two languages"),
        (["en"], [], "new: none"),
        (["en"], ["tr"], "en and tr|tr and en"),
    ],
)
def test_wrong_groups_are_refused(old, new, said):
    with pytest.raises(DataError, match=said):
        layer_similarity(pairs_of(["en", "el", "hu"]), old, new)


def test_similarities_that_are_no_numbers_or_of_other_lengths_are_refused():
    pairs = pairs_of(["en", "el", "hu"])
    with pytest.raises(DataError, match="of el and en"):
        layer_similarity({**pairs, ("en", "el"): np.array([0.1, np.nan, 0.1, 0.1])}, ["en"], ["el", "hu"])
    with pytest.raises(DataError, match="3, 4"):
        layer_similarity({**pairs, ("en", "el"): np.array([0.1, 0.1, 0.1])}, ["en"], ["el", "hu"])


def test_means_that_are_no_numbers_or_of_other_shapes_are_refused():
    mean = np.full((2, 3), 0.5)
    with pytest.raises(DataError, match=r"of el: not a number at layers \[1\]"):
        pairwise({"en": mean, "el": np.array([[0.5] * 3, [0.5, np.nan, 0.5]])})
    with pytest.raises(DataError, match="different shapes"):
        pairwise({"en": mean, "el": mean[:1]})


def test_finite_values_pass_in_any_shape():
    check_finite(np.ones(3), "x")
    check_finite(np.ones((3, 2)), "x")
