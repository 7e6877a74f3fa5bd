"""Jobs that fit on no node are refused when the application is deployed; those that wait for room say so."""

import logging

import pytest
from tenfold.platform.cluster_capacity import Capacity, NodeFacts, NodeShape
from tenfold.platform.errors import ClusterError
from tenfold.serve.spatial import room
from tenfold.serve.spatial.config import GIBIBYTE, Jobs
from tenfold.serve.spatial.jobs import JobStore, Request
from tenfold.serve.spatial.room import PATIENCE_SECONDS, Waiting, check_room, no_room


def node(cpus, gpus=0, memory_gb=16):
    return NodeFacts("10.0.0.1", "n", cpus, gpus, memory_gb * GIBIBYTE, is_head=False)


def cluster(*nodes, **more):
    shapes = tuple(NodeShape(found.cpus, found.gpus) for found in nodes)
    return Capacity(sum(s.cpus for s in shapes), sum(s.gpus for s in shapes), 0, len(nodes), shapes=shapes, **more)


@pytest.fixture
def connected(monkeypatch):
    """Return a function that makes the connected cluster one of these nodes."""
    from tenfold.platform import cluster_capacity

    def connect(*nodes, **more):
        monkeypatch.setattr(cluster_capacity, "capacity", lambda: cluster(*nodes, **more))
        monkeypatch.setattr(cluster_capacity, "node_facts", lambda: list(nodes))

    return connect


@pytest.mark.parametrize(
    ("jobs", "fits"),
    [
        ({"cpus": 4}, True),
        ({"cpus": 4.5}, False),  # though both nodes together have 6
        ({"cpus": 4, "gpus": 1}, False),  # the cores are on one node, the GPU is on the other
        ({"cpus": 2, "gpus": 1}, True),
        ({"memory_gb": 32}, True),
        ({"memory_gb": 33}, False),
        ({"cpus": 4, "memory_gb": 20}, False),
    ],
)
def test_a_job_fits_where_one_node_has_all_that_it_takes(jobs, fits):
    nodes = [node(4, memory_gb=16), node(2, gpus=1, memory_gb=32)]
    assert (no_room(Jobs(**jobs), cluster(*nodes), nodes) is None) == fits


def test_a_node_that_an_autoscaler_may_add_counts():
    growth = {"autoscaler": "known", "growth": (NodeShape(16, 0, 2),), "growth_nodes": 2}
    assert no_room(Jobs(cpus=16), cluster(node(2), **growth), [node(2)]) is None
    assert no_room(Jobs(cpus=17), cluster(node(2), **growth), [node(2)]) is not None


def test_deploying_what_can_never_run_is_an_error_that_names_the_option_and_the_nodes(connected):
    connected(node(2), node(4))
    with pytest.raises(ClusterError, match=r"jobs\.cpus = 16: .*4 CPU, 0 GPU and 16\.0 GiB.*Lower jobs\.cpus"):
        check_room(Jobs(cpus=16))
    check_room(Jobs(cpus=4))


def test_an_autoscaler_of_unknown_limits_gets_a_warning_instead(connected, caplog):
    connected(node(2), autoscaler="unknown")
    with caplog.at_level(logging.WARNING, logger=room.__name__):
        check_room(Jobs(cpus=16))
    assert "jobs wait until the autoscaler adds a node" in caplog.text


@pytest.fixture
def store(tmp_path):
    made = JobStore(tmp_path)
    made.prepare()
    for job_id in ("a" * 32, "b" * 32):
        made.add(made.incoming(), job_id, Request({}, {}, {}, "c", None, {}, 0.0))
    return made


def test_jobs_say_what_they_wait_for_once_none_has_run_for_long(store):
    ids = list(store.ids())
    waiting = Waiting(store, Jobs(cpus=2, gpus=1))
    waiting.look(ids, 0.0)
    waiting.look(ids, PATIENCE_SECONDS - 1)
    assert [store.progress(job_id) for job_id in ids] == [{}, {}]
    waiting.look(ids, PATIENCE_SECONDS)
    assert {store.progress(job_id)["stage"] for job_id in ids} == {"waiting for a node with 2 CPU and 1 GPU free"}


def test_a_job_that_waits_behind_a_running_one_is_told_nothing(store):
    first, second = store.ids()
    waiting = Waiting(store, Jobs())
    waiting.look([first, second], 0.0)
    store.claim(first, 3)
    waiting.look([first, second], PATIENCE_SECONDS)
    assert "stage" not in store.progress(second)
    store.cancel(first)
    waiting.look([second], PATIENCE_SECONDS + 1)  # the wait begins anew
    assert "stage" not in store.progress(second)
    waiting.look([second], 2 * PATIENCE_SECONDS + 1)
    assert store.progress(second)["stage"] == "waiting for a node with 1 CPU free"
