"""The short form of `make chaos`: every kind of event once, in a fixed order, in one training."""

import pytest
from chaos import play
from chaos_events import EVENTS
from chaos_plan import draw

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS, PLAN_SEED = 30, 1


def test_a_training_that_loses_workers_nodes_store_and_tracker_ends_as_if_undisturbed(tmp_path):
    plan = draw(PLAN_SEED, STEPS, 1)
    assert len({event.kind for event in plan}) == len(EVENTS) == len(plan)
    result = play(tmp_path, plan, STEPS, say=lambda event: print(event.planned.kind, event.told))
    assert [event.planned for event in result.happened] == plan
    assert not result.verdict.failed
    # the claims are about something: a loss costs steps, and the number of workers has changed
    assert sorted(result.verdict.history) == list(range(1, STEPS + 1))
    assert {step.size for step in result.verdict.history.values()} == {1, 2}
    assert any("requests refused; the same workers went on" in event.told for event in result.happened)
    for told in ("will be taken away", "there is room for 2 workers", "such losses are allowed"):
        assert told in result.log
