"""`tenfold submit`: an experiment as a job of a Ray cluster, checked here, followed to its end.

What is sent is one folder, the `working_dir` of the job's runtime environment: the packages of the tenfold that runs
here, as they were imported, its metadata, and the resolved experiment. Not a wheel, because Ray installs a wheel in
`py_modules` with all its dependencies on every node, and does not send a changed one of the same name again; a
`working_dir` is named by a hash of its content. And not a build, because one rule then serves an installed tenfold as
well as a source tree, needs no build tools, and the code that checked the experiment is the code that runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from tenfold.platform.cluster import token_path
from tenfold.platform.deadline import run_with_deadline
from tenfold.platform.errors import ClusterError, ConfigError, TenfoldError
from tenfold.platform.experiment import LoadedExperiment
from tenfold.platform.method import PlanSection
from tenfold.platform.run import check_job_addresses, plan, read_state, refuse_ended
from tenfold.platform.storage import Storage
from tenfold.platform.tracking_store import one_line
from tenfold.platform.tuning.study import STATE as SWEEP_STATE
from tenfold.platform.tuning.study import plan_sweep, refuse_finished_sweep, sweep_identity

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

PARTS = ("platform", "methods", "serve", "samples")
EXPERIMENT = "experiment.yaml"
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray puts them above an address that it is given
ANSWER_SECONDS = 30
LOST_SECONDS = 20.0  # without an answer, before a head counts as lost
RUN, STORAGE, NEW = "tenfold.run", "tenfold.storage", "tenfold.new"
# `ray job stop` then ends a run as Ctrl-C does: its MLflow run ends, its lock is given back.
JOB_ENVIRONMENT = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "30"}


def check(loaded: LoadedExperiment, *, sweep: bool, new: bool, blind: bool) -> list[PlanSection]:
    """Find every mistake that can be seen from here; sends nothing.

    The plan is made in an empty folder, as the job will find itself in one.

    Args:
        loaded: a checked experiment.
        sweep: it is to be run as a sweep.
        new: it may have been run before.
        blind: this machine sees neither the experiment's data nor its storage: only the addresses are looked at.

    Returns:
        The plan; empty for `blind`.

    Raises:
        TenfoldError: the first thing that does not fit, or the run (the sweep) has ended already.
    """
    check_job_addresses(loaded.experiment)
    if blind:
        return []
    with tempfile.TemporaryDirectory(prefix="tenfold-submit-") as name:
        folder = str(Path(name).resolve())
        with contextlib.chdir(folder), _without_addresses():
            try:
                sections = plan_sweep(loaded) if sweep else plan(loaded)
            except TenfoldError as error:
                if folder not in str(error):
                    raise
                raise ConfigError(
                    f"{str(error).replace(folder, 'the empty folder of the job')}. Your files do not travel with a "
                    f"job: give absolute paths that all nodes see, or URIs"
                ) from error
    if not new:
        top = Storage(loaded.experiment.storage)
        if sweep:
            refuse_finished_sweep(top, sweep_identity(loaded), read_state(top, sweep_identity(loaded), SWEEP_STATE))
        else:
            refuse_ended(top, loaded.run_id, read_state(top, loaded.run_id))
    return sections


def job_server(address: str | None = None) -> str:
    """Return the address of the cluster's job server: the one given, RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or here.

    Raises:
        ClusterError: it is not the kind of address that takes jobs.
    """
    given = [("--address", address), *((name, os.environ.get(name)) for name in VARIABLES)]
    source, found = next(((name, value) for name, value in given if value), ("", DEFAULT_ADDRESS))
    if not found.startswith(("http://", "https://")):
        raise ClusterError(
            f"{source} = {found!r}: jobs go to the address of the cluster's dashboard: --address http://HEAD:8265"
        )
    return found.rstrip("/")


@dataclass(frozen=True)
class JobServer:
    """The job server of a cluster.

    Attributes:
        address: http://HEAD:8265.
        client: Ray's.
    """

    address: str
    client: JobSubmissionClient

    @classmethod
    def at(cls, address: str) -> JobServer:
        """Connect.

        Raises:
            ClusterError: nothing answers there, it is no Ray dashboard, or it refuses us.
        """
        from ray.job_submission import JobSubmissionClient

        with _without_addresses():
            try:
                ask = f"asking {address}"
                return cls(address, run_with_deadline(lambda: JobSubmissionClient(address), ANSWER_SECONDS, ask))
            except Exception as error:
                raise _explained(address, error) from error

    def submit(self, loaded: LoadedExperiment, *, sweep: bool, new: bool) -> tuple[str, bool]:
        """Send an experiment, unless a job runs it already.

        A job is named after its run; a run that is submitted again, because its job failed or its cluster was lost,
        resumes from storage under the next free name.

        Args:
            loaded: a checked experiment.
            sweep: run it as a sweep.
            new: start afresh beside an earlier run.

        Returns:
            The job's submission id, and whether it was there before.

        Raises:
            ClusterError: the job server does not take it.
        """
        run_id = sweep_identity(loaded) if sweep else loaded.run_id
        metadata = {RUN: run_id, STORAGE: loaded.experiment.storage, NEW: str(new)}
        command = f"python -m tenfold.platform.cli {'sweep' if sweep else 'run'} {EXPERIMENT}{' --new' if new else ''}"
        with tempfile.TemporaryDirectory(prefix="tenfold-submit-") as folder:
            pack(loaded, Path(folder))
            while True:
                try:
                    jobs = self.client.list_jobs()
                    running = [job for job in jobs if _is_of(job, metadata)]
                    if running and not new:
                        return str(running[0].submission_id), True
                    job_id = self.client.submit_job(
                        entrypoint=command,
                        submission_id=_free_name(run_id, jobs),
                        runtime_env={"working_dir": folder, "env_vars": JOB_ENVIRONMENT},
                        metadata=metadata,
                    )
                    return job_id, False
                except Exception as error:
                    if "already exists" not in str(error):  # another `submit` was quicker: look again
                        raise _explained(self.address, error) from error

    def follow(self, job_id: str, show: Callable[[str], None]) -> int:
        """Show a job's log from its beginning until it has ended, and return the exit code of its command.

        Args:
            job_id: submission id.
            show: gets pieces of the log.

        Raises:
            ClusterError: the job could not be started, or contact with the cluster was lost.
        """
        shown = 0

        async def tail() -> None:
            nonlocal shown
            before, passed = shown, 0
            async for text in self.client.tail_job_logs(job_id):
                news = text[max(before - passed, 0) :]  # a new contact tells everything again
                passed += len(text)
                if news:
                    show(news)
                    shown += len(news)

        while True:
            with contextlib.suppress(Exception):  # whatever broke the contact: the job's state says what is next
                asyncio.run(tail())
            job = self._state(job_id)
            if job.status.is_terminal():
                return _exit_code(job)
            time.sleep(1)

    def _state(self, job_id: str) -> JobDetails:
        """Return what the cluster knows of a job; a head that does not answer may only be busy."""
        end = time.monotonic() + LOST_SECONDS
        while True:
            try:
                return run_with_deadline(
                    lambda: self.client.get_job_info(job_id), ANSWER_SECONDS, "asking for the job"
                )
            except Exception as error:
                gone = "does not exist" in str(error)
                if not gone and time.monotonic() < end:
                    time.sleep(1)
                    continue
                what = "its head was started anew and does not know the job" if gone else one_line(error)
                raise ClusterError(
                    f"job {job_id}: contact with {self.address} was lost: {what}. A job ends with its head: when it "
                    f"is back, the same command submits the run again, and it resumes from its storage"
                ) from error


def pack(loaded: LoadedExperiment, folder: Path) -> None:
    """Put what a job needs into an empty folder: tenfold as it is imported here, and the resolved experiment."""
    for part in PARTS:
        spec = importlib.util.find_spec(f"tenfold.{part}")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        source = next(iter(spec.submodule_search_locations))
        shutil.copytree(source, folder / "tenfold" / part, ignore=shutil.ignore_patterns("__pycache__"))
    distribution = importlib.metadata.distribution("tenfold")
    about = folder / f"tenfold-{distribution.version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(str(distribution.metadata), encoding="utf-8")  # an egg-info has no such file
    (folder / EXPERIMENT).write_text(yaml.safe_dump(loaded.resolved(), sort_keys=False), encoding="utf-8")


def _exit_code(job: JobDetails) -> int:
    code = job.driver_exit_code
    if code is not None:
        return code if code >= 0 else 128 - code  # ended by a signal: as shells say it
    if job.status.value == "FAILED":
        raise ClusterError(f"job {job.submission_id} failed without an exit code: {one_line(job.message)}")
    return 0 if job.status.value == "SUCCEEDED" else 1


def _is_of(job: JobDetails, metadata: dict[str, str]) -> bool:
    """Say whether a job works, or will work, on the run that the metadata tells of."""
    return not job.status.is_terminal() and (job.metadata or {}).items() >= metadata.items()


def _free_name(run_id: str, jobs: list[JobDetails]) -> str:
    taken, number, name = {job.submission_id for job in jobs}, 2, run_id
    while name in taken:
        name, number = f"{run_id}-{number}", number + 1
    return name


@contextlib.contextmanager
def _without_addresses() -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _explained(address: str, error: Exception) -> ClusterError:
    """Say what a refusal means and what to do."""
    from ray.exceptions import AuthenticationError

    path, is_on = token_path(), os.environ.get("RAY_AUTH_MODE") == "token"
    if isinstance(error, AuthenticationError):
        if "Authentication failed" in str(error):
            return ClusterError(
                f"{address}: refuses our token (403), which is another cluster's. Copy the head's to {path} "
                f"(RAY_AUTH_TOKEN_PATH names another file, RAY_AUTH_TOKEN the token itself)"
            )
        return ClusterError(
            f"{address}: wants a token, and none was sent (401). It needs RAY_AUTH_MODE=token here "
            f"({'it is set' if is_on else 'it is not set'}) and the head's token in {path} "
            f"({'there is one' if path.is_file() else 'there is none'}; RAY_AUTH_TOKEN_PATH names another file)"
        )
    if isinstance(error, ConnectionError):
        what = "nothing listens there"
    elif isinstance(error, TimeoutError):
        what = f"what listens there did not answer for {ANSWER_SECONDS} s"
    else:
        what = f"what listens there takes no Ray jobs: {one_line(error)}"
    return ClusterError(
        f"{address}: {what}. Give the address of the cluster's dashboard, which `ray start --head` prints: "
        f"--address http://HEAD:8265"
    )
