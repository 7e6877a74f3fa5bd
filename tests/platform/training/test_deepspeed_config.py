"""DeepSpeed settings: presets, the user's own file or dictionary, and what is refused."""

import json

import pytest
from tenfold.platform.errors import ConfigError
from tenfold.platform.experiment import DEEPSPEED_PRESETS
from tenfold.platform.training.deepspeed_config import deepspeed_config, zero_stage


@pytest.mark.parametrize("preset", DEEPSPEED_PRESETS)
def test_preset_has_its_stage_and_leaves_batches_to_the_training_options(preset):
    config = deepspeed_config(preset)
    assert zero_stage(config) == int(preset[4])
    assert config["train_micro_batch_size_per_gpu"] == config["gradient_accumulation_steps"] == "auto"
    assert ("offload_optimizer" in config["zero_optimization"]) == preset.endswith("_offload")


def test_only_stage_3_gathers_weights_for_saving_and_offloads_parameters():
    saving = "stage3_gather_16bit_weights_on_model_save"
    found = {preset: deepspeed_config(preset)["zero_optimization"] for preset in DEEPSPEED_PRESETS}
    assert {preset for preset, zero in found.items() if zero.get(saving)} == {"zero3", "zero3_offload"}
    assert {preset for preset, zero in found.items() if "offload_param" in zero} == {"zero3_offload"}


def test_changing_a_returned_preset_leaves_the_next_one_alone():
    deepspeed_config("zero2")["bf16"]["enabled"] = True
    assert deepspeed_config("zero2")["bf16"] == {"enabled": "auto"}


def test_own_file_and_own_dictionary_are_passed_through(tmp_path):
    own = {"zero_optimization": {"stage": 1}, "gradient_clipping": 0.5}
    path = tmp_path / "own.json"
    path.write_text(json.dumps(own))
    assert deepspeed_config(str(path)) == own
    copy = deepspeed_config(own)
    copy["zero_optimization"]["stage"] = 3
    assert own["zero_optimization"]["stage"] == 1


def test_no_zero_section_is_stage_0():
    assert zero_stage({}) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("{", "is not JSON"), ("[1]", "holds list, DeepSpeed needs a JSON object")],
)
def test_unusable_file_is_named(tmp_path, content, message):
    path = tmp_path / "own.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message) as raised:
        deepspeed_config(str(path))
    assert "own.json" in str(raised.value)


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"zero4.*zero2_offload.*\.json"):
        deepspeed_config("zero4")
