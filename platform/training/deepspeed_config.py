"""DeepSpeed configurations: presets for the ZeRO stages, or the user's own JSON passed through."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from tenfold.platform.errors import ConfigError
from tenfold.platform.experiment import DEEPSPEED_PRESETS

AUTO_KEYS = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
}


def deepspeed_config(setting: str | dict[str, Any]) -> dict[str, Any]:
    """Return the DeepSpeed configuration for a preset name, a JSON file, or a configuration itself.

    Batch sizes, clipping and precision are left "auto" in the presets: transformers fills them from the training
    options.
    With offloading, `zero_force_ds_cpu_optimizer` is off: plain AdamW then updates on the CPU and no compiler is
    needed.

    Raises:
        ConfigError: unknown preset, missing file, or not a JSON object.
    """
    if isinstance(setting, dict):
        return json.loads(json.dumps(setting))
    if setting in DEEPSPEED_PRESETS:
        return _preset(setting)
    if not setting.endswith(".json"):
        raise ConfigError(
            f"compute.deepspeed = {setting!r}: give one of {', '.join(DEEPSPEED_PRESETS)}, or a path to a .json file"
        )
    path = Path(setting).expanduser()
    if not path.is_file():
        raise ConfigError(f"compute.deepspeed = {setting!r}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"compute.deepspeed: {path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"compute.deepspeed: {path} holds {type(content).__name__}, DeepSpeed needs a JSON object")
    return content


def zero_stage(config: dict[str, Any]) -> int:
    """Return the ZeRO stage of a DeepSpeed configuration."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def _preset(name: str) -> dict[str, Any]:
    stage = int(name.removeprefix("zero")[0])
    zero: dict[str, Any] = {"stage": stage}
    config: dict[str, Any] = {**copy.deepcopy(AUTO_KEYS), "zero_optimization": zero}
    if stage == 3:
        # Checkpoints then hold whole weights that from_pretrained loads, not only shards.
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if name.endswith("_offload"):
        zero["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
        if stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return config
