"""What happens between HTTP and the jobs: who asks, uploads, checks, limits, answers."""

from __future__ import annotations

import asyncio
import re
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tenfold.platform.errors import DataError
from tenfold.platform.validation import did_you_mean
from tenfold.serve.access import KeyRing
from tenfold.serve.errors import ApiError, FieldError
from tenfold.serve.spatial.analyser import RESULT_FILES
from tenfold.serve.spatial.config import SpatialConfig
from tenfold.serve.spatial.isolation import Interrupted, Isolation
from tenfold.serve.spatial.jobs import UNFINISHED, JobStore, Request, State, job_id_of
from tenfold.serve.spatial.params import field_errors, invalid, parse_params
from tenfold.serve.spatial.upload import Upload, receive

if TYPE_CHECKING:
    from starlette.requests import Request as HttpRequest


JOB_ID = "[0-9a-f]{32}"


class JobRunner(Protocol):
    """Whoever runs the jobs that wait in the storage."""

    def start(self) -> None:
        """Begin; called once by each replica."""
        ...

    def wake(self) -> None:
        """Make sure that it is there, and let it look for new jobs."""
        ...


class Client(NamedTuple):
    """Who asks: a name for limits, and the holder of the key where there are keys."""

    name: str
    holder: str | None


@dataclass(frozen=True)
class Job:
    """A job as one request sees it."""

    id: str
    request: Request
    state: State


class SpatialService:
    """Answers requests; every replica has one, and all see the same jobs.

    Args:
        config: all options.
        runner: runs what is submitted.

    Raises:
        ConfigError: the API keys cannot be read.
    """

    def __init__(self, config: SpatialConfig, runner: JobRunner) -> None:
        self.config = config
        self.limits = config.limits
        self.keys = KeyRing(config.api_keys.load() if config.api_keys else None)
        self.store = JobStore(config.storage)
        self.models: list[dict[str, Any]] = []
        self._runner = runner
        self._uploading: Counter[str] = Counter()
        self._adding = asyncio.Lock()

    async def start(self) -> None:
        """Get ready to answer.

        Raises:
            ConfigError: the storage cannot be written, or the method cannot be loaded.
            ModelError: a saved model is missing or damaged.
        """
        replicas = self.config.replicas
        await asyncio.to_thread(self.store.prepare)
        self._isolation = Isolation(self.config.method, processes=replicas.processes, memory_gb=replicas.memory_gb)
        await self._isolation.load()
        for model in self.config.models:
            seconds = self.limits.check_s
            described = await self._isolation.call("describe_model", Path(model.path), timeout_s=seconds)
            self.models.append({"id": model.id, **described})
        await asyncio.to_thread(self._runner.start)

    def stop(self) -> None:
        """End what `start` began; jobs go on."""
        self._isolation.stop()

    def client(self, request: HttpRequest) -> Client:
        """Find out who asks.

        Raises:
            ApiError: 401.
        """
        holder = self.keys.check(request.headers.get("authorization"))
        address = request.client.host if request.client else "unknown"
        if self.config.client_header:
            address = request.headers.get(self.config.client_header, address).rpartition(",")[2].strip()
        return Client(holder or address, holder)

    async def submit(self, request: HttpRequest) -> Job:
        """Take an upload and make a job of it, or find the job that it is already.

        Raises:
            ApiError: it is refused.
        """
        client = self.client(request)
        async with self._upload(request, client) as upload:
            if "model_id" in upload.fields:
                raise invalid([FieldError("model_id", "is for /v1/predict; leave it out")])
            params = parse_params(upload.fields.get("params", ""), max_epochs=self.limits.max_epochs)
            stored = {name: path.name for name, path in upload.files.items()}
            job_id = job_id_of(upload.digests, stored, params, f"{self.config.method} {client.holder}")
            known = await self._known(job_id, client)
            if known is None:
                await self._admit(client)
                summary = await self._checked(upload.files, params)
                described = Request(
                    stored, upload.names, params, client.name, client.holder, summary, created=time.time()
                )
                async with self._adding:
                    await self._admit(client)
                    folder = next(iter(upload.files.values())).parent
                    await asyncio.to_thread(self.store.add, folder, job_id, described)
                await asyncio.to_thread(self._runner.wake)
        return await self.job(job_id, client)

    async def job(self, job_id: str, client: Client) -> Job:
        """Find a job.

        Raises:
            ApiError: 404: there is none, it has expired, or it belongs to another key.
        """
        request, state = await asyncio.to_thread(self._read, job_id)
        if request is None or state is None or request.holder != client.holder or self._expired(state):
            hours = f"{self.limits.ttl_s / 3600:g}"
            raise ApiError(
                404,
                f"no job {job_id[:64]!r}; results are deleted after {hours} h. Send the section again",
                param="job_id",
                code="job_not_found",
            )
        return Job(job_id, request, state)

    async def status(self, job: Job) -> dict[str, Any]:
        """Return what a client wants to know about a job, without addresses."""
        state = job.state
        progress = await asyncio.to_thread(self.store.progress, job.id)
        beat = progress.pop("time", None)
        if state.status in UNFINISHED:
            last = beat or state.started or job.request.created
            if time.time() - last > self.config.jobs.stale_s:
                await asyncio.to_thread(self._runner.wake)
        answer: dict[str, Any] = {
            "job_id": job.id,
            "status": state.status,
            "progress": progress,
            "loss": progress.get("loss"),
            "attempt": state.attempt,
            "created": job.request.created,
            "started": state.started,
            "finished": state.finished,
            "expires": self.store.expires(state, self.limits.ttl_s),
            "files": job.request.names,
            "params": job.request.params,
            "summary": job.request.summary,
        }
        if state.error is not None:
            answer["error"] = state.error
        return answer

    async def delete(self, job: Job) -> None:
        """Cancel a job that is not finished; remove one that is."""
        remove = self.store.cancel if job.state.status in UNFINISHED else self.store.delete
        await asyncio.to_thread(remove, job.id)

    def results(self, job: Job) -> Path:
        """Return the folder with a job's results.

        Raises:
            ApiError: 409: it has none (yet).
        """
        if job.state.status == "done":
            return self.store.result(job.id)
        if job.state.error is not None:
            raise ApiError(409, f"the job failed: {job.state.error['message']}", code="job_failed")
        what = "was cancelled" if job.state.status == "cancelled" else f"is {job.state.status}"
        raise ApiError(409, f"the job {what}, so there are no results; wait until it is done", code="job_not_done")

    def result_file(self, job: Job, form: str) -> Path:
        """Return the file with a job's results in one form.

        Raises:
            ApiError: 409 not done, 422 unknown form, 404 the method does not give it.
        """
        if form not in RESULT_FILES:
            known = ", ".join(RESULT_FILES)
            raise invalid([FieldError("format", f"{form[:40]!r} is unknown; known are {known}")])
        path = self.results(job) / RESULT_FILES[form]
        if not path.is_file():
            raise ApiError(
                404, f"the method has no embedding, so there is no {form}", param="format", code="no_embedding"
            )
        return path

    async def ask(self, function: str, *arguments: Any, field: str) -> Any:
        """Ask the analyser about results.

        Args:
            function: its method.
            arguments: for it.
            field: what the client chose, named in errors.

        Raises:
            ApiError: 422 for a wrong choice, 503 if it took too long.
        """
        try:
            return await self._isolation.call(function, *arguments, timeout_s=self.limits.check_s)
        except DataError as error:
            raise invalid(field_errors(error, {}, field)) from error
        except Interrupted as error:
            raise ApiError(503, f"{function}: {error}; try again later", code="interrupted") from error

    async def predict(self, request: HttpRequest) -> dict[str, Any]:
        """Label a section with a saved model, while the client waits.

        Raises:
            ApiError: it is refused.
        """
        client = self.client(request)
        async with self._upload(request, client) as upload:
            model_id = upload.fields.get("model_id", "")
            paths = {model.id: Path(model.path) for model in self.config.models}
            if not model_id:
                raise invalid([FieldError("model_id", "is missing; GET v1/models lists the saved models")])
            if model_id not in paths:
                raise ApiError(
                    404,
                    f"no model {model_id!r}{did_you_mean(model_id, paths)} GET v1/models lists the saved models",
                    param="model_id",
                    code="model_not_found",
                )
            params = parse_params(upload.fields.get("params", ""), max_epochs=self.limits.max_epochs)
            await self._checked(upload.files, params, max_cells=self.limits.predict_cells)
            try:
                return dict(
                    await self._isolation.call(
                        "predict", upload.files, paths[model_id], params, timeout_s=self.limits.predict_s
                    )
                )
            except DataError as error:
                raise invalid(field_errors(error, upload.files)) from error
            except Interrupted as error:
                raise invalid([FieldError("file", f"cannot be labelled at once: {error}; use a job")]) from error

    async def _known(self, job_id: str, client: Client) -> Job | None:
        """Return the job that an upload is already; one that failed or was cancelled begins again."""
        _, state = await asyncio.to_thread(self._read, job_id)
        if state is None:
            return None
        if self._expired(state):
            await asyncio.to_thread(self.store.delete, job_id)
            return None
        job = await self.job(job_id, client)
        if job.state.status == "done":
            await asyncio.to_thread(self.store.keep, job_id)
        elif job.state.status not in UNFINISHED:
            await self._admit(client)
            await asyncio.to_thread(self.store.restart, job_id)
            await asyncio.to_thread(self._runner.wake)
        return job

    async def _checked(
        self, files: Mapping[str, Path], params: Mapping[str, Any], *, max_cells: int | None = None
    ) -> dict[str, Any]:
        limits = self.limits.section(max_cells=max_cells)
        try:
            found = await self._isolation.call("check", dict(files), params, limits, timeout_s=self.limits.check_s)
        except DataError as error:
            raise invalid(field_errors(error, files, next(iter(files)))) from error
        except (Interrupted, RuntimeError) as error:
            # A file can make a library fail in ways that no check foresees; it is the file's fault all the same.
            raise invalid([FieldError(next(iter(files)), f"cannot be read: {error}")]) from error
        return dict(found)

    async def _admit(self, client: Client) -> None:
        waiting = await asyncio.to_thread(self.store.unfinished_clients)
        mine = waiting.count(client.name)
        if mine >= self.limits.max_jobs_per_client:
            raise self._busy(f"{mine} of your jobs are not finished, a client may have {mine} (limits)")
        if len(waiting) >= self.limits.max_jobs:
            raise self._busy(f"{len(waiting)} jobs wait already")

    @asynccontextmanager
    async def _upload(self, request: HttpRequest, client: Client) -> AsyncIterator[Upload]:
        if self._uploading[client.name] >= self.limits.max_jobs_per_client:
            raise self._busy(f"{self._uploading[client.name]} uploads of yours are under way")
        self._uploading[client.name] += 1
        folder = await asyncio.to_thread(self.store.incoming)
        try:
            yield await receive(
                request, folder, max_bytes=self.limits.max_upload_bytes, timeout_s=self.limits.upload_s
            )
        finally:
            self._uploading[client.name] -= 1
            self._uploading += Counter()  # forgets those who have none
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def _busy(self, reason: str) -> ApiError:
        return ApiError(
            429,
            f"{reason}; try again later, or cancel a job",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(self.limits.retry_after_s)},
        )

    def _read(self, job_id: str) -> tuple[Request | None, State | None]:
        if not re.fullmatch(JOB_ID, job_id):
            return None, None
        return self.store.request(job_id), self.store.state(job_id)

    def _expired(self, state: State) -> bool:
        expires = self.store.expires(state, self.limits.ttl_s)
        return expires is not None and expires < time.time()
