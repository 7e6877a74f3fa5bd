"""Calls in processes of their own: what one call does to its process, the next ones do not notice."""

import asyncio
import json
import time

import pytest
from tenfold.platform.errors import ConfigError, ModelError
from tenfold.serve.spatial.isolation import Interrupted, Isolation

ANALYSER = "kmeans_analyser:KMeansAnalyser"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "model.json").write_text(json.dumps({"n_domains": 2}))
    return folder


def with_one_process(work):
    async def run():
        isolation = Isolation(ANALYSER, processes=1, memory_gb=4)
        try:
            return await work(isolation)
        finally:
            isolation.stop()

    return asyncio.run(run())


def test_calls_that_wait_behind_a_crash_are_answered_by_the_next_process(model):
    async def work(isolation):
        crash = isolation.call("check", {}, {"method": "crash"}, None, timeout_s=120)
        others = [isolation.call("describe_model", model, timeout_s=120) for _ in range(3)]
        return await asyncio.gather(crash, *others, return_exceptions=True)

    crashed, *answers = with_one_process(work)
    assert isinstance(crashed, Interrupted)
    assert answers == [{"n_domains": 2}] * 3


def test_a_caller_that_gives_up_does_not_give_its_process_away_too_early(model):
    async def work(isolation):
        await isolation.load()
        start = time.monotonic()
        hanging = asyncio.create_task(isolation.call("check", {}, {"method": "hang"}, None, timeout_s=1.5))
        while not isolation._free.empty():
            await asyncio.sleep(0)
        hanging.cancel()
        # Behind the call that hangs until its time is over; its own time begins afterwards.
        answer = await isolation.call("describe_model", model, timeout_s=120)
        return answer, time.monotonic() - start

    answer, seconds = with_one_process(work)
    assert answer == {"n_domains": 2}
    assert seconds >= 1.5


def test_errors_of_ours_come_through_and_others_become_words(model, tmp_path):
    async def work(isolation):
        calls = [
            isolation.call("describe_model", tmp_path, timeout_s=120),
            isolation.call("gene", 1, 2, timeout_s=120),
        ]
        return await asyncio.gather(*calls, return_exceptions=True)

    ours, other = with_one_process(work)
    assert isinstance(ours, ModelError)
    assert type(other) is RuntimeError
    assert "TypeError" in str(other)


def test_a_method_that_cannot_be_loaded_is_a_configuration_error():
    async def run():
        isolation = Isolation("no.such.module:Analyser", processes=1, memory_gb=4)
        try:
            await isolation.load()
        finally:
            isolation.stop()

    with pytest.raises(ConfigError, match="cannot be loaded"):
        asyncio.run(run())
