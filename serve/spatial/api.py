"""The HTTP interface of the spatial application, and its page. Addresses are relative to where it is mounted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse
from tenfold.serve.error_handlers import add_error_handlers
from tenfold.serve.errors import FieldError
from tenfold.serve.spatial.metrics import MeasuredRequests
from tenfold.serve.spatial.params import invalid
from tenfold.serve.spatial.service import Job, SpatialService
from tenfold.serve.spatial.upload import FILES
from tenfold.serve.spatial.view import pack_view

SCRIPTS = ("page.js", "server.js", "result.js", "drawing.js", "elements.js")
PAGE = {**dict.fromkeys(SCRIPTS, "text/javascript"), "page.css": "text/css"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
MEDIA_TYPES = {
    "json": "application/json",
    "csv": "text/csv; charset=utf-8",
    "npz": "application/zip",
    "h5ad": "application/x-hdf5",
}


def create_app(service: SpatialService) -> FastAPI:
    """Return the application that answers with a service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(title="tenfold spatial", lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.add_middleware(MeasuredRequests)
    add_error_handlers(app)
    _add_headers(app)
    _add_page(app)
    _add_general(app, service)
    _add_jobs(app, service)
    _add_results(app, service)
    return app


def _add_headers(app: FastAPI) -> None:
    @app.middleware("http")
    async def headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    @app.exception_handler(RequestValidationError)
    async def wrong_query(_: Request, error: RequestValidationError) -> Response:
        problems = [FieldError(str(detail["loc"][-1]), str(detail["msg"])) for detail in error.errors()]
        answer = invalid(problems)
        return JSONResponse(answer.body, answer.status)


def _add_page(app: FastAPI) -> None:
    folder = files("tenfold.serve.spatial") / "page"
    index = (folder / "index.html").read_bytes()
    parts = {name: (folder / name).read_bytes() for name in PAGE}

    @app.get("")
    async def without_slash(request: Request) -> Response:
        return RedirectResponse(f"{request.scope.get('root_path', '')}/")

    @app.get("/")
    async def page() -> Response:
        return Response(index, media_type="text/html; charset=utf-8")

    @app.get("/page/{name}")
    async def part(name: str) -> Response:
        if name not in parts:
            return Response(status_code=404)
        return Response(parts[name], media_type=PAGE[name])


def _add_general(app: FastAPI, service: SpatialService) -> None:
    @app.get("/healthz")
    async def healthz() -> Response:
        if not await asyncio.to_thread((service.store.root / "jobs").is_dir):
            return JSONResponse({"status": "dead", "reason": "the storage is not there"}, status_code=503)
        return JSONResponse({"status": "ok", "models": [model["id"] for model in service.models]})

    @app.get("/v1/limits")
    async def limits(request: Request) -> dict[str, Any]:
        service.client(request)
        endings = {name: list(allowed) for name, allowed in FILES.items()}
        return {**service.limits.model_dump(), "files": endings}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        service.client(request)
        return {"object": "list", "data": service.models}

    @app.post("/v1/predict")
    async def predict(request: Request) -> dict[str, Any]:
        return await service.predict(request)


def _add_jobs(app: FastAPI, service: SpatialService) -> None:
    @app.post("/v1/jobs", status_code=202)
    async def submit(request: Request, response: Response) -> dict[str, Any]:
        job = await service.submit(request)
        address = _address(request, job)
        response.headers["Location"] = address
        return {"job_id": job.id, "status": job.state.status, "status_url": address, "summary": job.request.summary}

    @app.get("/v1/jobs/{job_id}")
    async def status(job_id: str, request: Request) -> dict[str, Any]:
        job = await service.job(job_id, service.client(request))
        answer = await service.status(job)
        if job.state.status == "done":
            answer["result_url"] = f"{_address(request, job)}/result"
        return answer

    @app.delete("/v1/jobs/{job_id}", status_code=204)
    async def delete(job_id: str, request: Request) -> None:
        await service.delete(await service.job(job_id, service.client(request)))


def _add_results(app: FastAPI, service: SpatialService) -> None:
    @app.get("/v1/jobs/{job_id}/result")
    async def result(job_id: str, request: Request, format: str = "json") -> Response:
        job = await service.job(job_id, service.client(request))
        path = service.result_file(job, format)
        name = None if format == "json" else f"domains-{job_id[:8]}.{format}"
        return FileResponse(path, media_type=MEDIA_TYPES[format], filename=name)

    @app.get("/v1/jobs/{job_id}/plot.png")
    async def plot(
        job_id: str,
        request: Request,
        color: str = "domain",
        size: float | None = Query(None, gt=0, le=1000),
        dpi: int = Query(150, ge=30, le=600),
    ) -> Response:
        job = await service.job(job_id, service.client(request))
        image = await service.ask("plot", service.results(job), color, size, dpi, field="color")
        return Response(image, media_type="image/png")

    @app.get("/v1/jobs/{job_id}/view")
    async def view(job_id: str, request: Request) -> Response:
        job = await service.job(job_id, service.client(request))
        packed = await asyncio.to_thread(pack_view, service.results(job))
        return Response(packed, media_type="application/octet-stream")

    @app.get("/v1/jobs/{job_id}/genes")
    async def genes(job_id: str, request: Request) -> dict[str, Any]:
        job = await service.job(job_id, service.client(request))
        return {"genes": await service.ask("genes", service.results(job), field="gene")}

    @app.get("/v1/jobs/{job_id}/genes/{gene:path}")
    async def gene(job_id: str, gene: str, request: Request) -> Response:
        job = await service.job(job_id, service.client(request))
        values = await service.ask("gene", service.results(job), gene, field="gene")
        return Response(values.astype("<f4").tobytes(), media_type="application/octet-stream")


def _address(request: Request, job: Job) -> str:
    return f"{request.scope.get('root_path', '')}/v1/jobs/{job.id}"
