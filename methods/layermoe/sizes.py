"""How many parameters an expansion or copies of layers add, train and use, from a model's shape alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A dense or expanded model without its weights.

    Attributes:
        parameters: all of them; tied weights count once.
        ffn: parameters of the original FFN of each layer, [L]: those of one expert.
        totals: experts of each layer, original FFN included, [L].
        hidden_size: inputs of a router or classifier.
        top_k: experts of a token.
    """

    parameters: int
    ffn: list[int]
    totals: list[int]
    hidden_size: int
    top_k: int

    def expanded(self, new: Sequence[int], top_k: int) -> Shape:
        """Return the shape after an expansion by so many experts a layer; routers grow with it, classifiers go."""
        totals = [known + added for known, added in zip(self.totals, new, strict=True)]
        experts = sum(size * added for size, added in zip(self.ffn, new, strict=True))
        parameters = self.parameters + experts + self.routers(totals) - self.routers(self.totals)
        return Shape(parameters, self.ffn, totals, self.hidden_size, top_k)

    def routers(self, totals: Sequence[int]) -> int:
        """Return the parameters of the routers; a layer with one expert has none."""
        return sum(total * self.hidden_size for total in totals if total > 1)

    @property
    def active(self) -> int:
        """Parameters that a token uses: all but the experts that it is not sent to."""
        idle = sum(size * (total - min(self.top_k, total)) for size, total in zip(self.ffn, self.totals, strict=True))
        return self.parameters - idle

    def trained(self, new: Sequence[int]) -> int:
        """Return the parameters that stage 1 trains after this shape was expanded by `new`: new experts, routers."""
        return sum(size * added for size, added in zip(self.ffn, new, strict=True)) + self.routers(self.totals)


def copied_parameters(model: Any, places: Sequence[int]) -> int:
    """Return the parameters of copies of some decoder layers of a model, which may be on the meta device."""
    from tenfold.methods.layermoe.modeling import decoder_layers

    layers = decoder_layers(model)
    return sum(parameter.numel() for place in places for parameter in layers[place].parameters())


def shape_of(model: Any) -> Shape:
    """Return the shape of a model, which may be on the meta device. Classifiers that it has do not count.

    Raises:
        ModelError: an architecture that cannot be expanded.
    """
    from tenfold.methods.layermoe.modeling import blocks_of, ffn_of, layout_of

    blocks = blocks_of(model)
    ffn = [
        getattr(module, "base", module) if layer in blocks else module for layer, module in enumerate(ffn_of(model))
    ]
    classifiers = sum(
        parameter.numel()
        for block in blocks.values()
        if block.classifier is not None
        for parameter in block.classifier.parameters()
    )
    layout = layout_of(model.config)
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()) - classifiers,
        ffn=[sum(parameter.numel() for parameter in module.parameters()) for module in ffn],
        totals=layout.totals,
        hidden_size=model.config.get_text_config().hidden_size,
        top_k=layout.top_k,
    )
