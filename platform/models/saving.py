"""Writing a model in memory as a model folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tenfold.platform.models.folder import new_folder
from tenfold.platform.models.manifest import Manifest, Parent, write_manifest

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def without_tied_copies(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that a model folder needs: a tied head is the embedding, and is made from it when loaded.

    `save_pretrained` leaves out what shares memory; gathered weights share none any more.

    Args:
        model: of transformers; of another one all weights are returned.
        weights: its whole state dict. What is tied by name and differs all the same is kept.
    """
    import torch

    kept = dict(weights)
    for copy, source in getattr(model, "all_tied_weights_keys", {}).items():
        if copy in kept and source in kept and torch.equal(kept[copy], kept[source]):
            del kept[copy]
    return kept


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    flavor: str,
    method: str,
    name: str,
    parents: Sequence[Parent] = (),
    metrics: Mapping[str, float] | None = None,
) -> Manifest:
    """Write safetensors, configuration, tokenizer and manifest to a new folder, which appears when it is whole.

    Args:
        model: whole on this process; under ZeRO-3 gather it first.
        tokenizer: goes with it.
        folder: new or empty.
        flavor: see `Manifest`, as for the others.
        method: what made it.
        name: for people.
        parents: what it was made from.
        metrics: its scores.

    Raises:
        ModelError: the folder has content, or cannot be written.
    """
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        return write_manifest(temporary, flavor=flavor, method=method, name=name, parents=parents, metrics=metrics)
