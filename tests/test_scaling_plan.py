"""The formulas of benchmarks/scaling_plan.py against published sizes, values by hand, and what was exchanged."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig, Qwen2Config

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def scaling():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import scaling

        yield scaling


@pytest.fixture
def shape(scaling):
    return scaling.Shape(28, 3072, 8192, 128256, 24, 8, 128, tied=True)  # Llama-3.2-3B


@pytest.fixture
def hardware(scaling):
    """Return round numbers: 100 Tflop/s at half efficiency, 1 and 0.1 TB/s."""
    return scaling.Hardware(1e14, 64 * 2**30, 8, 1e12, 1e11, 1e10, 0.5, 0.0, 0.0, 512 * 3600.0, 60.0, 2.0)


def test_parameters_are_those_of_the_published_models(scaling, shape):
    assert shape.parameters == 3_212_749_824
    qwen = scaling.Shape(24, 2048, 5504, 151936, 16, 16, 128, qkv_bias=True)  # Qwen1.5-1.8B
    assert qwen.parameters == 1_836_828_672
    assert qwen.multiplied == 1_836_828_672 - 151936 * 2048
    assert shape.multiplied == shape.parameters


def test_operations_of_a_token_by_hand(scaling, shape):
    tiny = scaling.Shape(2, 4, 8, 10, 2, 1, 2)
    # a layer: 2 x 4 x 4 + 2 x 4 x 2 of attention, 3 x 4 x 8, two norms of 4: 152; all: 2 x 40 + 2 x 152 + 4
    assert tiny.parameters == 388
    assert scaling.flops_per_token(tiny, 3, recompute=False) == 6 * 348 + 12 * 2 * 4 * 3
    assert scaling.flops_per_token(tiny, 3, recompute=True) == pytest.approx(8 * 348 + 16 * 2 * 4 * 3)
    assert scaling.flops_per_token(shape, 0, recompute=True) == pytest.approx(8 * shape.parameters)


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.40625), (2, 16.640625), (3, 1.875)])
def test_states_are_those_of_figure_1_of_zero(scaling, stage, gigabytes):
    """The paper's figure: 7.5 billion parameters on 64 GPUs take 120, 31.4, 16.6 and 1.9 GB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "MAX_LIVE_PARAMETERS", 0)
        assert sum(scaling.state_bytes(7_500_000_000, stage, 64)) == pytest.approx(gigabytes * 1e9)


def test_stage_3_counts_the_weights_that_are_whole_for_a_moment(scaling):
    assert scaling.state_bytes(8 * 10**9, 3, 8) == (2e9 + 2e9 * 7 / 8, 2e9, 12e9)
    assert scaling.state_bytes(1000, 3, 2, scaling.FP32) == (4 * 500 + 4 * 500, 4 * 500, 8 * 500)
    assert scaling.state_bytes(1000, 1, 2) == (2000, 2000, 6000)


def test_activations_by_hand(scaling):
    tiny = scaling.Shape(2, 4, 8, 10, 2, 1, 2)
    numbers, logits = 3 * 5 * 4, 4 * 3 * 5 * 10
    layer = numbers * (16 + 8 * 2)
    assert scaling.activation_bytes(tiny, 3, 5, recompute=False) == 2 * layer + logits
    assert scaling.activation_bytes(tiny, 3, 5, recompute=True) == 2 * 2 * numbers + layer + logits
    scores = 5 * 3 * 2 * 25
    assert scaling.activation_bytes(tiny, 3, 5, recompute=False, whole_scores=True) == 2 * (layer + scores) + logits


@pytest.mark.parametrize(
    ("stage", "micro_steps", "times"), [(0, 4, 2), (1, 4, 2), (2, 1, 2), (2, 4, 5), (3, 1, 3), (3, 4, 12)]
)
def test_exchanged_elements_by_stage(scaling, stage, micro_steps, times):
    assert scaling.exchanged_elements(1000, stage, micro_steps) == times * 1000


def test_exchange_takes_the_slow_link_only_between_nodes(scaling, hardware):
    assert scaling.exchange_seconds(10**9, 2, 8, 1, hardware) == pytest.approx(4e9 * 7 / 8 / 1e12)
    assert scaling.exchange_seconds(10**9, 2, 16, 1, hardware) == pytest.approx(4e9 * 15 / 16 / 1e11)
    assert scaling.exchange_seconds(10**9, 3, 1, 1, hardware) == 0


def test_exchange_hides_behind_a_share_of_the_computing(scaling):
    assert scaling.step_seconds(10.0, 4.0, 0.0) == 14.0
    assert scaling.step_seconds(10.0, 4.0, 0.3) == 11.0
    assert scaling.step_seconds(10.0, 4.0, 0.5) == 10.0


def test_dalys_interval_loses_least(scaling):
    save, mtbf, restart = 60.0, 24 * 3600.0, 300.0
    assert scaling.young_interval(save, mtbf) == pytest.approx(math.sqrt(2 * 60 * 86400))
    interval = scaling.daly_interval(save, mtbf)
    # of all intervals from a minute to a day
    found = min(range(60, 86400), key=lambda seconds: scaling.lost_share(save, mtbf, restart, seconds))
    assert interval == pytest.approx(found, rel=1e-3)
    # rare failures: saving takes delta / tau, half an interval and the restart are lost at each
    rare = scaling.lost_share(1.0, 1e9, 100.0, 1e4)
    assert rare == pytest.approx(1 / 1e4 + (1e4 / 2 + 100) / 1e9, rel=1e-3)
    assert scaling.daly_interval(300.0, 100.0) == 100.0


def test_a_plan_by_hand(scaling, hardware):
    tiny = scaling.Shape(2, 4, 8, 10, 2, 1, 2)
    found = scaling.plan(
        tiny, hardware, 16, 2, length=8, batch_tokens=16 * 8 * 6, checkpoint_bytes=16.0, recompute=False
    )
    assert (found.rows, found.micro_steps, found.batch_tokens) == (4, 2, 16 * 8 * 8)  # the nearest that 4 rows make
    compute = (6 * 348 + 12 * 2 * 4 * 8) * 64 / 1e14 / 0.5
    exchange = 2 * 3 * 388 * 15 / 16 / 1e11
    assert found.tokens_per_s == pytest.approx(16 * 64 / (compute + exchange))
    assert found.save_s == pytest.approx(16 * 388 / 1e10)
    assert found.price == pytest.approx(16 * 2 / 3600 / found.tokens_per_s / (1 - found.lost) * 1e9)


def test_a_model_that_does_not_fit_has_no_speed(scaling, shape, hardware):
    small = replace(hardware, memory=40 * 2**30)
    options = {"length": 4096, "batch_tokens": 2**22, "checkpoint_bytes": 16.0, "recompute": True}
    assert scaling.plan(shape, small, 8, 0, **options).rows == 0
    assert scaling.plan(shape, small, 8, 0, **options).tokens_per_s == 0
    assert scaling.plan(shape, small, 8, 2, **options).rows > 0


@pytest.fixture
def plan_of(scaling, monkeypatch, capsys, tmp_path):
    """Return plan_of(*options) -> (rows, output) of the script."""
    import scaling_plan

    def run(*options):
        written = tmp_path / "plan.json"
        arguments = ["scaling_plan.py", "--measured", str(BENCHMARKS / "scaling_measured.json"), "--json", written]
        monkeypatch.setattr(sys, "argv", [str(each) for each in (*arguments, *options)])
        assert scaling_plan.main() == 0
        return json.loads(written.read_text())["rows"], capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (
            LlamaConfig(
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=300,
                tie_word_embeddings=True,
            ),
            "--tied",
        ),
        (
            Qwen2Config(
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=300,
                tie_word_embeddings=False,
            ),
            "--qkv-bias",
        ),
    ],
)
def test_a_configuration_and_its_sizes_give_the_same_plan(plan_of, tmp_path, config, options):
    config.save_pretrained(tmp_path)
    sizes = [
        "--layers",
        "2",
        "--hidden",
        "64",
        "--intermediate",
        "96",
        "--vocabulary",
        "300",
        "--heads",
        "4",
        "--kv-heads",
        "2",
    ]
    by_config, output = plan_of("--config", tmp_path)
    assert by_config == plan_of(*sizes, options)[0]
    assert [row["gpus"] for row in by_config] == [8] * 4 + [64] * 4 + [512] * 4
    assert "ASSUMED, not measured" in output


def test_another_architecture_is_refused_with_both_counts(plan_of, tmp_path):
    from transformers import GPTNeoXConfig

    GPTNeoXConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4).save_pretrained(
        tmp_path
    )
    with pytest.raises(SystemExit, match="transformers' model has"):
        plan_of("--config", tmp_path)


def test_what_two_workers_exchanged_is_what_the_formula_says(scaling):
    measured = json.loads((BENCHMARKS / "scaling_measured.json").read_text())
    rows = {(row["workers"], row["stage"]): row for row in measured["rows"]}
    weight = 2 if rows[2, 0]["bf16"] else 4
    # DeepSpeed reduces the gradients to all ranks in stages 1 and 2, where the paper's 2 P reduces each to its owner
    for stage, times in ((0, 1.0), (1, 1.5), (2, 1.5)):
        formula = weight * scaling.exchanged_elements(rows[2, stage]["parameters"], stage)
        assert rows[2, stage]["exchanged_bytes"] == pytest.approx(times * formula, rel=0.05)
