"""A served model: from text to tokens, through the engine, and back to text that ends where it should."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tenfold.platform.errors import ConfigError
from tenfold.platform.models.generation import end_tokens
from tenfold.serve.config import Limits, ServedModel
from tenfold.serve.decoding import StopMatcher, TextDecoder
from tenfold.serve.engine import Engine, FinishReason
from tenfold.serve.errors import ApiError
from tenfold.serve.sampling import Sampling, TokenLogprob

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class PlacedLogprob:
    """Log probabilities of one token of the answer.

    Attributes:
        token_id: the token.
        logprob: its log probability and those of the best tokens at its place.
        offset: characters of the answer before it.
    """

    token_id: int
    logprob: TokenLogprob
    offset: int


@dataclass(frozen=True)
class Piece:
    """What one more token adds to an answer.

    Attributes:
        text: may be empty: inside a character, or while a stop string may be coming.
        logprobs: of the tokens whose text begins in what was sent so far, each once.
        num_tokens: tokens generated so far, the end-of-sequence token included.
        finish_reason: stop (end of sequence or stop string), length (all tokens allowed), None before the end.
    """

    text: str
    logprobs: tuple[PlacedLogprob, ...]
    num_tokens: int
    finish_reason: FinishReason | None


class LanguageModel:
    """One model by its name, with its tokenizer and engine.

    Args:
        served: its entry in the configuration.
        limits: of requests.
        model: on the device it runs on.
        tokenizer: its tokenizer.

    Raises:
        ConfigError: max_context is unknown, longer than the model's, or does not fit into cache_gb.
    """

    def __init__(
        self, served: ServedModel, limits: Limits, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.name = served.name
        self.tokenizer = tokenizer
        self.max_context = max_context(served, model.config)
        embeddings: Any = model.get_input_embeddings()
        self.vocabulary_size = int(embeddings.weight.shape[0])
        self.engine = Engine(
            model,
            eos_token_ids=end_tokens(model, tokenizer),
            max_context=self.max_context,
            max_running=limits.max_running,
            max_waiting=limits.max_waiting,
            cache_gb=served.cache_gb,
            max_batch_tokens=limits.max_batch_tokens,
        )
        self._token_texts: dict[int, str] = {}
        self._anchor: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]

    def encode(self, prompt: str | list[int]) -> list[int]:
        """Return the token ids of a prompt, with what the tokenizer puts before a text.

        Raises:
            ApiError: 400 for no token at all, or one that the model does not have.
        """
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        return self._checked(ids, "prompt")

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Return the token ids of a conversation up to where the answer begins.

        Raises:
            ApiError: 400 for a model that was not made for chat, or a conversation that its template refuses.
        """
        from jinja2 import TemplateError

        if self.tokenizer.chat_template is None:
            raise ApiError(
                400,
                f"the model {self.name} has no chat template, so it was not made for chat; use /v1/completions",
                param="model",
                code="no_chat_template",
            )
        try:
            encoded: Any = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True
            )
        except TemplateError as error:
            raise ApiError(
                400, f"the chat template of {self.name} refuses these messages: {error}", param="messages"
            ) from error
        return self._checked(encoded["input_ids"], "messages")

    def _checked(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            raise ApiError(400, f"{param}: gives no token; send at least one character", param=param)
        wrong = next((token_id for token_id in ids if not 0 <= token_id < self.vocabulary_size), None)
        if wrong is not None:
            raise ApiError(
                400, f"{param}: no token {wrong}; {self.name} has 0 to {self.vocabulary_size - 1}", param=param
            )
        return ids

    def num_new_tokens(self, prompt_ids: Sequence[int], max_tokens: int | None, default: int, param: str) -> int:
        """Return how many tokens may be generated.

        Args:
            prompt_ids: the encoded prompt.
            max_tokens: what the request says.
            default: where it says nothing; less when the context has less room.
            param: the field that makes the prompt long.

        Raises:
            ApiError: 400, prompt and answer do not fit into the context.
        """
        room = self.max_context - len(prompt_ids)
        wanted = max_tokens if max_tokens is not None else min(default, max(room, 1))
        if wanted > room:
            raise ApiError(
                400,
                f"the prompt has {len(prompt_ids)} tokens and {wanted} more are asked for, "
                f"{len(prompt_ids) + wanted} together; the context of {self.name} holds {self.max_context}. "
                f"Shorten the prompt, or lower max_tokens",
                param=param if room < 1 or max_tokens is None else "max_tokens",
                code="context_length_exceeded",
            )
        return wanted

    async def answer(
        self, prompt_ids: Sequence[int], sampling: Sampling, stops: Sequence[str], max_new_tokens: int
    ) -> AsyncIterator[Piece]:
        """Yield an answer, one piece a token; the last one has a finish reason.

        Raises:
            Busy: too many requests wait already.
            EngineError: the engine is dead.
        """
        decoder = TextDecoder(self._decode, prompt_ids)
        matcher = StopMatcher(stops)
        trail = _LogprobTrail()
        decoded = sent = count = 0
        async with aclosing(self.engine.generate(prompt_ids, sampling, max_new_tokens=max_new_tokens)) as tokens:
            async for token in tokens:
                count += 1
                piece = ""
                if token.finish_reason != "stop":  # an end-of-sequence token has no text
                    trail.add(token.token_id, token.logprob, decoded)
                    piece = decoder.push(token.token_id)
                if token.finish_reason is not None:
                    piece += decoder.finish()
                decoded += len(piece)
                text = matcher.push(piece)
                if token.finish_reason is not None:
                    text += matcher.finish()
                sent += len(text)
                reason: FinishReason | None = "stop" if matcher.matched else token.finish_reason
                whole = token.finish_reason is not None and not matcher.matched
                yield Piece(text, trail.release(decoded + 1 if whole else sent), count, reason)
                if reason is not None:
                    return

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def token_text(self, token_id: int) -> str:
        """Return a token as text, as it reads behind another one; bytes of a part of a character become U+FFFD."""
        text = self._token_texts.get(token_id)
        if text is None:
            before, behind = (
                str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
                for ids in (self._anchor, [*self._anchor, token_id])
            )
            text = self._token_texts[token_id] = behind[len(before) :]
        return text


class _LogprobTrail:
    """Keeps log probabilities until the text of their token is sent: text behind a stop string never is."""

    def __init__(self) -> None:
        self._held: list[PlacedLogprob] = []

    def add(self, token_id: int, logprob: TokenLogprob | None, offset: int) -> None:
        if logprob is not None:
            self._held.append(PlacedLogprob(token_id, logprob, offset))

    def release(self, length: int) -> tuple[PlacedLogprob, ...]:
        """Return those of tokens that begin before `length` characters of the answer."""
        ready = tuple(entry for entry in self._held if entry.offset < length)
        del self._held[: len(ready)]
        return ready


def max_context(served: ServedModel, config: PretrainedConfig) -> int:
    """Return how many tokens prompt and answer may have together.

    Args:
        served: what the server's configuration says.
        config: the model's own.

    Raises:
        ConfigError: the model does not say and the configuration neither, or the configuration says more.
    """
    most: Any = getattr(config.get_text_config(), "max_position_embeddings", None)
    if served.max_context is None and most is None:
        raise ConfigError(f"models: {served.name}: the model does not say how long its context is; set max_context")
    if served.max_context is not None and most is not None and served.max_context > most:
        raise ConfigError(
            f"models: {served.name}: max_context = {served.max_context}, the model was made for {most}; lower it"
        )
    return int(served.max_context if served.max_context is not None else most)


def load_language_model(served: ServedModel, limits: Limits, *, device: str) -> LanguageModel:
    """Load a model onto a device; a folder with a manifest is compared with it.

    Raises:
        ModelError: missing or damaged.
        ConfigError: see `LanguageModel`.
    """
    from tenfold.platform.models.loading import load_causal_lm, load_tokenizer, resolve

    resolve(served.source)  # compares every file with its digest; loading alone does not
    tokenizer = load_tokenizer(served.source)
    model = load_causal_lm(served.source).to(device)
    return LanguageModel(served, limits, model, tokenizer)
