"""A whole run in this process, without Ray: which stages there are, what decides them, who shares what."""

import dataclasses
import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from tenfold.methods.layermoe.config import LayerMoEConfig
from tenfold.methods.layermoe.method import LayerMoE
from tenfold.methods.layermoe.modeling import layout_of
from tenfold.methods.layermoe.planned_similarity import cached_similarity
from tenfold.methods.layermoe.stages import grow
from tenfold.methods.layermoe.translation import TranslationScore
from tenfold.platform.context import PlanContext, RunContext
from tenfold.platform.experiment import Compute
from tenfold.platform.models.loading import load_causal_lm
from tenfold.platform.models.manifest import read_manifest
from tenfold.platform.models.randomness import seeded
from tenfold.platform.models.source import ModelSource
from tenfold.platform.storage import Storage
from tenfold.platform.training.checkpoints import CheckpointRecord
from tenfold.platform.training.launch import TrainingResult
from tenfold.platform.training.worker import WorkerContext

WORDS = {
    "en": ["the bird", "a cat", "my friend", "sings", "walks home", "today"],
    "es": ["el ave", "un gato", "mi amigo", "canta", "anda a casa", "hoy"],
    "el": [
        "\u03c4\u03bf \u03c0\u03bf\u03c5\u03bb\u03af",
        "\u03b7 \u03b3\u03ac\u03c4\u03b1",
        "\u03bf \u03c6\u03af\u03bb\u03bf\u03c2",
        "\u03c4\u03c1\u03ad\u03c7\u03b5\u03b9",
        "\u03b6\u03b5\u03b9",
        "\u03c4\u03ce\u03c1\u03b1",
    ],
    "tr": ["ku\u015f", "kedi", "arkada\u015f\u0131m", "\u015fark\u0131 s\u00f6yler", "eve gider", "bug\u00fcn"],
    "bn": [
        "\u09aa\u09be\u0996\u09bf",
        "\u09ac\u09bf\u09a1\u09bc\u09be\u09b2",
        "\u09ac\u09a8\u09cd\u09a7\u09c1",
        "\u0997\u09be\u09a8",
        "\u09ac\u09be\u09a1\u09bc\u09bf",
        "\u0986\u099c",
    ],
}
STEPS = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "eval_strategy": "no",
    "save_strategy": "no",
}


class MemoryTracker:
    """Stands for an MLflow run."""

    uri, started = "memory", 0

    def __init__(self, name="run"):
        self.name, self.metrics, self.figures, self.tags, self.children = name, {}, [], {}, []
        type(self).started += 1
        self.run_id = f"{name}-{self.started}"

    def child(self, name, **_):
        self.children.append(MemoryTracker(name))
        return self.children[-1]

    def log_metrics(self, metrics, step=None):
        self.metrics |= metrics

    def log_figure(self, name, figure):
        self.figures.append(name)

    def set_tags(self, tags):
        self.tags |= tags

    def log_params(self, flat):
        pass

    def log_text(self, text, name):
        pass

    def log_model_pointer(self, uri, digest, **_):
        self.tags["model"] = digest

    def finish(self, status):
        self.status = status


@dataclasses.dataclass(frozen=True)
class LocalContext(RunContext):
    """Does in this process what a run puts on the cluster, and writes down what it did."""

    log: list = dataclasses.field(default_factory=list)
    arguments: object = None

    def map(self, function, items, *, name, keys=None, cpus=1.0, gpus=0.0):
        self.log.extend(f"{function.__name__}" for _ in items)
        return [json.loads(json.dumps(function(json.loads(json.dumps(item))))) for item in items]

    def train(self, job):
        self.log.append(job.name)
        payload = json.loads(json.dumps(job.config))
        given = WorkerContext(payload, job.options, self.arguments(job.options), self.seed, 0, 1, {})
        trainer = job.build(given)
        with seeded(self.seed):
            trainer.train()
        folder = f"train/{job.name}/checkpoint"
        trainer.save_model(str(self.storage.local_path(folder)))
        metrics = {name.replace("eval_", "eval/", 1): v for name, v in trainer.evaluate().items()}
        return TrainingResult(CheckpointRecord(folder, 1, 1, metrics, {}))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Return language -> a file of 40 short documents."""
    folder = tmp_path_factory.mktemp("text")
    for language, words in WORDS.items():
        lines = [f"{words[i % 3]} {words[3 + i % 2]} {words[5]}" + " ." * (i % 4) for i in range(40)]
        (folder / f"{language}.txt").write_text("\n".join(lines), encoding="utf-8")
    return {language: str(folder / f"{language}.txt") for language in WORDS}


@pytest.fixture
def make_context(tmp_path, local_arguments):
    def make(run_id="one", seed=1):
        top = Storage(tmp_path / "runs")
        places = Storage(top.uri_of(run_id)), Storage(top.uri_of("cache"))
        return LocalContext(
            run_id, "layermoe", seed, Compute(), *places, MemoryTracker(run_id), log=[], arguments=local_arguments
        )

    return make


@pytest.fixture
def options(text, tiny_model_folder):
    def make(**changes):
        def corpora(*languages, **where):
            return [{"language": language, "path": text[language], **where} for language in languages]

        known = changes.pop("languages", ["en", "es", "el", "tr"])
        given = {
            "model": {"model": str(tiny_model_folder)},
            "data": {
                "old": corpora("en", "es", stop=30),
                "new": corpora("el", "tr", stop=30),
                "evaluation": corpora(*known, start=30),
                "stage1_length": 16,
                "stage2_length": 16,
            },
            "similarity": {"tokens": 60},
            "allocation": {"total_experts": 6},
            "stage1": STEPS,
            "stage2": STEPS,
            "loss_chunk_rows": 16,
        }
        if "lifelong" in changes:
            changes["lifelong"] = [{"new": corpora(language, stop=30)} for language in changes["lifelong"]]
        return LayerMoEConfig.model_validate(given | changes)

    return make


def layout(context, model):
    return layout_of(load_causal_lm(ModelSource(model=context.storage.uri_of(model))).config)


def test_a_run_measures_similarity_trains_experts_reviews_and_compares_before_with_after(make_context, options):
    context = make_context()
    outcome = LayerMoE().run(options(), context)
    assert [name for name in context.log if not name.endswith("_piece")] == ["experts", "review"]
    assert context.log.count("similarity_piece") == 4  # one a language
    assert [child.name for child in context.tracker.children] == ["one/similarity", "one/experts", "one/review"]
    assert context.tracker.figures == ["allocation", "routing"]
    made = layout(context, outcome.model)
    assert sum(made.totals) == 6
    assert len(made.classifier_layers) == 1  # 0.3 of two layers
    assert made.languages == {"old": ["en", "es"], "expansions": [["el", "tr"]]}
    assert made.history[0]["totals"] == made.totals
    assert len(made.history[0]["similarity"]) == 2
    manifest = read_manifest(Path(context.storage.local_path(outcome.model)))
    assert manifest.flavor == "moe-causal-lm"
    assert [parent.kind for parent in manifest.parents] == ["initial", "data", "data"]
    metrics = outcome.metrics
    rise = sum(
        metrics[f"eval/{name}/nats_per_byte"] - metrics[f"before/{name}/nats_per_byte"] for name in ("en", "es")
    )
    assert metrics["eval/forgetting"] == pytest.approx(rise / 2)
    assert 0 < metrics["routing/old/p0"] < 1
    # 4 new experts of 3 * 32 * 64, routers of 6 and one classifier of 2 outputs on 32 inputs
    assert metrics["eval/added_parameters"] == 4 * 3 * 32 * 64 + 6 * 32 + 2 * 32


def test_evaluating_again_trains_and_measures_nothing_twice(make_context, options):
    context, config = make_context(), options()
    outcome = LayerMoE().run(config, context)
    context.log.clear()
    measured = LayerMoE().evaluate(config, context.storage.uri_of(outcome.model), context)
    assert context.log == []
    assert measured == {name: outcome.metrics[name] for name in measured}


def test_a_second_run_shares_what_does_not_depend_on_what_was_changed(make_context, options):
    first = make_context("one")
    grow(options(), first)
    other_review = make_context("two")
    grow(options(prior_weight=0.5), other_review)
    assert other_review.log == ["start_piece", "review"]
    other_budget = make_context("three")
    grow(options(allocation={"total_experts": 7}), other_budget)
    assert other_budget.log == ["start_piece", "experts", "start_piece", "review"]
    other_measures = make_context("four")
    grow(options(evaluation={"batch_size": 2, "routing": False}), other_measures)
    assert other_measures.log == ["start_piece", "review"]  # of its own, as every run's last stage


def test_strategies_with_the_same_counts_share_their_experts(make_context, options):
    grow(options(allocation={"explicit": [3, 3]}, classifier={"layers": [0]}), make_context("one"))
    context = make_context("two")
    grow(options(strategy="moe_lpr", allocation={"uniform": 3}), context)
    assert context.log == ["review"]  # without classifiers it starts from the shared model as it is


def test_moe_is_another_stage_than_frozen_experts(make_context, options):
    grow(options(strategy="moe_lpr", allocation={"uniform": 3}), make_context("one"))
    context = make_context("two")
    (grown,) = grow(options(strategy="moe", allocation={"uniform": 3}), context)
    assert context.log == ["start_piece", "experts"]
    before, after = (load_causal_lm(source).model.embed_tokens.weight for source in (grown.before, grown.after))
    assert not before.equal(after)


@pytest.mark.parametrize(("strategy", "log"), [("full_ft", ["full_ft"]), ("lora", ["lora"]), ("base", [])])
def test_competitors_without_experts_go_through_the_same_measures(make_context, options, strategy, log):
    context = make_context()
    outcome = LayerMoE().run(options(strategy=strategy), context)
    assert [name for name in context.log if not name.endswith("_piece")] == log
    assert outcome.metrics["eval/added_parameters"] == 0
    assert (outcome.model is None) == (strategy == "base")
    if strategy == "base":
        assert outcome.metrics["eval/forgetting"] == outcome.metrics["eval/plasticity"] == 0


def test_llama_pro_trains_copies_of_layers_and_leaves_a_plain_model(make_context, options):
    context = make_context()
    outcome = LayerMoE().run(options(strategy="llama_pro"), context)
    assert context.log[:2] == ["start_piece", "llama_pro"]
    # one copy of the two layers: 4 matrices of the attention, 3 of the FFN, 2 norms
    assert outcome.metrics["eval/added_parameters"] == 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32
    place = Path(context.storage.local_path(outcome.model))
    assert read_manifest(place).flavor == "causal-lm"
    made, base = load_causal_lm(ModelSource(model=str(place))), load_causal_lm(options().model)
    assert made.config.model_type == base.config.model_type
    before, after = base.state_dict(), made.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    copied = {name: weight for name, weight in after.items() if name not in before}
    assert len(copied) == 9
    assert copied["model.layers.2.self_attn.o_proj.weight"].abs().sum() > 0  # no longer zero: it was trained
    again = make_context("two")
    grow(options(strategy="llama_pro", inserted_layers=2), again)
    assert again.log == ["start_piece", "llama_pro"]


def test_a_trial_of_a_sweep_reports_what_is_compared(make_context, options):
    class Reports:
        kept: ClassVar[list] = []

        def report(self, metrics, step):
            self.kept.append((step, metrics))

    context = dataclasses.replace(make_context(), trial=Reports())
    outcome = LayerMoE().run(options(strategy="base"), context)
    assert Reports.kept == [(0, outcome.metrics)]
    values = [outcome.metrics[f"eval/{name}/nats_per_byte"] for name in ("en", "es", "el", "tr")]
    assert outcome.metrics["eval/nats_per_byte"] == pytest.approx(sum(values) / 4)


def test_a_fresh_base_is_trained_once_and_for_all(make_context, options, tiny_model_folder):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    fresh = {"config": {"model_type": "llama", **sizes}, "tokenizer": str(tiny_model_folder)}
    config = options(model=fresh, base_training=STEPS)
    first, second = make_context("one"), make_context("two")
    grow(config, first)
    (grown,) = grow(config.model_copy(update={"strategy": "base"}), second)
    assert "base" in first.log
    assert second.log == []
    assert "stages/layermoe/base-" in grown.before.model
    plan = PlanContext(1, Compute(), first.cache)
    assert cached_similarity(config, plan) is not None
    assert cached_similarity(config, dataclasses.replace(plan, seed=2)) is None


def test_a_lifelong_run_expands_what_the_first_expansion_gave(make_context, options):
    grow(options(), make_context("one"))
    context = make_context("two")
    languages = ["en", "es", "el", "tr", "bn"]
    outcome = LayerMoE().run(options(lifelong=["bn"], languages=languages), context)
    trained = [name for name in context.log if name in ("experts", "review")]
    assert trained == ["review", "experts", "review"]  # the first experts are those of the first run
    assert context.log.count("similarity_piece") == 5  # on the expanded model, all five languages
    made = layout(context, outcome.model)
    assert made.languages == {"old": ["en", "es"], "expansions": [["el", "tr"], ["bn"]]}
    assert sum(made.totals) == 2 + 4 + 4
    assert "expansion_1/forgetting" in outcome.metrics
    assert "eval/forgetting_earlier" in outcome.metrics
    assert context.tracker.figures == ["allocation", "allocation-2", "routing"]


def test_an_expanded_model_is_expanded_again_in_a_run_of_its_own(make_context, options, text):
    first = make_context("one")
    outcome = LayerMoE().run(options(), first)
    config = options(
        model={"model": first.storage.uri_of(outcome.model)},
        data={
            "old": [{"language": name, "path": text[name], "stop": 30} for name in ("en", "es")],
            "earlier": [{"language": name, "path": text[name], "stop": 30} for name in ("el", "tr")],
            "new": [{"language": "bn", "path": text["bn"], "stop": 30}],
            "evaluation": [{"language": name, "path": text[name], "start": 30} for name in WORDS],
            "stage1_length": 16,
            "stage2_length": 16,
        },
    )
    context = make_context("two")
    (grown,) = grow(config, context)
    made = layout_of(load_causal_lm(grown.after).config)
    assert [len(sizes) for sizes in made.experts] == [2, 2]
    assert made.languages["expansions"] == [["el", "tr"], ["bn"]]


def test_a_stage_that_was_interrupted_makes_its_start_again_and_ends_the_same(make_context, options):
    context, config = make_context(), options()
    (grown,) = grow(config, context)
    digest = read_manifest(Path(grown.after.model)).digest
    stage = grown.result.storage
    assert not stage.exists("start")
    state = json.loads(stage.read_text("stage.json"))
    stage.write_text("stage.json", json.dumps(state | {"status": "running"}))
    context.log.clear()
    (again,) = grow(config, context)
    assert context.log == ["start_piece", "review"]
    assert read_manifest(Path(again.after.model)).digest == digest


def test_translation_is_measured_before_and_after_between_the_pivot_and_every_language(
    make_context, options, text, monkeypatch
):
    asked = []

    def score(translations, references, target):
        asked.append((len(translations), references, target))
        return TranslationScore(chrf=10.0 + len(asked), bleu=1.0)

    monkeypatch.setattr("tenfold.methods.layermoe.translation.check_sacrebleu", lambda option: None)
    monkeypatch.setattr("tenfold.methods.layermoe.translation.score", score)
    examples = [{"language": language, "path": path, "stop": 20} for language, path in text.items()]
    own = {"examples": examples, "shots": 2, "max_lines": 3, "num_beams": 1, "max_new_tokens": 2}
    context, config = make_context(), options(evaluation={"translation": own, "routing": False})
    outcome = LayerMoE().run(config, context)
    assert [target for _, _, target in asked[:6]] == ["es", "en", "el", "en", "tr", "en"]
    assert len(asked) == 12  # the model before, and the one after
    lines = Path(text["es"]).read_text(encoding="utf-8").split("\n")
    assert asked[0] == (3, lines[30:33], "es")
    assert outcome.metrics["before/translation/en-es/chrf"] == 11
    assert outcome.metrics["translation/new/chrf"] == (19 + 20 + 21 + 22) / 4  # numbers 9 to 12: el and tr
    LayerMoE().evaluate(config, context.storage.uri_of(outcome.model), context)
    assert len(asked) == 12


def test_benchmarks_are_run_one_by_one_for_the_languages_of_the_run(make_context, options, monkeypatch):
    asked = []

    def run_harness(model, tokenizer, tasks, *, batch_size, limit, definitions):
        (task,) = tasks
        asked.append((task.task, batch_size, limit, definitions))
        return {task: 0.25}

    monkeypatch.setattr("tenfold.methods.layermoe.harness.run_harness", run_harness)
    harness = {"benchmarks": ["Belebele"], "limit": 7}
    outcome = LayerMoE().run(options(evaluation={"harness": harness}, strategy="base"), make_context())
    assert asked == [(f"belebele_{name}", 8, 7, None) for name in ("eng_Latn", "spa_Latn", "ell_Grek", "tur_Latn")]
    assert outcome.metrics["harness/new/average"] == 25
    assert outcome.metrics["before/harness/old/Belebele"] == 25
