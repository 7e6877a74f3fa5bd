"""Places in the batch: in order, within the cache, and never lost."""

import asyncio

import pytest
from tenfold.serve.admission import Admission, Busy


async def hold(admission, blocks, log, name, release):
    async with admission.place(blocks):
        log.append(name)
        await release.wait()


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


def test_requests_enter_in_the_order_they_came_even_if_a_later_one_would_fit():
    async def scenario():
        admission = Admission(num_blocks=10, max_running=4, max_waiting=4)
        log, first, others = [], asyncio.Event(), asyncio.Event()
        tasks = [asyncio.create_task(hold(admission, 8, log, "big", first))]
        await settle()
        tasks.append(asyncio.create_task(hold(admission, 5, log, "middle", others)))
        tasks.append(asyncio.create_task(hold(admission, 1, log, "small", others)))
        await settle()
        assert log == ["big"]
        assert admission.num_waiting == 2
        first.set()
        await settle()
        assert log == ["big", "middle", "small"]
        others.set()
        await asyncio.gather(*tasks)
        assert (admission.num_running, admission.num_waiting) == (0, 0)

    asyncio.run(scenario())


def test_no_more_than_max_running_enter():
    async def scenario():
        admission = Admission(num_blocks=100, max_running=2, max_waiting=4)
        log, release = [], asyncio.Event()
        tasks = [asyncio.create_task(hold(admission, 1, log, name, release)) for name in "abc"]
        await settle()
        assert log == ["a", "b"]
        release.set()
        await asyncio.gather(*tasks)
        assert log == ["a", "b", "c"]

    asyncio.run(scenario())


def test_one_more_than_may_wait_is_refused():
    async def scenario():
        admission = Admission(num_blocks=1, max_running=1, max_waiting=1)
        release = asyncio.Event()
        tasks = [asyncio.create_task(hold(admission, 1, [], name, release)) for name in "ab"]
        await settle()
        with pytest.raises(Busy, match="1 requests are running and 1 wait"):
            await hold(admission, 1, [], "c", release)
        release.set()
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_a_waiting_request_that_leaves_makes_way():
    async def scenario():
        admission = Admission(num_blocks=10, max_running=9, max_waiting=9)
        log, first, release = [], asyncio.Event(), asyncio.Event()
        running = asyncio.create_task(hold(admission, 5, log, "running", first))
        await settle()
        leaving = asyncio.create_task(hold(admission, 9, log, "leaving", release))
        behind = asyncio.create_task(hold(admission, 5, log, "behind", release))
        await settle()
        assert log == ["running"]
        leaving.cancel()
        await settle()
        assert log == ["running", "behind"]
        first.set()
        release.set()
        await asyncio.gather(running, behind)
        assert admission.num_running == 0

    asyncio.run(scenario())


def test_leaving_in_the_moment_of_ones_turn_gives_the_place_back():
    async def scenario():
        admission = Admission(num_blocks=1, max_running=1, max_waiting=9)
        log, first, release = [], asyncio.Event(), asyncio.Event()
        running = asyncio.create_task(hold(admission, 1, log, "running", first))
        await settle()
        leaving = asyncio.create_task(hold(admission, 1, log, "leaving", release))
        await settle()
        first.set()
        await asyncio.sleep(0)  # the running one gives its place to the leaving one, which has not woken up yet
        leaving.cancel()
        await asyncio.gather(running, leaving, return_exceptions=True)
        release.set()
        await hold(admission, 1, log, "next", release)
        assert log == ["running", "next"]
        assert admission.num_running == 0

    asyncio.run(scenario())


def test_more_blocks_than_there_are_is_an_error_not_a_wait():
    async def scenario():
        admission = Admission(num_blocks=3, max_running=1, max_waiting=1)
        with pytest.raises(ValueError, match="4 blocks asked for, the cache has 3"):
            async with admission.place(4):
                pass

    asyncio.run(scenario())
