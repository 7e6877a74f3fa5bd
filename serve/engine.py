"""One model answering many clients at once: transformers' continuous batching behind asynchronous iterators.

The library's manager owns the paged key-value cache, the scheduling and the forward passes, in a thread of its own.
This module adds what a server needs around it: sampling per request (`tenfold.serve.sampling`), admission by cache
blocks (`tenfold.serve.admission`), log probabilities, cancellation, and health.

The manager runs without its asynchronous double buffering and CUDA graphs, as it does by its own choice wherever an
attention mask is needed (sdpa): the log probabilities of a step are handed over from the same thread right after it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from tenfold.platform.errors import ConfigError
from tenfold.serve.admission import Admission
from tenfold.serve.sampling import Sampling, TokenLogprob, choose_tokens, logprobs_of, uniform
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.generation.continuous_batching.requests import FutureRequestState

logger = logging.getLogger(__name__)

PAGE_SIZE = 32  # tokens in a cache block; small, so that a short request reserves little
HEALTH_SECONDS = 2.0  # a request that hears nothing for so long looks whether the thread is alive
STOP_SECONDS = 30.0  # longest wait for the step that is running
FinishReason = Literal["stop", "length"]


class EngineError(Exception):
    """The generation thread is dead or stopping; the replica has to be replaced."""


@dataclass(frozen=True)
class Token:
    """One generated token.

    Attributes:
        token_id: its id; also the end-of-sequence token is reported.
        logprob: None unless asked for.
        finish_reason: stop after an end-of-sequence token, length after the last token allowed, else None.
    """

    token_id: int
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None


@dataclass
class Statistics:
    """What the batches looked like since the start.

    Attributes:
        steps: forward passes that gave at least one token.
        tokens: tokens generated.
        largest_batch: most requests that got a token in one pass.
        ended_early: requests taken out before their last token: by a stop string, or because the client left.
    """

    steps: int = 0
    tokens: int = 0
    largest_batch: int = 0
    ended_early: int = 0


class RequestSampler(ContinuousBatchingLogitsProcessor):
    """Chooses the tokens of a batch; the library's arg max over what is returned only reads the choice.

    Called by the generation thread: `prepare_tensor_args`, then the call, once a forward pass.
    """

    supported_kwargs: dict[str, type] = {"sampling": Sampling, "prompt_length": int}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.statistics = Statistics()
        # request id -> log probabilities of all its tokens so far
        self.logprobs: dict[str, list[TokenLogprob | None]] = {}
        self._rows: list[tuple[str, Sampling, int]] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """No defaults: every request brings its own `Sampling`."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        """Note whose tokens the coming pass gives; nothing has to go through the library's int32 storage."""
        self._rows = []
        for request in requests_with_new_token:
            state = request.state
            options = state.logit_processor_kwargs
            position = len(state.initial_tokens) + len(state.generated_tokens) - options["prompt_length"]
            self._rows.append((state.request_id, options["sampling"], position))
        return torch.zeros(len(self._rows), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Return [B, V] scores whose arg max is the chosen token of each row.

        Args:
            scores: [B, V] float32 logits, in the order of the last `prepare_tensor_args`.
            tensor_arg: not used.
        """
        samplings = [sampling for _, sampling, _ in self._rows]
        draws = [
            uniform(sampling.seed, position) if sampling.temperature > 0 else 0.0
            for _, sampling, position in self._rows
        ]
        tokens = choose_tokens(scores, samplings, draws)
        for (request_id, _, _), logprob in zip(self._rows, logprobs_of(scores, tokens, samplings), strict=True):
            record = self.logprobs.get(request_id)
            if record is not None:
                record.append(logprob)
        self._count(len(self._rows))
        return torch.full_like(scores, -math.inf).scatter_(-1, tokens.unsqueeze(-1), 0.0)

    def _count(self, rows: int) -> None:
        if rows:
            self.statistics.steps += 1
            self.statistics.tokens += rows
            self.statistics.largest_batch = max(self.statistics.largest_batch, rows)


def cache_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Return the bytes that one token's keys and values take in all layers."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * head_dim * dtype.itemsize


def num_cache_blocks(bytes_per_token: int, *, cache_gb: float, max_context: int, max_running: int) -> int:
    """Return how many blocks of `PAGE_SIZE` tokens the cache gets: within the memory, and no more than can be used.

    Raises:
        ConfigError: the memory does not hold one request of `max_context` tokens.
    """
    per_request = math.ceil(max_context / PAGE_SIZE)
    block_bytes = bytes_per_token * PAGE_SIZE
    affordable = int(cache_gb * 2**30) // block_bytes
    if affordable < per_request:
        raise ConfigError(
            f"cache_gb = {cache_gb:g} holds the keys and values of {affordable * PAGE_SIZE} tokens, max_context = "
            f"{max_context} needs {per_request * block_bytes / 2**30:.3g}. Raise cache_gb or lower max_context"
        )
    return min(affordable, per_request * max_running)


class Engine:
    """Generates for many requests in one batch.

    Use from one event loop; `start` and `stop` from any thread.

    Args:
        model: on the device it is to run on.
        eos_token_ids: tokens that end an answer.
        max_context: most tokens of prompt and answer together.
        max_running: most requests in the batch.
        max_waiting: most requests that wait for a place in it.
        cache_gb: gibibytes for keys and values.
        max_batch_tokens: most tokens in one forward pass; longer prompts are read in several.

    Raises:
        ConfigError: the cache is too small for one request.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_ids: Collection[int],
        max_context: int,
        max_running: int = 16,
        max_waiting: int = 64,
        cache_gb: float = 1.0,
        max_batch_tokens: int = 512,
    ) -> None:
        self.max_context = max_context
        self.eos_token_ids = frozenset(eos_token_ids)
        bytes_per_token = cache_bytes_per_token(model.config, model.dtype)
        blocks = num_cache_blocks(bytes_per_token, cache_gb=cache_gb, max_context=max_context, max_running=max_running)
        self.admission = Admission(num_blocks=blocks, max_running=max_running, max_waiting=max_waiting)
        self._sampler = RequestSampler()
        self._manager = model.init_continuous_batching(  # type: ignore[operator]
            generation_config=GenerationConfig(do_sample=False, eos_token_id=sorted(self.eos_token_ids) or [-1]),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_SIZE,
                num_blocks=blocks,
                max_batch_tokens=max(max_batch_tokens, max_running),
                max_requests_per_batch=max_running,
                max_blocks_per_request=0,
                use_async_batching=False,
                use_cuda_graph=False,
                auto_switch_to_flash=False,
            ),
        )
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([self._sampler]))
        processors.tensors_required = 1
        self._manager.logit_processor = processors
        tokens = blocks * PAGE_SIZE
        logger.info("key-value cache: %d tokens, %.2f GiB", tokens, tokens * bytes_per_token / 2**30)

    @property
    def statistics(self) -> Statistics:
        """What the batches looked like since the start."""
        return self._sampler.statistics

    def start(self) -> None:
        """Start the generation thread."""
        self._manager.start()

    def stop(self) -> None:
        """End the generation thread; requests that still run fail with `EngineError`."""
        if self._manager.is_running():
            self._manager.stop(block=True, timeout=STOP_SECONDS, hard_stop=True)

    def check(self) -> None:
        """Make sure that requests are being answered.

        Raises:
            EngineError: the generation thread is dead or was stopped; says why.
        """
        reason = self._manager.background_thread_status.fatal_error
        if reason is not None or not self._manager.is_running():
            raise EngineError(f"the generation thread has stopped: {reason or 'the server is shutting down'}")

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, max_new_tokens: int
    ) -> AsyncIterator[Token]:
        """Yield the tokens of one answer as they come. Closing the iterator takes the request out of the batch.

        Args:
            prompt_ids: at least one token.
            sampling: how tokens are chosen.
            max_new_tokens: at least 1; with the prompt at most `max_context`.

        Raises:
            ValueError: the prompt is empty, or with the answer longer than the context.
            Busy: too many requests wait already.
            EngineError: the engine is dead, or died meanwhile.
        """
        length = len(prompt_ids) + max_new_tokens
        if not prompt_ids or max_new_tokens < 1 or length > self.max_context:
            raise ValueError(
                f"{len(prompt_ids)} prompt tokens and {max_new_tokens} new ones; the context holds {self.max_context}"
            )
        self.check()
        async with self.admission.place(math.ceil(length / PAGE_SIZE)):
            request_id = uuid.uuid4().hex
            outputs: asyncio.Queue[Any] = asyncio.Queue()
            if sampling.num_top_logprobs is not None:
                self._sampler.logprobs[request_id] = []
            self._manager.register_result_handler(request_id, outputs.put_nowait)
            finished = False
            try:
                self._submit(request_id, prompt_ids, sampling, max_new_tokens)
                sent = 0
                while not finished:
                    output = await self._next(outputs)
                    finished = output.is_finished()
                    if output.error is not None:
                        raise EngineError(f"the generation thread has stopped: {output.error}")
                    for token in self._tokens(output, sent, finished):
                        sent += 1
                        yield token
            finally:
                self._forget(request_id, finished)

    def _submit(self, request_id: str, prompt_ids: Sequence[int], sampling: Sampling, max_new_tokens: int) -> None:
        added = self._manager.add_request(
            list(prompt_ids),
            request_id=request_id,
            max_new_tokens=max_new_tokens,
            streaming=True,
            sampling=sampling,
            prompt_length=len(prompt_ids),
        )
        if added is None:
            raise EngineError("the generation thread has stopped")

    async def _next(self, outputs: asyncio.Queue[Any]) -> Any:
        while True:
            try:
                return await asyncio.wait_for(outputs.get(), HEALTH_SECONDS)
            except TimeoutError:
                self.check()

    def _tokens(self, output: Any, sent: int, finished: bool) -> list[Token]:
        ids = output.generated_tokens[sent:]
        record = self._sampler.logprobs.get(output.request_id)
        logprobs = record[sent : sent + len(ids)] if record is not None else [None] * len(ids)
        tokens = [Token(token_id, logprob) for token_id, logprob in zip(ids, logprobs, strict=True)]
        if finished and tokens:
            last = tokens[-1]
            reason: FinishReason = "stop" if last.token_id in self.eos_token_ids else "length"
            tokens[-1] = Token(last.token_id, last.logprob, reason)
        return tokens

    def _forget(self, request_id: str, finished: bool) -> None:
        self._sampler.logprobs.pop(request_id, None)
        if not finished:
            self.statistics.ended_early += 1
            self._manager.cancel_request(request_id)
            self._manager.output_router.result_handlers.pop(request_id, None)
