"""Whole optimizer steps of every stage through the Trainer, without Ray: what is trained, counted and measured."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tenfold.methods.layermoe.config import LayerMoEConfig
from tenfold.methods.layermoe.expansion import attach_classifiers, expand
from tenfold.methods.layermoe.trainer import (
    block_length,
    build_trainer,
    evaluated_languages,
    held_out_rows,
    language_metrics,
    objective_of,
    training_corpora,
)
from tenfold.platform.errors import DataError, ModelError
from tenfold.platform.models.loading import load_causal_lm
from tenfold.platform.models.randomness import seeded
from tenfold.platform.models.source import ModelSource
from tenfold.platform.training.deepspeed_config import deepspeed_config
from tenfold.platform.training.options import TrainingOptions
from tenfold.platform.training.worker import WorkerContext

SCRIPT = Path(__file__).parents[2] / "platform" / "training" / "training_ranks.py"
STEPS = 3
OLD, NEW = "en", "el"
WORDS = {
    OLD: ["the bird", "a cat", "my friend", "sings", "walks home", "sees the sun", "today", "every day"],
    NEW: ["το πουλί", "μια γάτα", "καλός φίλος", "τραγουδά", "πάει σπίτι", "βλέπει τον ήλιο", "σήμερα", "κάθε μέρα"],
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Return language -> a file of 60 documents."""
    folder = tmp_path_factory.mktemp("text")
    for language, words in WORDS.items():
        lines = [f"{words[i % 3]} {words[3 + i % 3]} {words[6 + i % 2]}" + " ." * (i % 4) for i in range(60)]
        (folder / f"{language}.txt").write_text("\n".join(lines), encoding="utf-8")
    return {language: str(folder / f"{language}.txt") for language in WORDS}


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_llama, tiny_tokenizer):
    """Return folders of a dense model, the expanded one that stage 1 starts from, and one for the review."""
    made = {"dense": tiny_llama(hidden=32, layers=3)}
    made["experts"] = expand(
        tiny_llama(hidden=32, layers=3), [2, 0, 1], languages=[NEW], old_languages=[OLD], seed=1, record={}
    )
    made["review"] = expand(
        tiny_llama(hidden=32, layers=3), [2, 0, 1], languages=[NEW], old_languages=[OLD], seed=1, record={}
    )
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in made["review"].named_parameters():
            if ".groups." in name:
                weight.add_(torch.randn(weight.shape, generator=draw), alpha=0.05)
    attach_classifiers(made["review"], [0, 2], seed=2)
    folders = {}
    for name, model in made.items():
        folders[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(folders[name])
        tiny_tokenizer.save_pretrained(folders[name])
    return folders


def options(text, rows=4, passes=1, training=None, **more):
    def corpora(*languages, **where):
        return [{"language": language, "path": text[language], **where} for language in languages]

    data = {
        "old": corpora(OLD, stop=50),
        "new": corpora(NEW, stop=50),
        "evaluation": corpora(OLD, NEW, start=50),
        "stage1_length": 24,
        "stage2_length": 16,
        **more.pop("data", {}),
    }
    steps = {
        "max_steps": STEPS,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": passes,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-4,  # with the default the sign of a gradient of 1e-9 would decide about whole updates
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        **(training or {}),
    }
    given = {"model": {"model": "anything"}, "data": data, "stage1": steps, "stage2": steps, "loss_chunk_rows": 16}
    return LayerMoEConfig.model_validate(given | more)


@pytest.fixture
def build(local_arguments, models):
    def make(config, stage, model=None, **payload):
        folder = models[model or (stage if stage in models else "dense")]
        given = {"layermoe": config.model_dump(mode="json"), "stage": stage, "model": {"model": folder}, **payload}
        arguments = local_arguments(config.stage1)
        return build_trainer(WorkerContext(given, TrainingOptions(), arguments, 1, 0, 1, {}))

    return make


@pytest.fixture
def train(build):
    def finished(config, stage, **more):
        trainer = build(config, stage, **more)
        with seeded(1):
            trainer.train()
        return trainer

    return finished


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(module):
    return {name: weight.detach().clone() for name, weight in module.exported.named_parameters()}


def changed(before, after):
    return {name for name, weight in before.items() if not torch.equal(weight, after[name])}


def test_a_review_does_not_depend_on_the_accumulation(train, text):
    whole, split = (train(options(text, rows, 4 // rows), "review") for rows in (4, 1))
    assert len(set(logged(whole))) == STEPS
    assert logged(whole) == pytest.approx(logged(split), rel=1e-4)
    names = ("ntp", "prior", "classifier", "classifier_accuracy_old", "classifier_accuracy_new", "p0_old", "p0_new")
    for name in names:
        assert logged(whole, name) == pytest.approx(logged(split, name), rel=1e-4, nan_ok=True), name
    after = weights(split.model)
    for name, weight in weights(whole.model).items():
        torch.testing.assert_close(weight, after[name], rtol=1e-3, atol=1e-5, msg=name)


def test_stage_1_learns_the_new_language_with_new_experts_and_routers_alone(build, text):
    trainer = build(options(text, training={"max_steps": 15}), "experts")
    before, measured = weights(trainer.model), trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    moved = changed(before, weights(trainer.model))
    assert moved == {name for name in before if ".groups.0." in name or ".router." in name}
    optimised = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert optimised == len(moved)
    assert after["eval_nll_el"] == after["eval_nll_new"]
    falls = {name: measured[f"eval_nll_{name}"] - after[f"eval_nll_{name}"] for name in ("old", "new")}
    assert falls["new"] > 0.25  # embeddings and head, drawn at random, stay as they are
    assert falls["new"] > 2 * falls["old"]
    for name in ("ntp", "balance", "load_base", "load_largest", "p0_new"):
        assert len(logged(trainer, name)) == 15, name
    losses = [n + 0.01 * b for n, b in zip(logged(trainer, "ntp"), logged(trainer, "balance"), strict=True)]
    assert logged(trainer) == pytest.approx(losses, rel=1e-4)


def test_the_review_teaches_routers_and_classifiers_alone(build, text):
    trainer = build(options(text, 8, training={"max_steps": 25}), "review")
    before = weights(trainer.model)
    trainer.train()
    moved = changed(before, weights(trainer.model))
    assert moved == {name for name in before if ".router." in name or ".classifier." in name}
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(moved) == 4
    for name in ("classifier", "prior"):
        values = torch.tensor(logged(trainer, name))  # NaN in steps without an old token
        assert values[-8:].nanmean() < values[:8].nanmean() - 0.2, name
    for name in ("old", "new"):  # two scripts are easy to tell
        assert torch.tensor(logged(trainer, f"classifier_accuracy_{name}")[-8:]).nanmean() > 0.8, name
    terms = [torch.tensor(logged(trainer, name)).nan_to_num().tolist() for name in ("ntp", "prior", "classifier")]
    losses = [n + 0.1 * p + 0.1 * c for n, p, c in zip(*terms, strict=True)]
    assert logged(trainer) == pytest.approx(losses, rel=1e-4)


def test_a_review_without_classifiers_has_the_prior_alone(train, text):
    trainer = train(options(text, strategy="moe_lpr"), "review", model="experts")
    assert trainer.model.objective.classifier_weight is None
    assert len(logged(trainer, "prior")) == STEPS
    assert not logged(trainer, "classifier")
    assert not logged(trainer, "balance")


@pytest.mark.parametrize(
    ("stage", "strategy", "model"),
    [("base", "layermoe", "dense"), ("full_ft", "full_ft", "dense"), ("experts", "moe", "experts")],
)
def test_base_full_fine_tuning_and_upcycling_train_everything(train, text, stage, strategy, model):
    config = options(text, strategy=strategy, stage2=None)
    trainer = train(config, stage, model=model)
    before = load_causal_lm(ModelSource(model=trainer.model.config.name_or_path), dtype="float32")
    assert changed(dict(before.named_parameters()), weights(trainer.model)) == set(dict(before.named_parameters()))
    assert ("balance" in trainer.state.log_history[0]) == (strategy == "moe")


def test_an_adapter_trains_alone_and_is_merged_where_it_is_saved(train, text, tmp_path):
    config = options(
        text, strategy="lora", stage2=None, lora={"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": "all-linear"}
    )
    trainer = train(config, "lora")
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)
    assert {name.rsplit(".lora")[0].rsplit(".")[-1] for name in trained} >= {"q_proj", "down_proj"}
    assert logged(trainer) == pytest.approx(logged(trainer, "ntp"), rel=1e-4)
    trainer.save_model(str(tmp_path / "merged"))
    loaded = load_causal_lm(ModelSource(model=str(tmp_path / "merged")), dtype="float32")
    ids = torch.arange(3, 20)[None]
    expected = trainer.model.exported.eval()(ids).logits
    torch.testing.assert_close(loaded.eval()(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_saved_review_loads_with_its_classifiers(train, text, tmp_path):
    trainer = train(options(text), "review")
    trainer.save_model(str(tmp_path / "saved"))
    loaded = load_causal_lm(ModelSource(model=str(tmp_path / "saved")), dtype="float32")
    found = dict(loaded.named_parameters())
    assert not changed(weights(trainer.model), found)
    assert any(".classifier." in name for name in found)


def test_the_counts_of_a_step_are_integers_over_all_its_batches(build, text):
    trainer = build(options(text, 3, 2), "review")
    loader = iter(trainer.get_train_dataloader())
    batches = trainer.prepare_step([next(loader), next(loader)])
    old = sum(int((batch["group"] == 0).sum()) for batch in batches)
    for batch in batches:
        assert int(batch["num_sequences"]) == 6
        assert int(batch["num_old_tokens"]) == 16 * old
        assert int(batch["num_real_tokens"]) == 16 * 6
        assert not any(torch.is_floating_point(value) for value in batch.values())
    assert trainer.prepare_step([]) == []


def test_the_counts_of_a_step_are_summed_over_ranks(build, text, monkeypatch):
    trainer = build(options(text), "review")
    rows = trainer.train_dataset
    old, new = ([place for place, group in enumerate(rows["group"]) if group == one] for one in (0, 1))
    batch = trainer.data_collator([rows[place] for place in [*old[:2], *new[:3]]])
    alone, asked = trainer.prepare_step([batch])[0], []
    names = ("num_old_tokens", "num_real_tokens", "num_sequences")
    assert [int(alone[name]) for name in names] == [2 * 16, 5 * 16, 5]

    def as_on_two_ranks(tensor, reduction):
        asked.append(reduction)
        return 2 * tensor

    monkeypatch.setattr(trainer.accelerator, "reduce", as_on_two_ranks)
    both = trainer.prepare_step([batch])[0]
    assert asked == ["sum"]
    for name in names:
        assert both[name] == 2 * alone[name]


def test_only_a_review_is_given_counts(build, text):
    trainer = build(options(text), "experts")
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer.prepare_step([batch]) == [batch]


def test_each_stage_reads_its_own_languages_and_lengths(text):
    config = options(text)
    found = {stage: [c.language for c in training_corpora(config, stage)] for stage in ("base", "experts", "review")}
    assert found == {"base": [OLD], "experts": [NEW], "review": [NEW, OLD]}
    assert [block_length(config, stage) for stage in ("base", "full_ft", "review")] == [24, 24, 16]


def test_blocks_of_both_groups_reach_the_review_and_new_ones_alone_stage_1(build, text):
    config = options(text)
    review, experts = (build(config, stage).train_dataset for stage in ("review", "experts"))
    assert set(review["group"]) == {0, 1}
    assert all(old == (group == 0) for old, group in zip(review["old"], review["group"], strict=True))
    assert set(experts["group"]) == {1}
    assert {len(ids) for ids in experts["input_ids"]} == {24}


def test_budgets_limit_the_text_of_their_stage_alone(build, text):
    config = options(text, data={"token_budget": 100, "max_documents": 5})
    whole = options(text)
    sizes = {
        stage: [len(build(one, stage).train_dataset) for one in (config, whole)] for stage in ("experts", "review")
    }
    assert all(few < many / 3 for few, many in sizes.values())
    base = [len(build(one, "base").train_dataset) for one in (config, whole)]
    assert base[0] == base[1]


def test_the_weights_and_forms_of_the_terms_come_from_the_options(text):
    config = options(
        text,
        balance_weight=0.5,
        prior_weight=0.3,
        classifier_weight=0.7,
        prior_form="official",
        classifier={"route_with": "gold"},
    )
    experts, review = objective_of(config, "experts", []), objective_of(config, "review", [1])
    assert (experts.balance_weight, experts.prior_weight, experts.classifier_weight) == (0.5, None, None)
    assert (review.balance_weight, review.prior_weight, review.classifier_weight) == (None, 0.3, 0.7)
    assert (review.prior_form, review.route_with, review.chunk) == ("official", "gold", 16)
    without = objective_of(config, "review", [])
    assert (without.classifier_weight, without.route_with) == (None, "predicted")
    assert not objective_of(config, "full_ft", []).reads_routing


def test_held_out_lines_have_a_start_and_an_end_and_are_cut(text, tiny_tokenizer):
    languages = {OLD: "old", NEW: "new"}
    whole, cut = (
        held_out_rows(
            options(text, evaluation={"max_lines": 3}, data={"stage1_length": length}),
            *("experts", tiny_tokenizer, languages),
        )
        for length in (200, 9)
    )
    lines = [line for path in text.values() for line in Path(path).read_text(encoding="utf-8").splitlines()[50:53]]
    assert [row["language"] for row in whole] == [0] * 3 + [1] * 3
    assert [row["old"] for row in whole] == [True] * 3 + [False] * 3
    for row, line in zip(whole, lines, strict=True):
        begin, *ids, end = row["input_ids"]
        assert (begin, end) == (tiny_tokenizer.bos_token_id, tiny_tokenizer.eos_token_id)
        assert tiny_tokenizer.decode(ids) == line
        assert row["labels"] == [-100, *ids, end]
    for row, other in zip(cut, whole, strict=True):
        assert row == {**other, "input_ids": other["input_ids"][:9], "labels": other["labels"][:9]}


def test_the_base_is_evaluated_on_old_languages_and_other_stages_on_all(text):
    config = options(text)
    assert evaluated_languages(config, "base") == {OLD: "old"}
    assert evaluated_languages(config, "experts") == {OLD: "old", NEW: "new"}
    assert evaluated_languages(options(text, data={"old": []}), "experts") == {NEW: "new"}


def test_metrics_are_ratios_of_sums_by_language_and_group():
    rows = [(6.0, 3, 0), (2.0, 1, 0), (9.0, 3, 1), (1.0, 1, 2), (8.0, 2, 2), (5.0, 5, 3)]
    languages = {"en": "old", "el": "new", "es": "old", "bn": "earlier"}
    found = language_metrics(SimpleNamespace(predictions=rows), languages)
    expected = {"nll_en": 2.0, "nll_el": 3.0, "nll_es": 3.0, "nll_bn": 1.0, "nll_old": 17 / 7, "nll_new": 3.0}
    expected |= {"nll_earlier": 1.0, "nll": 31 / 15, "perplexity": math.exp(31 / 15)}
    assert found == pytest.approx(expected)
    empty = language_metrics(SimpleNamespace(predictions=[(0.0, 0, 0)]), {"en": "old"})
    assert math.isnan(empty["nll_old"])


def test_metrics_of_the_trainer_are_those_of_the_model(build, text):
    trainer = build(options(text, training={"per_device_eval_batch_size": 3}), "review")
    found, model = trainer.evaluate(), trainer.model.exported.eval()
    totals = {}
    with torch.no_grad():
        for row in trainer.eval_dataset:
            ids = torch.tensor([row["input_ids"]])
            losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            totals.setdefault(row["language"], []).append(losses)
    means = [torch.cat(parts).mean().item() for parts in totals.values()]
    assert [found["eval_nll_old"], found["eval_nll_new"]] == pytest.approx(means, rel=1e-4)


@pytest.mark.parametrize("stage", ["experts", "review"])
def test_stages_of_experts_refuse_a_dense_model(build, text, stage):
    with pytest.raises(ModelError, match="Expand it"):
        build(options(text), stage, model="dense")


def test_upcycling_refuses_a_dense_model(build, text):
    with pytest.raises(ModelError, match="strategy moe trains experts"):
        build(options(text, strategy="moe", stage2=None), "experts", model="dense")


def test_a_base_without_old_text_is_refused(build, text):
    with pytest.raises(DataError, match=r"data\.old is empty"):
        build(options(text, data={"old": []}), "base")


def test_training_is_repeatable(train, text):
    first, again = (train(options(text), "review") for _ in range(2))
    assert logged(first) == logged(again)
    assert not changed(weights(first.model), weights(again.model))


# name -> ranks, DeepSpeed settings; the first of each stage is what the others are like
RUNS = {
    "review-whole": (1, "zero2"),
    "review-zero2": (2, "zero2"),
    "review-zero3": (2, "zero3"),
    "experts-zero2": (2, "zero2"),
    "experts-zero3": (2, "zero3"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text, models):
    """Return the folder of each run; those of one world size share their processes."""
    base = tmp_path_factory.mktemp("trained")
    for world_size in (1, 2):
        jobs = []
        for name, (ranks, settings) in RUNS.items():
            if ranks != world_size:
                continue
            stage, config = name.split("-")[0], options(text, 4 // ranks)
            job = {
                "build": "tenfold.methods.layermoe.trainer:build_trainer",
                "config": {
                    "layermoe": config.model_dump(mode="json"),
                    "stage": stage,
                    "model": {"model": models[stage]},
                },
                "options": config.stage1.model_dump(mode="json"),
                "deepspeed": deepspeed_config(settings),
                "seed": 10,
                "output": str(base / name),
            }
            Path(job["output"]).mkdir()
            jobs.append(job)
        listed = base / f"jobs-{world_size}.json"
        listed.write_text(json.dumps(jobs))
        subprocess.run([sys.executable, str(SCRIPT), str(listed), str(world_size)], check=True, timeout=200)
    return base


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_ranks_and_sharding_give_the_same_losses_and_weights(trained, models, name):
    first = next(run for run in RUNS if run.split("-")[0] == name.split("-")[0])
    found, expected = (json.loads((trained / run / "result.json").read_text())["losses"] for run in (name, first))
    assert len(set(found)) == STEPS
    assert found == pytest.approx(expected, rel=1e-4)
    before, after, same = (
        dict(load_causal_lm(ModelSource(model=str(folder)), dtype="float32").named_parameters())
        for folder in (models[name.split("-")[0]], trained / name, trained / first)
    )
    for key, weight in after.items():
        torch.testing.assert_close(weight, same[key], rtol=1e-3, atol=1e-5, msg=key)
    parts = (".router.", ".classifier.") if name.startswith("review") else (".router.", ".groups.")
    assert changed(before, after) == {key for key in before if any(part in key for part in parts)}
