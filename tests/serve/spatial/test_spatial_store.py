"""Jobs as folders: who may change what, and what happens when two do."""

import os
import time

import pytest
from tenfold.platform.errors import ConfigError
from tenfold.serve.spatial.config import parse_spatial_config
from tenfold.serve.spatial.jobs import JobStore, Request, job_id_of
from tenfold.serve.spatial.running import run_job

JOB = "a" * 32


class Writer:
    """An analyser that does as it is told."""

    def __init__(self, act=lambda folder, progress: None, leave_out=()):
        self.act, self.leave_out = act, leave_out

    def run(self, files, params, folder, progress):
        self.files = {name: path.read_text() for name, path in files.items()}
        for name in {"result.json", "domains.csv", "result.h5ad", "view.npz"} - set(self.leave_out):
            (folder / name).write_text("x")
        self.act(folder, progress)


@pytest.fixture
def store(tmp_path):
    made = JobStore(tmp_path)
    made.prepare()
    return made


@pytest.fixture
def config(tmp_path):
    return parse_spatial_config({"storage": str(tmp_path)})


def add(store, job_id=JOB, client="me", created=1.0):
    incoming = store.incoming()
    (incoming / "file.h5ad").write_text("content")
    request = Request({"file": "file.h5ad"}, {"file": "mine.h5ad"}, {"k": 3}, client, None, {"n_obs": 1}, created)
    return store.add(incoming, job_id, request)


def test_a_job_reads_as_it_was_written(store):
    assert add(store)
    request = store.request(JOB)
    assert (request.params, request.names) == ({"k": 3}, {"file": "mine.h5ad"})
    assert store.upload(JOB, request)["file"].read_text() == "content"
    assert store.state(JOB).status == "queued"


def test_the_second_upload_of_a_job_changes_nothing(store):
    add(store, client="first")
    assert not add(store, client="second")
    assert store.request(JOB).client == "first"
    assert not list((store.root / "incoming").glob("*/upload"))


def test_jobs_wait_in_the_order_in_which_they_came(store):
    for job_id, created in (("a" * 32, 3.0), ("b" * 32, 1.0), ("c" * 32, 2.0)):
        add(store, job_id, created=created)
    assert store.unfinished() == ["b" * 32, "c" * 32, "a" * 32]
    store.cancel("c" * 32)
    assert store.unfinished() == ["b" * 32, "a" * 32]
    assert store.unfinished_clients() == ["me", "me"]


def test_a_job_that_is_done_has_its_results_and_not_its_upload(store, config):
    add(store)
    analyser = Writer()
    run_job(store, analyser, JOB, config)
    assert analyser.files == {"file": "content"}
    assert store.state(JOB).status == "done"
    assert (store.result(JOB) / "result.json").read_text() == "x"
    assert sorted(path.name for path in store.folder(JOB).iterdir()) == [
        "progress.json",
        "request.json",
        "result",
        "state.json",
    ]


def test_the_last_to_claim_a_job_owns_it_and_the_other_leaves_no_trace(store, config):
    add(store)

    def other_claims(folder, progress):
        store.claim(JOB, 3)

    run_job(store, Writer(other_claims), JOB, config)
    state = store.state(JOB)
    assert (state.status, state.attempt) == ("running", 2)
    assert not store.result(JOB).exists()
    assert not list(store.folder(JOB).glob("attempt-*"))


def test_a_cancelled_job_stops_at_its_next_progress(store, config):
    add(store)
    reached = []

    def cancelled(folder, progress):
        store.cancel(JOB)
        progress({"stage": "train"})
        reached.append("too far")

    run_job(store, Writer(cancelled), JOB, config)
    assert store.state(JOB).status == "cancelled"
    assert not reached
    assert store.claim(JOB, 3) is None


def test_a_job_that_is_deleted_while_it_runs_does_not_come_back(store, config):
    add(store)
    run_job(store, Writer(lambda folder, progress: store.delete(JOB)), JOB, config)
    assert store.state(JOB) is None
    assert not store.folder(JOB).exists()


def test_a_job_that_loses_all_its_workers_fails(store):
    add(store)
    assert store.claim(JOB, 2).attempt == 1
    assert store.claim(JOB, 2).attempt == 2
    assert store.claim(JOB, 2) is None
    state = store.state(JOB)
    assert (state.status, state.error["code"]) == ("failed", "worker_lost")


def test_a_failed_job_begins_again_with_all_its_attempts(store):
    add(store)
    store.claim(JOB, 1)
    store.claim(JOB, 1)
    store.restart(JOB)
    assert store.state(JOB).status == "queued"
    assert store.claim(JOB, 1).attempt == 1


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [(MemoryError(), "out_of_memory", "memory"), (RuntimeError("secret"), "analysis_failed", "log says why")],
)
def test_what_goes_wrong_in_an_analysis_is_told_without_its_inside(store, config, error, code, words):
    def fails(folder, progress):
        raise error

    add(store)
    run_job(store, Writer(fails), JOB, config)
    failed = store.state(JOB).error
    assert failed["code"] == code
    assert words in failed["message"]
    assert "secret" not in failed["message"]


def test_an_analysis_that_forgets_a_file_fails(store, config):
    add(store)
    run_job(store, Writer(leave_out=["view.npz"]), JOB, config)
    assert store.state(JOB).status == "failed"


def test_a_job_may_not_take_longer_than_allowed(store, tmp_path):
    add(store)
    config = parse_spatial_config({"storage": str(tmp_path), "limits": {"job_s": 0.05}})

    def slow(folder, progress):
        time.sleep(0.1)
        progress({"stage": "train"})

    run_job(store, Writer(slow), JOB, config)
    assert store.state(JOB).error["code"] == "timeout"


def test_a_long_step_without_news_still_shows_life(store, tmp_path):
    add(store)
    config = parse_spatial_config({"storage": str(tmp_path), "jobs": {"heartbeat_s": 0.05, "stale_s": 1.0}})
    beats = []

    def silent(folder, progress):
        progress({"stage": "read"})
        deadline = time.monotonic() + 60
        # The first may be due to the news; the others come without any.
        while len(beats) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
            told = store.progress(JOB)
            if told.get("stage") == "read" and told["time"] not in beats:
                beats.append(told["time"])

    run_job(store, Writer(silent), JOB, config)
    assert len(beats) == 3
    assert beats == sorted(beats)
    assert store.progress(JOB)["stage"] == "read"


def test_what_is_old_is_swept_and_nothing_else(store):
    for job_id in ("a" * 32, "b" * 32, "c" * 32):
        add(store, job_id)
    store.cancel("a" * 32)
    store.cancel("b" * 32)
    store.keep("b" * 32)
    now = time.time()
    state = store.folder("a" * 32)
    assert store.sweep(ttl_s=100, upload_s=1, now=now + 50) == 3
    assert store.sweep(ttl_s=100, upload_s=1, now=now + 150) == 1
    assert not state.exists()
    assert store.unfinished() == ["c" * 32]


def test_uploads_of_dead_replicas_are_swept(store):
    old, new = store.incoming(), store.incoming()
    os.utime(old, (1, 1))
    store.sweep(ttl_s=10, upload_s=10)
    assert (old.exists(), new.exists()) == (False, True)


def test_a_storage_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        JobStore(tmp_path / "file").prepare()


def test_a_job_is_named_by_content_options_and_owner():
    digests, files, params = {"file": "ab"}, {"file": "file.h5ad"}, {"k": 1, "seed": 2}
    name = job_id_of(digests, files, params, "gates")
    assert name == job_id_of(digests, files, {"seed": 2, "k": 1}, "gates")
    others = {
        job_id_of({"file": "ac"}, files, params, "gates"),
        job_id_of({"counts": "ab"}, {"counts": "counts.csv"}, params, "gates"),
        job_id_of(digests, files, {"k": 1}, "gates"),
        job_id_of(digests, files, params, "other"),
    }
    assert name not in others
    assert len(others) == 4
