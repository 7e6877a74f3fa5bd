"""What tests of several objectives share: pairs for several ranks, and training in this process."""

import json

import pytest
from tenfold.platform.models.randomness import seeded
from tenfold.platform.training.options import TrainingOptions
from tenfold.platform.training.worker import WorkerContext

SUBJECTS = ["Tom", "Lily", "The bird", "A cat", "Mom", "The sun"]


@pytest.fixture(scope="module")
def uneven_pairs(tmp_path_factory):
    """Return a function: number -> file of so many pairs of unequal lengths; ranks get unequal numbers of tokens."""

    def write(number):
        path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
        rows = [
            {
                "prompt": f"{SUBJECTS[place % len(SUBJECTS)]} {'very ' * (place % 3)}big {place}",
                "chosen": " and happy." * (1 + place % 4),
                "rejected": " or sad" * (1 + place % 5),
            }
            for place in range(number)
        ]
        path.write_text("\n".join(map(json.dumps, rows)))
        return str(path)

    return write


@pytest.fixture
def in_this_process(local_arguments):
    """Return a function: build_trainer, options, name -> source of the frozen models that there are -> Trainer."""

    def make(build_trainer, config, sources):
        payload = {
            "aligndistil": config.model_dump(mode="json"),
            "frozen": {name: sources[name] for name in config.frozen_names},
        }
        return build_trainer(WorkerContext(payload, TrainingOptions(), local_arguments(config.training), 1, 0, 1, {}))

    return make


@pytest.fixture
def to_the_end():
    """Return a function that trains to the end and gives the Trainer back."""

    def train(trainer):
        with seeded(1):
            trainer.train()
        return trainer

    return train
