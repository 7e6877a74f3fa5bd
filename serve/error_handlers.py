"""Everything that goes wrong in an application becomes an error body of one form."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from tenfold.serve.errors import ApiError, of_status

logger = logging.getLogger(__name__)


def add_error_handlers(app: FastAPI) -> None:
    """Answer our errors, the framework's and unknown ones with OpenAI's error body."""

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
