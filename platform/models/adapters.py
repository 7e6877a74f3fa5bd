"""Low-rank adapters (LoRA, arXiv 2106.09685): training one inside a model, and merging one into plain weights.

An adapted linear layer computes W x + (alpha / r) B A dropout(x). W is frozen, A [r, in] starts at random and B
[out, r] at zero. The adapter is put into the model itself, not around it: heads, hidden states and generation are
reached as before. Merged weights are W + (alpha / r) B A.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from tenfold.platform.errors import ModelError
from tenfold.platform.experiment import StrictModel
from tenfold.platform.models.cache import build_once, cache_folder
from tenfold.platform.models.conversion import damage
from tenfold.platform.models.folder import VOCABULARIES, WEIGHTS, WEIGHTS_INDEX, file_digest
from tenfold.platform.models.manifest import Parent, model_digest, write_manifest
from tenfold.platform.models.randomness import seeded
from tenfold.platform.models.sharding import sharded_by

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
NAME = "default"  # peft's name of the only adapter


class LoraOptions(StrictModel):
    """A low-rank adapter that is trained instead of the model's own weights (arXiv 2106.09685)."""

    r: Annotated[int, Field(lt=2**31)] = Field(256, ge=1, description="rank of the adapter (DSKD v1: 256)")
    alpha: float = Field(8.0, gt=0, description="the adapter's output is scaled by alpha / r (DSKD v1: 8)")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout of the adapter's input (DSKD v1: 0.1)")
    target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] | None = Field(
        None,
        description="names of the linear layers that get one, or all-linear (the head excluded); default: peft's for "
        "the architecture, mostly the query and value projections (DSKD v1)",
    )


def add_adapter(model: PreTrainedModel, options: LoraOptions, *, seed: int = 0) -> None:
    """Put an adapter into a model and freeze everything else.

    Args:
        model: whole, without weights (meta device), or sharded by ZeRO-3; it changes nothing that the model computes
            until it is trained.
        options: the adapter's.
        seed: decides A; the global random state is left alone.

    Raises:
        ModelError: peft knows no layers for this architecture, a name is in none of its layers, or layers are chosen
            that are no linear ones inside the body.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = options.target_modules
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # a number; peft only divides it
        lora_dropout=options.dropout,
        target_modules=targets,
        fan_in_fan_out=_stores_transposed(model),
    )
    what = "lora.target_modules" + (f" = {targets}" if targets is not None else "")
    on_meta = next(model.parameters()).device.type == "meta"
    try:
        with seeded(seed):
            inject_adapter_in_model(config, model, NAME, low_cpu_mem_usage=on_meta)
    except ValueError as error:
        raise ModelError(
            f"{what}: does not fit a {model.config.model_type}: {' '.join(str(error).split())[:300]}. Name linear "
            f"layers of it, or use all-linear"
        ) from error
    _check_targets(model, what)
    model.train(model.training)  # the new layers' mode


def _stores_transposed(model: nn.Module) -> bool:
    """Say whether linear layers keep their weights as [in, out] (GPT-2); peft warns unless it is told."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


def _check_targets(model: PreTrainedModel, what: str) -> None:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import Linear

    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if module in (model.get_output_embeddings(), model.get_input_embeddings()):
            raise ModelError(f"{what}: {name} is an embedding or the head, which losses read directly. Leave it out")
        if not isinstance(module, Linear):
            raise ModelError(f"{what}: {name} is no plain linear layer, so nothing could merge it. Leave it out")


def num_trained(model: nn.Module) -> int:
    """Return the number of weights that get a gradient, also where ZeRO-3 has sharded them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


def merged_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the plain model that computes what an adapted one does in eval mode.

    Only names and scales are taken from the model, so that its own weights may be sharded. Products are formed in
    float32 and rounded once, to the dtype of W.

    Args:
        model: with or without an adapter; without one the weights are returned as they are.
        weights: its whole state dict.

    Returns:
        Names and shapes as before the adapter was added; tensors that the adapter leaves alone are not copied.
    """
    from peft.tuners.lora import LoraLayer

    merged = dict(weights)
    layers: list[tuple[str, Any]] = [pair for pair in model.named_modules() if isinstance(pair[1], LoraLayer)]
    for name, layer in layers:
        down, up = (merged.pop(f"{name}.lora_{part}.{NAME}.weight").float() for part in "AB")
        change = up @ down * layer.scaling[NAME]
        for key in [key for key in merged if key.startswith(f"{name}.base_layer.")]:
            merged[key.replace(f"{name}.base_layer.", f"{name}.")] = merged.pop(key)
        own = merged[f"{name}.weight"]
        # GPT-2 keeps the transpose
        merged[f"{name}.weight"] = (own.float() + (change.T if layer.fan_in_fan_out else change)).to(own.dtype)
    return merged


def is_adapter(place: Path) -> bool:
    """Say whether a model reference led to a folder with an adapter alone.

    Raises:
        ModelError: there is an adapter beside a whole model; transformers would load both.
    """
    if not (place / ADAPTER_CONFIG).is_file():
        return False
    if any((place / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX)):
        raise ModelError(
            f"{place}: holds a whole model and an adapter ({ADAPTER_CONFIG}); which of them is meant cannot be told. "
            f"Move one of them to a folder of its own"
        )
    return True


def base_model(folder: Path, *, weights: bool = True) -> Path:
    """Return where the base model of an adapter folder is, as `locate` does.

    Args:
        folder: the adapter's.
        weights: False downloads only configuration and tokenizer of hub models.

    Raises:
        ModelError: the adapter does not name one, or it is not there.
    """
    from tenfold.platform.models.references import locate

    try:
        content = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base, revision = content["base_model_name_or_path"], content.get("revision")
        if not isinstance(base, str) or not base:
            raise ValueError(f"base_model_name_or_path = {base!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{folder / ADAPTER_CONFIG}: does not tell the adapter's base model: {error!r}. Put its folder or hub "
            f"name there as base_model_name_or_path"
        ) from error
    try:
        # peft writes "main" for folders as well
        place = locate(base, revision=None if Path(base).exists() else revision, weights=weights)
    except ModelError as error:
        raise ModelError(
            f"{folder}: is an adapter, and its base model {base} is not there: {error}. Get the base model, or "
            f"correct base_model_name_or_path in {ADAPTER_CONFIG}"
        ) from error
    if is_adapter(place):
        raise ModelError(f"{folder}: its base model {place} is an adapter itself. Merge that one first")
    return place


def tokenizer_place(folder: Path) -> Path:
    """Return where the tokenizer of an adapter is: in its own folder, or with its base model."""
    own = any((folder / name).is_file() for name in VOCABULARIES)
    return folder if own else base_model(folder, weights=False)


def merge_adapter(folder: Path) -> Path:
    """Return a model folder in which an adapter is merged into its base model, making it at the first use.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`, as peft saves them.

    Raises:
        ModelError: the base model is not there, the adapter is damaged or of a kind that cannot be merged.
    """
    from tenfold.platform.models.references import resolve

    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise ModelError(f"{folder}: no {ADAPTER_WEIGHTS}. Save the adapter again, with peft's save_pretrained")
    base = resolve(str(base_model(folder)))
    digests = [model_digest(base), file_digest(folder / ADAPTER_CONFIG), file_digest(weights)]
    target = cache_folder() / "adapters" / f"{folder.name}-{'-'.join(digest[:12] for digest in digests)}"
    parents = [
        Parent(kind="adapter", reference=str(folder), digest=digests[2]),
        Parent(kind="base", reference=str(base), digest=digests[0]),
    ]
    return build_once(target, lambda temporary: _merge(folder, base, temporary, parents), damage)


def _merge(folder: Path, base: Path, target: Path, parents: list[Parent]) -> None:
    from peft import PeftModel
    from tenfold.platform.models.loading import load_causal_lm, load_tokenizer
    from tenfold.platform.models.source import ModelSource

    logger.info("merging the adapter %s into %s once", folder, base)
    with sharded_by(None):
        model: Any = load_causal_lm(ModelSource(model=str(base)))
        try:
            model = PeftModel.from_pretrained(model, folder, use_safetensors=True)
            _check_names(model, folder)
            model = model.merge_and_unload(safe_merge=True)
        except Exception as error:
            # peft and torch raise many kinds for weights that do not fit
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ModelError(
                f"{folder}: cannot be merged into {base}: {reason}. Check that it belongs to this base model, or "
                f"merge it with peft and give the merged folder"
            ) from error
    model.save_pretrained(target)
    load_tokenizer(ModelSource(model=str(tokenizer_place(folder)))).save_pretrained(target)
    write_manifest(target, flavor="causal-lm", method="adapter-merge", name=folder.name, parents=parents)


def _check_names(model: Any, folder: Path) -> None:
    """Make sure that all of the file's weights were used, and no layer kept a fresh one: peft only warns, or not."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as weights:
        given = set(weights.keys())
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    wrong = sorted(wanted - given) + sorted(given - wanted - set(model.state_dict()))
    if wrong:
        raise ValueError(f"{len(wrong)} of its weights do not belong to this model, the first is {wrong[0]}")
