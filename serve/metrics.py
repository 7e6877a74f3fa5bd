"""What Prometheus gets to know; Ray exports it on the metrics port of every node."""

from __future__ import annotations

import time
from typing import Any, Literal

from ray.serve import metrics

SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300]
Endpoint = Literal["completions", "chat"]
CLIENT_LEFT = "499"  # nginx's number for a client that closed the connection; never sent


class ServerMetrics:
    """Counters and histograms of one replica. Serve adds tags for application, deployment and replica."""

    def __init__(self) -> None:
        # Ray's annotation allows one tag, Ray itself any number.
        tags: Any = ("model", "endpoint")
        self._requests = metrics.Counter(
            "tenfold_requests", description="requests by HTTP status; 499: the client left", tag_keys=(*tags, "status")
        )
        self._prompt_tokens = metrics.Counter("tenfold_prompt_tokens", description="tokens read", tag_keys=tags)
        self._completion_tokens = metrics.Counter(
            "tenfold_completion_tokens", description="tokens generated", tag_keys=tags
        )
        self._latency = metrics.Histogram(
            "tenfold_request_seconds", description="from request to last token", boundaries=SECONDS, tag_keys=tags
        )
        self._first_token = metrics.Histogram(
            "tenfold_first_token_seconds", description="from request to first token", boundaries=SECONDS, tag_keys=tags
        )

    def request(self, endpoint: Endpoint) -> Measurement:
        """Begin to measure one request."""
        return Measurement(self, endpoint)


class Measurement:
    """One request: when it came, when its first token was there, how it ended.

    `model` is set once it is known to exist: names that clients make up do not become tags.
    """

    def __init__(self, owner: ServerMetrics, endpoint: Endpoint) -> None:
        self.model = "none"
        self._owner = owner
        self._endpoint = endpoint
        self._start = time.perf_counter()
        self._first: float | None = None
        self._ended = False

    def token(self) -> None:
        """Note that a token is there."""
        if self._first is None:
            self._first = time.perf_counter() - self._start
            self._owner._first_token.observe(self._first, tags=self._tags())

    def end(self, status: int | str, *, prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
        """Report the request; only the first call counts."""
        if self._ended:
            return
        self._ended = True
        tags = self._tags()
        self._owner._requests.inc(1, tags={**tags, "status": str(status)})
        self._owner._latency.observe(time.perf_counter() - self._start, tags=tags)
        for counter, tokens in (
            (self._owner._prompt_tokens, prompt_tokens),
            (self._owner._completion_tokens, completion_tokens),
        ):
            if tokens:
                counter.inc(tokens, tags=tags)

    def _tags(self) -> dict[str, str]:
        return {"model": self.model, "endpoint": self._endpoint}
