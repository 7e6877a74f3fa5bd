"""Dense decoders with expert layers, as transformers loads, saves and generates with them (section 10 of LayerMoE).

Importing this module registers `layermoe-llama` and `layermoe-qwen2` with transformers' Auto classes. Their folders
are read, sharded, cast and generated with as any other; one that has not imported this does not know the type.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import transformers
from tenfold.methods.layermoe.block import ExpertBlock, hand_over
from tenfold.methods.layermoe.packed import PackedGeneration
from tenfold.methods.layermoe.state import RoutingPasses
from tenfold.platform.errors import ModelError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

PREFIX = "layermoe-"
SIZE = "intermediate_size"
HOW_TO_LOAD = f"import {__name__} and use transformers.AutoModelForCausalLM"


@dataclass(frozen=True)
class Family:
    """A base architecture: transformers' classes and where its parts are.

    Attributes:
        config: name of the configuration class.
        model: name of the causal language model's class.
        ffn: a decoder layer's feed-forward module; another one is made by its class from the configuration.
        attention: the module that runs before it in the layer and gets the layer's keyword arguments.
        ffn_output: the FFN's linear map into the residual stream.
        attention_output: the attention's.
    """

    config: str
    model: str
    ffn: str = "mlp"
    attention: str = "self_attn"
    ffn_output: str = "down_proj"
    attention_output: str = "o_proj"


# A family is one line: decoder layers at `model.model.layers`.
FAMILIES = {
    "llama": Family("LlamaConfig", "LlamaForCausalLM"),
    "qwen2": Family("Qwen2Config", "Qwen2ForCausalLM"),
}


@dataclass(frozen=True)
class Layout:
    """What a configuration says under `layermoe`.

    Attributes:
        experts: per layer, the experts that each expansion added, in order; zeros for none.
        top_k: experts a token uses.
        classifier_layers: layers with a classifier, rising.
        classes: outputs of a classifier; class 0 is the old languages.
        classifier_pool: see `RoutingState.classify`.
        languages: {"old": names, "expansions": names of each}.
        history: what decided each expansion: similarities, budget, counts.
    """

    experts: list[list[int]]
    top_k: int = 2
    classifier_layers: list[int] = field(default_factory=list)
    classes: int = 2
    classifier_pool: Literal["sequence", "prefix"] = "sequence"
    languages: dict[str, Any] = field(default_factory=lambda: {"old": [], "expansions": []})
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def totals(self) -> list[int]:
        """Experts of each layer, the original FFN included; 1 = dense."""
        return [1 + sum(sizes) for sizes in self.experts]

    def to_json(self) -> dict[str, Any]:
        """Return what goes into the configuration."""
        return asdict(self)

    def check(self, num_layers: int) -> Layout:
        """Return itself if it fits a decoder of so many layers.

        Raises:
            ModelError: lists of wrong lengths, negative counts, a classifier on a dense layer, unknown values.
        """
        expansions = {len(sizes) for sizes in self.experts}
        if len(self.experts) != num_layers or len(expansions) != 1:
            raise ModelError(
                f"layermoe.experts: {len(self.experts)} layers with {sorted(expansions)} expansions; needed is one "
                f"list for each of the {num_layers} layers, all of one length"
            )
        if any(size < 0 for sizes in self.experts for size in sizes) or self.top_k < 1 or self.classes < 2:
            raise ModelError(
                f"layermoe: counts of experts are at least 0, top_k at least 1 (given {self.top_k}), classes at least "
                f"2 (given {self.classes})"
            )
        wrong = [layer for layer in self.classifier_layers if not 0 <= layer < num_layers or self.totals[layer] == 1]
        if wrong or len(set(self.classifier_layers)) != len(self.classifier_layers):
            raise ModelError(
                f"layermoe.classifier_layers {self.classifier_layers}: each must be another layer with more than one "
                f"expert{f'; {wrong[0]} is not' if wrong else ''}. Such layers: "
                f"{[layer for layer, total in enumerate(self.totals) if total > 1]}"
            )
        if self.classifier_pool not in ("sequence", "prefix"):
            raise ModelError(f"layermoe.classifier_pool {self.classifier_pool!r}: sequence or prefix")
        return self


def layout_of(config: Any) -> Layout:
    """Return a configuration's layout; a dense model's has no expansion.

    Raises:
        ModelError: it is missing, has unknown entries or does not fit the model.
    """
    num_layers = config.get_text_config().num_hidden_layers
    if not config.model_type.startswith(PREFIX):
        return Layout(experts=[[] for _ in range(num_layers)])
    given = getattr(config, "layermoe", None)
    if not isinstance(given, Mapping):
        raise ModelError(f"{config.model_type}: config.json has no layermoe entry, which says where the experts are")
    try:
        layout = Layout(**given)
    except TypeError as error:
        raise ModelError(f"{config.model_type}: layermoe in config.json: {error}") from error
    return layout.check(num_layers)


def family_of(config: Any) -> Family:
    """Return the architecture of a dense or expanded model.

    Raises:
        ModelError: experts for this type are not there.
    """
    base = config.model_type.removeprefix(PREFIX)
    if base not in FAMILIES:
        raise ModelError(
            f"{config.model_type}: only {', '.join(sorted(FAMILIES))} models can be expanded. Use one of those, or "
            f"add its line to FAMILIES"
        )
    return FAMILIES[base]


def decoder_layers(model: Any) -> Sequence[Any]:
    """Return a model's decoder layers."""
    return model.base_model.layers


def ffn_of(model: Any) -> list[nn.Module]:
    """Return what stands for the FFN in each decoder layer: the FFN itself, or the `ExpertBlock` in its place.

    Raises:
        ModelError: an unknown architecture.
    """
    name = family_of(model.config).ffn
    return [getattr(layer, name) for layer in decoder_layers(model)]


def blocks_of(model: Any) -> dict[int, ExpertBlock]:
    """Return layer -> block of the layers with experts, in order."""
    return {layer: module for layer, module in enumerate(ffn_of(model)) if isinstance(module, ExpertBlock)}


def ffn_place(model: Any, number: int) -> str:
    """Return how the names of a layer's FFN begin."""
    return f"{model.base_model_prefix}.layers.{number}.{family_of(model.config).ffn}."


def put_blocks(model: Any) -> None:
    """Put the blocks that a new model's configuration asks for in place of its FFNs, and the hooks around them."""
    config, family, layout = model.config, family_of(model.config), layout_of(model.config)
    for number, layer in enumerate(decoder_layers(model)):
        base: nn.Module = getattr(layer, family.ffn)
        block = None
        if layout.totals[number] > 1:
            block = ExpertBlock(
                base,
                partial(type(base), config),
                hidden_size=config.hidden_size,
                sizes=layout.experts[number],
                layer=number,
                top_k=layout.top_k,
                classes=layout.classes if number in layout.classifier_layers else 0,
                pool=layout.classifier_pool,
            )
            setattr(layer, family.ffn, block)
        getattr(layer, family.attention).register_forward_pre_hook(partial(hand_over, block), with_kwargs=True)
    model.routing_passes = RoutingPasses(remembers=bool(layout.classifier_layers))
    model.base_model.register_forward_pre_hook(model.routing_passes.begin, with_kwargs=True)


class ExpandedConfig:
    """What a configuration of a family has more: `layermoe`, a dictionary of the fields of `Layout`.

    In config.json the size of the FFN is a sentence. A class of the dense base, asked by name to load the folder,
    would only warn, and fill the FFNs that it does not find with random numbers; so it refuses the configuration.
    """

    model_type: str
    layermoe: dict | None = None
    base_model_tp_plan = None  # the base's has the names of the plain FFN

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
        """Write config.json."""
        values = json.loads(self.to_json_string(use_diff))  # type: ignore[attr-defined]
        values[SIZE] = f"{getattr(self, SIZE)} of each expert: {HOW_TO_LOAD}"
        Path(json_file_path).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """Read what `to_json_file` wrote, or a dictionary with the plain number."""
        size = config_dict.get(SIZE)
        plain = {SIZE: int(size.split()[0])} if isinstance(size, str) else {}
        return super().from_dict(config_dict | plain, **options)  # type: ignore[misc]


class ExpandedModel:
    """What a model of a family has more: blocks in place of FFNs, and a loader that accepts no difference.

    Attributes:
        routing_passes: gives every forward pass its `RoutingState`.
    """

    routing_passes: RoutingPasses

    def __init__(self, config: Any):
        super().__init__(config)  # type: ignore[call-arg]
        put_blocks(self)
        self.post_init()  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(cls, *arguments: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """Load as transformers does; weights and configuration must name the same parameters.

        Raises:
            ModelError: a weight is missing, unknown, or of another shape; transformers would go on without it.
        """
        model, found = super().from_pretrained(*arguments, output_loading_info=True, **options)  # type: ignore[misc]
        wrong = [
            f"{kind} {key}"
            for kind in ("missing", "unexpected", "mismatched")
            for key in sorted(found[f"{kind}_keys"])
        ]
        if wrong:
            raise ModelError(
                f"{len(wrong)} weights do not fit the layermoe entry of config.json, the first: {wrong[0]}. Get the "
                f"folder again as it was saved"
            )
        return (model, found) if output_loading_info else model


def _make(base_type: str, family: Family) -> tuple[Any, Any]:
    """Return (configuration class, model class) of a family with experts."""
    base_config, base_model = getattr(transformers, family.config), getattr(transformers, family.model)
    own = {"__module__": __name__, "model_type": PREFIX + base_type, "__annotations__": {"layermoe": "dict | None"}}
    config_class = type(f"Expanded{family.config}", (ExpandedConfig, base_config), {**own, "layermoe": None})
    model_class = type(
        f"Expanded{family.model}",
        (PackedGeneration, ExpandedModel, base_model),
        {"__module__": __name__, "config_class": config_class},
    )
    return config_class, model_class


def register() -> None:
    """Tell transformers' Auto classes about every family; once is enough, twice does no harm."""
    for base_type, (config_class, model_class) in EXPANDED.items():
        AutoConfig.register(PREFIX + base_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


EXPANDED = {base_type: _make(base_type, family) for base_type, family in FAMILIES.items()}
# importable by name, as pickling and transformers' own messages expect
globals().update({made.__name__: made for pair in EXPANDED.values() for made in pair})
register()
