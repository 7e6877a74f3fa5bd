"""Block expansion of LLaMA-Pro (arXiv 2401.02415), a competitor: copies of decoder layers that do nothing at first.

Behind every second layer, or as many as are asked for, evenly spaced, stands a copy of it whose two output projections
(of the attention and of the FFN) are zero. Both branches then add nothing to the residual stream, so the deeper model
computes exactly what the given one does. Only the copies are trained. What comes out is a plain model of the same
architecture with more layers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from tenfold.methods.layermoe.expansion import fill
from tenfold.methods.layermoe.modeling import PREFIX, Family, decoder_layers, family_of
from tenfold.platform.errors import ConfigError, ModelError
from torch import Tensor


def places_of(layers: int, inserted: int | None = None) -> list[int]:
    """Return the layers behind which a copy stands, rising.

    Args:
        layers: L of the dense model.
        inserted: copies; None: half as many as there are layers (with an even L, behind every second one).

    Returns:
        The last layer of each of `inserted` runs of layers whose lengths differ by one at most.

    Raises:
        ConfigError: more copies than layers.
    """
    number = max(1, layers // 2) if inserted is None else inserted
    if not 1 <= number <= layers:
        raise ConfigError(
            f"inserted_layers = {number}: the model has {layers} layers, and each is copied once at most"
        )
    return [(run + 1) * layers // number - 1 for run in range(number)]


def copies_of(places: Sequence[int]) -> list[int]:
    """Return where the copies are in the deeper model, rising."""
    return [place + 1 + before for before, place in enumerate(places)]


def deepened(config: Any) -> Family:
    """Return the architecture of a model that layers can be inserted into.

    Raises:
        ModelError: an unknown one, or one with experts.
    """
    if config.model_type.startswith(PREFIX):
        raise ModelError(f"{config.model_type}: llama_pro inserts layers into dense models, and this one has experts")
    return family_of(config)


def insert_layers(model: Any, places: Sequence[int]) -> Any:
    """Return a deeper model, which computes the same; it shares all weights but the copies' with `model`.

    Args:
        model: dense, whole on this process, of a family in `modeling.FAMILIES`; should not be used any more.
        places: of `places_of`.

    Raises:
        ModelError: an unknown architecture, one with experts, or a model that ZeRO-3 has split.
    """
    family = deepened(model.config)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ModelError("the model is split by ZeRO-3. Insert layers before, on one process, and load what was saved")
    sources = sorted([*range(len(decoder_layers(model))), *places])
    copies = set(copies_of(places))
    with torch.device("meta"):
        deeper = type(model)(_deeper_config(model.config, sources, places))
    outputs = re.compile(rf"({family.attention}\.{family.attention_output}|{family.ffn}\.{family.ffn_output})\.")
    start, weights = f"{model.base_model_prefix}.layers.", dict[str, Tensor]()
    known = dict(model.named_parameters(remove_duplicate=False))
    weights |= {name: weight for name, weight in known.items() if not name.startswith(start)}
    for number, source in enumerate(sources):
        own = f"{start}{source}."
        for name, weight in known.items():
            if name.startswith(own):
                inner = name.removeprefix(own)
                if number in copies:
                    weight = torch.zeros_like(weight) if outputs.match(inner) else weight.detach().clone()
                weights[f"{start}{number}.{inner}"] = weight
    fill(deeper, model, weights)
    return deeper.train(model.training)


def _deeper_config(config: Any, sources: Sequence[int], places: Sequence[int]) -> Any:
    """Return the configuration of the deeper model; a copy has the kind of attention that its layer has."""
    deeper = copy.deepcopy(config)
    deeper.num_hidden_layers = len(sources)
    if getattr(config, "layer_types", None) is not None:
        deeper.layer_types = [config.layer_types[source] for source in sources]
    if getattr(config, "max_window_layers", None) is not None:  # the first layer with a window; others may read it
        deeper.max_window_layers = config.max_window_layers + sum(place < config.max_window_layers for place in places)
    return deeper


def train_copies(model: Any, copies: Sequence[int]) -> list[str]:
    """Let the copies' parameters require gradients, and no other; returns their names.

    Args:
        model: what `insert_layers` made; may be split by ZeRO-3.
        copies: of `copies_of`.
    """
    chosen = {id(parameter) for number in copies for parameter in decoder_layers(model)[number].parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
