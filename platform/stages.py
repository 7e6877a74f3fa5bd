"""Stages of a method: each is an MLflow run below the method's own, resumes alone, and can be shared by several runs.

A shared stage lives in the cache under a digest of all that decides it, so that a second run, and every trial of a
sweep, takes what is there. Any other stage lives in its run's folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.platform.method import Outcome
from tenfold.platform.run import flatten, keep_outcome, only_one, outcome_in, spool_path, status_after
from tenfold.platform.storage import Storage

if TYPE_CHECKING:
    from tenfold.platform.context import RunContext

logger = logging.getLogger(__name__)

STATE = "stage.json"


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: for people, and of its MLflow run.
        decides: plain data: everything that its result depends on, with digests of models and data.
        work: does it, in a context with a storage and an MLflow run of its own; called again, it goes on from there.
        shared: keep it where other runs find it; then its reports do not go to a sweep.
    """

    name: str
    decides: Mapping[str, Any]
    work: Callable[[RunContext], Outcome]
    shared: bool = False


@dataclass(frozen=True)
class StageResult:
    """A stage that has been done.

    Attributes:
        storage: its folder.
        outcome: what its work gave back; paths are relative to `storage`.
        mlflow_run_id: of its MLflow run.
        reused: another run, or an earlier start, had done it.
    """

    storage: Storage
    outcome: Outcome
    mlflow_run_id: str
    reused: bool

    @property
    def model_folder(self) -> str:
        """Address of the stage's model."""
        assert self.outcome.model is not None
        return self.storage.uri_of(self.outcome.model)


def digest_of(decides: Mapping[str, Any]) -> str:
    """Return the name of everything that decides a result, 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]


def run_stage(context: RunContext, stage: Stage) -> StageResult:
    """Do a stage, go on with it, or take it as it is there; waits for another process that works on it.

    Raises:
        TenfoldError: what stopped the work; started again, the stage goes on where it was.
    """
    name = f"{stage.name}-{digest_of({**stage.decides, 'seed': context.seed})}"
    home, path = (
        (context.cache, f"stages/{context.method}/{name}") if stage.shared else (context.storage, f"stages/{name}")
    )
    storage = Storage(home.uri_of(path))
    with only_one(home, path, wait=True):
        state = json.loads(storage.read_text(STATE)) if storage.exists(STATE) else None
        if state is not None and state["status"] == "finished":
            logger.info("%s: done already (%s)", stage.name, storage.uri)
            context.tracker.set_tags({f"tenfold.stage.{stage.name}": state["mlflow_run_id"]})
            return StageResult(storage, outcome_in(state), state["mlflow_run_id"], reused=True)
        return StageResult(storage, *_work(context, stage, storage, state), reused=False)


def _work(context: RunContext, stage: Stage, storage: Storage, state: dict[str, Any] | None) -> tuple[Outcome, str]:
    is_known = state is not None and state["mlflow_uri"] == context.tracker.uri
    tracker = context.tracker.child(
        f"{context.run_id}/{stage.name}",
        run_id=state["mlflow_run_id"] if state is not None and is_known else None,
        tags={"tenfold.stage": stage.name, "tenfold.method": context.method, "tenfold.storage": storage.uri},
        spool=Path(spool_path(storage)),
    )
    tracker.log_params(flatten({**stage.decides, "seed": context.seed}))
    context.tracker.set_tags({f"tenfold.stage.{stage.name}": tracker.run_id})
    state = {"status": "running", "mlflow_run_id": tracker.run_id, "mlflow_uri": tracker.uri}
    storage.write_text(STATE, json.dumps(state, indent=1))
    logger.info("%s: starts (%s)", stage.name, storage.uri)
    own = replace(context, storage=storage, tracker=tracker, trial=None if stage.shared else context.trial)
    try:
        outcome = stage.work(own)
    except BaseException as error:
        tracker.finish(status_after(error))
        raise
    keep_outcome(outcome, tracker, storage, STATE, state)
    return outcome, tracker.run_id


def run_stages(context: RunContext, stages: Sequence[Stage], *, at_once: bool) -> list[StageResult]:
    """Do stages that do not need each other; results in their order.

    Args:
        context: the run.
        stages: each trains with the run's `compute`.
        at_once: side by side, if the cluster has room for all of them.

    Raises:
        TenfoldError: the first stage that failed. The others end first: what they have done is kept.
    """
    if len(stages) < 2 or not at_once or not _has_room(context, len(stages)):
        return [run_stage(context, stage) for stage in stages]
    logger.info("%s: side by side", " and ".join(stage.name for stage in stages))
    pool = ThreadPoolExecutor(len(stages))
    try:
        futures = [pool.submit(run_stage, context, stage) for stage in stages]
        wait(futures)
        return [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _has_room(context: RunContext, jobs: int) -> bool:
    """Say whether so many training jobs of the run's `compute` fit into the cluster at once."""
    import ray

    compute, there = context.compute, ray.cluster_resources()
    needed = {"CPU": compute.cpus_per_worker, "GPU": compute.gpus_per_worker}
    return all(jobs * compute.max_workers * number <= there.get(name, 0.0) for name, number in needed.items())
