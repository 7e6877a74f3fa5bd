"""Calls of the analyser in processes of their own: a file that eats memory, time or the interpreter hurts only them.

A replica must stay alive and quick whatever a client sends. Uploads are opened, and plots drawn, in a few processes
that stay (their imports take seconds). Each may allocate so much memory and no more, and is killed when a call takes
too long.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import multiprocessing
import resource
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tenfold.platform.errors import TenfoldError
from tenfold.serve.spatial.analyser import load_analyser
from tenfold.serve.spatial.config import GIBIBYTE

logger = logging.getLogger(__name__)

GRACE_SECONDS = 5.0  # from the alarm in the process to giving it up


class Interrupted(Exception):
    """The process died, ran out of memory or out of time; the message says which."""


class Isolation:
    """A few processes with an analyser in each.

    Args:
        method: name of the analyser, for `load_analyser`.
        processes: how many.
        memory_gb: GiB that each may allocate.

    Use from one event loop.
    """

    def __init__(self, method: str, *, processes: int, memory_gb: float) -> None:
        self._method = method
        self._memory = int(memory_gb * GIBIBYTE)
        self._pools = [self._new_pool() for _ in range(processes)]
        self._free: asyncio.Queue[int] = asyncio.Queue()
        for index in range(processes):
            self._free.put_nowait(index)

    async def load(self) -> None:
        """Load the analyser in all processes.

        Raises:
            ConfigError: it cannot be loaded.
        """
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(pool, import_analyser, self._method) for pool in self._pools))

    async def call(self, function: str, *arguments: Any, timeout_s: float) -> Any:
        """Call a method of the analyser, when a process is free.

        Args:
            function: its name.
            arguments: for it; they and the result are pickled.
            timeout_s: seconds that it may take.

        Raises:
            Interrupted: the process did not survive the call, or it took too long.
            TenfoldError: what the analyser raised.
        """
        index = await self._free.get()
        work = self._submit(index, function, arguments, timeout_s)
        try:
            return await asyncio.wait_for(asyncio.shield(work), timeout_s + GRACE_SECONDS)
        except BrokenProcessPool as error:
            raise Interrupted(f"it took longer than {timeout_s:g} s, or crashed the process") from error
        except TimeoutError as error:
            _kill(self._pools[index])
            raise Interrupted(f"it took longer than {timeout_s:g} s") from error
        except MemoryError as error:
            raise Interrupted(f"it needs more than {self._memory / GIBIBYTE:g} GiB of memory") from error

    def _submit(self, index: int, function: str, arguments: tuple[Any, ...], timeout_s: float) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        call = functools.partial(call_analyser, self._method, function, arguments, timeout_s)
        try:
            work = loop.run_in_executor(self._pools[index], call)
        except BrokenProcessPool:  # it died while it had nothing to do
            self._renew(index)
            work = loop.run_in_executor(self._pools[index], call)

        # The process is free when the call has ended, not when its caller gave up.
        def ended(done: asyncio.Future[Any]) -> None:
            if not done.cancelled() and isinstance(done.exception(), BrokenProcessPool):
                self._renew(index)
            self._free.put_nowait(index)

        work.add_done_callback(ended)
        return work

    def stop(self) -> None:
        """End the processes."""
        for pool in self._pools:
            _kill(pool)

    def _new_pool(self) -> ProcessPoolExecutor:
        # Not forked: a replica has threads, and a fork would inherit their locks.
        return ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), initializer=limit_memory, initargs=(self._memory,)
        )

    def _renew(self, index: int) -> None:
        logger.warning("a process that read uploads was lost; another takes its place")
        _kill(self._pools[index])
        self._pools[index] = self._new_pool()


def limit_memory(num_bytes: int) -> None:
    """Let this process allocate so much; more is a MemoryError."""
    # Not the address space, of which libraries reserve more than they use.
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))


def import_analyser(method: str) -> None:
    """Load an analyser in this process, before it is needed."""
    _analyser(method)


def call_analyser(method: str, function: str, arguments: tuple[Any, ...], timeout_s: float) -> Any:
    """Call a method of this process' analyser; the process is killed when it takes longer than allowed."""
    analyser = _analyser(method)
    # The default action ends the process even in the middle of a C library, where no exception could.
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        return getattr(analyser, function)(*arguments)
    except (TenfoldError, MemoryError):
        raise
    except Exception as error:
        # Errors of libraries may not survive the way to the other process.
        logger.exception("%s failed", function)
        raise RuntimeError(f"{function}: {type(error).__name__}: {error}") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@functools.cache
def _analyser(method: str) -> Any:
    return load_analyser(method)


def _kill(pool: ProcessPoolExecutor) -> None:
    # The pool has no public call for a process that does not listen.
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)
