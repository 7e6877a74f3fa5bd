"""Who may enter the batch: first come, first served, and only who fits in the key-value cache to the end."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Busy(Exception):
    """As many requests wait already as may wait."""


class Admission:
    """Counts requests and the cache blocks they may come to need.

    A request reserves blocks for its prompt and all tokens it may generate. So the cache never overflows in the middle
    of an answer, and the scheduler of the batch never has to throw a running request out and start it again.

    Use from one event loop.
    """

    def __init__(self, *, num_blocks: int, max_running: int, max_waiting: int) -> None:
        self.num_blocks = num_blocks
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.num_running = 0
        self._free_blocks = num_blocks
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._queue)

    @asynccontextmanager
    async def place(self, blocks: int) -> AsyncIterator[None]:
        """Hold a place in the batch, waiting for it when necessary.

        Args:
            blocks: cache blocks to reserve, at most `num_blocks`.

        Raises:
            Busy: `max_waiting` requests wait already.
            ValueError: more blocks than the cache has.
        """
        if blocks > self.num_blocks:
            raise ValueError(f"{blocks} blocks asked for, the cache has {self.num_blocks}")
        if self._queue or not self._fits(blocks):
            await self._wait(blocks)
        else:
            self._take(blocks)
        try:
            yield
        finally:
            self._give_back(blocks)

    def _fits(self, blocks: int) -> bool:
        return self.num_running < self.max_running and blocks <= self._free_blocks

    def _take(self, blocks: int) -> None:
        self.num_running += 1
        self._free_blocks -= blocks

    def _give_back(self, blocks: int) -> None:
        self.num_running -= 1
        self._free_blocks += blocks
        self._admit()

    def _admit(self) -> None:
        while self._queue:
            blocks, turn = self._queue[0]
            if not turn.cancelled():
                if not self._fits(blocks):
                    break
                self._take(blocks)
                turn.set_result(None)
            self._queue.popleft()

    async def _wait(self, blocks: int) -> None:
        if len(self._queue) >= self.max_waiting:
            raise Busy(f"{self.num_running} requests are running and {len(self._queue)} wait already")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (blocks, turn)
        self._queue.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # its turn came in the same moment
                self._give_back(blocks)
            elif entry in self._queue:
                self._queue.remove(entry)
                self._admit()
            raise
