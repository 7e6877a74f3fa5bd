"""The requests of OpenAI's completions and chat API that this server understands.

What it cannot do is refused, not ignored: an option is accepted only where leaving it out would give the same answer.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator
from tenfold.platform.validation import validate_all
from tenfold.serve.errors import ApiError

MAX_STOPS = 4
MAX_STOP_LENGTH = 256
Zero = Annotated[float, Field(ge=0, le=0)]
Body = TypeVar("Body", bound=BaseModel)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _stops(value: Any) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value or ()
    if not isinstance(stops, (list, tuple)) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("is neither a string nor a list of strings")
    if len(stops) > MAX_STOPS or not all(1 <= len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise ValueError("has too many strings, or an empty or too long one")
    return tuple(stops)


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, str) or (isinstance(value, list) and value and all(_is_number(item) for item in value)):
        return value
    if isinstance(value, list) and len(value) == 1:
        return _prompt(value[0])
    if isinstance(value, list) and len(value) > 1:
        raise ValueError("has several prompts")
    raise ValueError("is neither text nor token ids")


def _content(value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("is neither text nor a list of parts")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError("has a part that is not text")
    return "".join(part["text"] for part in value)


class RequestModel(BaseModel):
    """Base of all parts of a request: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StreamOptions(RequestModel):
    """What a stream carries besides the answer."""

    include_usage: bool | None = Field(None, description="send a last chunk with the usage counts")


class TextFormat(RequestModel):
    """The only format of an answer."""

    type: Literal["text"] = Field(description="only text")


class GenerationRequest(RequestModel):
    """What completions and chat requests have in common."""

    model: str = Field(description="a name from /v1/models")
    max_tokens: int | None = Field(None, ge=1, description="most tokens of the answer, at least 1")
    temperature: float | None = Field(None, ge=0, le=2, description="0 (most probable token) to 2; default 1")
    top_p: float | None = Field(None, gt=0, le=1, description="probability of the nucleus, above 0 to 1; default 1")
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="same seed and request, same answer; default: a random one"
    )
    stop: Annotated[tuple[str, ...], PlainValidator(_stops)] = Field(
        (), description=f"a string that ends the answer, or up to {MAX_STOPS}, of 1 to {MAX_STOP_LENGTH} characters"
    )
    stream: bool | None = Field(None, description="send the answer in pieces as server-sent events")
    stream_options: StreamOptions | None = Field(None, description="only with stream: true")
    n: Literal[1] | None = Field(None, description="only 1: send a request for each answer")
    presence_penalty: Zero | None = Field(None, description="only 0")
    frequency_penalty: Zero | None = Field(None, description="only 0")
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(None, description="only empty")
    user: str | None = Field(None, description="not used")

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[str | list[int], PlainValidator(_prompt)] = Field(
        description="one prompt: text, or its token ids; send a request for each prompt"
    )
    logprobs: int | None = Field(None, ge=0, le=5, description="most probable tokens to report a place, 0 to 5")
    echo: Literal[False] | None = Field(None, description="only false")
    best_of: Literal[1] | None = Field(None, description="only 1")

    @property
    def num_top_logprobs(self) -> int | None:
        """Most probable tokens to report a place; None reports no log probabilities."""
        return self.logprobs


class Message(RequestModel):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"] = Field(description="system, user or assistant")
    content: Annotated[str, PlainValidator(_content)] = Field(
        description='text, or a list of parts {"type": "text", "text": ...}'
    )


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, description="the conversation so far, at least one message")
    max_completion_tokens: int | None = Field(None, ge=1, description="the newer name of max_tokens")
    logprobs: bool | None = Field(None, description="report log probabilities")
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="most probable tokens to report a place, 0 to 20; needs logprobs: true"
    )
    response_format: TextFormat | None = Field(None, description="only text")

    @property
    def num_top_logprobs(self) -> int | None:
        """Most probable tokens to report a place; None reports no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


def parse(schema: type[Body], data: Any) -> Body:
    """Check a request's JSON.

    Raises:
        ApiError: 400, with one sentence for each wrong field.
    """
    if not isinstance(data, dict):
        raise ApiError(400, "the body is JSON, but no object; send an object with the fields of the request")
    found, errors = validate_all(schema, data)
    if found is None:
        raise ApiError(400, ". ".join(errors), param=_field(errors[0]), code="invalid_value")
    if isinstance(found, GenerationRequest):
        _check_together(found)
    return found


def _check_together(request: GenerationRequest) -> None:
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options: only allowed with stream: true", param="stream_options")
    if not isinstance(request, ChatRequest):
        return
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs: true", param="top_logprobs")
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise ApiError(400, "max_tokens and max_completion_tokens are the same; send one of them", param="max_tokens")


def _field(sentence: str) -> str | None:
    """Return the field that a sentence of `validate_all` begins with."""
    match = re.match(r"[\w.]+(?=( = |: ))", sentence)
    return match.group() if match else None
