"""The answers of OpenAI's completions and chat API, whole and in pieces; pure functions of what was generated."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from tenfold.serve.decoding import REPLACEMENT
from tenfold.serve.generation import PlacedLogprob

DONE = "data: [DONE]\n\n"
TokenText = Callable[[int], str]
Body = dict[str, Any]


def event(data: Body) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the usage counts; the end-of-sequence token counts, as it was generated."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class CompletionAnswer:
    """Writes the answer to one POST /v1/completions.

    Args:
        model: the model's name.
        token_text: from a token id to its text.
        with_logprobs: whether the request asked for log probabilities.
    """

    id_prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, model: str, token_text: TokenText, *, with_logprobs: bool) -> None:
        self._head = {"id": f"{self.id_prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._token_text = token_text
        self._with_logprobs = with_logprobs

    def whole(self, text: str, logprobs: Sequence[PlacedLogprob], reason: str, counts: dict[str, int]) -> Body:
        """Return the body of an answer that is not streamed."""
        choice = {**self._text(text), "index": 0, "logprobs": self._logprobs(logprobs), "finish_reason": reason}
        return {**self._head, "object": self.whole_object, "choices": [choice], "usage": counts}

    def opening(self) -> list[Body]:
        """Return the chunks before the first piece of text."""
        return []

    def chunk(self, text: str, logprobs: Sequence[PlacedLogprob], reason: str | None) -> Body:
        """Return the chunk for a piece of the answer."""
        choice = {**self._delta(text), "index": 0, "logprobs": self._logprobs(logprobs), "finish_reason": reason}
        return {**self._head, "object": self.chunk_object, "choices": [choice]}

    def closing(self, counts: dict[str, int]) -> Body:
        """Return the chunk with the usage counts."""
        return {**self._head, "object": self.chunk_object, "choices": [], "usage": counts}

    def _text(self, text: str) -> Body:
        return {"text": text}

    def _delta(self, text: str) -> Body:
        return {"text": text}

    def _logprobs(self, entries: Sequence[PlacedLogprob]) -> Body | None:
        if not self._with_logprobs:
            return None
        return {
            "tokens": [self._token_text(entry.token_id) for entry in entries],
            "token_logprobs": [entry.logprob.chosen for entry in entries],
            "top_logprobs": [
                {self._token_text(token_id): value for token_id, value in entry.logprob.top} for entry in entries
            ],
            "text_offset": [entry.offset for entry in entries],
        }


class ChatAnswer(CompletionAnswer):
    """Writes the answer to one POST /v1/chat/completions."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self) -> list[Body]:
        """Return the chunk that says who speaks."""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [{**self._head, "object": self.chunk_object, "choices": [choice]}]

    def _text(self, text: str) -> Body:
        return {"message": {"role": "assistant", "content": text}}

    def _delta(self, text: str) -> Body:
        return {"delta": {"content": text} if text else {}}

    def _logprobs(self, entries: Sequence[PlacedLogprob]) -> Body | None:
        if not self._with_logprobs:
            return None
        content = [
            {
                **self._token(entry.token_id, entry.logprob.chosen),
                "top_logprobs": [self._token(token_id, value) for token_id, value in entry.logprob.top],
            }
            for entry in entries
        ]
        return {"content": content}

    def _token(self, token_id: int, logprob: float) -> Body:
        text = self._token_text(token_id)
        # Bytes of a part of a character are not known here; the API allows null.
        raw = None if REPLACEMENT in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": raw}
