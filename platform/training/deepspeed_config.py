"""DeepSpeed configurations: presets for the ZeRO stages, or the user's own, which DeepSpeed itself checks."""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

from tenfold.platform.errors import ConfigError
from tenfold.platform.experiment import DEEPSPEED_PRESETS
from tenfold.platform.paths import expanded
from tenfold.platform.validation import did_you_mean

# Not train_batch_size: under ZeRO-3 DeepSpeed checks it while models load, before it knows the number of workers.
BATCH_KEYS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# Sections that transformers obeys instead of the Trainer: projectors would lose their learning rate, norms get decay.
TRAINING_KEYS = {
    "optimizer": "learning_rate, weight_decay and adam_*",
    "scheduler": "lr_scheduler_type and warmup_steps",
}
AUTO_KEYS = {
    **dict.fromkeys(BATCH_KEYS, "auto"),
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
}


def deepspeed_config(setting: str | dict[str, Any]) -> dict[str, Any]:
    """Return the DeepSpeed configuration for a preset name, a JSON file, or a configuration itself.

    Batch sizes, clipping and precision are left "auto" in the presets: transformers fills them from the training
    options. What an own configuration does not say is as in zero0: left to the training options, not to DeepSpeed.
    With offloading, `zero_force_ds_cpu_optimizer` is off: plain AdamW then updates on the CPU and no compiler is
    needed.

    Raises:
        ConfigError: unknown preset, missing file, not a JSON object, or not what DeepSpeed takes.
    """
    if isinstance(setting, dict):
        return _own(setting)
    if setting in DEEPSPEED_PRESETS:
        return _preset(setting)
    if not setting.endswith(".json"):
        raise ConfigError(
            f"compute.deepspeed = {setting!r}: give one of {', '.join(DEEPSPEED_PRESETS)}, or a path to a .json file"
        )
    path = expanded(setting)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"compute.deepspeed = {setting!r}: no such file") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"compute.deepspeed: {path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"compute.deepspeed: {path} holds {type(content).__name__}, DeepSpeed needs a JSON object")
    return _own(content)


def zero_stage(config: dict[str, Any]) -> int:
    """Return the ZeRO stage of a DeepSpeed configuration."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


class _Watched(dict[str, Any]):
    """A configuration that remembers what DeepSpeed looks for, and has values of the same type as their defaults."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.known: list[str] = []

    def __contains__(self, key: object) -> bool:
        self.known.append(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.known.append(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.known.append(key)
        value = super().get(key, default)
        if default is not None and type(value) is not type(default) and {type(value), type(default)} != {int, float}:
            raise ConfigError(f"compute.deepspeed.{key} = {value!r}: needs a value like the default, {default!r}")
        return value


def _own(content: dict[str, Any]) -> dict[str, Any]:
    """Return a user's configuration laid over preset zero0, once DeepSpeed's own classes have read it."""
    config = {**_preset("zero0"), **copy.deepcopy(content)}
    for key in BATCH_KEYS:
        if config[key] != "auto" and (type(config[key]) is not int or config[key] < 1):
            raise ConfigError(f"compute.deepspeed.{key} = {config[key]!r}: needs a number from 1, or auto")
    if config.pop("train_batch_size", "auto") != "auto":
        raise ConfigError(
            f"compute.deepspeed.train_batch_size: leave it out; {', '.join(BATCH_KEYS)} and workers decide"
        )
    for key, decided_by in TRAINING_KEYS.items():
        if key in config:
            raise ConfigError(
                f"compute.deepspeed.{key}: leave it out; {decided_by} of config.training decide. DeepSpeed's own "
                "would replace the method's parameter groups and schedule without a word"
            )
    zero = config["zero_optimization"]
    if not isinstance(zero, dict) or zero.get("stage") == "auto":
        raise ConfigError(f"compute.deepspeed.zero_optimization = {zero!r}: needs a section such as {{stage: 2}}")
    logging.disable(logging.WARNING)  # it tells of this machine's devices; the workers have others
    try:
        known = _read_by_deepspeed(config)
    finally:
        logging.disable(logging.NOTSET)
    # DeepSpeed would ignore them.
    unknown = [f"{key}: unknown{did_you_mean(key, known)}" for key in config if key not in known]
    if unknown:
        raise ConfigError(f"compute.deepspeed.{' '.join(unknown)} Remove it or mend its name")
    return config


def _read_by_deepspeed(config: dict[str, Any]) -> list[str]:
    """Let DeepSpeed read a configuration, as far as one process can; return the keys that it looked for."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    # Batch sizes depend on the number of workers; transformers compares them with the training options.
    given = {key: value for key, value in config.items() if key not in BATCH_KEYS and value != AUTO_KEYS.get(key)}
    watched = _Watched({**copy.deepcopy(given), BATCH_KEYS[0]: 1})
    try:
        DeepSpeedConfig(watched)
    except ConfigError:
        raise
    except Exception as error:  # its own checks raise many kinds
        told = f"{type(error).__name__}: {error}"
        if isinstance(error, ValidationError):
            told = "; ".join(f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors())
        raise ConfigError(
            f"compute.deepspeed: DeepSpeed refuses it after reading {watched.known[-1]}: {told}"
        ) from error
    return watched.known


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
