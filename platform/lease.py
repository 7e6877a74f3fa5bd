"""Who works on a run in storage that has no locks: a file that its owner rewrites for as long as it lives.

Object stores have neither locks nor, through pyarrow, an atomic create. So whoever wants a run writes its name into
`.lease.json`, waits a moment, and has the run if its name is still there. A lease whose content has not changed for
`STALE_SECONDS` by the clock of whoever looks belongs to a process that is gone: no two clocks are compared.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from tenfold.platform.errors import ConfigError, TenfoldError
from tenfold.platform.storage import Storage

logger = logging.getLogger(__name__)

LEASE = ".lease.json"
BEAT_SECONDS = 5.0
# Of a store that fails, an owner hears again at most `patience.LONGEST_PAUSE` after it is back.
STALE_SECONDS = 45.0
SETTLE_SECONDS = 1.0


@contextlib.contextmanager
def leased(top: Storage, path: str, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder of a remote storage; another process gets it when this one ends, or dies.

    Args:
        top: the storage.
        path: the folder in it.
        wait: wait for an owner that lives, however long it works.

    Raises:
        ConfigError: another process that lives has it and `wait` is not set.
    """
    lease = _Lease(top, f"{path}/{LEASE}" if path else LEASE)
    lease.take(wait)
    stopped = threading.Event()
    beating = threading.Thread(target=lease.beat, args=(stopped,), name=f"tenfold: lease of {path}", daemon=True)
    beating.start()
    try:
        yield
    finally:
        stopped.set()
        beating.join()
        lease.give_back()


class _Lease:
    def __init__(self, top: Storage, path: str) -> None:
        self._top, self._path = top, path
        self._owner, self._beats = uuid.uuid4().hex, 0
        self._name = path.rpartition("/")[0] or top.uri

    def take(self, wait: bool) -> None:
        """Become the owner."""
        while True:
            self._wait_until_free(wait)
            self._write()
            time.sleep(SETTLE_SECONDS)
            if self._is_mine():
                return

    def beat(self, stopped: threading.Event) -> None:
        """Renew the lease until told to stop; end the program when another process has taken it."""
        while not stopped.wait(BEAT_SECONDS):
            try:
                mine = self._is_mine()
                if mine:
                    self._write()
            except (OSError, TenfoldError) as error:
                logger.warning("the lease of %s cannot be renewed: %s", self._name, error)
                continue
            if not mine and not stopped.is_set():
                logger.error("another process works on %s, so this one stops", self._name)
                # as Ctrl-C, which ends what the main thread waits for; a shell's background job does not hear that
                ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
                os.kill(os.getpid(), signal.SIGTERM if ignored else signal.SIGINT)
                return

    def give_back(self) -> None:
        """Let the next process have it at once."""
        try:
            if self._is_mine():
                self._top.delete(self._path)
        except (OSError, TenfoldError) as error:
            logger.warning("the lease of %s stays for %.0f s: %s", self._name, STALE_SECONDS, error)

    def _wait_until_free(self, wait: bool) -> None:
        seen, since = self._read(), time.monotonic()
        first, said = seen, False
        while seen is not None and time.monotonic() - since < STALE_SECONDS:
            if not said:
                logger.info("%s is or was worked on by %s; waiting to see whether it lives", self._name, _who(seen))
                said = True
            time.sleep(SETTLE_SECONDS)
            now = self._read()
            if now == seen:
                continue
            seen, since = now, time.monotonic()
            if now is not None and not wait:
                raise ConfigError(
                    f"run {self._name} is being worked on by another process ({_who(now)}); wait for it, or use --new"
                )
        if seen is not None and seen == first:
            logger.info("%s: %s is gone; going on with its work", self._name, _who(seen))

    def _is_mine(self) -> bool:
        found = self._read()
        return found is not None and json.loads(found).get("owner") == self._owner

    def _read(self) -> str | None:
        """Return the lease as it is there, None where nobody has it; what cannot be read counts as nobody's."""
        try:
            text = self._top.read_text(self._path)
            return text if isinstance(json.loads(text), dict) else None
        except (FileNotFoundError, ValueError):
            return None

    def _write(self) -> None:
        self._beats += 1
        content = {"owner": self._owner, "host": socket.gethostname(), "pid": os.getpid(), "beats": self._beats}
        self._top.write_text(self._path, json.dumps(content))


def _who(text: str) -> str:
    content = json.loads(text)
    return f"process {content.get('pid')} on {content.get('host')}"
