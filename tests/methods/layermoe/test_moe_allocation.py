"""Experts per layer: the published list, the formula by hand and in fractions, budgets, orders, explicit lists."""

import logging
import math
import random
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from tenfold.methods.layermoe.allocation import (
    allocate,
    check_counts,
    classifier_layers,
    inverse,
    mola,
    new_counts,
    ordered,
    shares,
    shuffled,
    uniform,
)
from tenfold.platform.errors import ConfigError, DataError

# Llama-3.2-3B, new languages el, hu, tr (section 3.2): new-new, new-old, and their mean as published, rounded.
LLAMA_NN = [
    *(0.03907, 0.04297, 0.03817, 0.05577, 0.07080, 0.07747, 0.09247, 0.10380, 0.10157, 0.10610, 0.11473, 0.11850),
    *(0.12710, 0.12010, 0.12873, 0.12660, 0.11213, 0.10350, 0.09633, 0.09373, 0.08743, 0.07520, 0.07387, 0.05993),
    *(0.05353, 0.05137, 0.05280, 0.04993),
]
LLAMA_NO = [
    *(0.03281, 0.03747, 0.03227, 0.04492, 0.05631, 0.06206, 0.07599, 0.08822, 0.08741, 0.08944, 0.09718, 0.10026),
    *(0.10579, 0.09478, 0.10158, 0.09511, 0.08237, 0.07797, 0.06973, 0.07334, 0.06822, 0.06146, 0.06307, 0.04967),
    *(0.04609, 0.04796, 0.04340, 0.04076),
]
LLAMA = [
    *(0.03594, 0.04022, 0.03522, 0.05034, 0.06356, 0.06976, 0.08423, 0.09601, 0.09449, 0.09777, 0.10596, 0.10938),
    *(0.11644, 0.10744, 0.11516, 0.11086, 0.09725, 0.09073, 0.08303, 0.08354, 0.07783, 0.06833, 0.06847, 0.05480),
    *(0.04981, 0.04966, 0.04810, 0.04534),
]
LLAMA_QUOTAS = [
    *(4.671, 4.174, 4.767, 3.334, 2.641, 2.406, 1.993, 1.748, 1.777, 1.717, 1.584, 1.535, 1.442, 1.562),
    *(1.458, 1.514, 1.726, 1.850, 2.022, 2.009, 2.157, 2.457, 2.452, 3.063, 3.370, 3.380, 3.490, 3.702),
]
OFFICIAL = [5, 5, 5, 4, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4]
BY_FALLING_SIMILARITY = [
    *(12, 14, 15, 11, 13, 10, 9, 16, 7, 8, 17, 6, 19, 18, 20, 5, 22, 21, 4, 23, 3, 24, 25, 26, 27, 1, 0, 2),
]
# Qwen1.5-1.8B, published totals of all expansions so far.
QWEN = {
    "G1": [5, 4, 3, 5, 4, 3, 2, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 4, 4, 4, 3, 3],
    "G2": [5, 5, 4, 5, 4, 3, 2, 3, 3, 3, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 2, 2],
    "G1 G2": [10, 8, 6, 9, 8, 5, 3, 5, 5, 4, 3, 3, 3, 3, 3, 3, 3, 5, 5, 6, 6, 6, 4, 4],
    "G2 G1": [9, 8, 6, 8, 7, 5, 3, 5, 5, 4, 3, 3, 3, 3, 3, 5, 5, 5, 6, 6, 6, 6, 3, 3],
}
WITH_ONES = [1] * 16 + [2, 1, 1, 1, 1, 6, 1, 4, 2, 2, 4, 3]


def random_similarity(generator, layers=None):
    number = layers or generator.randint(1, 40)
    return [generator.choice([generator.uniform(0.003, 0.6), 0.05, 0.1, 0.15]) for _ in range(number)]


def by_fractions(similarity, delta):
    """The formula without rounding; None where a quota is so near an integer that floats may decide."""
    inverses = [1 / Fraction(value) for value in similarity]
    quotas = [Fraction(delta) * value / sum(inverses) for value in inverses]
    if any(abs(quota - round(quota)) < Fraction(1, 10**7) for quota in quotas):
        return None
    return [math.ceil(quota) for quota in quotas]


def by_search(similarity, total):
    """The exact budget one expert at a time, in fractions: the smallest breakpoint N S, then S, then the layer."""
    counts = [1] * len(similarity)
    exact = [Fraction(str(value)) for value in similarity]
    while sum(counts) < total:
        layer = min(range(len(counts)), key=lambda i: (counts[i] * exact[i], exact[i], i))
        counts[layer] += 1
    return counts


def test_published_similarities_give_the_official_list():
    counts = allocate(LLAMA, delta=70)
    assert counts == OFFICIAL
    assert sum(counts) == 84
    assert sum(new_counts(counts)) == 56


def test_the_default_budget_is_the_official_one():
    assert allocate(LLAMA) == OFFICIAL


def test_published_quotas_are_those_of_the_formula():
    # The table's similarities are rounded by up to 5e-6, which moves an inverse by up to 5e-6 / S^2.
    moved = [5e-6 / value**2 for value in LLAMA]
    assert abs(sum(1 / value for value in LLAMA) - 417.0095) < sum(moved)
    for found, published, inverse_moved in zip(70 * shares(LLAMA), LLAMA_QUOTAS, moved, strict=True):
        assert abs(found - published) < 5e-4 + 70 / 417 * (inverse_moved + found / 70 * sum(moved))


@pytest.mark.parametrize(("delta", "same"), [(69.67, False), (69.68, True), (70.24, True), (70.25, False)])
def test_the_official_list_is_stable_for_budgets_from_69_68_to_70_24(delta, same):
    assert (allocate(LLAMA, delta=delta) == OFFICIAL) is same


@pytest.mark.parametrize(("delta", "total"), [(56, 69), (84, 99), (112, 124), (140, 154), (42, 58), (28, 38)])
def test_other_budgets_give_the_published_sums(delta, total):
    assert sum(allocate(LLAMA, delta=delta)) == total


@pytest.mark.parametrize(("delta", "dense"), [(42, range(10, 16)), (28, range(5, 23))])
def test_small_budgets_leave_middle_layers_dense(delta, dense):
    counts = allocate(LLAMA, delta=delta)
    assert [layer for layer, count in enumerate(counts) if count == 1] == list(dense)


def test_indicators_of_the_llama_data_differ_as_the_specification_says():
    assert allocate(LLAMA_NO, delta=70) == OFFICIAL
    assert allocate([(3 * nn + 9 * no) / 12 for nn, no in zip(LLAMA_NN, LLAMA_NO, strict=True)], delta=70) == OFFICIAL
    new_alone = allocate(LLAMA_NN, delta=70)
    assert sum(new_alone) == 82
    assert [layer for layer in range(28) if new_alone[layer] != OFFICIAL[layer]] == [18, 19]
    assert new_alone[18] == new_alone[19] == 2


@pytest.mark.parametrize(("delta", "expected"), [(9, [4, 2, 1, 2]), (10, [5, 3, 2, 3])])
def test_small_example_by_hand(delta, expected):
    assert allocate([0.02, 0.04, 0.08, 0.04], delta=delta) == expected


def test_a_whole_quota_is_not_lifted_by_rounding():
    naive = 18 * (1 / 0.003) / sum([1 / 0.003] * 6)
    assert math.ceil(naive) == 4
    assert allocate([0.003] * 6, delta=18) == [3] * 6


@pytest.mark.parametrize("layers", range(1, 41))
def test_equal_similarities_get_equal_whole_shares(layers):
    for value in (0.003, 0.07, 0.1, 1 / 3):
        for share in (1, 2, 3, 7):
            assert allocate([value] * layers, delta=share * layers) == [share] * layers


def test_whole_quotas_of_different_layers_are_not_lifted_by_rounding():
    # S^i = c / n_i and delta = k sum(n): the quotas are k n_i, which floats may put a little above
    generator = random.Random(6)
    for _ in range(300):
        shares_asked = [generator.randint(1, 9) for _ in range(generator.randint(2, 30))]
        scale, times = generator.uniform(0.01, 1), generator.randint(1, 4)
        counts = allocate([scale / share for share in shares_asked], delta=times * sum(shares_asked))
        assert counts == [times * share for share in shares_asked]


def test_formula_is_that_in_fractions():
    generator = random.Random(1)
    compared = 0
    for _ in range(150):
        similarity, delta = random_similarity(generator), generator.uniform(0.5, 200)
        expected = by_fractions(similarity, delta)
        if expected is not None:
            assert allocate(similarity, delta=delta) == expected
            compared += 1
    assert compared > 100


def test_invariants_of_the_formula_hold():
    generator = random.Random(2)
    for _ in range(200):
        similarity = random_similarity(generator)
        layers = len(similarity)
        delta = generator.uniform(layers, 5 * layers)
        counts = allocate(similarity, delta=delta)
        by_similarity = sorted(zip(similarity, counts, strict=True))
        assert all(a[1] >= b[1] for a, b in pairwise(by_similarity))
        assert delta - 1e-6 <= sum(counts) < delta + layers
        assert allocate([4 * value for value in similarity], delta=delta) == counts
        order = generator.sample(range(layers), layers)
        assert allocate([similarity[i] for i in order], delta=delta) == [counts[i] for i in order]


def test_exact_budget_is_the_slow_search():
    generator = random.Random(3)
    for _ in range(100):
        similarity = [round(value, 3) for value in random_similarity(generator, generator.randint(1, 12))]
        total = generator.randint(len(similarity), 5 * len(similarity))
        counts = allocate(similarity, total=total)
        assert sum(counts) == total
        assert counts == by_search(similarity, total)


def test_exact_budget_equals_the_formula_wherever_the_formula_has_that_total():
    generator = random.Random(4)
    for _ in range(200):
        similarity = random_similarity(generator)
        limits = {"min_per_layer": generator.randint(1, 3), "max_per_layer": generator.choice([None, 4, 7])}
        counts = allocate(similarity, delta=generator.uniform(1, 6) * len(similarity), **limits)
        assert allocate(similarity, total=sum(counts), **limits) == counts


@pytest.mark.parametrize("delta", [28, 42, 56, 70, 84, 112, 140])
def test_exact_budget_equals_the_formula_on_the_llama_data(delta):
    counts = allocate(LLAMA, delta=delta)
    assert allocate(LLAMA, total=sum(counts)) == counts


def test_exact_budget_grows_one_layer_at_a_time():
    previous = allocate(LLAMA, total=28)
    assert previous == [1] * 28
    for total in range(29, 200):
        counts = allocate(LLAMA, total=total)
        assert sum(after - before for before, after in zip(previous, counts, strict=True)) == 1
        assert all(after >= before for before, after in zip(previous, counts, strict=True))
        previous = counts


@pytest.mark.parametrize(
    ("total", "expected"),
    # 0.02 N = 0.04 N' = 0.08 N'' at delta = 9: the layers that are ready go by smaller S, then from below
    [(9, [4, 2, 1, 2]), (10, [5, 2, 1, 2]), (11, [5, 3, 1, 2]), (12, [5, 3, 1, 3]), (13, [5, 3, 2, 3])],
)
def test_ties_of_an_exact_budget_go_to_the_smaller_similarity_then_to_the_lower_layer(total, expected):
    assert allocate([0.02, 0.04, 0.08, 0.04], total=total) == expected


def test_equal_similarities_share_an_exact_budget_from_below():
    assert allocate([0.3] * 5, total=12) == [3, 3, 2, 2, 2]


def test_limits_cut_the_formula():
    assert allocate(LLAMA, delta=70, max_per_layer=3) == [min(count, 3) for count in OFFICIAL]
    assert allocate(LLAMA, delta=70, min_per_layer=3) == [max(count, 3) for count in OFFICIAL]


def test_limits_keep_an_exact_budget():
    # a first layer with tiny S would take nearly everything (section 10)
    similarity = [0.015, 0.12, 0.13, 0.15]
    assert allocate(similarity, delta=10) == [8, 1, 1, 1]
    assert allocate(similarity, total=11) == [8, 1, 1, 1]
    assert allocate(similarity, total=11, max_per_layer=4) == [4, 3, 2, 2]
    assert allocate(similarity, total=11, min_per_layer=2) == [5, 2, 2, 2]
    assert allocate(similarity, total=16, max_per_layer=4) == [4, 4, 4, 4]


def test_an_exact_budget_of_new_experts_may_leave_layers_without():
    assert allocate([0.02, 0.04, 0.08, 0.04], total=3, min_per_layer=0) == [1, 1, 0, 1]
    assert allocate([0.02, 0.04, 0.08, 0.04], total=0, min_per_layer=0) == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"total": 27}, "at least 28"),
        ({"total": 30, "max_per_layer": 1}, "28 to 28"),
        ({"total": 50, "min_per_layer": 2}, "at least 56"),
        ({"total": 84, "delta": 70}, "both set the budget"),
        ({"delta": 0.0}, "positive"),
        ({"delta": math.nan}, "positive"),
        ({"delta": 70, "min_per_layer": 3, "max_per_layer": 2}, "below min_per_layer"),
    ],
)
def test_impossible_budgets_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        allocate(LLAMA, **options)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_similarity_that_is_no_number_is_refused(bad):
    with pytest.raises(DataError, match=r"layers \[1\]"):
        allocate([0.1, bad, 0.1], delta=6)
    with pytest.raises(DataError, match=r"layers \[1\]"):
        classifier_layers([0.1, bad, 0.1], [2, 2, 2])
    with pytest.raises(DataError, match=r"layers \[1\]"):
        inverse([1, 2, 3], [0.1, bad, 0.1])


def test_a_similarity_of_zero_or_less_counts_as_a_ten_thousandth(caplog):
    with caplog.at_level(logging.WARNING):
        counts = allocate([0.1, 0.0, -0.2], total=40)
    assert counts == allocate([0.1, 1e-4, 1e-4], total=40)
    assert "layers [1, 2]" in caplog.text
    assert "0.0001" in caplog.text
    caplog.clear()
    allocate([0.1, 1e-4], delta=5)
    assert not caplog.records


def test_a_similarity_below_zero_never_gets_fewer_experts_than_a_positive_one():
    counts = allocate([1e-6, -1.0, 0.5], total=21)
    assert counts == [10, 10, 1]
    assert allocate([0.0, 0.0], delta=4) == [2, 2]


def test_shares_add_up_to_one_for_tiny_and_huge_values():
    assert shares([1e-300, 1e-300, 1e300]).tolist() == pytest.approx([0.5, 0.5, 0])
    assert sum(shares(LLAMA)) == pytest.approx(1, abs=1e-12)


def test_moe_lpr_has_the_same_count_everywhere():
    assert uniform(24, 6) == [6] * 24
    assert sum(new_counts(uniform(24, 6))) == 120


def test_mola_has_two_four_six_eight_by_quarter():
    assert mola(24) == [2] * 6 + [4] * 6 + [6] * 6 + [8] * 6
    assert sum(new_counts(mola(24))) == 96
    assert mola(4) == [2, 4, 6, 8]
    assert mola(6) == [2, 2, 4, 6, 6, 8]
    assert mola(2) == [2, 6]
    assert mola(1) == [2]


def test_inverse_gives_most_experts_where_languages_are_most_alike():
    assert inverse([5, 3, 2, 3], [0.02, 0.04, 0.08, 0.05]) == [2, 3, 5, 3]
    generator = random.Random(5)
    for _ in range(100):
        similarity = random_similarity(generator)
        counts = allocate(similarity, delta=3 * len(similarity))
        turned = inverse(counts, similarity)
        assert Counter(turned) == Counter(counts)
        by_similarity = sorted(zip(similarity, turned, strict=True))
        assert all(a[1] <= b[1] for a, b in pairwise(by_similarity) if a[0] < b[0])


def test_inverse_of_the_official_list_ends_at_the_other_layers():
    turned = inverse(OFFICIAL, LLAMA)
    assert [layer for layer in range(28) if turned[layer] == 5] == sorted(BY_FALLING_SIMILARITY[:3])
    assert turned[0] == turned[1] == turned[2] == 2


def test_a_random_order_keeps_the_numbers_and_is_decided_by_the_seed():
    orders = {tuple(shuffled(OFFICIAL, seed)) for seed in range(20)}
    assert len(orders) == 20
    assert all(Counter(order) == Counter(OFFICIAL) for order in orders)
    assert shuffled(OFFICIAL, 3) == shuffled(OFFICIAL, 3)
    assert all(type(count) is int for count in shuffled(OFFICIAL, 3))


def test_order_chooses_what_is_done_with_the_formula():
    assert ordered(OFFICIAL, LLAMA, "similar", 7) == OFFICIAL
    assert ordered(OFFICIAL, LLAMA, "inverse", 7) == inverse(OFFICIAL, LLAMA)
    assert ordered(OFFICIAL, LLAMA, "random", 7) == shuffled(OFFICIAL, 7)


def test_counts_of_the_first_expansion_include_the_original_ffn():
    assert new_counts([5, 1, 3]) == [4, 0, 2]
    assert new_counts([5, 1, 3], "new") == [5, 1, 3]


@pytest.mark.parametrize(("first", "second"), [("G1", "G1 G2"), ("G2", "G2 G1")])
def test_published_lifelong_totals_are_two_lists_of_which_each_adds_one_less(first, second):
    # 72 - 24 = 48 new ones both times: only this reading of N in a later expansion gives 120 (section 3.2)
    added = [after - before for before, after in zip(QWEN[first], QWEN[second], strict=True)]
    counts = [number + 1 for number in added]
    assert sum(QWEN[first]) == sum(counts) == 72
    assert min(counts) > 1
    totals = [1 + a + b for a, b in zip(new_counts(QWEN[first]), new_counts(counts), strict=True)]
    assert totals == QWEN[second]
    assert sum(totals) == 120


def test_an_explicit_list_with_ones_is_taken():
    assert check_counts(WITH_ONES, 28) == WITH_ONES
    assert sum(WITH_ONES) == 44
    assert sum(new_counts(WITH_ONES)) == 16
    assert WITH_ONES.count(1) == 21


def test_an_explicit_list_of_new_experts_may_have_zeros():
    assert check_counts([0, 2, 0], 3, count_mode="new") == [0, 2, 0]


@pytest.mark.parametrize(
    ("counts", "mode", "said"),
    [
        ([2, 2], "total_minus_one", "2 numbers, the model 3 layers"),
        ([2, 2, 2, 2], "total_minus_one", "4 numbers"),
        ([2, 0, 2], "total_minus_one", "layer 1: 0"),
        ([2, -1, 2], "new", "layer 1: -1"),
        ([2, 2.0, 2], "total_minus_one", "layer 1: 2.0"),
        ([2, True, 2], "total_minus_one", "layer 1: True"),
        ([1, 1, 1], "total_minus_one", "adds no expert"),
        ([0, 0, 0], "new", "adds no expert"),
    ],
)
def test_wrong_explicit_lists_are_refused(counts, mode, said):
    with pytest.raises(ConfigError, match=said):
        check_counts(counts, 3, count_mode=mode)


def test_classifiers_go_to_the_most_similar_layers():
    assert classifier_layers(LLAMA, OFFICIAL) == sorted(BY_FALLING_SIMILARITY[:8])
    assert len(classifier_layers(LLAMA[:24], OFFICIAL[:24])) == 7
    for share in (0.1, 0.5, 1.0):
        number = round(28 * share)
        assert classifier_layers(LLAMA, OFFICIAL, share=share) == sorted(BY_FALLING_SIMILARITY[:number])


def test_a_small_share_still_gives_one_classifier():
    assert classifier_layers([0.1, 0.3, 0.2], [2, 2, 2], share=0.01) == [1]


def test_layers_without_experts_get_no_classifier():
    counts = allocate(LLAMA, delta=42)
    able = [layer for layer in BY_FALLING_SIMILARITY if counts[layer] > 1]
    assert classifier_layers(LLAMA, counts) == sorted(able[:8])
    assert classifier_layers([0.1, 0.3, 0.2], [2, 1, 1], share=1.0) == [0]
    assert classifier_layers([0.1, 0.3, 0.2], [1, 1, 1]) == []


def test_of_equal_similarities_the_lower_layers_get_the_classifiers():
    assert classifier_layers([0.1, 0.2, 0.2, 0.2], [2, 2, 2, 2], share=0.5) == [1, 2]


def test_explicit_classifier_layers_are_taken_in_order():
    assert classifier_layers(None, QWEN["G1"], explicit=[23, 5, 6, 10, 11, 12, 13]) == [5, 6, 10, 11, 12, 13, 23]
    assert classifier_layers(None, OFFICIAL, explicit=[]) == []


@pytest.mark.parametrize(
    ("explicit", "said"), [([3], "0 to 2"), ([-1], "0 to 2"), ([1], "no new experts"), ([0, 0], "twice")]
)
def test_wrong_classifier_layers_are_refused(explicit, said):
    with pytest.raises(ConfigError, match=said):
        classifier_layers([0.1, 0.2, 0.3], [2, 1, 2], explicit=explicit)


def test_classifiers_without_similarity_need_a_list():
    with pytest.raises(ConfigError, match="Give a list"):
        classifier_layers(None, OFFICIAL)
