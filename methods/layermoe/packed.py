"""Classifier routes of many requests in one row: transformers' continuous batching, as a server uses it.

A request must be routed in every forward pass as its own prompt says (specification 3.7). A pass of continuous
batching has one row: the next tokens of all running requests behind each other, one token of those that generate, and
of a prompt as many as there is room for. So a prompt may come in several passes, and then it is read once on its own
before the first: no layer can go on before the class of the whole prompt is known. Which tokens are whose, the batch
processor knows; what the requests remember of routing lies on its cache, and ends with it.

Legend: T tokens of the row, C classes.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from tenfold.methods.layermoe.state import RouteMemory, RoutingState, routing_by
from tenfold.platform.errors import ModelError
from torch import Tensor
from transformers.generation.configuration_utils import ContinuousBatchingConfig

if TYPE_CHECKING:
    from transformers.generation.continuous_batching.requests import FutureRequestState

__all__ = ["PackedGeneration", "PackedRequests", "PackedState"]

MEMORIES = "route_memories"  # attribute of the paged cache: request id -> RouteMemory


class PackedState(RoutingState):
    """The state of a pass whose one row holds the tokens of many requests: each has a state of its own.

    Args:
        states: of the requests, in the order of the row.
        lengths: their numbers of tokens in the row.
    """

    def __init__(self, states: Sequence[RoutingState], lengths: Sequence[int]) -> None:
        super().__init__()
        self._states = states
        self._lengths = list(lengths)

    def classify(self, layer: int, scores_BTC: Tensor, pool: str) -> Tensor:
        """Return the class [1, T] of each token, see `RoutingState.classify`.

        Args:
            layer: index of the layer.
            scores_BTC: [1, T, C] float32.
            pool: "sequence" or "prefix".
        """
        parts = scores_BTC.split(self._lengths, dim=1)
        classes = [state.classify(layer, part, pool) for state, part in zip(self._states, parts, strict=True)]
        return torch.cat(classes, dim=1)


class PackedGeneration:
    """For an expanded model's class, before transformers' own in the bases: what continuous batching needs.

    Blocks of the cache are not shared between requests that begin alike: the keys and values of equal tokens differ
    with the class of their prompts. The host looks up the decisions, so there are no CUDA graphs, and no second batch
    is under way while one is computed.
    """

    def init_continuous_batching(
        self,
        generation_config: Any = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints: Any = None,
    ) -> Any:
        """Return transformers' manager, set up so that every request keeps its routes.

        Raises:
            ModelError: the model runs with eager attention, which reads no prompt outside the cache.
        """
        model: Any = self
        if not model.routing_passes.remembers:
            return super().init_continuous_batching(  # type: ignore[misc]
                generation_config, continuous_batching_config, workload_hints
            )
        if "eager" in model.config._attn_implementation:
            raise ModelError(
                "eager attention cannot serve a model with classifiers. Load it with attn_implementation = sdpa, "
                "which is the default"
            )
        alone = replace(
            continuous_batching_config or ContinuousBatchingConfig(),
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False,
        )
        manager = super().init_continuous_batching(generation_config, alone, workload_hints)  # type: ignore[misc]
        model.routing_passes.packed = PackedRequests(model, manager)
        return manager


class PackedRequests:
    """What the requests of a manager remember of routing; called at the begin of each pass.

    Args:
        model: an expanded model with classifiers.
        manager: transformers' manager of continuous batching for it.
    """

    def __init__(self, model: Any, manager: Any) -> None:
        self._model = weakref.ref(model)
        self._manager = weakref.ref(manager)

    def __call__(self, cache: Any) -> PackedState:
        """Return the state of a pass, after reading the prompts that do not come in one piece.

        Args:
            cache: the paged cache of the pass, which the batch processor has prepared.

        Raises:
            ModelError: the cache is another manager's, or a request goes on from another one's cache.
        """
        manager = self._manager()
        processor = manager.batch_processor if manager is not None else None
        if processor is None or processor.cache is not cache:
            raise ModelError(
                "this model has two managers of continuous batching, and its classifiers follow the one made last. "
                "Stop the other one"
            )
        scheduler = processor.scheduler
        memories: dict[str, RouteMemory] = vars(cache).setdefault(MEMORIES, {})
        for request_id in memories.keys() - scheduler.active_requests.keys() - scheduler.waiting_requests.keys():
            del memories[request_id]
        requests = processor.inputs_and_outputs.requests_in_batch
        states = [self._state_of(request, memories) for request in requests]
        return PackedState(states, [request.query_length for request in requests])

    def _state_of(self, request: FutureRequestState, memories: dict[str, RouteMemory]) -> RoutingState:
        """Return the state of one request for this pass; a new one gets its memory."""
        model: Any = self._model()
        state, length = request.state, request.query_length
        start = state.position_offset - length  # the batch is prepared: the position has moved on already
        # A request that lost its blocks to others begins again, and reads what it generated as if it were prompt.
        prompt_length = state._true_initial_tokens or len(state.initial_tokens)
        by_prompt = model.config.layermoe.get("classifier_pool", "sequence") == "sequence"
        if start == 0 and (length >= prompt_length or not by_prompt):
            memories[state.request_id] = RouteMemory()
        elif start == 0 or (state.request_id not in memories and by_prompt):
            memories[state.request_id] = _read(model, state.initial_tokens[:prompt_length])
        elif state.request_id not in memories:
            raise ModelError(
                f"the request {state.request_id} goes on from the cache of another one, whose running means it does "
                f"not know. Ask for one answer to a prompt (num_return_sequences = 1)"
            )
        mask = None
        if by_prompt and start == 0 and length > prompt_length:
            mask = (torch.arange(length, device=model.device) < prompt_length)[None]
        return RoutingState(memory=memories[state.request_id], attention_mask=mask)


def _read(model: Any, prompt_ids: list[int]) -> RouteMemory:
    """Return what a prompt decides, from a pass of its own without cache and head."""
    with routing_by(model, RoutingState()) as state:
        model.base_model(input_ids=torch.tensor([prompt_ids], device=model.device), use_cache=False)
    return RouteMemory({layer: (classes,) for layer, classes in state.decisions.items()})
