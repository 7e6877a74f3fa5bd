"""The HTTP interface: routes, error bodies, start and end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from tenfold.serve.engine import EngineError
from tenfold.serve.error_handlers import add_error_handlers
from tenfold.serve.service import LanguageService


def create_app(service: LanguageService) -> FastAPI:
    """Return the application that answers with a service; its engines run while the application does."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    # No generated documentation: the interface is OpenAI's, and requests are checked by tenfold.serve.schemas.
    app = FastAPI(title="tenfold", lifespan=lifespan, openapi_url=None)
    add_error_handlers(app)

    @app.get("/healthz")
    async def healthz() -> Response:
        try:
            service.check()
        except EngineError as error:
            return JSONResponse({"status": "dead", "reason": str(error)}, status_code=503)
        return JSONResponse({"status": "ok", "models": list(service.models)})

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        service.keys.check(request.headers.get("authorization"))
        return {"object": "list", "data": service.model_list()}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> dict[str, Any]:
        service.keys.check(request.headers.get("authorization"))
        found = service.model(name)
        return next(entry for entry in service.model_list() if entry["id"] == found.name)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await service.respond(request, "completions")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await service.respond(request, "chat")

    return app
