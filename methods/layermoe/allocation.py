"""How many experts a layer gets (section 3.2 of LayerMoE, arXiv 2505.22582), and which layers get a classifier.

Counts N are of one expansion and count the original FFN, unless `new_counts` is told otherwise.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tenfold.methods.layermoe.similarity import check_finite
from tenfold.platform.errors import ConfigError

logger = logging.getLogger(__name__)

FACTOR = 2.5  # delta / layers of the official run: 70 for 28 layers, about 3 experts a layer
GUARD = 1e-9  # a quota may lie that far above an integer by rounding alone
FLOOR = 1e-4  # stands for a similarity that the formula cannot take

CountMode = Literal["total_minus_one", "new"]
Order = Literal["similar", "inverse", "random"]


def shares(similarity: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (1 / S^i) / sum_j (1 / S^j), [L] float64, which adds up to 1.

    Similarities of 0 and less become 1e-4, or the smallest positive one if that is less: such a layer gets as many
    experts as any. A warning names them.

    Raises:
        DataError: a similarity is not a number.
    """
    values = np.asarray(similarity, dtype=np.float64)
    check_finite(values, "similarity")
    unusable = values <= 0
    if unusable.any():
        floor = min(FLOOR, values[~unusable].min(initial=FLOOR))
        logger.warning(
            "similarity is 0 or less at layers %s; the formula takes it as %g. Look at the texts that it was measured "
            "on, or give allocation.explicit",
            np.flatnonzero(unusable).tolist(),
            floor,
        )
        values = np.where(unusable, floor, values)
    inverse = values.min() / values  # scaled to at most 1: no overflow
    return inverse / inverse.sum()


def allocate(
    similarity: Sequence[float] | NDArray[np.float64],
    *,
    delta: float | None = None,
    total: int | None = None,
    min_per_layer: int = 1,
    max_per_layer: int | None = None,
) -> list[int]:
    """Return N^i = ceil(delta (1/S^i) / sum_j (1/S^j)): fewer experts where languages look more alike.

    Args:
        similarity: S, [L].
        delta: budget factor; without limits delta <= sum N < delta + L. Default: 2.5 L.
        total: in place of delta: the exact sum of N. The layers grow one expert at a time in the order in which a
            rising delta would raise them (of several at once, smaller S first, then the lower layer).
        min_per_layer: fewest experts of a layer.
        max_per_layer: most experts of a layer.

    Raises:
        ConfigError: delta and total are both given, or no counts within the limits add up to the total.
        DataError: a similarity is not a number.
    """
    weights = shares(similarity)
    layers = len(weights)
    if delta is not None and total is not None:
        raise ConfigError(f"delta = {delta:g} and total = {total} both set the budget. Give one of them")
    if max_per_layer is not None and max_per_layer < min_per_layer:
        raise ConfigError(f"max_per_layer = {max_per_layer} is below min_per_layer = {min_per_layer}")
    if total is not None:
        return _exact(weights, total, min_per_layer, max_per_layer)
    factor = FACTOR * layers if delta is None else delta
    if not (factor > 0 and math.isfinite(factor)):
        raise ConfigError(f"delta = {factor:g}: the budget factor must be a positive number")
    counts = [max(math.ceil(quota - GUARD), min_per_layer) for quota in factor * weights]
    return counts if max_per_layer is None else [min(count, max_per_layer) for count in counts]


def _exact(weights: NDArray[np.float64], total: int, fewest: int, most: int | None) -> list[int]:
    """Return counts that add up to `total`: always raise the layer with the smallest breakpoint N^i / w^i."""
    layers = len(weights)
    largest = math.inf if most is None else layers * most
    if not layers * fewest <= total <= largest:
        limits = f"at least {layers * fewest}" if most is None else f"{layers * fewest} to {largest}"
        raise ConfigError(
            f"total_experts = {total}: {layers} layers hold {limits}, by min_per_layer = {fewest} and max_per_layer = "
            f"{most}. Change one of them"
        )
    counts = np.full(layers, fewest)
    for _ in range(total - layers * fewest):
        breakpoints = counts / weights
        if most is not None:
            breakpoints[counts >= most] = np.inf
        tied = np.flatnonzero(breakpoints <= breakpoints.min() * (1 + GUARD))
        counts[tied[np.argmax(weights[tied])]] += 1
    return counts.tolist()


def uniform(layers: int, count: int) -> list[int]:
    """Return the same count for every layer (MoE-LPR, arXiv 2408.11396: 6 for Qwen1.5-1.8B)."""
    return [count] * layers


def mola(layers: int) -> list[int]:
    """Return 2, 4, 6, 8 by quarter of the depth (MoLA, arXiv 2402.08562): 2 q + 2 with q = floor(4 i / L)."""
    return [2 * (4 * layer // layers) + 2 for layer in range(layers)]


def inverse(counts: Sequence[int], similarity: Sequence[float] | NDArray[np.float64]) -> list[int]:
    """Return the same counts in the opposite order: the largest where languages look most alike.

    An ablation that changes nothing but the order: the budget and the set of counts stay.

    Raises:
        DataError: a similarity is not a number.
    """
    values = np.asarray(similarity, dtype=np.float64)
    check_finite(values, "similarity")
    turned = np.empty(len(values), dtype=np.int64)
    turned[np.argsort(-values, kind="stable")] = sorted(counts, reverse=True)
    return turned.tolist()


def shuffled(counts: Sequence[int], seed: int) -> list[int]:
    """Return the same counts in a random order that the seed decides."""
    return np.random.default_rng(seed).permutation(np.asarray(counts)).tolist()


def ordered(
    counts: Sequence[int], similarity: Sequence[float] | NDArray[np.float64], order: Order, seed: int
) -> list[int]:
    """Return the counts as the formula gave them (`similar`), or as `inverse` or `shuffled` put them."""
    if order == "inverse":
        return inverse(counts, similarity)
    return shuffled(counts, seed) if order == "random" else list(counts)


def check_counts(counts: Sequence[Any], layers: int, *, count_mode: CountMode = "total_minus_one") -> list[int]:
    """Check an explicit list of counts and return it.

    Raises:
        ConfigError: not one whole number for each layer, one is too small, or no layer gets a new expert.
    """
    least = 0 if count_mode == "new" else 1
    if len(counts) != layers:
        raise ConfigError(
            f"allocation.explicit has {len(counts)} numbers, the model {layers} layers. Give one for each"
        )
    for layer, count in enumerate(counts):
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            counted = "original FFN and new experts" if least else "new experts"
            raise ConfigError(
                f"allocation.explicit, layer {layer}: {count!r}; with count_mode = {count_mode} it counts {counted}: "
                f"a whole number, at least {least}"
            )
    if not any(new_counts(counts, count_mode)):
        raise ConfigError(f"allocation.explicit = {list(counts)} adds no expert to any layer. Raise one")
    return list(counts)


def new_counts(counts: Sequence[int], count_mode: CountMode = "total_minus_one") -> list[int]:
    """Return how many experts an expansion adds to each layer.

    `total_minus_one`: N^i - 1, in the first expansion because N^i counts the original FFN, and in later ones as well:
    this is the reading that gives the published totals. `new`: N^i.
    """
    return list(counts) if count_mode == "new" else [count - 1 for count in counts]


def classifier_layers(
    similarity: Sequence[float] | NDArray[np.float64] | None,
    experts: Sequence[int],
    *,
    share: float = 0.3,
    explicit: Sequence[int] | None = None,
) -> list[int]:
    """Return the layers that get a classifier, ascending.

    Args:
        similarity: S, [L]; not read if `explicit` is given.
        experts: [L], all experts of a layer, original FFN and earlier expansions included. A layer with one has no
            router, and so no classifier.
        share: the max(1, round(share L)) layers with experts that have the largest S, or all with experts if these
            are fewer (of equal S, the lower layer first). The paper's own rule is unknown.
        explicit: exactly these layers; [] for none.

    Raises:
        ConfigError: an explicit layer is no layer of the model, is there twice, or has no experts; or neither a
            similarity nor a list is given.
        DataError: a similarity is not a number.
    """
    if explicit is not None:
        return _checked_layers(explicit, experts)
    if similarity is None:
        raise ConfigError("classifier.layers: no similarity was measured that could choose them. Give a list, or []")
    values = np.asarray(similarity, dtype=np.float64)
    check_finite(values, "similarity")
    number = max(1, round(share * len(values)))
    alike = [layer for layer in np.argsort(-values, kind="stable").tolist() if experts[layer] > 1]
    return sorted(alike[:number])


def _checked_layers(chosen: Sequence[int], experts: Sequence[int]) -> list[int]:
    for layer in chosen:
        if not 0 <= layer < len(experts):
            raise ConfigError(f"classifier.layers: {layer} is no layer of the model: 0 to {len(experts) - 1}")
        if experts[layer] < 2:
            able = [number for number, count in enumerate(experts) if count > 1]
            raise ConfigError(
                f"classifier.layers: layer {layer} has no new experts, so there is nothing to choose. Layers with "
                f"experts: {able}"
            )
    if len(set(chosen)) != len(chosen):
        raise ConfigError(f"classifier.layers names a layer twice: {list(chosen)}")
    return sorted(chosen)
