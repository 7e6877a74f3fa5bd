"""Checking files of strangers in a process of their own, which has little memory and little time.

Headers cannot tell everything: a chunk of HDF5 that declares 80 kB may inflate to gigabytes inside of the library, a
string of one byte may declare four gigabytes, and the library itself may crash over a crafted file or never return. So
such a file is read through once, piece by piece, where none of that matters. What passes there, a reader can read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

from tenfold.methods.gates.file_checks import inspect_file
from tenfold.methods.gates.limits import Limits
from tenfold.platform.errors import DataError

_MEMORY_BYTES = 2**30  # on top of the interpreter and of the file itself
_CPU_SECONDS = 60
_WALL_SECONDS = 300
_REFUSED = 3  # exit status: the message is on the standard output


def check_file(path: str | Path, limits: Limits | None, *, transpose: bool = False) -> None:
    """Check a section's file before it is read; see `inspect_file`.

    Args:
        path: .h5ad, .h5 of 10x, a table (.csv, .tsv, .txt, .mtx, also with .gz), .npz, or a Visium folder.
        limits: for files of strangers: bounds, and all is read once in a process apart (about half a second more).
            None: the file is trusted, and only its headers are looked at, here.
        transpose: a counts table has genes in rows.

    Raises:
        DataError: the file is missing, damaged, of another format than its ending says, too large, or points out of
            itself.
    """
    if limits is None:
        return inspect_file(path, None, transpose=transpose)
    order = json.dumps([str(path), dataclasses.asdict(limits), transpose, _MEMORY_BYTES, _CPU_SECONDS])
    # -P: the current folder may hold anything; the child finds packages where this process does.
    places = os.pathsep.join(place for place in sys.path if place)
    environment = {**os.environ, "PYTHONPATH": places, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    try:
        ended = subprocess.run(
            [sys.executable, "-P", "-m", __name__, order],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            timeout=_WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{path}: reading it takes longer than {_WALL_SECONDS} s. Write it anew, smaller") from error
    if ended.returncode == _REFUSED:
        raise DataError(ended.stdout.decode())
    if ended.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise DataError(f"{path}: reading it takes more than {_CPU_SECONDS} s of computing. Write it anew, smaller")
    if ended.returncode != 0:
        raise DataError(f"{path}: reading it ends the process (status {ended.returncode}): damaged. Write it anew")


def _main(order: str) -> int:
    """Check the file that the order names; returns the exit status."""
    path, limits, transpose, memory, seconds = json.loads(order)
    size = Path(path).stat().st_size if Path(path).is_file() else 0
    here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for kind, most in (
        (resource.RLIMIT_AS, here + size + memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    try:
        inspect_file(path, Limits(**limits), transpose=transpose)
    except DataError as error:
        sys.stdout.write(str(error))
        return _REFUSED
    except MemoryError:
        sys.stdout.write(f"{path}: reading a piece of it takes more than {memory} bytes. Write it with small chunks")
        return _REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
