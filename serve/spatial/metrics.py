"""What Prometheus gets to know about the spatial application."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ray.serve import metrics
from tenfold.serve.metrics import SECONDS

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


class MeasuredRequests:
    """ASGI middleware that counts requests and their seconds, by route and status."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        # Ray's annotation allows one tag, Ray itself any number.
        tags: Any = ("endpoint", "status")
        self._requests = metrics.Counter(
            "tenfold_spatial_requests", description="requests by route and HTTP status", tag_keys=tags
        )
        self._seconds = metrics.Histogram(
            "tenfold_spatial_request_seconds",
            description="from request to the end of the answer, by route and HTTP status",
            boundaries=SECONDS,
            tag_keys=tags,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500
        start = time.perf_counter()

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note)
        finally:
            # The pattern, not the path: what clients make up does not become a tag.
            endpoint = getattr(scope.get("route"), "path", "none")
            tags = {"endpoint": f"{scope['method']} {endpoint}", "status": str(status)}
            self._requests.inc(1, tags=tags)
            self._seconds.observe(time.perf_counter() - start, tags=tags)
