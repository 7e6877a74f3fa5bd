"""The packaged experiments are valid, small enough to plan at once, and say what the paper did."""

import pytest
from tenfold.methods.layermoe.config import LayerMoEConfig
from tenfold.platform.context import PlanContext
from tenfold.platform.experiment import load_experiment
from tenfold.platform.method import packaged_experiments
from tenfold.platform.storage import Storage
from tenfold.platform.tuning.space import check_space, trial_count

NAMES = sorted(name for name in packaged_experiments() if name.startswith("layermoe/"))
LOCAL = [name for name in NAMES if "paper" not in name]


def plan(name, tmp_path, *overrides):
    loaded = load_experiment(name, overrides)
    context = PlanContext(loaded.experiment.seed, loaded.experiment.compute, Storage(tmp_path / "cache"))
    return {section.title: dict(section.rows) for section in loaded.method.plan(loaded.config, context)}


def test_there_is_an_experiment_for_every_claim():
    assert {name.partition("/")[2] for name in NAMES} >= {
        "demo",
        "compare",
        "classifier",
        "expert_budget",
        "lifelong",
        "paper_llama3.2_3b",
        "paper_qwen1.5_1.8b",
        "paper_qwen1.5_1.8b_lifelong",
    }


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_is_valid_at_every_point_of_its_sweep(name):
    loaded = load_experiment(name)
    assert isinstance(loaded.config, LayerMoEConfig)
    assert len(loaded.experiment.description) > 20
    if loaded.experiment.sweep is not None:
        assert len(check_space(loaded)) == trial_count(loaded.experiment.sweep)


@pytest.mark.parametrize("name", LOCAL)
def test_an_experiment_that_runs_here_can_be_planned(name, tmp_path):
    sections = plan(name, tmp_path)
    assert "warning" not in sections["languages"]
    assert {"base", "experts", "review"} <= set(sections["stages"])


def test_the_demo_has_60_percent_fewer_experts_than_moe_lpr(tmp_path):
    ours = plan("layermoe/demo", tmp_path)["expansion"]["experts"]
    theirs = plan("layermoe/demo", tmp_path, "config.strategy=moe_lpr")["expansion"]["experts"]
    assert "about 12 new" in ours
    assert theirs.startswith("30 new: 6, 6, 6, 6, 6, 6 a layer")


def test_the_lifelong_run_begins_as_the_demo_does():
    demo, lifelong = (load_experiment(f"layermoe/{name}").config for name in ("demo", "lifelong"))
    assert lifelong.expansions()[0] == demo.expansions()[0]
    assert lifelong.expansions()[1].data.groups() == {
        "old": ["en", "es", "zh"],
        "earlier": ["el", "hu", "tr"],
        "new": ["bn", "hi", "ne"],
    }


def test_the_lifelong_sweep_has_a_third_fewer_experts_than_moe_lpr(tmp_path):
    ours = plan("layermoe/lifelong", tmp_path)
    theirs = plan("layermoe/lifelong", tmp_path, "config.strategy=moe_lpr", "config.allocation.uniform=4")
    for expansion in ("expansion", "expansion 2"):
        assert "about 12 new" in ours[expansion]["experts"]
        assert theirs[expansion]["experts"].startswith("18 new")
    [uniform] = load_experiment("layermoe/lifelong").experiment.sweep.space["config.allocation.uniform"].grid
    assert uniform == 4


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [("paper_qwen1.5_1.8b", 512, 768), ("paper_llama3.2_3b", 512, 640), ("paper_qwen1.5_1.8b_lifelong", 512, 640)],
)
def test_global_batches_are_those_of_the_published_scripts(name, first, second):
    loaded = load_experiment(f"layermoe/{name}")
    workers = loaded.experiment.compute.workers
    sizes = [
        stage.per_device_train_batch_size * stage.gradient_accumulation_steps * workers
        for stage in (loaded.config.stage1, loaded.config.stage2)
    ]
    assert sizes == [first, second]
    assert (loaded.config.data.stage1_length, loaded.config.data.stage2_length) == (1024, 512)
    assert loaded.config.stage1.learning_rate == loaded.config.stage2.learning_rate == 5e-5


def test_the_published_counts_of_qwen_add_up():
    first, second = load_experiment("layermoe/paper_qwen1.5_1.8b_lifelong").config.expansions()
    totals = first.allocation.explicit
    assert sum(totals) - len(totals) == 48
    after = [total + new for total, new in zip(totals, second.allocation.explicit, strict=True)]
    assert after == [10, 8, 6, 9, 8, 5, 3, 5, 5, 4, 3, 3, 3, 3, 3, 3, 3, 5, 5, 6, 6, 6, 4, 4]
    assert sum(after) - len(after) == 96
