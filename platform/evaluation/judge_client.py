"""Asking a judge one question over HTTP: any OpenAI-compatible address, and what its answers mean."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tenfold.platform.errors import ConfigError
from tenfold.platform.evaluation.options import JudgeOptions

if TYPE_CHECKING:
    import httpx

LONGEST_WAIT_S = 60.0
# what may pass if one asks again; so may everything from 500
PASSING = (408, 409, 425, 429)
# what holds for this one question, such as a text that is too long
REFUSED = (400, 413, 422)


@dataclass(frozen=True)
class Reply:
    """What came back of one question.

    Attributes:
        text: the judge's words, or the server's on a question that it refuses; None: no answer.
        problem: why there is none.
        pause: seconds that the server asks to wait.
        is_final: asking again would not help.
    """

    text: str | None = None
    problem: str = ""
    pause: float = 0.0
    is_final: bool = False


def check_judge(options: JudgeOptions) -> None:
    """Raise ConfigError unless the API key's variable, if one is named, is set and not empty."""
    if options.api_key_env is not None and not _key(options):
        raise ConfigError(
            f"judge.api_key_env = {options.api_key_env}: this environment variable is not set here. Set it to the API "
            f"key of {options.base_url}, or leave api_key_env out for an address that needs none"
        )


def _key(options: JudgeOptions) -> str:
    return os.environ.get(options.api_key_env, "").strip() if options.api_key_env else ""


def open_client(options: JudgeOptions) -> httpx.Client:
    """Return a client that sends the API key with every question; several threads may use it."""
    import httpx

    key = _key(options)
    return httpx.Client(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=options.timeout_s,
        limits=httpx.Limits(max_connections=options.max_concurrent),
    )


def ask(client: httpx.Client, options: JudgeOptions, question: str) -> Reply:
    """Ask once.

    Raises:
        ConfigError: no valid API key, or an address that is no such interface.
    """
    import httpx

    body: dict[str, Any] = {"model": options.model, "messages": [{"role": "user", "content": question}]}
    limits = {"temperature": options.temperature, "max_tokens": options.max_tokens}
    body |= {name: value for name, value in limits.items() if value is not None}
    try:
        response = client.post(f"{options.base_url}/chat/completions", json=body)
    except httpx.TimeoutException:
        return Reply(problem=f"nothing within {options.timeout_s:g} s")
    except httpx.RequestError as error:
        return Reply(problem=str(error) or type(error).__name__)
    if response.status_code >= 500 or response.status_code in PASSING:
        return Reply(problem=_said(response), pause=_asked_to_wait(response))
    if response.status_code in REFUSED:
        return Reply(text=_said(response), is_final=True)
    if response.status_code != 200:
        raise ConfigError(_refusal(options, response))
    try:
        return Reply(text=str(response.json()["choices"][0]["message"]["content"] or ""))
    except (ValueError, LookupError, TypeError):
        return Reply(problem=f"no chat completion: {response.text[:200]!r}")


def _refusal(options: JudgeOptions, response: httpx.Response) -> str:
    where = f"judge {options.model} at {options.base_url}: {_said(response)}"
    if response.status_code in (401, 403):
        key = f"the key in {options.api_key_env}" if options.api_key_env else "a request without a key"
        return f"{where}. It does not take {key}; put a valid one into the variable that judge.api_key_env names"
    return (
        f"{where}. judge.base_url must be what /chat/completions follows (it mostly ends in /v1), and judge.model a "
        "model there"
    )


def _said(response: httpx.Response) -> str:
    return f"HTTP {response.status_code} {response.text.strip()[:200]}".strip()


def _asked_to_wait(response: httpx.Response) -> float:
    """Return the Retry-After header in seconds, at most LONGEST_WAIT_S; 0 without one (or with a date)."""
    try:
        return min(max(float(response.headers.get("retry-after", 0)), 0.0), LONGEST_WAIT_S)
    except ValueError:
        return 0.0
