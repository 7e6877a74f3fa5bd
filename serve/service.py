"""What happens to a request between HTTP and the engine: checks, generation, answers, measurements."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.responses import JSONResponse, Response, StreamingResponse
from tenfold.platform.validation import nearest
from tenfold.serve.access import KeyRing, read_json
from tenfold.serve.admission import Busy
from tenfold.serve.config import ServeConfig
from tenfold.serve.engine import EngineError
from tenfold.serve.errors import ApiError
from tenfold.serve.generation import LanguageModel, Piece, PlacedLogprob, load_language_model
from tenfold.serve.metrics import CLIENT_LEFT, Endpoint, Measurement, ServerMetrics
from tenfold.serve.responses import DONE, ChatAnswer, CompletionAnswer, event, usage
from tenfold.serve.sampling import Sampling
from tenfold.serve.schemas import ChatRequest, CompletionRequest, parse

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Send

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
DEFAULT_COMPLETION_TOKENS = 16  # as in OpenAI's API
DEAD_RETRY_SECONDS = 10  # until a dead replica is replaced


class ClientGone(Exception):
    """The client closed the connection before its answer."""


class EventStream(StreamingResponse):
    """Server-sent events; the generator behind them is closed at once when the client leaves, not some time later."""

    def __init__(self, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events = events

    async def stream_response(self, send: Send) -> None:
        """Send the events."""
        async with aclosing(self._events):  # type: ignore[type-var]
            await super().stream_response(send)


class LanguageService:
    """Answers requests with the models it has.

    Args:
        config: limits and keys; its models are those given.
        models: loaded.

    Raises:
        ConfigError: the API keys cannot be read.
    """

    def __init__(self, config: ServeConfig, models: Sequence[LanguageModel]) -> None:
        self.limits = config.limits
        self.models = {model.name: model for model in models}
        self.keys = KeyRing(config.api_keys.load() if config.api_keys else None)
        self.metrics = ServerMetrics()
        self._created = int(time.time())

    @classmethod
    def load(cls, config: ServeConfig, *, device: str) -> LanguageService:
        """Load all models of a configuration onto a device.

        Raises:
            ModelError: a model is missing or damaged.
            ConfigError: its limits do not fit, or the keys cannot be read.
        """
        models = []
        for served in config.models:
            logger.info("loading %s from %s", served.name, served.model)
            models.append(load_language_model(served, config.limits, device=device))
        return cls(config, models)

    def start(self) -> None:
        """Start the engines."""
        for model in self.models.values():
            model.engine.start()

    def stop(self) -> None:
        """Stop the engines; what still runs fails."""
        for model in self.models.values():
            model.engine.stop()

    def check(self) -> None:
        """Make sure that every model can answer.

        Raises:
            EngineError: one cannot; names it.
        """
        for model in self.models.values():
            try:
                model.engine.check()
            except EngineError as error:
                raise EngineError(f"{model.name}: {error}") from error

    def model_list(self) -> list[dict[str, Any]]:
        """Return the entries of GET /v1/models."""
        return [
            {"id": name, "object": "model", "created": self._created, "owned_by": "tenfold", "max_model_len": length}
            for name, length in ((model.name, model.max_context) for model in self.models.values())
        ]

    def model(self, name: str) -> LanguageModel:
        """Return a model by its name.

        Raises:
            ApiError: 404, naming those that exist.
        """
        found = self.models.get(name)
        if found is None:
            near = nearest(name, self.models)
            hint = f"did you mean {near}? " if near else ""
            raise ApiError(
                404,
                f"no model {name[:100]!r}; {hint}there are: {', '.join(self.models)}",
                param="model",
                code="model_not_found",
            )
        return found

    async def respond(self, request: Request, endpoint: Endpoint) -> Response:
        """Answer one POST request.

        Raises:
            ApiError: everything that is not an answer.
        """
        measurement = self.metrics.request(endpoint)
        try:
            self.keys.check(request.headers.get("authorization"))
            data = await read_json(request, self.limits.max_body_bytes)
            if endpoint == "chat":
                return await self._chat(parse(ChatRequest, data), request, measurement)
            return await self._completion(parse(CompletionRequest, data), request, measurement)
        except ApiError as error:
            measurement.end(error.status)
            raise
        except Busy as error:
            measurement.end(429)
            raise ApiError(
                429,
                f"the server is busy: {error}; try again later",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(self.limits.retry_after_s)},
            ) from error
        except EngineError as error:
            measurement.end(503)
            raise ApiError(
                503,
                f"the model cannot answer now: {error}; try again later",
                code="engine_dead",
                headers={"Retry-After": str(DEAD_RETRY_SECONDS)},
            ) from error
        except ClientGone:
            measurement.end(CLIENT_LEFT)
            return Response(status_code=int(CLIENT_LEFT))
        except BaseException as error:
            measurement.end(CLIENT_LEFT if isinstance(error, asyncio.CancelledError) else 500)
            raise

    async def _completion(self, options: CompletionRequest, request: Request, measurement: Measurement) -> Response:
        model = self.model(options.model)
        measurement.model = model.name
        ids = model.encode(options.prompt)
        length = model.num_new_tokens(ids, options.max_tokens, DEFAULT_COMPLETION_TOKENS, "prompt")
        answer = CompletionAnswer(model.name, model.token_text, with_logprobs=options.logprobs is not None)
        return await self._send(model, ids, length, options, answer, request, measurement)

    async def _chat(self, options: ChatRequest, request: Request, measurement: Measurement) -> Response:
        if len(options.messages) > self.limits.max_messages:
            raise ApiError(
                400,
                f"messages: {len(options.messages)} of them, this server takes {self.limits.max_messages}; leave out "
                f"the oldest",
                param="messages",
            )
        model = self.model(options.model)
        measurement.model = model.name
        ids = model.encode_chat([message.model_dump() for message in options.messages])
        asked = options.max_completion_tokens or options.max_tokens
        length = model.num_new_tokens(ids, asked, self.limits.default_max_tokens, "messages")
        answer = ChatAnswer(model.name, model.token_text, with_logprobs=bool(options.logprobs))
        return await self._send(model, ids, length, options, answer, request, measurement)

    async def _send(
        self,
        model: LanguageModel,
        prompt_ids: list[int],
        num_new_tokens: int,
        options: CompletionRequest | ChatRequest,
        answer: CompletionAnswer,
        request: Request,
        measurement: Measurement,
    ) -> Response:
        sampling = Sampling(
            temperature=1.0 if options.temperature is None else options.temperature,
            top_p=1.0 if options.top_p is None else options.top_p,
            seed=secrets.randbits(63) if options.seed is None else options.seed,
            num_top_logprobs=options.num_top_logprobs,
        )
        pieces = model.answer(prompt_ids, sampling, options.stop, num_new_tokens)
        if not options.stream:
            body = await unless_gone(request, _whole(pieces, answer, len(prompt_ids), measurement))
            return JSONResponse(body)
        # The first token is awaited here, so that a busy or dead engine is still answered by a status.
        first = await unless_gone(request, anext(pieces))
        stream = _Stream(answer, len(prompt_ids), measurement, options.include_usage, self.limits.stream_interval_s)
        return EventStream(stream.events(first, pieces))


async def _whole(
    pieces: AsyncIterator[Piece], answer: CompletionAnswer, prompt_tokens: int, measurement: Measurement
) -> dict[str, Any]:
    texts: list[str] = []
    logprobs: list[PlacedLogprob] = []
    count, reason = 0, "length"
    async with aclosing(pieces):  # type: ignore[type-var]
        async for piece in pieces:
            measurement.token()
            texts.append(piece.text)
            logprobs += piece.logprobs
            count, reason = piece.num_tokens, piece.finish_reason or reason
    measurement.end(200, prompt_tokens=prompt_tokens, completion_tokens=count)
    return answer.whole("".join(texts), logprobs, reason, usage(prompt_tokens, count))


@dataclass(frozen=True)
class _Stream:
    """One streamed answer."""

    answer: CompletionAnswer
    prompt_tokens: int
    measurement: Measurement
    include_usage: bool
    interval_s: float

    async def events(self, first: Piece, pieces: AsyncIterator[Piece]) -> AsyncIterator[str]:
        """Yield the events of a stream; an engine that dies is an error event without [DONE]."""
        self.measurement.token()
        count = first.num_tokens
        status: int | str = CLIENT_LEFT
        try:
            for chunk in self.answer.opening():
                yield event(chunk)
            async with aclosing(self._merged(first, pieces)) as merged:  # type: ignore[type-var]
                async for piece in merged:
                    count = piece.num_tokens
                    yield event(self.answer.chunk(piece.text, piece.logprobs, piece.finish_reason))
            if self.include_usage:
                yield event(self.answer.closing(usage(self.prompt_tokens, count)))
            status = 200
            yield DONE
        except EngineError as error:
            status = 503
            yield event(ApiError(503, f"the answer is incomplete: {error}; try again later", code="engine_dead").body)
        finally:
            self.measurement.end(status, prompt_tokens=self.prompt_tokens, completion_tokens=count)

    async def _merged(self, first: Piece, pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
        """Yield pieces with something in them, those that come within `interval_s` of the last one joined."""
        sent = -math.inf
        text = ""
        logprobs: tuple[PlacedLogprob, ...] = ()
        async with aclosing(pieces):  # type: ignore[type-var]
            piece: Piece | None = first
            while piece is not None:
                text, logprobs = text + piece.text, logprobs + piece.logprobs
                due = time.monotonic() - sent >= self.interval_s
                if piece.finish_reason or (due and (text or logprobs)):
                    yield replace(piece, text=text, logprobs=logprobs)
                    sent, text, logprobs = time.monotonic(), "", ()
                piece = await anext(pieces, None)


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Wait for work on behalf of a client, and cancel it when the client leaves; its body must have been read.

    Raises:
        ClientGone: it left.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for pending in (task, gone):
            pending.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await pending


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
