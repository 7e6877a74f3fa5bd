"""What the layers of one forward pass share: the mask, the classes of the sequences, and what losses and reports read.

A decoder layer hands its FFN a tensor and nothing else. Hooks on the decoder carry a `RoutingState` beside it: into
the decoder's keyword arguments, from there with each layer's own arguments to the attention, which stands before the
FFN. So a layer that gradient checkpointing runs again finds the state of its own pass, whatever ran in between.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from tenfold.methods.layermoe.routing import pooled_scores, running_scores
from tenfold.platform.errors import ModelError
from torch import Tensor
from transformers import Cache, DynamicCache

RouteWith = Literal["predicted", "gold"]
KEYWORD = "routing_state"


@dataclass
class RoutingState:
    """What one forward pass of the decoder shares with its blocks.

    Attributes:
        groups: [B] int64, the true class of each sequence; larger numbers than classes mean the last class.
        route_with: predicted: the classifier's arg-max decides, also in training; gold: `groups` do.
        collects: keep the logits below.
        attention_mask: [B, T] bool of this pass's positions, True = real; None: all are.
        router_logits: layer -> [B, T, E] float32, with their graph.
        classifier_logits: layer -> [B, C] float32 of each sequence's mean state in this pass, with their graph.
        decisions: layer -> the classes that this pass routed by: [B] int64, or [B, T] with running means.
        memory: what earlier passes with the same cache decided; None without a cache.
    """

    groups: Tensor | None = None
    route_with: RouteWith = "predicted"
    collects: bool = False
    attention_mask: Tensor | None = None
    router_logits: dict[int, Tensor] = field(default_factory=dict)
    classifier_logits: dict[int, Tensor] = field(default_factory=dict)
    decisions: dict[int, Tensor] = field(default_factory=dict)
    memory: RouteMemory | None = None
    with_gradients: bool = False

    def begin(self, *, attention_mask: Any, cache: Any, batch: int, length: int) -> None:
        """Start a pass over `length` positions of `batch` sequences; what an earlier pass left is dropped.

        Raises:
            ModelError: the mask does not say which positions are real, or the cache was filled without this model's
                decisions or by another number of sequences.
        """
        self.memory = None if cache is None else memory_of(cache)
        if self.memory is not None:
            self.memory.check(batch)
        self.attention_mask = _real_positions(attention_mask, cache, length)
        self.router_logits, self.classifier_logits, self.decisions = {}, {}, {}
        self.with_gradients = torch.is_grad_enabled()

    def collect_router(self, layer: int, logits_BTE: Tensor) -> None:
        """Keep a layer's router logits for losses and reports.

        Raises:
            ModelError: they have no graph, though the pass has gradients (re-entrant checkpointing).
        """
        if not self.collects:
            return
        if self.with_gradients and not torch.is_grad_enabled():
            raise ModelError(
                "re-entrant gradient checkpointing cuts router and classifier off from their losses. Use "
                "gradient_checkpointing_kwargs: {use_reentrant: false}"
            )
        # of the first run: a layer that checkpointing runs again has the same
        self.router_logits.setdefault(layer, logits_BTE)

    def classify(self, layer: int, scores_BTC: Tensor, pool: str) -> Tensor:
        """Return the class by which each position of a classifier layer is routed (sections 3.6 and 3.7).

        `sequence`: one class a sequence, from the mean state of the first pass with a cache (the prompt), kept for all
        later ones. `prefix`: a class a position, from the mean state up to it, the same in one pass as in many.

        Args:
            layer: index of the layer.
            scores_BTC: [B, T, C] float32, the classifier's product with every position's state.
            pool: "sequence" or "prefix".

        Returns:
            [B, T] int64.

        Raises:
            ModelError: gold classes are asked for and missing.
        """
        batch, length, num_classes = scores_BTC.shape
        mask = None if self.attention_mask is None else self.attention_mask.to(scores_BTC.device)
        if self.collects:
            self.classifier_logits.setdefault(layer, pooled_scores(scores_BTC, mask))
        if layer not in self.decisions:  # it is there when checkpointing runs the layer again
            if self.route_with == "gold":
                self.decisions[layer] = self._gold(batch, num_classes).to(scores_BTC.device)
            else:
                self.decisions[layer] = self._predicted(layer, scores_BTC.detach(), mask, pool)
        classes = self.decisions[layer]
        return classes if classes.dim() == 2 else classes[:, None].expand(batch, length)

    def _gold(self, batch: int, num_classes: int) -> Tensor:
        if self.groups is None or len(self.groups) != batch:
            given = "none" if self.groups is None else str(len(self.groups))
            raise ModelError(f"route_with gold needs the group of each of the {batch} sequences; {given} given")
        return self.groups.clamp(max=num_classes - 1)

    def _predicted(self, layer: int, scores_BTC: Tensor, mask: Tensor | None, pool: str) -> Tensor:
        known = None if self.memory is None else self.memory.layers.get(layer)
        if pool == "prefix":
            means, after = running_scores(scores_BTC, mask, known)  # type: ignore[arg-type]
            classes = means.argmax(dim=-1)
            kept: tuple[Tensor, ...] = after
        else:
            classes = known[0] if known is not None else pooled_scores(scores_BTC, mask).argmax(dim=-1)
            kept = (classes,)
        if self.memory is not None:
            self.memory.layers[layer] = kept
        return classes


def _real_positions(mask: Any, cache: Any, length: int) -> Tensor | None:
    """Return [B, T] bool of this pass's positions from any mask that a decoder takes; None: all are real."""
    if isinstance(mask, Mapping):
        mask = next(iter(mask.values()))  # one for each kind of attention
    if mask is None:
        return None
    if mask.dim() == 2 and mask.shape[1] >= length:
        return mask[:, mask.shape[1] - length :].bool()
    if mask.dim() == 4 and mask.shape[2] == length:
        # [B, heads, queries, keys], True or 0 = seen: real tokens see themselves, also through a window
        before = 0 if cache is None else int(cache.get_seq_length())
        own = mask[:, 0].diagonal(offset=before, dim1=1, dim2=2)
        return own if own.dtype == torch.bool else own == 0
    raise ModelError(
        f"attention_mask {list(mask.shape)}: classifiers need to know which of the {length} positions of this pass "
        f"are real. Give [sequences, positions], 1 = real"
    )


@dataclass
class RouteMemory:
    """What a cache remembers of routing: layer -> tensors whose first dimension is the batch."""

    layers: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)

    def check(self, batch: int) -> None:
        """Make sure that what is remembered belongs to a batch of this size.

        Raises:
            ModelError: it does not.
        """
        kept = next((len(tensors[0]) for tensors in self.layers.values()), batch)
        if kept != batch:
            raise ModelError(
                f"the cache holds the routes of {kept} sequences, this pass has {batch}. Use the cache with the batch "
                f"that filled it"
            )

    def change(self, name: str, argument: Any) -> None:
        """Follow what was done to the cache's batch."""
        for layer, kept in self.layers.items():
            self.layers[layer] = tuple(
                tensor.repeat_interleave(argument, dim=0)
                if name == "batch_repeat_interleave"
                else tensor[argument.to(tensor.device)]
                for tensor in kept
            )


class _Remembering:
    """What a cache class gets in front of it, so that beams and selections carry their routes along."""

    route_memory: RouteMemory

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.route_memory.change("reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.route_memory.change("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.route_memory.change("batch_select_indices", indices)

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.route_memory.layers.clear()

    def crop(self, *arguments: Any) -> None:
        if any(len(kept) > 1 for kept in self.route_memory.layers.values()):
            raise ModelError(
                "a cache with running means of the classifiers (pool prefix) cannot be cut. Generate without an "
                "assistant model"
            )
        super().crop(*arguments)  # type: ignore[misc]


def memory_of(cache: Any) -> RouteMemory:
    """Return what a cache remembers of routing; an empty one starts to.

    Raises:
        ModelError: it has positions already that this model has not routed, or it is no cache of one batch.
    """
    if isinstance(cache, _Remembering):
        return cache.route_memory
    if not isinstance(cache, Cache) or cache.get_seq_length() > 0:
        raise ModelError(
            f"{type(cache).__name__}: the classifiers' decisions are kept with the cache, and this one was filled "
            f"without them or holds many requests in a row. Start with an empty cache"
        )
    own, memory = type(cache), RouteMemory()
    cache.__class__ = type(f"Routed{own.__name__}", (_Remembering, own), {})
    vars(cache)["route_memory"] = memory
    return memory


class RoutingPasses:
    """Puts a RoutingState into every forward pass of a decoder.

    Attributes:
        active: the state of all passes for now; None makes one for each.
        remembers: there are classifiers, whose decisions belong to the cache.
        packed: makes the state of a pass with a paged cache, whose one row holds many requests.
    """

    def __init__(self, *, remembers: bool):
        self.active: RoutingState | None = None
        self.remembers = remembers
        self.packed: Callable[[Any], RoutingState] | None = None

    def begin(self, decoder: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any]:
        """Hook before the decoder: begin a pass, with a cache of its own where the decoder would make one."""
        names = [name for name in inspect.signature(type(decoder).forward).parameters if name != "self"]
        given = dict(zip(names, arguments, strict=False)) | keywords
        cache_name = "cache" if "cache" in names else "past_key_values"
        cache = given.get(cache_name)
        if cache is None:
            cache = given.pop("past_key_values", None)
        if self.remembers and cache is None and _wants_cache(decoder, given):
            cache = DynamicCache(config=decoder.config)
        if cache is not None:
            given[cache_name] = cache
        return (), {**given, KEYWORD: self._state(given, cache)}

    def _state(self, given: dict[str, Any], cache: Any) -> RoutingState:
        if self.remembers and self.packed is not None and cache is not None and not isinstance(cache, Cache):
            return self.packed(cache)
        state = RoutingState() if self.active is None else self.active
        inputs = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        mask, kept = (given.get("attention_mask"), cache) if self.remembers else (None, None)
        state.begin(attention_mask=mask, cache=kept, batch=inputs.shape[0], length=inputs.shape[1])
        return state


def _wants_cache(decoder: Any, given: dict[str, Any]) -> bool:
    """Say whether the decoder will make a cache, by transformers' own rules."""
    wanted = given.get("use_cache")
    wanted = decoder.config.use_cache if wanted is None else wanted
    recomputes = decoder.gradient_checkpointing and decoder.training and torch.is_grad_enabled()
    return bool(wanted) and not recomputes


@contextmanager
def routing_by(model: Any, state: RoutingState) -> Iterator[RoutingState]:
    """Give all forward passes inside the block one state, which each of them begins anew.

    Raises:
        ModelError: the model has no experts.
    """
    passes = [module.routing_passes for module in model.modules() if hasattr(module, "routing_passes")]
    if not passes:
        raise ModelError(f"{type(model).__name__}: a dense model routes nothing. Expand it first")
    before = passes[0].active
    passes[0].active = state
    try:
        yield state
    finally:
        passes[0].active = before


def collecting(
    model: Any, *, groups: Tensor | None = None, route_with: RouteWith = "predicted"
) -> AbstractContextManager[RoutingState]:
    """Return a context that collects what the routers and classifiers say in the pass inside it.

    Args:
        model: an expanded model, or what holds one (a training module, DeepSpeed's engine).
        groups: [B] int64, the true class of each sequence; needed with gold.
        route_with: see `RoutingState`.

    Returns:
        A context manager that yields the `RoutingState`. It stays readable afterwards.

    Raises:
        ModelError: on entering, the model has no experts.
    """
    return routing_by(model, RoutingState(groups=groups, route_with=route_with, collects=True))
