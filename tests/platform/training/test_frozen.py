"""Frozen models beside the trained one: how they are sharded and offloaded, and what loading one leaves alone."""

import pytest
from tenfold.platform.models.sharding import sharded_by
from tenfold.platform.training.deepspeed_config import deepspeed_config
from tenfold.platform.training.frozen import frozen_settings
from transformers.integrations import deepspeed as state


def settings_for(preset, **more):
    return frozen_settings(deepspeed_config(preset), **{"dtype": "float32", **more})


@pytest.mark.parametrize("preset", ["zero0", "zero1", "zero2", "zero2_offload"])
def test_without_zero3_every_worker_has_a_whole_copy_unless_it_is_offloaded(preset):
    assert settings_for(preset) is None
    zero = settings_for(preset, offload="cpu")["zero_optimization"]
    assert zero == {"stage": 3, "offload_param": {"device": "cpu"}}


def test_under_zero3_it_is_sharded_and_offloaded_as_the_trained_model_or_as_asked_for():
    assert settings_for("zero3")["zero_optimization"] == {"stage": 3}
    for found in (settings_for("zero3_offload"), settings_for("zero3", offload="cpu")):
        assert found["zero_optimization"] == {"stage": 3, "offload_param": {"device": "cpu"}}


@pytest.mark.parametrize(("dtype", "on"), [("bfloat16", True), ("float32", False)])
def test_its_arithmetic_is_its_own_and_not_the_trained_models(dtype, on):
    trained = {**deepspeed_config("zero3"), "bf16": {"enabled": not on}}
    assert frozen_settings(trained, dtype=dtype)["bf16"] == {"enabled": on}


def test_loading_by_other_settings_ends_with_the_block_also_after_an_error():
    training = state.HfDeepSpeedConfig(deepspeed_config("zero3"))
    try:
        with sharded_by(None):
            assert not state.is_deepspeed_zero3_enabled()
        assert state.is_deepspeed_zero3_enabled()
        own = {"zero_optimization": {"stage": 2}}
        with sharded_by(own):
            assert state.deepspeed_config() == own
        assert state.deepspeed_config() is training.config
        with pytest.raises(ZeroDivisionError), sharded_by(None):
            1 / 0  # noqa: B018
        assert state.deepspeed_config() is training.config
    finally:
        state.unset_hf_deepspeed_config()
