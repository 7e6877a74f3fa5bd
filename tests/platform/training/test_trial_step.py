"""bfloat16 without ZeRO trains as with it: DeepSpeed's trial step leaves no trace."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tenfold.platform.training.deepspeed_config import deepspeed_config
from tenfold.platform.training.options import TrainingOptions
from tenfold.platform.training.trial_step import forget_trial_step

HERE = Path(__file__).parent
OPTIONS = TrainingOptions(
    max_steps=4,
    per_device_train_batch_size=2,
    learning_rate=1e-2,
    weight_decay=0.5,
    logging_steps=1,
    eval_strategy="no",
    save_strategy="no",
    bf16=True,
)


@pytest.mark.slow
def test_the_losses_of_bfloat16_do_not_depend_on_the_zero_stage(tmp_path):
    jobs = {}
    for stage in (0, 1, 2):
        folder = tmp_path / str(stage)
        folder.mkdir()
        jobs[stage] = {
            "build": "toy_job:build",
            "config": {"rows": 10, "record": str(folder / "rows")},
            "options": OPTIONS.model_dump(mode="json"),
            "deepspeed": deepspeed_config(f"zero{stage}"),
            "seed": 10,
            "output": str(folder),
        }
    (tmp_path / "jobs.json").write_text(json.dumps(list(jobs.values())))
    command = [sys.executable, str(HERE / "training_ranks.py"), str(tmp_path / "jobs.json"), "1"]
    subprocess.run(command, check=True, timeout=600)
    losses = [json.loads((tmp_path / str(stage) / "result.json").read_text())["losses"] for stage in jobs]
    assert len(losses[0]) == OPTIONS.max_steps
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)


def test_other_optimizers_are_left_alone():
    forget_trial_step(None)
    forget_trial_step(object())
