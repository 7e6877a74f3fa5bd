"""Jobs in Ray tasks, under a supervisor that outlives the replicas.

The supervisor is one detached actor a storage. It compares what waits in the storage with the tasks it has started,
and starts what is missing: new jobs, and those whose supervisor was lost. Nothing is only in its memory. So

* a replica that dies takes no job with it: the supervisor owns the tasks;
* a worker that dies has its task retried by Ray, `jobs.max_attempts` starts in all;
* a supervisor that dies is restarted by Ray, or made anew by the first replica that needs it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tenfold.platform.errors import ClusterError
from tenfold.serve.spatial.analyser import load_analyser
from tenfold.serve.spatial.config import GIBIBYTE, SpatialConfig, parse_spatial_config
from tenfold.serve.spatial.jobs import JobStore
from tenfold.serve.spatial.room import Waiting
from tenfold.serve.spatial.running import run_job

logger = logging.getLogger(__name__)

NAMESPACE = "tenfold-spatial"
LOOK_SECONDS = 2.0
SWEEP_SECONDS = 60.0
IDLE_SECONDS = 600.0  # without any job, even finished ones, until the supervisor ends
START_SECONDS = 60.0
REPLACE_SECONDS = 0.5


class Supervisor:
    """Starts tasks for jobs; a detached Ray actor."""

    def __init__(self, config: dict[str, Any]) -> None:
        logging.getLogger("tenfold").setLevel(logging.INFO)
        self._data = config
        self._config = parse_spatial_config(config)
        self._store = JobStore(self._config.storage)
        self._tasks: dict[str, Any] = {}
        self._waiting = Waiting(self._store, self._config.jobs)
        self._news = threading.Event()
        threading.Thread(target=self._work, name="supervisor", daemon=True).start()

    def wake(self) -> None:
        """Look for new jobs now."""
        self._news.set()

    def identity(self) -> str:
        """Return what the supervisor was made from."""
        return identity_of(self._data)

    def _work(self) -> None:
        limits = self._config.limits
        swept = busy = time.monotonic()
        while time.monotonic() - busy < IDLE_SECONDS:
            try:
                self._collect()
                self._start_missing()
                self._waiting.look(self._tasks, time.monotonic())
                if time.monotonic() - swept >= min(SWEEP_SECONDS, limits.ttl_s):
                    swept = time.monotonic()
                    if self._store.sweep(ttl_s=limits.ttl_s, upload_s=limits.upload_s):
                        busy = swept
            except Exception:  # a disk that is full or away comes back
                logger.exception("looking after the jobs failed; trying again")
            self._news.wait(LOOK_SECONDS)
            self._news.clear()
        self._leave()

    def _start_missing(self) -> None:
        for job_id in self._store.unfinished():
            if job_id not in self._tasks:
                self._tasks[job_id] = _job_task(self._config).remote(self._data, job_id)

    def _collect(self) -> None:
        import ray

        jobs = {task: job_id for job_id, task in self._tasks.items()}
        ended, _ = ray.wait(list(jobs), num_returns=len(jobs), timeout=0) if jobs else ([], [])
        for task in ended:
            job_id = jobs[task]
            del self._tasks[job_id]
            try:
                ray.get(task)
            except ray.exceptions.RayError as error:
                logger.error("the task of job %s failed: %s", job_id, error)
                self._store.fail(job_id, "the job could not be run; the server's log says why", "worker_lost")

    def _leave(self) -> None:
        import ray

        ray.kill(ray.get_runtime_context().current_actor)


class RayJobs:
    """The supervisor as a replica sees it.

    Args:
        config: of the application.
    """

    def __init__(self, config: SpatialConfig) -> None:
        self._data = config.model_dump(mode="json", exclude_unset=True)
        place = hashlib.sha256(config.storage.encode()).hexdigest()[:16]
        self._name = f"supervisor-{place}"

    def start(self) -> None:
        """Make sure that a supervisor with this configuration is there; one with another is replaced.

        Raises:
            ClusterError: there is none after a minute.
        """
        import ray

        deadline = time.monotonic() + START_SECONDS
        mine = identity_of(self._data)
        while True:
            supervisor = self._supervisor()
            try:
                there = ray.get(supervisor.identity.remote(), timeout=START_SECONDS)
            except ray.exceptions.RayError as error:  # also one that was killed a moment ago and keeps its name yet
                there = f"none ({error})"
            if there == mine:
                return
            if time.monotonic() > deadline:
                raise ClusterError(f"the supervisor of the jobs does not start: {there}. Ray's logs say why")
            logger.info("the supervisor of the jobs is not this configuration's, it is replaced")
            ray.kill(supervisor)
            time.sleep(REPLACE_SECONDS)

    def wake(self) -> None:
        """Make sure that a supervisor is there, and let it look for new jobs."""
        self._supervisor().wake.remote()

    def _supervisor(self) -> Any:
        import ray

        actor: Any = ray.remote(Supervisor)
        return actor.options(
            name=self._name,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_task_retries=-1,
            num_cpus=0,
        ).remote(self._data)


def identity_of(data: dict[str, Any]) -> str:
    """Return a digest of a configuration and of the installed version."""
    try:
        installed = version("tenfold")
    except PackageNotFoundError:
        installed = ""
    return hashlib.sha256(json.dumps([data, installed], sort_keys=True).encode()).hexdigest()


def run_job_here(data: dict[str, Any], job_id: str) -> None:
    """Run a job in this process; the Ray task."""
    logging.getLogger("tenfold").setLevel(logging.INFO)
    config = parse_spatial_config(data)
    store = JobStore(config.storage)
    run_job(store, load_analyser(config.method), job_id, config)
    _count(store, job_id)


def _job_task(config: SpatialConfig) -> Any:
    import ray

    jobs = config.jobs
    task: Any = ray.remote(run_job_here)
    return task.options(
        name="spatial-job",
        num_cpus=jobs.cpus,
        num_gpus=jobs.gpus,
        memory=None if jobs.memory_gb is None else int(jobs.memory_gb * GIBIBYTE),
        # The attempts are counted in the job's folder, where they survive the supervisor.
        max_retries=-1,
    )


def _count(store: JobStore, job_id: str) -> None:
    from ray.util import metrics

    state = store.state(job_id)
    if state is not None:
        tags: Any = ("status",)
        counter = metrics.Counter("tenfold_spatial_jobs", description="jobs by how they ended", tag_keys=tags)
        counter.inc(1, tags={"status": state.status})
