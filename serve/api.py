"""The HTTP interface: routes, error bodies, start and end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from tenfold.serve.engine import EngineError
from tenfold.serve.errors import ApiError, of_status
from tenfold.serve.service import LanguageService

logger = logging.getLogger(__name__)


def create_app(service: LanguageService) -> FastAPI:
    """Return the application that answers with a service; its engines run while the application does."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    # No generated documentation: the interface is OpenAI's, and requests are checked by tenfold.serve.schemas.
    app = FastAPI(title="tenfold", lifespan=lifespan, openapi_url=None)
    _add_error_handlers(app)

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


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def known(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, status_code=error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def framework(request: Request, error: HTTPException) -> Response:
        detail = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(of_status(error.status_code, detail).body, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return JSONResponse(of_status(500, "the server failed; its log says why").body, 500)
