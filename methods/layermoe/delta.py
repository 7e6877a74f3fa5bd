"""What an expanded model has beside its dense base, as a folder of its own: experts, routers, classifiers.

The base is named by reference and digest. Loading puts both together and accepts no difference: the base must be the
one, and each weight must be there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tenfold.methods.layermoe.expansion import fill, kept_weights, outline
from tenfold.methods.layermoe.modeling import PREFIX, Layout, blocks_of, ffn_place, layout_of
from tenfold.platform.errors import ModelError
from tenfold.platform.models.folder import new_folder
from tenfold.platform.models.loading import load_causal_lm
from tenfold.platform.models.manifest import Parent, verify_manifest, write_manifest
from tenfold.platform.models.source import ModelSource
from torch import Tensor

WEIGHTS = "experts.safetensors"
DESCRIPTION = "experts.json"
FLAVOR = "expert-delta"
ADDED = ("groups.", "router.", "classifier.")


def save_delta(model: Any, folder: Path, base_reference: str, base_digest: str | None = None) -> None:
    """Write only what expansions added to a model, with a manifest.

    Args:
        model: expanded, whole on this process; all else must be as in its dense base.
        folder: new or empty.
        base_reference: where the dense base is; see `ModelSource.model`.
        base_digest: its `model_digest`, which loading then compares.

    Raises:
        ModelError: a dense model, one split by ZeRO-3, or a folder that has content.
    """
    from safetensors.torch import save_file

    added, rest = _divided(model)
    if not added:
        raise ModelError(f"{model.config.model_type}: a dense model has no experts to save. Expand it first")
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ModelError("the model is split by ZeRO-3. Save it whole, load it in one process, and save its experts")
    description = {
        "model_type": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "layermoe": model.config.layermoe,
        "base": {"reference": base_reference, "digest": base_digest},
        "rest_sha256": _digest(rest),
    }
    with new_folder(folder) as temporary:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in added.items()}
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / DESCRIPTION).write_text(json.dumps(description, indent=2, sort_keys=True), encoding="utf-8")
        parents = [Parent(kind="base", reference=base_reference, digest=base_digest)]
        write_manifest(temporary, flavor=FLAVOR, method="layermoe", name=folder.name, parents=parents)


def load_delta(folder: Path, base: ModelSource | None = None) -> Any:
    """Return the expanded model that `save_delta` wrote, in evaluation mode and in the dtype that it had.

    Args:
        folder: that folder.
        base: the dense base, where it is no longer at the place that is written there.

    Raises:
        ModelError: a damaged folder, another base (also one of that name whose weights have changed), or weights that
            do not fit the layout.
    """
    from safetensors.torch import load_file

    verify_manifest(folder)
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        own, layout = description["base"], Layout(**description["layermoe"])
        model_type, dtype, expected = (description[name] for name in ("model_type", "dtype", "rest_sha256"))
        given = {"model": own["reference"], "sha256": own["digest"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / DESCRIPTION}: does not describe experts: {error!r}. Save them again") from error
    dense = load_causal_lm(base or ModelSource.model_validate(given), dtype=dtype)
    if PREFIX + dense.config.model_type != model_type:
        raise ModelError(f"{folder}: holds experts of a {model_type}, the base is a {dense.config.model_type}")
    if _digest(dict(dense.named_parameters())) != expected:
        raise ModelError(
            f"{folder}: its base {(base or ModelSource.model_validate(given)).name} is not the one that was expanded, "
            f"or other weights than experts were trained. Give the right base, or use the whole model"
        )
    layout.check(dense.config.num_hidden_layers)
    layers = [number for number, total in enumerate(layout.totals) if total > 1]
    expanded = outline(dense.config, layout)
    try:
        fill(expanded, dense, kept_weights(dense, layers) | load_file(folder / WEIGHTS))
    except RuntimeError as error:
        raise ModelError(f"{folder}: {error}. Save the experts again") from error
    return expanded.eval()


def _divided(model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what expansions added, and all else by the names that it has in the dense base."""
    layout_of(model.config)
    places = [ffn_place(model, number) for number in blocks_of(model)]
    added, rest = {}, {}
    for name, weight in model.named_parameters():
        place = next((place for place in places if name.startswith(place)), "")
        own = name.removeprefix(place)
        if place and own.startswith(ADDED):
            added[name] = weight
        else:
            rest[place + own.removeprefix("base.") if place else name] = weight
    return added, rest


def _digest(weights: Mapping[str, Tensor]) -> str:
    """Return one sha256 over names, shapes, dtypes and bits of weights."""
    total = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        total.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        total.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
