"""Making expanded models: new experts as copies of the FFN, routers, classifiers, and what each stage trains."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from tenfold.methods.layermoe.block import FloatLinear
from tenfold.methods.layermoe.modeling import (
    EXPANDED,
    PREFIX,
    Layout,
    blocks_of,
    decoder_layers,
    family_of,
    ffn_place,
    layout_of,
)
from tenfold.platform.errors import ModelError
from torch import Tensor, nn

RouterInit = Literal["reinit", "extend"]


def expand(
    model: Any,
    new_counts: Sequence[int],
    *,
    languages: Sequence[str],
    old_languages: Sequence[str] = (),
    seed: int,
    router_init: RouterInit = "reinit",
    top_k: int = 2,
    record: dict[str, Any] | None = None,
) -> Any:
    """Return a model with new experts beside the FFNs of a dense or already expanded one (sections 3.3 and 3.8).

    New experts are copies of the layer's original FFN, never of an earlier expansion's expert. A dense model computes
    the same afterwards. Classifiers are dropped: they would keep tokens from the new experts while those train. All
    other weights are shared with `model`, which should not be used any more.

    Args:
        model: whole on this process, of a family in `modeling.FAMILIES`.
        new_counts: new experts of each layer; 0 leaves it as it is.
        languages: names of the new group.
        old_languages: names of the old group; of the first expansion alone.
        seed: decides the routers.
        router_init: reinit: all routers anew (official); extend: known experts keep their rows.
        top_k: experts a token uses; of the first expansion alone.
        record: what decided the counts; goes into the configuration's history.

    Raises:
        ModelError: an unknown architecture, counts that do not fit, no new expert at all, or a model that ZeRO-3 has
            split.
    """
    family_of(model.config)
    before = layout_of(model.config)
    counts = list(new_counts)
    if len(counts) != len(before.experts) or min(counts) < 0 or sum(counts) == 0:
        raise ModelError(
            f"new experts {counts}: needed is a number of at least 0 for each of the {len(before.experts)} layers, "
            f"and one new expert in all"
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ModelError("the model is split by ZeRO-3. Expand it before, on one process, and load what was saved")
    first = not model.config.model_type.startswith(PREFIX)
    groups = before.languages
    layout = replace(
        before,
        experts=[[*sizes, count] for sizes, count in zip(before.experts, counts, strict=True)],
        top_k=top_k if first else before.top_k,
        classifier_layers=[],
        languages={
            "old": list(old_languages) if first else groups["old"],
            "expansions": [*groups["expansions"], list(languages)],
        },
        history=[*before.history, dict(record or {})],
    )
    expanded = outline(model.config, layout)
    fill(expanded, model, _weights(model, layout, seed, router_init))
    return expanded.train(model.training)


def outline(config: Any, layout: Layout) -> Any:
    """Return a model of that layout on the meta device."""
    base_type = config.model_type.removeprefix(PREFIX)
    config_class, model_class = EXPANDED[base_type]
    values = config.to_dict()
    for name in ("model_type", "architectures", "layermoe"):
        values.pop(name, None)
    new_config = config_class(**values, layermoe=layout.to_json())
    new_config._attn_implementation = config._attn_implementation
    with torch.device("meta"):
        return model_class(new_config)


def kept_weights(model: Any, layers: Collection[int]) -> dict[str, Tensor]:
    """Return a model's weights by the names that they have where `layers` have blocks; without classifiers."""
    known = blocks_of(model)
    weights: dict[str, Tensor] = {}
    places = {ffn_place(model, number): number for number in layers}
    for name, weight in model.named_parameters(remove_duplicate=False):
        place = next((place for place in places if name.startswith(place)), None)
        if place is None or places[place] in known:
            if place is None or name != f"{place}classifier.weight":
                weights[name] = weight
        else:
            weights[f"{place}base.{name.removeprefix(place)}"] = weight
    return weights


def _weights(model: Any, layout: Layout, seed: int, router_init: str) -> dict[str, Tensor]:
    """Return every weight of the expanded model by name: the old ones themselves, new experts as copies, routers."""
    layers = [number for number, total in enumerate(layout.totals) if total > 1]
    weights, known = kept_weights(model, layers), blocks_of(model)
    generator = torch.Generator().manual_seed(seed)
    for number in layers:
        place = ffn_place(model, number)
        base = {
            name.removeprefix(f"{place}base."): own
            for name, own in weights.items()
            if name.startswith(f"{place}base.")
        }
        newest = len(layout.experts[number]) - 1
        for expert in range(layout.experts[number][-1]):
            for name, own in base.items():
                weights[f"{place}groups.{newest}.{expert}.{name}"] = own.detach().clone()
        shape = (layout.totals[number], model.config.hidden_size)
        rows = xavier_rows(shape, generator, like=next(iter(base.values())))
        if router_init == "extend" and number in known:
            kept = known[number].router.weight.detach()
            rows[: len(kept)] = kept
        weights[f"{place}router.weight"] = rows
    return weights


def xavier_rows(shape: Sequence[int], generator: torch.Generator, *, like: Tensor) -> Tensor:
    """Return a Xavier-normal matrix [outputs, inputs], drawn in float32 on the CPU: the same on any device."""
    drawn = nn.init.xavier_normal_(torch.empty(tuple(shape)), generator=generator)
    return drawn.to(like.device, like.dtype)


def fill(expanded: Any, model: Any, weights: dict[str, Tensor]) -> None:
    """Give an outline its weights, and the buffers that are not saved (rotary frequencies)."""
    expanded.load_state_dict(weights, strict=True, assign=True)
    for name, buffer in model.named_buffers():
        owner, _, own = name.rpartition(".")
        expanded.get_submodule(owner).register_buffer(own, buffer, persistent=False)
    expanded.tie_weights()
    expanded.generation_config = model.generation_config


def attach_classifiers(
    model: Any, layers: Sequence[int], *, classes: int = 2, pool: Literal["sequence", "prefix"] = "sequence", seed: int
) -> Any:
    """Put fresh classifiers on some layers of an expanded model, in place of those it has; returns the model.

    Args:
        model: changed, with its configuration.
        layers: with more than one expert each; empty removes all classifiers.
        classes: outputs; class 0 is the old languages.
        pool: see `RoutingState.classify`.
        seed: decides their weights.

    Raises:
        ModelError: a dense layer, an unknown one, or one given twice.
    """
    layout = replace(
        layout_of(model.config), classifier_layers=sorted(layers), classes=classes, classifier_pool=pool
    ).check(len(decoder_layers(model)))
    generator = torch.Generator().manual_seed(seed)
    for number, block in blocks_of(model).items():
        block.classifier, block.pool = None, pool
        if number in layout.classifier_layers:
            block.classifier = FloatLinear(block.hidden_size, classes)
            rows = xavier_rows((classes, block.hidden_size), generator, like=block.router.weight)
            block.classifier.weight = nn.Parameter(rows)
    model.config.layermoe = layout.to_json()
    model.routing_passes.remembers = bool(layout.classifier_layers)
    return model


def trainable(model: Any, stage: Literal[1, 2]) -> list[str]:
    """Let a stage's parameters require gradients, and no other; returns their names.

    Stage 1 trains the newest expansion's experts and all routers; stage 2 all routers and classifiers.

    Raises:
        ModelError: the model has no experts, or stage 1 has classifiers, which keep tokens from the new experts.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise ModelError(f"{model.config.model_type}: no layer has experts, so there is nothing to train. Expand it")
    if stage == 1 and any(block.classifier is not None for block in blocks.values()):
        raise ModelError(
            "stage 1 has classifiers, which keep tokens from the experts that shall learn. Expand the model again, or "
            "remove them with attach_classifiers(model, [])"
        )
    chosen = {id(parameter) for block in blocks.values() for parameter in _of_stage(block, stage)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _of_stage(block: Any, stage: int) -> Iterator[nn.Parameter]:
    yield from block.router.parameters()
    if stage == 1:
        yield from block.groups[-1].parameters()
    elif block.classifier is not None:
        yield from block.classifier.parameters()
