"""Jobs as folders: what was sent, how far it is, what came out. Every process of the cluster reads and writes them.

    STORAGE/incoming/RANDOM/   an upload that is not complete or not checked yet
    STORAGE/jobs/ID/           request.json, upload/, state.json, progress.json, result/
    STORAGE/trash/RANDOM/      being deleted

Files are replaced whole, folders renamed: a reader sees all or nothing. A job has at most one owner, the task that
claimed it last; whoever changes the state takes the ownership away, and a task that is no longer the owner stops and
leaves no trace. So cancelling, restarting and two tasks for one job need no locks.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tenfold.platform.storage import Storage

Status = Literal["queued", "running", "done", "failed", "cancelled"]
UNFINISHED = ("queued", "running")
ABANDONED_SECONDS = 3600.0  # after an upload was allowed to end


@dataclass(frozen=True)
class Request:
    """What a client asked for; never changes.

    Attributes:
        files: what was sent -> name of the file in `upload/`.
        names: what was sent -> what the client calls it.
        params: set options.
        client: who asked.
        holder: whose API key was used; only they see the job. None where there are no keys.
        summary: what the check found out.
        created: seconds since 1970.
    """

    files: dict[str, str]
    names: dict[str, str]
    params: dict[str, Any]
    client: str
    holder: str | None
    summary: dict[str, Any]
    created: float


@dataclass(frozen=True)
class State:
    """How far a job is.

    Attributes:
        status: of the job.
        owner: token of the task that runs it.
        attempt: how often it was started.
        started: when the last attempt began.
        finished: when it ended, in whatever way.
        error: `message`, `code` and perhaps `errors` of a failed one.
    """

    status: Status
    owner: str | None = None
    attempt: int = 0
    started: float | None = None
    finished: float | None = None
    error: dict[str, Any] | None = field(default=None)


class JobStore:
    """The jobs in a folder.

    Args:
        root: a folder on a disk that all nodes share.
    """

    def __init__(self, root: str | Path) -> None:
        self._storage = Storage(root)
        self.root = Path(root)

    def prepare(self) -> None:
        """Make the folders and find out whether they can be written.

        Raises:
            ConfigError: they cannot.
        """
        self._storage.check_writable()
        for name in ("jobs", "incoming", "trash"):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    # What a job consists of

    def folder(self, job_id: str) -> Path:
        """Return the folder of a job."""
        return self.root / "jobs" / job_id

    def result(self, job_id: str) -> Path:
        """Return the folder with the results of a job that is done."""
        return self.folder(job_id) / "result"

    def upload(self, job_id: str, request: Request) -> dict[str, Path]:
        """Return what was sent, by name."""
        return {name: self.folder(job_id) / "upload" / file for name, file in request.files.items()}

    def request(self, job_id: str) -> Request | None:
        """Return what was asked for; None where there is no such job."""
        data = self._read(job_id, "request.json")
        return None if data is None else Request(**data)

    def state(self, job_id: str) -> State | None:
        """Return how far a job is; None where there is no such job."""
        data = self._read(job_id, "state.json")
        return None if data is None else State(**data)

    def progress(self, job_id: str) -> dict[str, Any]:
        """Return what the owner said last, with `time`, its last sign of life."""
        return self._read(job_id, "progress.json") or {}

    def ids(self) -> Iterator[str]:
        """Yield the ids of all jobs."""
        folder = self.root / "jobs"
        if folder.is_dir():
            yield from sorted(path.name for path in folder.iterdir())

    def unfinished(self) -> list[str]:
        """Return the jobs that wait or run, the oldest first."""
        waiting = [(request.created, job_id) for job_id, request in self._unfinished()]
        return [job_id for _, job_id in sorted(waiting)]

    def unfinished_clients(self) -> list[str]:
        """Return who waits, once for each job."""
        return [request.client for _, request in self._unfinished()]

    def _unfinished(self) -> Iterator[tuple[str, Request]]:
        for job_id in self.ids():
            state = self.state(job_id)
            request = self.request(job_id) if state is not None and state.status in UNFINISHED else None
            if request is not None:
                yield job_id, request

    # What clients do

    def incoming(self) -> Path:
        """Return a new folder for an upload."""
        folder = self.root / "incoming" / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return folder

    def add(self, incoming: Path, job_id: str, request: Request) -> bool:
        """Make a job of an upload.

        Args:
            incoming: its folder; its files move into the job.
            job_id: the name of the job.
            request: what was asked for.

        Returns:
            Whether it is new. An old one stays as it is, and the upload where it is.
        """
        draft = self.root / "incoming" / uuid.uuid4().hex
        (draft / "upload").mkdir(parents=True)
        for file in request.files.values():
            (incoming / file).rename(draft / "upload" / file)
        for name, data in (("request.json", request), ("state.json", State("queued"))):
            (draft / name).write_text(json.dumps(asdict(data)), encoding="utf-8")
        try:
            draft.rename(self.folder(job_id))
        except OSError:  # not empty: another replica was faster
            shutil.rmtree(draft, ignore_errors=True)
            return False
        return True

    def restart(self, job_id: str) -> None:
        """Let a job that failed or was cancelled begin again."""
        self._discard(self.result(job_id))
        self._write(job_id, "progress.json", {})
        self._write(job_id, "state.json", asdict(State("queued")))

    def keep(self, job_id: str) -> None:
        """Let the time until a finished job is deleted begin again."""
        state = self.state(job_id)
        if state is not None and state.status not in UNFINISHED:
            self._write(job_id, "state.json", asdict(replace(state, finished=time.time())))

    def cancel(self, job_id: str) -> None:
        """End a job that waits or runs; its task stops when it looks."""
        state = self.state(job_id)
        if state is not None and state.status in UNFINISHED:
            ended = replace(state, status="cancelled", owner=None, finished=time.time())
            self._write(job_id, "state.json", asdict(ended))

    def delete(self, job_id: str) -> None:
        """Remove a job with all its files."""
        self._discard(self.folder(job_id))

    # What tasks do

    def claim(self, job_id: str, max_attempts: int) -> State | None:
        """Become the owner of a job that waits, or whose owner was lost.

        Args:
            job_id: the job.
            max_attempts: more starts make it fail.

        Returns:
            Its state with the new owner; None where there is nothing to do.
        """
        state = self.state(job_id)
        if state is None or state.status not in UNFINISHED:
            return None
        if state.attempt >= max_attempts:
            self.fail(
                job_id,
                f"its worker was lost {state.attempt} times, perhaps because the memory of the node was full; send a "
                f"smaller section, or ask the operator for more memory (jobs.memory_gb)",
                "worker_lost",
            )
            return None
        for remains in self.folder(job_id).glob("attempt-*"):
            shutil.rmtree(remains, ignore_errors=True)
        claimed = State("running", owner=uuid.uuid4().hex, attempt=state.attempt + 1, started=time.time())
        self._write(job_id, "progress.json", {"time": time.time()})
        self._write(job_id, "state.json", asdict(claimed))
        return claimed

    def is_owner(self, job_id: str, owner: str) -> bool:
        """Say whether a task may still work for a job."""
        state = self.state(job_id)
        return state is not None and state.owner == owner

    def attempt_folder(self, job_id: str, owner: str) -> Path:
        """Return an empty folder into which an owner writes before it has all results."""
        folder = self.folder(job_id) / f"attempt-{owner}"
        folder.mkdir()
        return folder

    def tell(self, job_id: str, progress: Mapping[str, Any]) -> None:
        """Write what is going on, and that the owner lives; for the owner."""
        self._write(job_id, "progress.json", {**progress, "time": time.time()}, durable=False)

    def succeed(self, job_id: str, owner: str) -> None:
        """Publish what an owner wrote; what was sent is not needed any more."""
        state = self.state(job_id)
        if state is None or state.owner != owner:
            return
        self._discard(self.result(job_id))
        (self.folder(job_id) / f"attempt-{owner}").rename(self.result(job_id))
        self._write(job_id, "state.json", asdict(replace(state, status="done", owner=None, finished=time.time())))
        self._discard(self.folder(job_id) / "upload")

    def fail(
        self,
        job_id: str,
        message: str,
        code: str,
        errors: list[dict[str, str]] | None = None,
        *,
        owner: str | None = None,
    ) -> None:
        """End a job that cannot be done.

        Args:
            job_id: the job.
            message: what went wrong and what to do.
            code: a word for programs.
            errors: wrong fields, where it is the data's fault.
            owner: who says so; only counts while it is the owner. None counts always.
        """
        state = self.state(job_id)
        if state is None or state.status not in UNFINISHED or (owner is not None and state.owner != owner):
            return
        error: dict[str, Any] = {"message": message, "code": code}
        if errors:
            error["errors"] = errors
        ended = replace(state, status="failed", owner=None, finished=time.time(), error=error)
        self._write(job_id, "state.json", asdict(ended))

    def leave(self, job_id: str, owner: str) -> None:
        """Remove what an owner wrote and did not publish."""
        shutil.rmtree(self.folder(job_id) / f"attempt-{owner}", ignore_errors=True)

    # What time does

    def expires(self, state: State, ttl_s: float) -> float | None:
        """Return when a job will be deleted; None while it is not finished."""
        return None if state.finished is None else state.finished + ttl_s

    def sweep(self, *, ttl_s: float, upload_s: float, now: float | None = None) -> int:
        """Delete what is old: finished jobs, uploads whose replica died, remains of deletions.

        Args:
            ttl_s: seconds from the end of a job.
            upload_s: seconds that an upload may take.
            now: seconds since 1970; default: the clock's.

        Returns:
            How many jobs are left.
        """
        now = time.time() if now is None else now
        left = 0
        for job_id in self.ids():
            state = self.state(job_id)
            expires = None if state is None else self.expires(state, ttl_s)
            if expires is not None and expires < now:
                self.delete(job_id)
            else:
                left += 1
        for folder in (self.root / "incoming").glob("*"):
            if _age(folder, now) > upload_s + ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
        for folder in (self.root / "trash").glob("*"):
            shutil.rmtree(folder, ignore_errors=True)
        return left

    def _discard(self, folder: Path) -> None:
        # A name elsewhere first, so that nobody sees half of it.
        trash = self.root / "trash" / uuid.uuid4().hex
        trash.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.rename(trash)
        except FileNotFoundError:
            return
        shutil.rmtree(trash, ignore_errors=True)

    def _read(self, job_id: str, name: str) -> dict[str, Any] | None:
        try:
            return dict(json.loads((self.folder(job_id) / name).read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _write(self, job_id: str, name: str, data: Mapping[str, Any], *, durable: bool = True) -> None:
        folder = self.folder(job_id)
        if not folder.is_dir():  # deleted in the meantime: it must not come back
            return
        if durable:
            self._storage.write_text(f"jobs/{job_id}/{name}", json.dumps(data))
            return
        draft = folder / f".{name}.{uuid.uuid4().hex[:8]}"
        draft.write_text(json.dumps(data), encoding="utf-8")
        draft.replace(folder / name)


def job_id_of(digests: Mapping[str, str], files: Mapping[str, str], params: Mapping[str, Any], owner: str) -> str:
    """Return the name of a job: equal for equal content, options and owner.

    Args:
        digests: SHA-256 of each file that was sent.
        files: what was sent -> stored name, whose ending says how it is read.
        params: set options.
        owner: what else tells jobs apart: the method, and whose API key was used.
    """
    identity = json.dumps([dict(digests), dict(files), dict(params), owner], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def _age(path: Path, now: float) -> float:
    try:
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
