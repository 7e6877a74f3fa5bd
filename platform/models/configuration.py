"""The transformers configuration of a model, existing or fresh, and the model's shape without its weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.platform.errors import ModelError
from tenfold.platform.models.architectures import known, known_in
from tenfold.platform.models.folder import check_config
from tenfold.platform.validation import nearest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Older names that every configuration with rope_parameters still reads.
LEGACY_ROPE = ("rope_theta", "rope_scaling")
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read the configuration of a model folder.

    Raises:
        ModelError: it is missing or damaged, or belongs to a type that transformers does not know.
    """
    from transformers import AutoConfig

    check_config(folder)
    known_in(folder)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        # Reading JSON and checking values raise errors of many kinds.
        raise ModelError(
            f"{folder / 'config.json'}: not usable: {type(error).__name__}: {_short(error)}. Get the "
            f"model again; a model with code of its own needs trust_remote_code"
        ) from error


def fresh_config(options: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """Return the configuration of a fresh model.

    Args:
        options: model_type and options of its configuration class. What is not given is the class's default, except
            vocab_size (the tokenizer's length) and the ids of the padding, BOS and EOS tokens (the tokenizer's).
        tokenizer: the tokenizer that the model will be used with.

    Raises:
        ModelError: an unknown type, an option that the type does not have, or a value that it refuses.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    values = dict(options)
    model_type = values.pop("model_type")
    known(model_type)
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        usable = [name for name in CONFIG_MAPPING if CONFIG_MAPPING[name] in MODEL_FOR_CAUSAL_LM_MAPPING]
        raise ModelError(
            f"config.model_type = {model_type!r}: no causal language model of this type{_hint(model_type, usable)}. "
            f"Give one that transformers has, such as llama, qwen2, gpt2"
        )
    config_class = CONFIG_MAPPING[model_type]
    allowed = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    if "rope_parameters" in allowed:
        allowed |= set(LEGACY_ROPE)
    unknown = sorted(set(values) - allowed)
    if unknown:
        # transformers would keep it as an attribute that nothing reads.
        raise ModelError(
            f"config.{unknown[0]}: a {model_type} has no such option{_hint(unknown[0], allowed)}. Options: "
            f"{', '.join(sorted(allowed))}"
        )
    defaults = {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in TOKEN_IDS}}
    try:
        return config_class(**{**defaults, **values})
    except Exception as error:
        raise ModelError(f"config of a {model_type}: {_short(error)}. Correct the value") from error


def skeleton(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return a model without weights (on torch's meta device): its parameters have names and shapes only.

    Raises:
        ModelError: no causal language model has this configuration.
    """
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
                # Not from_config: under ZeRO-3 that splits the parameters over the ranks.
                model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
                return model_class(config)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(
            f"no causal language model can be made of a {config.model_type} configuration: {_short(error)}. Give a "
            f"decoder-only language model"
        ) from error


def _hint(word: str, known: Any) -> str:
    near = nearest(word, known)
    return f"; did you mean {near}?" if near else ""


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
