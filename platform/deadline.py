"""Give up waiting for something that may hang: name resolution, a silent server, a locked file."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


def run_with_deadline(function: Callable[[], Result], seconds: float, what: str) -> Result:
    """Run `function` in a thread of its own and return its result, or stop waiting after `seconds`.

    The thread is a daemon: one that hangs keeps neither the caller nor the end of the program. It is not stopped, so
    `function` must be safe to finish late.

    Args:
        function: called without arguments.
        seconds: longest wait.
        what: names the work in the error.

    Raises:
        TimeoutError: no result in time.
        Exception: whatever `function` raised.
    """
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["result"] = function()
        except BaseException as error:  # handed to the caller below
            outcome["error"] = error

    thread = threading.Thread(target=work, name=f"tenfold: {what}", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"{what}: no answer within {seconds:g} s")
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]
