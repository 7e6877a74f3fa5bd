"""One training that is disturbed in every way there is, and must end by itself as if nothing had been.

`make chaos SEED=3 STEPS=60 ROUNDS=2` plays every kind of event twice at least, prints the timeline and writes it into
`build/chaos`. The test plays each kind once.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import chaos_job
from chaos_events import EVENTS
from chaos_plan import LOSSES, Planned, draw
from chaos_report import show_plan, show_timeline, write_figure, write_json
from chaos_scene import NODES, ROWS, SEED, Ended, Reference, Scene, options, scene, undisturbed
from chaos_verdict import Happened, Verdict, judge
from tenfold.platform.context import RunContext
from tenfold.platform.experiment import Compute, Workers
from tenfold.platform.run import only_one
from tenfold.platform.storage import Storage
from tenfold.platform.tracking import Tracker
from tenfold.platform.training.launch import TrainingJob, train_job

QUICK_SECONDS = 0.3  # a step, while nothing happens: some time in which something may


@dataclass
class Result:
    """What has happened, what holds, and what it was compared with."""

    happened: list[Happened]
    verdict: Verdict
    reference: Reference
    log: str


class Director(threading.Thread):
    """Plays the events, while the main thread trains.

    Args:
        scene: where.
        plan: which events.
        say: is called after each.

    Attributes:
        happened: those so far.
        error: what went wrong.
    """

    def __init__(self, scene: Scene, plan: list[Planned], say: Callable[[Happened], None]) -> None:
        super().__init__(name="director", daemon=True)
        self.happened: list[Happened] = []
        self.error: BaseException | None = None
        self._scene, self._plan, self._say = scene, plan, say
        self._begun = time.monotonic()

    def run(self) -> None:
        """Play them all; then the training may run to its end."""
        try:
            for planned in self._plan:
                self._play(planned)
        except BaseException as error:
            self.error = error
        finally:
            self._scene.permit(10**9, 0)

    def _play(self, planned: Planned) -> None:
        scene = self._scene
        scene.permit(planned.step + 1, QUICK_SECONDS)
        scene.wait(lambda: scene.progress()[2] >= planned.step, f"step {planned.step}")
        time.sleep(planned.delay_s)  # anywhere in a step, or between two
        name, attempt, step = scene.progress()
        happened = Happened(planned, time.monotonic() - self._begun, step, attempt.size, name, "")
        try:
            happened.told = EVENTS[planned.kind](scene, planned)
        except Ended as error:
            raise RuntimeError(f"event {planned.number} ({planned.kind}): {error}") from error
        self.happened.append(happened)
        self._say(happened)


def play(
    folder: Path, plan: list[Planned], steps: int, *, deepspeed: str = "zero2", say: Callable[[Happened], None]
) -> Result:
    """Train while the plan is carried out, and judge what has come out.

    Args:
        folder: for all files; may be deleted afterwards.
        plan: the events.
        steps: of the training.
        deepspeed: configuration of DeepSpeed.
        say: is called after each event.

    Raises:
        Exception: the training did not end by itself, or an event could not be played.
    """
    losses = sum(event.kind in LOSSES for event in plan)
    compute = Compute(workers=Workers(min=1, max=NODES), deepspeed=deepspeed, max_failures=2 * losses)
    with (
        scene(folder) as made,
        undisturbed(folder, steps, deepspeed, NODES) as wait_for_two,
        undisturbed(folder, steps, deepspeed, 1) as wait_for_one,
        logged(folder / "log"),
    ):
        tracker = Tracker.start(
            made.mlflow, "chaos", "chaos", artifact_root=str(folder / "artifacts"), spool=made.spool.path
        )
        context = RunContext("chaos", "chaos", SEED, compute, made.storage, Storage(folder / "cache"), tracker)
        config = {"rows": ROWS, "record": str(made.records), "permit": str(folder / "permit")}
        director = Director(made, plan, say)
        try:
            with only_one(made.storage.above(), made.storage.name):
                director.start()
                result = train_job(context, TrainingJob(chaos_job.build, config, options(steps)))
        finally:
            made.ended.set()
            if director.is_alive():
                director.join()
            # it comes before what it has led to; Ctrl-C has led to it
            if director.error is not None and not isinstance(sys.exception(), KeyboardInterrupt):
                raise director.error
        tracker.finish("FINISHED")
        status, history = mlflow_says(made.mlflow, tracker.run_id)
        checkpoint = made.storage.download(result.best.path, folder / "last-checkpoint")
        verdict = judge(
            made.records,
            wait_for_two(),
            wait_for_one(),
            director.happened,
            steps,
            checkpoint,
            history,
            status,
            len(made.spool.unsent()),
        )
    return Result(director.happened, verdict, wait_for_two(), (folder / "log").read_text())


def mlflow_says(uri: str, run_id: str) -> tuple[str, list[tuple[int, float]]]:
    """Return status and history of the loss, as anybody may read them."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    history = client.get_metric_history(run_id, "train/loss")
    return client.get_run(run_id).info.status, sorted((metric.step, metric.value) for metric in history)


@contextlib.contextmanager
def logged(path: Path):
    """Keep what the platform says on the driver."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("tenfold")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
        handler.close()


def main() -> None:
    """Play a long run and show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="decides what happens when")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--rounds", type=int, default=2, help="how often each kind of event happens at least")
    parser.add_argument("--deepspeed", default="zero2", help="zero0, zero1, zero2 or zero3")
    parser.add_argument("--output", type=Path, default=Path("build/chaos"), help="folder of timeline.png, chaos.json")
    given = parser.parse_args()
    try:
        plan = draw(given.seed, given.steps, given.rounds)
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that all is taken down
    show_plan(plan)
    given.output.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    begun, happened = time.monotonic(), []

    def say(event: Happened) -> None:
        happened.append(event)
        planned = event.planned
        where = f"{planned.number:3d} {time.monotonic() - begun:5.0f} s  step {event.step}, {event.size} worker(s)"
        print(f"{where}: {planned.kind}: {event.told}", flush=True)

    result = None
    try:
        result = play(folder, plan, given.steps, deepspeed=given.deepspeed, say=say)
    except KeyboardInterrupt:
        sys.exit("interrupted; the cluster is gone")
    finally:
        if (folder / "log").exists():
            shutil.copyfile(folder / "log", given.output / "log")
        shutil.rmtree(folder, ignore_errors=True)
        show_timeline(happened, result.verdict if result else None)
    write_json(given.output / "chaos.json", given.seed, plan, result.happened, result.verdict)
    write_figure(given.output / "timeline.png", given.seed, result.happened, result.verdict, result.reference)
    print(f"{time.monotonic() - begun:.0f} s; {given.output}/timeline.png, chaos.json, log")
    sys.exit(1 if result.verdict.failed else 0)


if __name__ == "__main__":
    main()
