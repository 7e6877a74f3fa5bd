"""Which layers get how many new experts and a classifier, as a strategy says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tenfold.methods.layermoe.config import EXPANDING, LayerMoEConfig
from tenfold.platform.errors import ConfigError

if TYPE_CHECKING:
    from tenfold.methods.layermoe.similarity import Similarity


@dataclass(frozen=True)
class Assignment:
    """What an expansion adds to each layer.

    Attributes:
        new: experts that are added, [L].
        totals: experts afterwards, original FFN included, [L].
        classifier_layers: layers with a classifier in the review, rising.
        similarity: the values S that decided, [L]; None where nothing was measured.
    """

    new: list[int]
    totals: list[int]
    classifier_layers: list[int] = field(default_factory=list)
    similarity: list[float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "new": self.new,
            "totals": self.totals,
            "classifier_layers": self.classifier_layers,
            "similarity": self.similarity,
        }


def assign(
    config: LayerMoEConfig, present: Sequence[int], similarity: Similarity | None, *, seed: int
) -> Assignment | None:
    """Return what an expansion adds; None for strategies that add no experts.

    Args:
        config: the options of this expansion.
        present: experts of each layer before it, original FFN included, [L].
        similarity: what was measured, where `config.needs_similarity`.
        seed: decides the order `random`.

    Raises:
        ConfigError: counts or classifier layers that do not fit the model.
    """
    from tenfold.methods.layermoe.allocation import classifier_layers

    if config.strategy not in EXPANDING:
        return None
    values = None if similarity is None else similarity.indicator(config.similarity.indicator)
    new = new_experts(config, len(present), values, seed=seed)
    totals = [known + added for known, added in zip(present, new, strict=True)]
    layers: list[int] = []
    if config.strategy == "layermoe" and config.has_review:
        layers = classifier_layers(values, totals, share=config.classifier.share, explicit=config.classifier.layers)
    return Assignment(new, totals, layers, None if values is None else values.tolist())


def new_experts(config: LayerMoEConfig, layers: int, similarity: Any, *, seed: int) -> list[int]:
    """Return how many experts each layer gets, [L].

    Raises:
        ConfigError: an explicit list does not fit the model, or no layer gets an expert.
    """
    from tenfold.methods.layermoe import allocation

    options = config.allocation
    if config.strategy in ("moe_lpr", "moe"):
        return allocation.new_counts(allocation.uniform(layers, options.uniform))
    if config.strategy == "mola":
        return allocation.new_counts(allocation.mola(layers))
    if options.explicit is not None:
        counts = allocation.check_counts(options.explicit, layers, count_mode=options.count_mode)
        return allocation.new_counts(counts, options.count_mode)
    values = [1.0] * layers if options.order == "uniform" else similarity
    counts = allocation.allocate(
        values,
        delta=options.delta,
        total=options.total_experts,
        min_per_layer=options.min_per_layer,
        max_per_layer=options.max_per_layer,
    )
    if options.order in ("inverse", "random"):
        counts = allocation.ordered(counts, similarity, options.order, seed)
    new = allocation.new_counts(counts, options.count_mode)
    if not any(new):
        raise ConfigError("allocation: this budget adds no expert to any layer. Raise delta or total_experts")
    return new
