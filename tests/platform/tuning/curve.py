"""A method that reports a given curve instead of training: trials of a few seconds."""

import os
import signal
import time
from pathlib import Path
from typing import Literal

from tenfold.methods import table
from tenfold.platform import tracking
from tenfold.platform.experiment import StrictModel
from tenfold.platform.method import Outcome
from tenfold.platform.tuning import trial

ENTRY = f"{__name__}:Curve"


class Config(StrictModel):
    curve: list[float] = [3.0, 2.0, 1.0]
    scale: float = 1.0
    sign: Literal[1, -1] = 1
    seconds: float = 0.0
    gate: str | None = None
    dies_without: str | None = None


class Curve:
    Config = Config

    def plan(self, config, context):
        return []

    def run(self, config, context):
        """Report the curve; with a gate, the last value only when that file is there."""
        starts = context.storage.list("starts")
        context.storage.write_text(f"starts/{len(starts)}", "")
        if config.dies_without and not Path(config.dies_without).exists():
            os.kill(os.getpid(), signal.SIGKILL)
        for step, point in enumerate(config.curve, start=1):
            while config.gate and step == len(config.curve) and not Path(config.gate).exists():
                time.sleep(0.05)
            time.sleep(config.seconds)
            metrics = {"eval/loss": config.sign * config.scale * point}
            context.report(metrics, step)
        return Outcome(metrics)


def run_trial(values, **given):
    """Run a trial in a process whose method table has this method."""
    table.METHODS["curve"] = ENTRY
    trial.run_trial(values, **given)


def run_patient_trial(values, **given):
    """Run a trial that waits long for an MLflow server which is started again on a busy machine."""
    tracking.FINISH_SECONDS = 240.0
    run_trial(values, **given)
