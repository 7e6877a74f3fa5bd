"""A layer's experts: what stands in place of its FFN (sections 3.3, 3.4, 3.6 of LayerMoE).

Legend: B sequences, T positions, N = B T rows, H hidden size, E experts, k experts a row uses, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from tenfold.methods.layermoe.routing import allowed_experts, top_k_routing
from tenfold.methods.layermoe.state import KEYWORD, RoutingState
from torch import Tensor, nn
from torch.nn import functional


class FloatLinear(nn.Linear):
    """A linear map without bias that computes in float32, whatever the dtype of model and autocast."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        """Return [..., outputs] float32."""
        with torch.autocast(rows.device.type, enabled=False):
            return functional.linear(rows.float(), self.weight.float())


class ExpertBlock(nn.Module):
    """The original FFN as expert 0, the experts of every expansion, a router and, on some layers, a classifier.

    Args:
        base: the original FFN; its parameters are kept as they are.
        new_expert: makes an FFN of the same form, its weights not yet those of `base`.
        hidden_size: H.
        sizes: experts that each expansion added, in order; at least one in all.
        layer: index of the layer, the key of what is collected.
        top_k: k.
        classes: C of the classifier; 0 for a layer without.
        pool: "sequence" or "prefix", see `RoutingState.classify`.
    """

    def __init__(
        self,
        base: nn.Module,
        new_expert: Callable[[], nn.Module],
        *,
        hidden_size: int,
        sizes: Sequence[int],
        layer: int,
        top_k: int,
        classes: int = 0,
        pool: str = "sequence",
    ):
        super().__init__()
        self.base = base
        self.groups = nn.ModuleList(nn.ModuleList(new_expert() for _ in range(size)) for size in sizes)
        self.router = FloatLinear(hidden_size, 1 + sum(sizes))
        self.classifier = FloatLinear(hidden_size, classes) if classes else None
        self.hidden_size = hidden_size
        self.layer = layer
        self.top_k = top_k
        self.pool = pool
        self.state: RoutingState | None = None

    @property
    def experts(self) -> list[nn.Module]:
        """All experts in the order of the router's rows."""
        return [self.base, *(expert for group in self.groups for expert in cast(nn.ModuleList, group))]

    @property
    def sizes(self) -> list[int]:
        """Experts that each expansion added."""
        return [len(cast(nn.ModuleList, group)) for group in self.groups]

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the mixture of the experts' outputs.

        Every expert and router is called in every pass, also with no row: under ZeRO-3 all ranks must gather the same
        parameters in the same order. A sequence of class 0 gets exactly what `base` gives.

        Args:
            hidden: [B, T, H], what enters the FFN.

        Returns:
            [B, T, H] in the experts' dtype.
        """
        # without hooks around it, a pass of its own
        state, self.state = self.state or RoutingState(), None
        rows, places = hidden.reshape(-1, self.hidden_size), hidden.shape[:-1]
        exact = rows.float()
        logits = self.router(exact)
        state.collect_router(self.layer, logits.view(*places, logits.shape[-1]))
        allowed = None
        if self.classifier is not None:
            scores = self.classifier(exact).view(*places, self.classifier.out_features)
            classes = state.classify(self.layer, scores, self.pool)
            allowed = allowed_experts(classes.reshape(-1), self.sizes, scores.shape[-1])
        weights, experts = top_k_routing(logits, self.top_k, allowed)
        return mixture(rows, weights, experts, self.experts).view(hidden.shape)


def mixture(rows_NH: Tensor, weights_Nk: Tensor, experts_Nk: Tensor, experts: Sequence[nn.Module]) -> Tensor:
    """Return each row's weighted sum of what its experts make of it.

    Rows are sorted by expert once, and each expert is called once, with the contiguous rows that are its own.

    Args:
        rows_NH: [N, H].
        weights_Nk: [N, k] float32; a slot of weight 0 goes to no expert.
        experts_Nk: [N, k] int64.
        experts: E modules, [n, H] -> [n, H].

    Returns:
        [N, H] in the experts' dtype.
    """
    slots = experts_Nk.masked_fill(weights_Nk <= 0, len(experts)).flatten()
    order = slots.argsort(stable=True)
    counts = slots.bincount(minlength=len(experts) + 1).tolist()
    order = order[: len(slots) - counts.pop()]
    source = order // experts_Nk.shape[1]
    pieces = rows_NH.index_select(0, source).split(counts)
    outputs = torch.cat([expert(piece) for expert, piece in zip(experts, pieces, strict=True)])
    weighted = outputs * weights_Nk.flatten().index_select(0, order)[:, None].to(outputs.dtype)
    return torch.zeros_like(rows_NH, dtype=outputs.dtype).index_add(0, source, weighted)


def hand_over(
    block: ExpertBlock | None, attention: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[Any, Any]:
    """Hook before a layer's attention: take the state of the pass out of its arguments, for the block behind it."""
    state = keywords.pop(KEYWORD, None)
    if block is not None:
        block.state = state
    return arguments, keywords
