"""Sizes of published models, from their shapes alone (section 7)."""

import pytest
from tenfold.methods.layermoe.allocation import mola, new_counts, uniform
from tenfold.methods.layermoe.expansion import attach_classifiers, expand
from tenfold.methods.layermoe.sizes import shape_of
from tenfold.platform.models.configuration import skeleton

FIRST = [5, 4, 3, 5, 4, 3, 2, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 4, 4, 4, 3, 3]
LLAMA = [5, 5, 5, 4, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4]
WITH_ONES = [1] * 16 + [2, 1, 1, 1, 1, 6, 1, 4, 2, 2, 4, 3]


@pytest.fixture(scope="module")
def qwen():
    """Qwen1.5-1.8B."""
    from transformers import Qwen2Config

    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=False,
    )
    return shape_of(skeleton(config))


@pytest.fixture(scope="module")
def llama():
    """Llama-3.2-3B."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    return shape_of(skeleton(config))


def test_the_dense_models_have_their_published_sizes(qwen, llama):
    assert qwen.parameters == qwen.active == 1_836_828_672
    assert llama.parameters == llama.active == 3_212_749_824


def test_an_expert_has_three_matrices(qwen, llama):
    assert qwen.ffn == [3 * 2048 * 5504] * 24 == [33_816_576] * 24
    assert llama.ffn == [3 * 3072 * 8192] * 28 == [75_497_472] * 28


@pytest.mark.parametrize(
    ("counts", "experts", "billions"),
    [(FIRST, 48, 3.460), (mola(24), 96, 5.083), (uniform(24, 6), 120, 5.895), (uniform(24, 7), 144, 6.706)],
)
def test_expanded_qwen_models_have_their_published_sizes(qwen, counts, experts, billions):
    new = new_counts(counts)
    grown = qwen.expanded(new, 2)
    routers = sum(counts) * 2048
    assert sum(new) == experts
    assert grown.parameters == 1_836_828_672 + experts * 33_816_576 + routers
    assert (grown.parameters - routers) / 1e9 == pytest.approx(billions, abs=5e-4)
    assert grown.trained(new) == experts * 33_816_576 + routers


def test_a_token_uses_two_experts_of_a_layer(qwen, llama):
    grown = qwen.expanded(new_counts(FIRST), 2)
    assert grown.active == 1_836_828_672 + 24 * 33_816_576 + 147_456
    assert (grown.active - 147_456) / 1e9 == pytest.approx(2.648, abs=5e-4)
    assert qwen.expanded(new_counts(FIRST), 1).active == 1_836_828_672 + 147_456
    assert llama.expanded(new_counts(LLAMA), 2).active / 1e9 == pytest.approx(5.327, abs=5e-4)


def test_expanded_llama_has_its_published_size_and_routers(llama):
    grown = llama.expanded(new_counts(LLAMA), 2)
    assert grown.parameters == 3_212_749_824 + 56 * 75_497_472 + 258_048
    assert grown.parameters / 1e9 == pytest.approx(7.441, abs=5e-4)


def test_dense_layers_have_neither_experts_nor_routers(llama):
    grown = llama.expanded(new_counts(WITH_ONES), 2)
    in_layers_with_experts = 44 - 21
    assert grown.parameters == 3_212_749_824 + 16 * 75_497_472 + in_layers_with_experts * 3072
    assert grown.active == 3_212_749_824 + 7 * 75_497_472 + in_layers_with_experts * 3072


def test_two_expansions_are_as_large_as_one_of_both(qwen):
    first, second = new_counts(FIRST), new_counts([6, 5, 4, 5, 5, 3, 2, 3, 3, 3] + [2] * 7 + [3, 3, 3, 3, 3, 2, 2])
    twice = qwen.expanded(first, 2).expanded(second, 2)
    once = qwen.expanded([a + b for a, b in zip(first, second, strict=True)], 2)
    assert twice == once
    assert sum(twice.totals) == 120
    assert twice.trained(second) == 48 * 33_816_576 + 120 * 2048


@pytest.mark.parametrize("counts", [[3, 1, 2], [2, 2, 2]])
def test_the_shape_of_a_model_that_was_expanded_is_the_one_foretold(tiny_llama, counts):
    dense = tiny_llama(layers=3)
    foretold = shape_of(dense).expanded(new_counts(counts), 2)
    made = expand(dense, new_counts(counts), languages=["el"], old_languages=["en"], seed=0)
    assert shape_of(made) == foretold
    assert foretold.parameters == sum(parameter.numel() for parameter in made.parameters())
    attach_classifiers(made, [0], seed=0)
    assert shape_of(made) == foretold
