"""What a sweep shows: best trial, means over seeds, table, picture."""

import csv
import io
import json
import math
from dataclasses import replace

import pytest
from tenfold.platform.experiment import Dimension, Sweep
from tenfold.platform.storage import Storage
from tenfold.platform.tuning.results import collect, figure, table_csv
from tenfold.platform.tuning.trial import TrialReports

SWEEP = Sweep.model_validate(
    {
        "metric": "eval/nll",
        "mode": "min",
        "space": {"config.objective": {"grid": ["sft", "kl"]}, "seed": {"grid": [1, 2, 3]}},
    }
)


@pytest.fixture
def top(tmp_path):
    storage = Storage(tmp_path)
    values = {"sft": [4.0, 5.0, 6.0], "kl": [3.0, 1.0, 0.5]}
    for objective, scores in values.items():
        for seed, score in enumerate(scores, start=1):
            status = "stopped" if (objective, seed) == ("kl", 3) else "finished"
            write(storage, f"s-1-{objective}{seed}", objective, seed, score, status)
    write(storage, "s-1-2-ab", "sft", 1, 0.0, "finished")  # of the repeated sweep s-1-2
    return storage


def write(storage, run, objective, seed, score, status):
    storage.write_text(f"{run}/trial.json", json.dumps({"values": {"config.objective": objective, "seed": seed}}))
    created = seed + 10 * (objective == "kl")
    metrics = {"eval/nll": score, "eval/perplexity": math.exp(score)}
    state = {"status": status, "metrics": metrics, "created": created}
    storage.write_text(f"{run}/run.json", json.dumps(state))
    reports = TrialReports(storage.uri_of(run), "eval/nll")
    assert reports.keep({"eval/nll": score + 1}, 10)
    assert reports.keep({"eval/nll": score}, 200)


def test_the_best_is_a_finished_trial_of_this_sweep(top):
    result = collect(top, "s-1", SWEEP)
    assert [trial.run_id for trial in result.trials] == [f"s-1-{o}{s}" for o in ("sft", "kl") for s in (1, 2, 3)]
    assert result.best.run_id == "s-1-kl2"
    assert collect(top, "s-1", SWEEP.model_copy(update={"mode": "max"})).best.run_id == "s-1-sft3"


def test_means_and_deviations_are_taken_over_the_seeds(top):
    first, second = collect(top, "s-1", SWEEP).groups()
    assert (first.values, first.trials, first.mean) == ({"config.objective": "kl"}, 2, 2.0)
    assert first.deviation == pytest.approx(math.sqrt(2))
    assert (second.values, second.mean, second.deviation) == ({"config.objective": "sft"}, 5.0, 1.0)


def test_the_table_has_one_line_a_trial(top):
    rows = list(csv.DictReader(io.StringIO(table_csv(collect(top, "s-1", SWEEP)))))
    assert len(rows) == 6
    assert rows[5]["status"] == "stopped"
    assert float(rows[4]["eval/nll"]) == 1.0


def test_failed_and_unfinished_trials_have_no_value_but_are_shown(top):
    top.write_text("s-1-kl1/trial.json", json.dumps({"values": {"config.objective": "kl", "seed": 1}, "error": "no"}))
    top.write_text("s-1-new/trial.json", json.dumps({"values": {"config.objective": "kl", "seed": 9}}))
    result = collect(top, "s-1", SWEEP)
    by_run = {trial.run_id: trial for trial in result.trials}
    assert by_run["s-1-kl1"].status == "failed"
    assert by_run["s-1-new"].status == "running"
    assert math.isnan(by_run["s-1-new"].value)
    assert result.best.run_id == "s-1-kl2"


def test_a_trial_that_breaks_as_the_scheduler_stops_it_has_not_failed(top):
    values = {"config.objective": "kl", "seed": 3}
    top.write_text("s-1-kl3/trial.json", json.dumps({"values": values, "error": "must be used in a Tune session."}))
    by_run = {trial.run_id: trial for trial in collect(top, "s-1", SWEEP).trials}
    assert (by_run["s-1-kl3"].status, by_run["s-1-kl3"].error) == ("stopped", None)


def test_reports_are_kept_once_a_step_and_told_in_order(tmp_path):
    reports = TrialReports(str(tmp_path), "eval/nll")
    assert not reports.keep({"train/loss": 1.0}, 1)
    assert reports.keep({"eval/nll": 2.0}, 100)
    assert reports.keep({"eval/nll": 3.0}, 20)
    assert not reports.keep({"eval/nll": 9.0}, 100)
    assert reports.kept() == [{"eval/nll": 3.0, "step": 20}, {"eval/nll": 2.0, "step": 100}]


def test_the_picture_has_curves_and_one_panel_an_option(top):
    drawn = figure(collect(top, "s-1", SWEEP))
    curves, options = drawn.axes
    assert sum(len(line.get_xdata()) == 2 for line in curves.lines) == 6
    assert sorted({line.get_ydata()[0] for line in options.lines}) == [0.5, 1.0, 3.0, 4.0, 5.0, 6.0]


def test_the_picture_of_trials_that_report_once_has_no_curves(top):
    result = collect(top, "s-1", SWEEP)
    once = replace(result, trials=[replace(trial, reports=trial.reports[-1:]) for trial in result.trials])
    (options,) = figure(once).axes
    assert options.get_ylabel() == SWEEP.metric


def test_the_picture_has_no_panel_for_an_option_of_one_value(top):
    result = collect(top, "s-1", SWEEP)
    space = SWEEP.space | {"config.rate": Dimension(grid=[4])}
    fixed = replace(result, sweep=SWEEP.model_copy(update={"space": space}))
    assert [axis.get_xlabel() for axis in figure(fixed).axes] == ["step", "objective"]
