"""The output head of a model: its weight, alone or from a folder, and the hidden states that it reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tenfold.platform.errors import ModelError
from tenfold.platform.models.configuration import read_config, skeleton
from tenfold.platform.models.folder import WEIGHTS, read_weight_map, weight_files
from tenfold.platform.models.hidden import check_head, final_hidden

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "check_head",
    "check_logit_options",
    "embedding_from_folder",
    "final_hidden",
    "head_and_bias_from_folder",
    "head_from_folder",
    "head_of",
    "head_shape",
]

# Options of a configuration that change logits after the head's product, and the values with which they do not.
LOGIT_OPTIONS: dict[str, tuple[float | None, ...]] = {
    "final_logit_softcapping": (None,),
    "logits_soft_cap": (None,),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "output_multiplier": (None, 1.0),
    "lm_head_multiplier": (None, 1.0),
}
# Heads that transformers renames while loading.
STORED_NAMES = {"gpt_neox": ("embed_out.weight",)}


def head_of(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """Return (weight [V, D], bias [V] or None) of the output head, as they are in the model: with their gradients.

    Under ZeRO-3 the weight is empty outside `deepspeed.zero.GatheredParameters`.

    Raises:
        ModelError: the model has no linear head.
    """
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise ModelError(f"{model.config.model_type}: no output head; give a causal language model")
    return head.weight, getattr(head, "bias", None)


def head_shape(model: PreTrainedModel) -> tuple[int, int]:
    """Return (rows V, columns D) of the head, also where ZeRO-3 has split it over the ranks.

    Raises:
        ModelError: the model has no linear head.
    """
    weight, _ = head_of(model)
    rows, columns = getattr(weight, "ds_shape", weight.shape)
    return int(rows), int(columns)


def check_logit_options(config: PretrainedConfig) -> None:
    """Make sure, before any weight is read, that a configuration asks for no change of the head's logits.

    `check_head` finds out the same, and what no option says, from the weights.

    Raises:
        ModelError: it scales or caps them (Gemma 2, Cohere, Granite); names the option.
    """
    own = config.get_text_config()
    for name, harmless in LOGIT_OPTIONS.items():
        value = getattr(own, name, None)
        if value not in harmless:
            raise ModelError(
                f"{own.model_type}: {name} = {value} in its config.json changes the logits after the head. Losses "
                "that read the head itself, and projectors fitted to it, need plain logits; use another model"
            )


def head_and_bias_from_folder(folder: Path) -> tuple[Tensor, Tensor | None]:
    """Read only the head of a model folder: its weight [V, D] and its bias [V], where it has one.

    Raises:
        ModelError: as `head_from_folder`, except for the bias.
    """
    model = skeleton(read_config(folder))
    weight, bias = head_of(model)
    return _stored(folder, model, weight), None if bias is None else _stored(folder, model, bias)


def head_from_folder(folder: Path) -> Tensor:
    """Read only the head's weight [V, D] of a model folder, in the dtype of the file; a tied one is the embedding.

    Raises:
        ModelError: the folder is incomplete, has a head with a bias (which the weight alone would leave out), or no
            tensor of the head's name and shape.
    """
    model = skeleton(read_config(folder))
    weight, bias = head_of(model)
    if bias is not None:
        raise ModelError(
            f"{folder}: the head of a {model.config.model_type} has a bias. Use head_and_bias_from_folder"
        )
    return _stored(folder, model, weight)


def embedding_from_folder(folder: Path) -> Tensor:
    """Read only the input embedding [V, D] of a model folder, in the dtype of the file.

    Raises:
        ModelError: the folder is incomplete, or has no tensor of the embedding's name and shape.
    """
    model = skeleton(read_config(folder))
    return _stored(folder, model, model.get_input_embeddings().weight)


def _stored(folder: Path, model: PreTrainedModel, weight: Tensor) -> Tensor:
    """Return what the files hold for one weight of the model's skeleton; a tied one has several names."""
    from safetensors import SafetensorError, safe_open

    names = [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is weight]
    # Some checkpoints hold the base model alone.
    prefix = f"{model.base_model_prefix}."
    names += [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    names += STORED_NAMES.get(model.config.model_type, ())
    files = weight_files(folder)
    try:
        places = dict.fromkeys(names, WEIGHTS) if files == [WEIGHTS] else read_weight_map(folder)
        for name in names:
            if name not in places:
                continue
            with safe_open(folder / places[name], framework="pt") as weights:
                if name in weights.keys():  # noqa: SIM118 (no mapping)
                    tensor = weights.get_tensor(name)
                    break
        else:
            raise ModelError(f"{folder}: none of {', '.join(names)} among the weights. Get the model again")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder}: damaged weights: {error}. Get the model again") from error
    if tensor.shape != weight.shape:
        raise ModelError(
            f"{folder}: {name} is {list(tensor.shape)}, config.json says {list(weight.shape)}. Get the model again"
        )
    return tensor
