"""What an elastic job asks an autoscaler for: never twice for the same workers."""

import itertools

import pytest
from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client
from tenfold.platform.experiment import Compute, Workers
from tenfold.platform.training import room as rooms
from tenfold.platform.training.room import Room

COMPUTE = Compute(workers=Workers(min=1, max=2), cpus_per_worker=3)


@pytest.fixture
def wished(monkeypatch):
    """The workers asked for so far, 0 where a wish was taken back; a wish that lasts is not written down again."""
    wishes = []

    class Coordinator:
        def __init__(self, requester):
            self.requester = requester

        def send_resource_request(self, scaling, workers):
            assert scaling._resources_per_worker_not_none == {"CPU": 3}
            wishes.append(workers)

        def maybe_send_resource_request(self, scaling, workers):
            assert wishes[-1] == workers

        def cancel_resource_request(self):
            wishes.append(0)

    monkeypatch.setattr(autoscaling_coordinator_client, "TrainAutoscalingCoordinatorClient", Coordinator)
    monkeypatch.setattr(rooms, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(rooms, "describe_nodes", lambda: "none")
    return wishes


def free(monkeypatch, *counts):
    """Have room for so many workers at each look, and for the last number from then on."""
    looks = itertools.chain(counts, itertools.repeat(counts[-1]))
    monkeypatch.setattr(rooms, "free_room", lambda cpus, gpus: next(looks))


def test_the_wish_is_taken_back_when_the_workers_have_room(wished, monkeypatch):
    free(monkeypatch, 0, 0, 1, 2)
    with Room(COMPUTE, (1, 2), "train") as room:
        assert room.wait() == 2
    assert wished == [2, 0]


def test_where_there_is_room_at_once_nothing_is_asked_for(wished, monkeypatch):
    free(monkeypatch, 2)
    with Room(COMPUTE, (1, 2), "train") as room:
        assert room.wait() == 2
    assert wished == []


def test_another_number_is_asked_for_at_once_and_the_same_one_now_and_then(wished, monkeypatch):
    monkeypatch.setattr(rooms, "SETTLE_SECONDS", 0.0)
    free(monkeypatch, 0, 1)
    with Room(COMPUTE, (1, 2), "train") as room:
        assert room.wait() == 1
        for _ in range(3):
            room.ask(1)  # beyond the one that runs
        assert wished == [2, 0, 1]
    assert wished == [2, 0, 1, 0]


def test_a_fixed_number_is_left_to_ray_train(wished):
    with Room(Compute(workers=2), (2,), "train") as room:
        room.ask(2)
    assert wished == []
