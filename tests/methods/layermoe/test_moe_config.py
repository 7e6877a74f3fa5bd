"""What the configuration accepts and refuses, and what it makes of a lifelong run."""

import pytest
from pydantic import ValidationError
from tenfold.methods.layermoe.config import LayerMoEConfig

MODEL = {"model": "somewhere"}


def corpora(*languages):
    return [{"language": language, "path": f"{language}.txt"} for language in languages]


def made(**changes):
    data = {"old": corpora("en", "es"), "new": corpora("el"), "evaluation": corpora("en", "es", "el", "bn", "hi")}
    return LayerMoEConfig.model_validate({"model": MODEL, "data": data, "stage2": {}} | changes)


def refused(**changes):
    with pytest.raises(ValidationError) as caught:
        made(**changes)
    return str(caught.value)


def test_defaults_are_those_of_the_official_scripts():
    config = made()
    assert (config.balance_weight, config.prior_weight, config.classifier_weight) == (0.01, 0.1, 0.1)
    assert (config.top_k, config.similarity.tokens, config.similarity.max_document) == (2, 100_000, 32_000)
    assert (config.data.stage1_length, config.data.stage2_length) == (1024, 512)
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (8, 16, 0)
    assert config.allocation.count_mode == "total_minus_one"
    assert config.allocation.uniform == 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"top_k": 0}, "greater than or equal to 1"),
        ({"allocation": {"delta": 70, "total_experts": 84}}, "delta and total_experts decide the same"),
        ({"allocation": {"explicit": [2, 0]}}, "at least 1 a layer; use count_mode: new"),
        ({"allocation": {"explicit": [2, 3], "order": "random"}}, "explicit is taken as it is"),
        ({"allocation": {"min_per_layer": 3, "max_per_layer": 2}}, "max_per_layer 2 is below min_per_layer 3"),
        ({"allocation": {"min_per_layer": 0}}, "counts the original FFN"),
        ({"classifier": {"layers": [1, 1]}}, "names a layer twice"),
        ({"classifier": {"layers": [1]}, "stage2": None}, "trained by the review; give stage2"),
        ({"classifier": {"classes": 1}}, "greater than or equal to 2"),
        ({"strategy": "moe_lpr", "classifier": {"layers": [1]}}, "classifier.layers is read by layermoe"),
        ({"strategy": "mola", "allocation": {"explicit": [2, 2]}}, "allocation.explicit is read by layermoe"),
        ({"lora": {"r": 4}}, "lora is read by strategy lora; strategy = layermoe"),
        ({"inserted_layers": 4}, "inserted_layers is read by strategy llama_pro; strategy = layermoe"),
        ({"strategy": "full_ft", "lifelong": [{"new": corpora("bn")}]}, "strategy = full_ft adds none"),
        ({"lifelong": [{"new": corpora("en")}]}, "en in both old and new"),
        ({"lifelong": [{"new": corpora("bn")}, {"new": corpora("bn")}]}, "bn in both new and earlier"),
        ({"lifelong": [{"new": corpora("sw")}]}, "evaluation has no lines of sw"),
        ({"lifelong": [{"new": []}]}, "at least 1 item"),
        ({"strategy": "layer_moe"}, "layermoe"),
        ({"stage_1": {}}, "Extra inputs are not permitted"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_reason(changes, said):
    assert said in refused(**changes)


def test_options_of_several_strategies_may_stand_side_by_side_for_a_sweep():
    for strategy in ("layermoe", "moe_lpr", "mola", "moe", "full_ft", "lora", "llama_pro", "base"):
        made(strategy=strategy, allocation={"total_experts": 18, "uniform": 4}, classifier={"layers": []})


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, True),
        ({"stage2": None}, True),
        ({"allocation": {"explicit": [2]}}, True),  # for the classifiers
        ({"allocation": {"explicit": [2]}, "classifier": {"layers": [0]}}, False),
        ({"allocation": {"explicit": [2]}, "stage2": None}, False),
        ({"allocation": {"order": "uniform"}, "classifier": {"layers": []}}, False),
        ({"allocation": {"order": "random"}, "classifier": {"layers": []}}, True),
        ({"strategy": "moe_lpr"}, False),
        ({"strategy": "full_ft"}, False),
    ],
)
def test_similarity_is_measured_only_where_it_decides_something(changes, needed):
    assert made(**changes).needs_similarity is needed


@pytest.mark.parametrize(
    ("strategy", "reviews"),
    [("layermoe", True), ("moe_lpr", True), ("mola", True), ("moe", False), ("full_ft", False), ("base", False)],
)
def test_only_strategies_of_two_stages_have_a_review(strategy, reviews):
    assert made(strategy=strategy).has_review is reviews
    assert made(strategy=strategy, stage2=None).has_review is False


def test_a_lifelong_run_is_a_series_of_expansions():
    config = made(
        base_training={},
        lifelong=[
            {"new": corpora("bn"), "allocation": {"delta": 9}},
            {"new": corpora("hi"), "classifier": {"share": 1}},
        ],
        allocation={"delta": 5},
    )
    first, second, third = config.expansions()
    assert [each.data.groups() for each in (first, second, third)] == [
        {"old": ["en", "es"], "new": ["el"], "earlier": []},
        {"old": ["en", "es"], "new": ["bn"], "earlier": ["el"]},
        {"old": ["en", "es"], "new": ["hi"], "earlier": ["el", "bn"]},
    ]
    assert [each.allocation.delta for each in (first, second, third)] == [5, 9, 5]
    assert [each.classifier.share for each in (first, second, third)] == [0.3, 0.3, 1]
    assert [each.base_training is None for each in (first, second, third)] == [False, True, True]
    assert all(each.lifelong == [] for each in (first, second, third))


def test_an_expansion_is_the_same_whatever_comes_after_it():
    alone = made(data={"old": corpora("en"), "new": corpora("el"), "evaluation": corpora("en", "el")})
    more = made(
        data={"old": corpora("en"), "new": corpora("el"), "evaluation": corpora("en", "el", "bn")},
        lifelong=[{"new": corpora("bn")}],
    )
    assert alone.expansions()[0] == more.expansions()[0]


def test_a_configuration_survives_its_own_dump():
    config = made(lifelong=[{"new": corpora("bn")}], strategy="layermoe", allocation={"delta": 7.5})
    assert LayerMoEConfig.model_validate(config.model_dump(mode="json")) == config
