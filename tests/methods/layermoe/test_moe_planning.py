"""What a plan says, and what it refuses before anything starts."""

import pytest
from tenfold.methods.layermoe.assignment import assign
from tenfold.methods.layermoe.config import LayerMoEConfig
from tenfold.methods.layermoe.expansion import attach_classifiers, expand
from tenfold.methods.layermoe.planned_steps import MOST_DOCUMENTS, count_blocks
from tenfold.methods.layermoe.planning import describe_run
from tenfold.methods.layermoe.similarity import layer_similarity
from tenfold.methods.layermoe.sizes import shape_of
from tenfold.platform.context import PlanContext
from tenfold.platform.errors import ConfigError, DataError, ModelError
from tenfold.platform.experiment import Compute
from tenfold.platform.models.loading import load_tokenizer
from tenfold.platform.models.source import ModelSource
from tenfold.platform.storage import Storage

STEPS = {"max_steps": 4, "per_device_train_batch_size": 2, "eval_strategy": "no", "save_strategy": "no"}
STORIES = "sample:models/stories260K"


@pytest.fixture
def text(tmp_path):
    """Return language -> a file of 30 documents of 4 words."""
    for language in ("en", "es", "el", "tr", "bn"):
        lines = [f"{language} sentence number {number}" for number in range(30)]
        (tmp_path / f"{language}.txt").write_text("\n".join(lines))
    return lambda *languages: [{"language": name, "path": str(tmp_path / f"{name}.txt")} for name in languages]


@pytest.fixture
def context(tmp_path):
    return PlanContext(1, Compute(), Storage(tmp_path / "cache"))


@pytest.fixture
def options(text):
    def make(**changes):
        data = {
            "old": text("en", "es"),
            "new": text("el", "tr"),
            "evaluation": text("en", "es", "el", "tr", "bn"),
            "stage1_length": 16,
            "stage2_length": 16,
        } | changes.pop("data", {})
        given = {
            "model": {"model": STORIES},
            "data": data,
            "allocation": {"total_experts": 9},
            "stage1": STEPS,
            "stage2": STEPS,
        }
        return LayerMoEConfig.model_validate(given | changes)

    return make


@pytest.fixture
def expanded_folder(tmp_path, tiny_llama, tiny_tokenizer):
    model = expand(
        tiny_llama(layers=3), [2, 0, 1], languages=["el", "tr"], old_languages=["en", "es"], seed=1, top_k=2
    )
    attach_classifiers(model, [0], seed=1)
    folder = tmp_path / "expanded"
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


def rows_of(sections, title):
    (section,) = (section for section in sections if section.title == title)
    return dict(section.rows)


def test_a_plan_says_model_languages_experts_and_stages(options, context):
    sections = describe_run(options(), context)
    assert [section.title for section in sections] == ["model", "languages", "expansion", "stages"]
    assert "260,032 parameters, 5 layers" in rows_of(sections, "model")["model"]
    assert "30 documents" in rows_of(sections, "languages")["new el"]
    grown = rows_of(sections, "expansion")
    assert "measured first" in grown["similarity"]
    assert grown["experts"].startswith("exactly 9 in 5 layers, originals included, by similarity; about 4 new")
    assert list(rows_of(sections, "stages")) == ["experts", "review", "memory a worker"]
    assert rows_of(sections, "stages")["experts"].startswith("4 steps of 2 blocks (2 x 1 accumulated x 1 workers)")


def test_parameters_that_a_plan_names_are_those_of_the_model(options, context, tiny_model_folder, tiny_llama):
    config = options(
        model={"model": str(tiny_model_folder)}, allocation={"explicit": [3, 1]}, classifier={"layers": [0]}
    )
    grown = rows_of(describe_run(config, context), "expansion")
    dense = tiny_llama(320)
    model = expand(tiny_llama(320), [2, 0], languages=["el"], old_languages=["en"], seed=1)
    size, before = (sum(parameter.numel() for parameter in each.parameters()) for each in (model, dense))
    ffn = sum(parameter.numel() for parameter in dense.model.layers[0].mlp.parameters())
    assert grown["parameters"] == f"{size:,}, {size - before:,} of them added"
    assert grown["active"] == f"{size - ffn:,} for a token (top 2)"  # two of the three experts
    assert grown["trained"].startswith(f"stage 1: {2 * ffn + 3 * 32:,};")
    assert grown["experts"] == "2 new: 3, 1 a layer, with the original; classifiers on layers 0"


def test_the_sizes_of_the_published_models_come_out():
    """Section 7: FFN of 3 H I parameters, totals of section 3.2; routers are counted apart there."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    config = LlamaConfig(**sizes, num_key_value_heads=8, head_dim=128, vocab_size=128256, tie_word_embeddings=True)
    with torch.device("meta"):
        shape = shape_of(AutoModelForCausalLM.from_config(config))
    assert shape.parameters == 3_212_749_824
    assert set(shape.ffn) == {75_497_472}
    new = [4, 4, 4, 3, 2, 2, *[1] * 12, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3]
    after = shape.expanded(new, 2)
    assert sum(new) == 56
    assert after.routers(after.totals) == 258_048
    assert after.parameters == 3_212_749_824 + 56 * 75_497_472 + 258_048
    assert after.active == 3_212_749_824 + 28 * 75_497_472 + 258_048
    assert after.trained(new) == 56 * 75_497_472 + 258_048


@pytest.mark.parametrize(
    ("strategy", "new"),
    [("moe_lpr", [2, 2, 2, 2, 2]), ("moe", [2, 2, 2, 2, 2]), ("mola", [1, 1, 3, 5, 7])],
)
def test_competitors_get_the_counts_of_their_papers(options, strategy, new):
    config = options(strategy=strategy, allocation={"uniform": 3})
    given = assign(config, [1] * 5, None, seed=1)
    assert given.new == new
    assert given.classifier_layers == []


def test_counts_add_to_what_a_layer_has_and_classifiers_go_where_languages_are_alike(options):
    pairs = {("el", "tr"): [0.02, 0.04, 0.08, 0.04], ("el", "en"): [0.02, 0.04, 0.08, 0.04]}
    pairs |= {("tr", "en"): [0.02, 0.04, 0.08, 0.04]}
    measured = layer_similarity(pairs, ["en"], ["el", "tr"])
    # section 9: delta 9 gives 4, 2, 1, 2
    given = assign(options(allocation={"delta": 9}), [1, 1, 1, 1], measured, seed=1)
    assert (given.new, given.totals) == ([3, 1, 0, 1], [4, 2, 1, 2])
    assert given.classifier_layers == [1]  # layer 2, the most alike, stays dense
    later = assign(options(allocation={"delta": 9}), [4, 2, 1, 2], measured, seed=1)
    assert (later.new, later.totals) == ([3, 1, 0, 1], [7, 3, 1, 3])
    more = assign(options(allocation={"delta": 9, "count_mode": "new"}), [4, 2, 1, 2], measured, seed=1)
    assert more.totals == [8, 4, 2, 4]
    assert assign(options(allocation={"delta": 9, "order": "inverse"}), [1] * 4, measured, seed=1).new == [0, 1, 3, 1]
    assert (
        assign(options(allocation={"total_experts": 8, "order": "uniform"}), [1] * 4, measured, seed=1).new == [1] * 4
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"allocation": {"explicit": [2, 2]}}, "has 2 numbers, the model 5 layers"),
        ({"allocation": {"explicit": [1] * 5}}, "adds no expert"),
        ({"allocation": {"total_experts": 5}}, "adds no expert to any layer"),
        ({"allocation": {"total_experts": 4}}, "5 layers hold at least 5"),
        ({"allocation": {"total_experts": 20, "max_per_layer": 3}}, "5 to 15"),
        ({"allocation": {"explicit": [2, 1, 2, 2, 2]}, "classifier": {"layers": [1]}}, "layer 1 has no new experts"),
        ({"allocation": {"explicit": [2] * 5}, "classifier": {"layers": [5]}}, "5 is no layer of the model"),
        ({"classifier": {"layers": [7]}}, "7 is no layer of the model: 0 to 4"),
        ({"data": {"old": []}}, "stage2 teaches which tokens belong to old languages"),
        ({"data": {"stage1_length": 1024}}, "stage1_length = 1024: sample:models/stories260K has 512 positions"),
        ({"base_training": STEPS, "data": {"old": []}}, "base_training trains on data.old, which is empty"),
        ({"stage1": {**STEPS, "per_device_train_batch_size": 500}}, "experts: a step takes 500 blocks"),
        ({"stage2": {**STEPS, "gradient_accumulation_steps": 900}}, "review: a step takes 1800 blocks"),
    ],
)
def test_what_does_not_fit_is_refused(options, context, changes, said):
    with pytest.raises(ConfigError) as caught:
        describe_run(options(**changes), context)
    assert said in str(caught.value)


def test_a_fresh_model_needs_training_first(options, context):
    fresh = {"config": {"model_type": "llama", "num_hidden_layers": 5}, "tokenizer": STORIES}
    with pytest.raises(ConfigError, match=r"which knows no language\. Give base_training"):
        describe_run(options(model=fresh), context)
    small = fresh | {"config": {**fresh["config"], "hidden_size": 64, "intermediate_size": 128}}
    sections = describe_run(options(model=small, base_training=STEPS), context)
    assert list(rows_of(sections, "stages"))[:2] == ["base", "experts"]


def test_an_architecture_without_experts_is_refused_only_where_it_gets_some(options, context):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    fresh = {"config": {"model_type": "gpt2", **sizes}, "tokenizer": STORIES}
    with pytest.raises(ModelError, match="only llama, qwen2 models can be expanded"):
        describe_run(options(model=fresh, base_training=STEPS), context)


def test_old_languages_that_a_review_does_not_replay_are_named(options, context, text):
    sections = describe_run(options(data={"old": text("en")}), context)
    assert "es, bn" in rows_of(sections, "languages")["warning"]
    assert "warning" not in rows_of(describe_run(options(stage2=None), context), "languages")


def test_a_language_that_fills_no_block_is_refused(options, context, text):
    short = [{**text("tr")[0], "stop": 1}]
    with pytest.raises(DataError, match="tr: its 1 documents have"):
        describe_run(options(data={"new": [*text("el"), *short], "stage1_length": 128}), context)


def test_missing_text_is_refused(options, context):
    lost = [{"language": "el", "path": "/no/such/file.txt"}]
    with pytest.raises(DataError, match=r"/no/such/file\.txt"):
        describe_run(options(data={"new": lost}), context)


class TestLaterExpansion:
    @pytest.fixture
    def later(self, options, text, expanded_folder):
        def make(**changes):
            data = {"old": text("en", "es"), "earlier": text("el", "tr"), "new": text("bn")}
            changes["data"] = data | changes.pop("data", {})
            return options(**{"model": {"model": expanded_folder}} | changes)

        return make

    def test_it_is_planned_from_what_the_model_records(self, later, context):
        sections = describe_run(later(), context)
        assert rows_of(sections, "model")["added before"] == "el, tr; 6 experts in 3 layers"
        assert "about 6 new" in rows_of(sections, "expansion")["experts"]

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"top_k": 1}, "was made with 2 experts a token"),
            ({"base_training": STEPS, "data": {"earlier": [], "old": []}}, "base_training trains a dense model"),
        ],
    )
    def test_options_that_contradict_the_model_are_refused(self, later, context, changes, said):
        with pytest.raises(ConfigError, match=said):
            describe_run(later(**changes), context)

    def test_a_language_that_it_has_is_not_new(self, later, context, text):
        with pytest.raises(ConfigError, match=r"data\.new names tr, which .* has already"):
            describe_run(later(data={"earlier": text("el"), "new": text("tr")}), context)

    def test_groups_are_those_of_the_model(self, later, context, text):
        with pytest.raises(ConfigError, match=r"el, tr: in .* en, es are old languages and el, tr were added"):
            describe_run(later(data={"old": text("en", "es", "el", "tr"), "earlier": []}), context)

    def test_earlier_languages_without_replay_are_named(self, later, context):
        sections = describe_run(later(data={"earlier": []}), context)
        assert "el, tr" in rows_of(sections, "languages")["warning"]

    def test_a_dense_model_has_no_earlier_languages(self, later, context):
        with pytest.raises(ConfigError, match=r"data\.earlier names el, tr, and .* was never expanded"):
            describe_run(later(model={"model": STORIES}), context)


def test_a_lifelong_plan_has_every_expansion(options, context, text):
    sections = describe_run(options(lifelong=[{"new": text("bn"), "allocation": {"delta": 12}}]), context)
    assert [section.title for section in sections][2:4] == ["expansion", "expansion 2"]
    assert list(rows_of(sections, "stages")) == ["experts", "review", "experts-2", "review-2", "memory a worker"]
    assert rows_of(sections, "expansion 2")["experts"].startswith("delta 12, originals included, by similarity")
    with pytest.raises(ConfigError, match="has 3 numbers, the model 5 layers"):
        describe_run(options(lifelong=[{"new": text("bn"), "allocation": {"explicit": [2, 2, 2]}}]), context)


@pytest.mark.parametrize("strategy", ["full_ft", "lora", "base"])
def test_competitors_without_experts_have_a_plan_without_them(options, context, strategy):
    sections = describe_run(options(strategy=strategy), context)
    assert [section.title for section in sections] == ["model", "languages", "stages"]
    assert next(iter(rows_of(sections, "stages"))) == ("evaluation" if strategy == "base" else strategy)


def test_llama_pro_has_a_plan_with_the_copies(options, context, tiny_model_folder):
    config = options(strategy="llama_pro", model={"model": str(tiny_model_folder)}, inserted_layers=1)
    sections = describe_run(config, context)
    assert [section.title for section in sections] == ["model", "languages", "expansion", "stages"]
    grown, added = rows_of(sections, "expansion"), 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32
    assert grown["layers"] == "1 copies, behind layers 1; 3 afterwards"
    assert grown["parameters"].endswith(f"{added:,} of them added")
    assert grown["trained"] == f"{added:,}"
    assert list(rows_of(sections, "stages")) == ["llama_pro", "memory a worker"]
    with pytest.raises(ConfigError, match="inserted_layers = 3: the model has 2 layers"):
        describe_run(config.model_copy(update={"inserted_layers": 3}), context)


def test_few_shot_translation_needs_sacrebleu_and_examples(options, context, text, monkeypatch):
    asked = {"translation": {"examples": text("en", "el"), "pivot": "en"}}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="sacrebleu"):
        describe_run(options(evaluation=asked), context)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="examples has none of es, tr"):
        describe_run(options(evaluation=asked), context)
    with pytest.raises(ConfigError, match="pivot = sw"):
        describe_run(options(evaluation={"translation": {**asked["translation"], "pivot": "sw"}}), context)


def test_blocks_are_counted_as_they_are_packed(text):
    tokenizer = load_tokenizer(ModelSource(model=STORIES))
    config = LayerMoEConfig.model_validate(
        {
            "model": {"model": STORIES},
            "data": {"new": text("el", "tr"), "evaluation": text("el", "tr")},
        }
    )
    from tenfold.methods.layermoe.packing import packed_blocks

    new = config.data.new
    for settings in ({}, {"max_documents": 10}, {"token_budget": 100}):
        packed = packed_blocks(new, tokenizer, 16, 1, groups={"el": 1, "tr": 1}, **settings)
        counted = count_blocks(new, tokenizer, 16, **settings)
        assert (counted.number, counted.is_exact) == (len(packed), True)


def test_of_long_texts_only_the_start_is_counted(tmp_path, monkeypatch, text):
    monkeypatch.setattr("tenfold.methods.layermoe.planned_steps.MOST_DOCUMENTS", 20)
    monkeypatch.setattr("tenfold.methods.layermoe.planned_steps._counted", {})
    tokenizer = load_tokenizer(ModelSource(model=STORIES))
    config = LayerMoEConfig.model_validate(
        {"model": {"model": STORIES}, "data": {"new": text("el"), "evaluation": text("el")}}
    )
    whole = count_blocks(config.data.new, tokenizer, 16, max_documents=20)
    start = count_blocks(config.data.new, tokenizer, 16)
    assert (whole.is_exact, start.is_exact) == (True, False)
    assert whole.number == start.number
    assert MOST_DOCUMENTS >= 1000
