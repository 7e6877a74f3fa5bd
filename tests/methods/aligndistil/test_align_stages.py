"""The stages of a run: which models are trained, and which one is only copied; a stand-in trains."""

import json
import shutil
from pathlib import Path

import pytest
from tenfold.methods.aligndistil import stages
from tenfold.methods.aligndistil.config import AlignDistilConfig
from tenfold.methods.aligndistil.stages import frozen_models, policy_is_dpo_model, preference_config, train_policy
from tenfold.platform.context import RunContext
from tenfold.platform.experiment import Compute
from tenfold.platform.method import Outcome
from tenfold.platform.models.manifest import Parent, read_manifest, verify_manifest
from tenfold.platform.stages import digest_of
from tenfold.platform.storage import Storage
from tenfold.platform.tracking import Tracker

MODEL = {"model": "sample:models/stories260K"}
OTHER_STEPS = {"max_steps": 7}
MEASURED = {"contrast_reward": True}


@pytest.fixture
def options(tmp_path):
    """Return a function: options -> the configuration of a DPO run that is measured with the contrast."""
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"p{number}", "chosen": "good", "rejected": "bad"} for number in range(8)]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = {"train": [{"path": str(path)}], "template": "none", "validation_ratio": 0.25}
    own = {"model": MODEL, "objective": "dpo", "data": data, "training": {"max_steps": 2}, "side_by_side": False}
    return lambda **more: AlignDistilConfig.model_validate(own | {"evaluation": MEASURED} | more)


@pytest.fixture
def make_context(tmp_path, tracking_uri):
    """Return a function that makes the context of a run in one storage."""
    uri = tracking_uri(tmp_path)

    def make(run_id="one"):
        tracker = Tracker.start(uri, "stages", run_id, spool=tmp_path / f"{run_id}.jsonl")
        top = Storage(tmp_path / "runs")
        storage, cache = Storage(top.uri_of(run_id)), Storage(top.uri_of("cache"))
        return RunContext(run_id, "aligndistil", 1, Compute(), storage, cache, tracker)

    return make


@pytest.fixture
def trained(monkeypatch, tiny_model_folder):
    """Train nothing; returns the objective, the steps and the exchange of answers of what would have been trained."""
    seen = []

    def train(name, config, frozen, decides, context):
        seen.append((name, config.training.max_steps, config.data.swap_preferences))
        context.storage.upload(tiny_model_folder, "checkpoint")
        metrics = {"eval/nll": 1.0 + len(seen)}
        parents = [Parent(kind="policy", reference=config.model.name)]
        model = context.save_model("checkpoint", name="policy", flavor="causal-lm", metrics=metrics, parents=parents)
        return Outcome(metrics=metrics, model=model)

    monkeypatch.setattr(stages, "_train", train)
    return seen


def run(config, context):
    """Do what a run does before it measures; returns the policy's stage and the model's folder in the run's own."""
    result = train_policy(config, frozen_models(config, context), context)
    return result, context.adopt_model(result)


def test_a_dpo_policy_that_evaluation_needs_as_dpo_model_is_trained_once(options, make_context, trained):
    context = make_context()
    result, _ = run(options(), context)
    assert trained == [("dpo", 2, False), ("reverse", 2, True)]
    assert result.outcome.metrics == {"eval/nll": 2.0}  # of the first


def test_the_copy_is_the_runs_own_and_outlives_the_cache(options, make_context, trained):
    context = make_context("two")
    run(options(), make_context("one"))
    _, model = run(options(), context)
    assert len(trained) == 2
    shutil.rmtree(context.cache.local_path())
    folder = context.storage.local_path(model)
    assert folder.is_relative_to(context.storage.local_path())
    manifest = verify_manifest(folder)
    assert (manifest.name, manifest.method, manifest.flavor) == ("two", "aligndistil", "causal-lm")
    assert manifest.metrics == {"eval/nll": 2.0}
    assert [parent.reference for parent in manifest.parents] == [MODEL["model"]]


def test_the_copy_has_the_digest_of_what_was_trained(options, make_context, trained):
    config, context = options(), make_context()
    models = frozen_models(config, context)
    model = context.adopt_model(train_policy(config, models, context))
    assert read_manifest(context.storage.local_path(model)).digest == read_manifest(Path(models["dpo"].model)).digest


def test_a_run_that_goes_on_takes_its_copy_as_it_is_there(options, make_context, trained):
    _, first = run(options(), make_context())
    result, again = run(options(), make_context())
    assert (result.reused, again) == (True, first)


@pytest.mark.parametrize(
    "more",
    [
        {"evaluation": {}},
        {"objective": "cdpo"},
        {"objective": "simpo"},
        {"preference_training": OTHER_STEPS},
        {"dpo_model": MODEL},
    ],
    ids=["not-measured", "cdpo", "simpo", "other-steps", "given"],
)
def test_any_other_policy_is_trained_for_itself(options, make_context, trained, more):
    config = options(**more)
    run(config, make_context())
    assert trained[-1] == (config.objective, 2, False)
    assert len(trained) == 1 + sum(
        given is None and name in config.evaluated_names
        for name, given in (("dpo", config.dpo_model), ("reverse", config.reverse_model))
    )


def test_what_dpo_does_not_read_makes_no_other_training(options, make_context, trained):
    unread = {"extrapolation": 3.0, "kto": {"desirable_weight": 2.0}, "rto": {"clip": 0.1}, "tdpo_alpha": 0.1}
    run(options(), make_context("one"))
    run(options(**unread, preference_training={"max_steps": 2}), make_context("two"))
    assert len(trained) == 2


def test_stages_of_one_model_are_decided_by_the_same(options, make_context):
    config, context = options(), make_context()
    assert policy_is_dpo_model(config)
    shared = stages._stage("dpo", preference_config(config, reverse=False), context)
    own = stages._stage("dpo", config, context, frozen={"reference": config.model})
    assert digest_of(own.decides) == digest_of(shared.decides)
    reverse = stages._stage("dpo", preference_config(config, reverse=True), context)
    assert digest_of(reverse.decides) != digest_of(shared.decides)
