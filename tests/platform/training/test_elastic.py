"""A cluster of two nodes on this machine, and what happens to a job when nodes and workers come, go and hang."""

import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tenfold.platform.context import RunContext
from tenfold.platform.errors import ClusterError
from tenfold.platform.experiment import Compute, Workers
from tenfold.platform.storage import Storage
from tenfold.platform.tracking import Tracker
from tenfold.platform.training import launch, room, watch
from tenfold.platform.training.checkpoints import list_checkpoints
from tenfold.platform.training.deepspeed_config import deepspeed_config
from tenfold.platform.training.launch import TrainingJob, train_job
from tenfold.platform.training.options import TrainingOptions

pytestmark = [pytest.mark.ray, pytest.mark.slow]

HERE = Path(__file__).parent
WAIT_SECONDS, STEPS, SAVED = 300, 40, 5
JOB = "train/train"
OPTIONS = TrainingOptions(
    max_steps=STEPS,
    per_device_train_batch_size=2,
    learning_rate=1e-2,
    adam_epsilon=1e-3,
    logging_steps=1,
    eval_strategy="no",
    save_strategy="steps",
    save_steps=SAVED,
    save_total_limit=100,
)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """A cluster whose head has one core; `add_node` adds others with one core each."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        patch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        patch.delenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", raising=False)  # as on clusters that one joins
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setattr(room, "SETTLE_SECONDS", 5.0)
        patch.setattr(watch, "GROW_SECONDS", 4.0)
        patch.setattr(launch, "PLACEMENT_SECONDS", 20.0)
        head = {
            "num_cpus": 1,
            "include_dashboard": False,
            # the default takes up to half a minute to find a node dead
            "_system_config": {"health_check_period_ms": 1000, "health_check_failure_threshold": 5},
        }
        # a node may be added from a thread, where no signal handler can be set
        cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
        try:
            ray.init(address=cluster.address, log_to_driver=False)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def start(tmp_path, tracking_uri):
    """Return start(compute, **plan) -> the context and the job of a toy whose files lie in `tmp_path`."""
    uri = tracking_uri(tmp_path)

    def make(compute, **plan):
        storage = Storage(tmp_path / "run")
        tracker = Tracker.start(uri, "toy", "toy", spool=tmp_path / "unsent.jsonl")
        context = RunContext("toy", "toy", 10, compute, storage, Storage(tmp_path / "cache"), tracker)
        import toy_job

        return context, TrainingJob(toy_job.build, {"record": str(tmp_path / "rows"), "rows": 10, **plan}, OPTIONS)

    return make


def wait_until(condition, what):
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.1)
    raise TimeoutError(what)


def recorded(folder):
    import toy_job

    return toy_job.recorded(folder)


def sizes(folder):
    import toy_job

    return toy_job.sizes(folder)


class Events(threading.Thread):
    """What happens to the cluster while the main thread trains; what it raises is raised again at its end."""

    def __init__(self, work):
        super().__init__(daemon=True)
        self._work, self.error = work, None
        self.start()

    def run(self):
        try:
            self._work()
        except BaseException as error:
            self.error = error

    def finish(self):
        self.join(WAIT_SECONDS)
        if self.error is not None:
            raise self.error


def undisturbed(folder):
    """Return losses and rows of all steps of the same job on two plain processes."""
    (folder / "plain").mkdir()
    job = {
        "build": "toy_job:build",
        "config": {"rows": 10, "record": str(folder / "plain" / "rows")},
        "options": {**OPTIONS.model_dump(mode="json"), "save_strategy": "no"},
        "deepspeed": deepspeed_config("zero2"),
        "seed": 10,
        "output": str(folder / "plain"),
    }
    (folder / "jobs.json").write_text(json.dumps([job]))
    command = [sys.executable, str(HERE / "training_ranks.py"), str(folder / "jobs.json"), "2"]
    subprocess.run(command, check=True, timeout=WAIT_SECONDS)
    return json.loads((folder / "plain" / "result.json").read_text())["losses"], recorded(folder / "plain" / "rows")[
        ""
    ]


def logged_losses(context):
    """Return step -> loss; a step that was done twice must have given nearly the same loss twice."""
    from mlflow import MlflowClient

    values = {}
    for metric in MlflowClient(context.tracker.uri).get_metric_history(context.tracker.run_id, "train/loss"):
        assert values.setdefault(metric.step, metric.value) == pytest.approx(metric.value, rel=1e-4)
    return values


def test_a_job_outlives_a_lost_node_grows_with_a_new_one_and_leaves_a_drained_one(nodes, start, tmp_path, caplog):
    import ray

    losses, expected = undisturbed(tmp_path)
    caplog.set_level("INFO", logger="tenfold")
    gate, first = tmp_path / "open", nodes.add_node(num_cpus=1)
    compute = Compute(workers=Workers(min=1, max=2), deepspeed="zero2")
    # steps after the first checkpoint are slow until all has happened: there is time for it, however busy this machine
    slow = {"from": SAVED + 1, "seconds": 1.0, "until": str(gate)}
    context, job = start(compute, slow=slow)
    drained = {}

    def records(attempt):
        return [record for record in list_checkpoints(context.storage, JOB) if attempt in record.path]

    def begun(*expected):
        """Say whether so many workers have got to work one after another; a start of the same size counts once."""
        return [size for size, _ in itertools.groupby(sizes(tmp_path / "rows").values())] == list(expected)

    def events():
        wait_until(lambda: list_checkpoints(context.storage, JOB), "a checkpoint of two workers")
        nodes.remove_node(first, allow_graceful=False)
        wait_until(lambda: begun(2, 1), "training after the loss")
        second = nodes.add_node(num_cpus=1)
        wait_until(lambda: begun(2, 1, 2), "training on the new node")
        grown, deadline = max(sizes(tmp_path / "rows")), time.time() + 120
        ray._raylet.GcsClient(address=nodes.address).drain_node(second.node_id, 2, "taken back", int(deadline * 1000))
        wait_until(lambda: begun(2, 1, 2, 1), "training after the drained node")
        drained.update(kept=records(grown), in_time=time.time() < deadline)
        gate.touch()
        nodes.remove_node(second)

    others = Events(events)
    result = train_job(context, job)
    others.finish()

    assert result.best.step == STEPS
    assert begun(2, 1, 2, 1)
    assert caplog.text.count("more such losses are allowed") == 1
    assert "there is room for 2 workers instead of 1" in caplog.text
    assert "will be taken away" in caplog.text
    # the notice has led to a checkpoint while the node was there
    assert drained["kept"]
    assert drained["in_time"]

    rows, workers = recorded(tmp_path / "rows"), sizes(tmp_path / "rows")
    first_start, *later = sorted(rows)
    kept = max(record.step for record in records(first_start))
    for name in later:
        assert {record.world_size for record in records(name)} == {workers[name]}
        # only the loss repeats steps: growing and leaving repeat none and leave none out
        assert min(rows[name]) == kept + 1
        kept = max(rows[name])
    assert kept == STEPS
    kept = min(rows[later[0]]) - 1
    for name, steps in rows.items():
        for step, found in steps.items():
            if name != first_start or step <= kept:  # of those that the loss cut short some were begun by one rank
                assert found == expected[step], (name, step)

    found = logged_losses(context)
    assert sorted(found) == list(range(1, STEPS + 1))
    # float32 sums in another order, over 40 steps
    assert [found[step] for step in sorted(found)] == pytest.approx(losses, rel=1e-4)
    assert not [name for name in context.storage.list(f"{JOB}/attempt-001") if name.startswith("universal")]


def test_a_worker_that_hangs_is_named_and_its_job_starts_again(nodes, start, tmp_path, caplog):
    hang = {"rank": 0, "step": SAVED + 3, "mark": str(tmp_path / "hung")}
    context, job = start(Compute(deepspeed="zero0", hang_timeout_s=20), hang=hang)
    result = train_job(context, job)
    assert result.best.step == STEPS
    told = re.search(
        r"1 of 1 workers made no progress: rank 0 on \S+ for \d+ s \(in step (\d+), after (\w+)\)", caplog.text
    )
    assert told, caplog.text
    assert told[1] == str(SAVED + 3)
    assert "raise compute.hang_timeout_s" in caplog.text
    assert min(recorded(tmp_path / "rows")["attempt-002"]) == SAVED + 1


@pytest.mark.parametrize("workers", [2, Workers(min=2, max=4)])
def test_a_job_without_room_ends_with_what_was_asked_for_and_what_there_is(nodes, start, workers):
    context, job = start(Compute(workers=workers, start_timeout_s=3))
    with pytest.raises(ClusterError) as raised:
        train_job(context, job)
    told = str(raised.value)
    assert "train: no room for 2 worker(s) with 1 CPU each within 3 s (compute.start_timeout_s)" in told
    assert re.search(r"The nodes: \S+ \(1 of 1 CPU free\)", told)
    assert "raise the limit" in told
