"""The judge of the chaos test finds what is wrong, in records that are made up here."""

import json
from pathlib import Path

import pytest
import torch
from chaos_plan import ADD_NODE, CUT_STORAGE, DRAIN_NODE, KILL_NODE, KILL_WORKER, RESTART_MLFLOW, Planned, draw
from chaos_scene import NODES, Reference
from chaos_verdict import Happened, judge
from safetensors.torch import save_file

STEPS = 6
LOSSES = {step: 3.0 / step for step in range(1, STEPS + 1)}
ROWS = {step: [4 * step, 4 * step + 1, 4 * step + 2, 4 * step + 3] for step in LOSSES}


class Made:
    """A training of 2 workers that was lost in step 5 and went on after step 3 with 1; all is as it should be."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.attempts = {"attempt-001": (2, [1, 2, 3, 4, 5]), "attempt-002": (1, [4, 5, 6])}
        self.rows = {(name, step): list(ROWS[step]) for name, (_, steps) in self.attempts.items() for step in steps}
        self.losses = {key: LOSSES[key[1]] for key in self.rows if key != ("attempt-001", 5)}
        self.logged = sorted(LOSSES.items())
        self.remembered = sorted(LOSSES.items())
        self.kind, self.status, self.unsent = KILL_WORKER, "FINISHED", 0
        self.weight = 1.0

    def verdict(self):
        records = self.folder / "rows"
        records.mkdir()
        for name, (size, steps) in self.attempts.items():
            for rank in range(size):
                lines = []
                for step in steps:
                    own = self.rows[name, step][rank::size]
                    lines.append({"step": step, "rows": own})
                    if rank == 0 and (name, step) in self.losses:
                        lines.append({"step": step, "loss": self.losses[name, step]})
                who = {"attempt": name, "rank": rank, "size": size}
                text = "".join(json.dumps({**who, **line}) + "\n" for line in lines)
                (records / f"{name}-{rank}.jsonl").write_text(text)
        for name, weight in (("last", self.weight), ("two", 1.0), ("one", 1.0)):
            (self.folder / name).mkdir()
            save_file({"w": torch.tensor([weight])}, self.folder / name / "model.safetensors")
        history = [{"step": step, "loss": loss} for step, loss in self.remembered]
        (self.folder / "last" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        two = Reference(LOSSES, ROWS, self.folder / "two")
        one = Reference({step: loss * (1 + 1e-7) for step, loss in LOSSES.items()}, ROWS, self.folder / "one")
        event = Happened(Planned(1, self.kind, 5, 0.0, 0.0, 3.0), 1.0, 5, 2, "attempt-001", "")
        return judge(records, two, one, [event], STEPS, self.folder / "last", self.logged, self.status, self.unsent)


@pytest.fixture
def made(tmp_path):
    return Made(tmp_path)


def test_a_training_that_did_lost_steps_again_passes(made):
    verdict = made.verdict()
    assert verdict.failed == []
    assert [step.attempt for step in verdict.history.values()] == ["attempt-001"] * 3 + ["attempt-002"] * 3
    assert verdict.repeated == [("attempt-001", 4, LOSSES[4])]
    assert verdict.tolerance == pytest.approx(1e-6)


def leave_out(made):
    made.attempts["attempt-002"] = (1, [5, 6])
    made.attempts["attempt-001"] = (2, [1, 2, 3])


def other_rows(made):
    made.rows["attempt-002", 5] = made.rows["attempt-002", 4]


def other_rows_in_what_was_lost(made):
    made.rows["attempt-001", 4] = ROWS[5]


def other_loss(made):
    made.losses["attempt-002", 5] *= 1 + 1e-5
    made.remembered[4] = made.logged[4] = (5, made.losses["attempt-002", 5])


def other_loss_the_second_time(made):
    made.losses["attempt-001", 4] *= 1 + 1e-5


def other_weights(made):
    made.weight += 1e-5


def forget(made):
    del made.remembered[2]


def log_twice(made):
    made.logged.append((4, LOSSES[4]))


def log_less(made):
    del made.logged[3]


def log_another_value(made):
    made.logged[3] = (4, LOSSES[4] * (1 + 1e-9))


def keep_unsent(made):
    made.unsent = 2


def drain(made):
    made.kind = DRAIN_NODE


@pytest.mark.parametrize(
    ("spoil", "claim"),
    [
        (leave_out, "the final model's history has each step once"),
        (other_rows, "each of its steps was trained on the rows of the undisturbed step"),
        (other_rows_in_what_was_lost, "a lost step had been begun on the rows on which it was trained again"),
        (other_loss, "all losses, the last one included, are those of the undisturbed training"),
        (other_loss_the_second_time, "a lost step had the loss that it had again"),
        (other_weights, "so are the weights"),
        (forget, "the last checkpoint remembers each step once, with its loss"),
        (log_twice, "MLflow has the loss of each step once"),
        (log_less, "MLflow has the loss of each step once"),
        (log_another_value, "it is a loss that the step had"),
        (keep_unsent, "the MLflow run is finished, and nothing is left to send"),
        (drain, "adding and draining a node repeat no step"),
    ],
)
def test_what_is_wrong_is_found(made, spoil, claim):
    spoil(made)
    assert any(failed.startswith(f"{claim}:") for failed in made.verdict().failed)


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_takes_away_only_nodes_that_are_there_and_has_each_kind_as_often_as_asked(seed):
    plan = draw(seed, 60, 2)
    assert plan == draw(seed, 60, 2)
    assert [event.step for event in plan] == sorted({event.step for event in plan})
    nodes = NODES
    for event in plan:
        nodes += {ADD_NODE: 1, KILL_NODE: -1, DRAIN_NODE: -1}.get(event.kind, 0)
        assert 1 <= nodes <= NODES
    kinds = [event.kind for event in plan]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        KILL_WORKER: 2,
        KILL_NODE: 2,
        DRAIN_NODE: 2,
        CUT_STORAGE: 2,
        RESTART_MLFLOW: 2,
        ADD_NODE: 3,
    }
    assert plan != draw(seed + 1, 60, 2)


def test_a_training_too_short_for_its_events_is_refused():
    with pytest.raises(ValueError, match="13 events, which need 48 steps, not 40"):
        draw(1, 40, 2)
