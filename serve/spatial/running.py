"""A job from its claim to its end; runs in a Ray task."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tenfold.platform.errors import DataError, TenfoldError
from tenfold.serve.spatial.analyser import RESULT_FILES, VIEW_FILE, Cancelled, SpatialAnalyser
from tenfold.serve.spatial.config import SpatialConfig
from tenfold.serve.spatial.jobs import JobStore, State
from tenfold.serve.spatial.params import field_errors, invalid

logger = logging.getLogger(__name__)

ALWAYS_WRITTEN = [name for form, name in RESULT_FILES.items() if form != "npz"]
OWNERSHIP_SECONDS = 0.5  # between two looks at whether the job was cancelled
TELL_SECONDS = 0.5  # between two progress reports


class TookTooLong(Exception):
    """The job used all the time it may have."""


def run_job(store: JobStore, analyser: SpatialAnalyser, job_id: str, config: SpatialConfig) -> None:
    """Run one job, if it still waits; how it ends is written into its folder.

    Args:
        store: the jobs.
        analyser: what does the work.
        job_id: the job.
        config: limits and times.
    """
    claimed = store.claim(job_id, config.jobs.max_attempts)
    request = store.request(job_id)
    if claimed is None or request is None:
        return
    owner = str(claimed.owner)
    logger.info("job %s begins, attempt %d", job_id, claimed.attempt)
    try:
        with _Reporter(store, job_id, claimed, config).reporting() as progress:
            folder = store.attempt_folder(job_id, owner)
            analyser.run(store.upload(job_id, request), request.params, folder, progress)
        missing = [name for name in (*ALWAYS_WRITTEN, VIEW_FILE) if not (folder / name).is_file()]
        if missing:
            raise RuntimeError(f"the analysis did not write {', '.join(missing)}")
        store.succeed(job_id, owner)
    except Cancelled:
        logger.info("job %s was cancelled", job_id)
    except DataError as error:
        problems = field_errors(error, store.upload(job_id, request))
        message = invalid(problems)
        store.fail(job_id, str(message), "invalid_data", [item._asdict() for item in problems], owner=owner)
    except TookTooLong:
        text = f"it took longer than {config.limits.job_s:g} s (limits.job_s); use fewer epochs or a smaller section"
        store.fail(job_id, text, "timeout", owner=owner)
    except TenfoldError as error:
        store.fail(job_id, str(error), "analysis_failed", owner=owner)
    except MemoryError:
        text = "the section needs more memory than the job has; send fewer cells or genes"
        store.fail(job_id, text, "out_of_memory", owner=owner)
    except Exception:
        logger.exception("job %s failed", job_id)
        store.fail(job_id, "the analysis failed; the server's log says why", "analysis_failed", owner=owner)
    finally:
        store.leave(job_id, owner)


class _Reporter:
    """Passes on progress and signs of life, and finds out when to stop.

    Files are written by a thread: an epoch never waits for the disk, and a long step without news still shows life.
    """

    def __init__(self, store: JobStore, job_id: str, claimed: State, config: SpatialConfig) -> None:
        self._store = store
        self._job_id = job_id
        self._owner = str(claimed.owner)
        self._deadline = time.monotonic() + config.limits.job_s
        self._beat_s = config.jobs.heartbeat_s
        self._latest: dict[str, Any] = {}
        self._news = threading.Event()
        self._end = threading.Event()
        self._looked = 0.0

    def progress(self, news: dict[str, Any]) -> None:
        """Take news from the analysis.

        Raises:
            Cancelled: the job is no longer wanted, or another task has it.
            TookTooLong: the time is over.
        """
        now = time.monotonic()
        # Later stages have no loss; the last one stays to be seen.
        self._latest = {**self._latest, **news}
        self._news.set()
        if now > self._deadline:
            raise TookTooLong
        if now - self._looked >= OWNERSHIP_SECONDS:
            self._looked = now
            if not self._store.is_owner(self._job_id, self._owner):
                raise Cancelled

    @contextmanager
    def reporting(self) -> Iterator[Any]:
        """Report while the block runs; yields `progress`."""
        thread = threading.Thread(target=self._write, name="progress", daemon=True)
        thread.start()
        try:
            yield self.progress
        finally:
            self._end.set()
            self._news.set()
            thread.join()

    def _write(self) -> None:
        while not self._end.is_set():
            self._news.wait(self._beat_s)
            self._news.clear()
            self._tell()
            self._end.wait(TELL_SECONDS)
        self._tell()

    def _tell(self) -> None:
        try:
            if self._store.is_owner(self._job_id, self._owner):
                self._store.tell(self._job_id, self._latest)
        except OSError as error:  # a full or absent disk: the analysis may still get through
            logger.warning("job %s: its progress cannot be written: %s", self._job_id, error)
