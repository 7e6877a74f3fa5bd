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
    assert "train_batch_size" not in config
    assert ("offload_optimizer" in config["zero_optimization"]) == preset.endswith("_offload")


def test_only_stage_3_gathers_weights_for_saving_and_offloads_parameters():
    saving = "stage3_gather_16bit_weights_on_model_save"
    found = {preset: deepspeed_config(preset)["zero_optimization"] for preset in DEEPSPEED_PRESETS}
    assert {preset for preset, zero in found.items() if zero.get(saving)} == {"zero3", "zero3_offload"}
    assert {preset for preset, zero in found.items() if "offload_param" in zero} == {"zero3_offload"}


def test_changing_a_returned_preset_leaves_the_next_one_alone():
    deepspeed_config("zero2")["bf16"]["enabled"] = True
    assert deepspeed_config("zero2")["bf16"] == {"enabled": "auto"}


def test_own_file_and_own_dictionary_leave_to_the_training_options_what_they_do_not_say(tmp_path):
    own = {"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}, "gradient_clipping": 0.5}
    path = tmp_path / "own.json"
    path.write_text(json.dumps(own))
    expected = own | {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": "auto"},
    }
    assert deepspeed_config(str(path)) == deepspeed_config(own) == expected
    deepspeed_config(own)["zero_optimization"]["stage"] = 3
    assert own["zero_optimization"]["stage"] == 1


def test_sections_of_all_kinds_and_their_auto_values_pass():
    own = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 1,
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "auto", "offload_param": {"device": "cpu"}},
        "activation_checkpointing": {"partition_activations": True},
        "flops_profiler": {"enabled": True},
        "comms_logger": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "tensorboard": {"enabled": False},
        "aio": {"block_size": 1048576},
        "steps_per_print": 10,
        "wall_clock_breakdown": False,
    }
    assert deepspeed_config(own) == deepspeed_config(own | {"train_batch_size": "auto"}) == own


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"zero_optimization": 3}, r"zero_optimization = 3: needs a section"),
        ({"zero_optimization": {"stage": "auto"}}, r"zero_optimization = .*needs a section"),
        ({"zero_optimization": {"stage": 7}}, r"zero_optimization: stage = 7: Input should be 0, 1, 2"),
        ({"zero_optimization": {"stge": 2}}, r"zero_optimization: stge = 2: Extra inputs"),
        ({"zero_optimization": {"offload_param": {"device": "disk"}}}, r"offload_param\.device = 'disk'"),
        ({"gradient_cliping": 1.0}, r"gradient_cliping: unknown; did you mean gradient_clipping\?"),
        ({"gradient_clipping": "much"}, r"gradient_clipping = 'much': needs a value like the default"),
        ({"wall_clock_breakdown": 1}, r"wall_clock_breakdown = 1: needs a value like the default, False"),
        ({"train_micro_batch_size_per_gpu": 0}, r"per_gpu = 0: needs a number from 1, or auto"),
        ({"train_batch_size": 16}, r"train_batch_size: leave it out"),
        ({"gradient_accumulation_steps": True}, r"gradient_accumulation_steps = True: needs a number"),
        # the Trainer would not build its own then: no parameter groups, no schedule of the training options
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, r"optimizer: leave it out; learning_rate"),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, r"scheduler: leave it out; lr_scheduler_type"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, r"after reading bf16: .*cannot be simultaneously"),
        ({"amp": {"enabled": True}}, r"after reading amp: .*removed"),
    ],
)
def test_what_deepspeed_would_ignore_or_stumble_over_is_refused(own, message):
    with pytest.raises(ConfigError, match=rf"compute\.deepspeed.*{message}"):
        deepspeed_config(own)


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


def test_home_folder_of_nobody_is_a_sentence():
    with pytest.raises(ConfigError, match="no home folder for ~nobody-of-this-name"):
        deepspeed_config("~nobody-of-this-name/own.json")
