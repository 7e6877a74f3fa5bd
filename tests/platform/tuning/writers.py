"""Many processes that write to MLflow at once: forked after one import, which is what takes long."""

import json
import math
import multiprocessing
import sys
import time
from pathlib import Path

from tenfold.platform import tracking

STEPS, METRICS, PARAMS = 30, 10, 120
PATIENCE_S = 240.0  # for a server that starts on a busy machine


def value(writer: int, step: int, metric: int) -> float:
    """Return what a writer logs."""
    return writer * 1000 + step + metric / 16


def write(uri: str, parent: str, folder: str, writer: int) -> tuple[str, bool]:
    """Log half of the metrics, wait for the gate, log the others and finish.

    Returns:
        The run's id, and whether something had to be kept.
    """
    spool = Path(folder) / f"{writer}.jsonl"
    tracker = tracking.Tracker.start(uri, "writers", f"writer-{writer}", parent_run_id=parent, spool=spool)
    tracker.log_params({f"param.{number}": writer * number for number in range(PARAMS)})
    for step in range(STEPS):
        while step == STEPS // 2 and not Path(folder, "gate").exists():
            time.sleep(0.05)
        metrics = {f"metric/{number}": value(writer, step, number) for number in range(METRICS)}
        tracker.log_metrics({**metrics, "nan": math.nan}, step)
        if step % 10 == 9:
            tracker.log_text(f"writer {writer}, step {step}", f"notes/{step}.txt")
            tracker.set_tags({"step": step})
    was_kept = spool.exists()
    tracker.flush(PATIENCE_S)
    tracker.finish("FINISHED")
    return tracker.run_id, was_kept


if __name__ == "__main__":
    uri, parent, folder, number = sys.argv[1:]
    import mlflow  # noqa: F401 (before the processes are forked)

    with multiprocessing.get_context("fork").Pool(int(number)) as pool:
        written = pool.starmap(write, [(uri, parent, folder, writer) for writer in range(int(number))], chunksize=1)
    print(json.dumps(written))
