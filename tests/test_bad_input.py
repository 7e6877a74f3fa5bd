"""What a user gets for a mistake: exit code 2, one message that says what to do, and nothing left behind.

The checks themselves are tested beside their modules; here they are met through the command line.
"""

import copy
import json
from pathlib import Path

import pytest
import yaml
from tenfold.platform.experiment import load_experiment

REPOSITORY = Path(__file__).parents[1]
STORIES = "sample:models/stories260K"
GOOD_ROWS = [{"instruction": f"Say {number}.", "output": str(number)} for number in range(20)]


@pytest.fixture
def experiment(tmp_path):
    """A tiny experiment as plain data, which passes all checks."""
    data = yaml.safe_load((REPOSITORY / "tests" / "methods" / "dskd" / "contract.yaml").read_text())
    data["compute"]["workers"] = 1
    return {**data, "storage": str(tmp_path / "runs"), "tracking": {"uri": f"sqlite:///{tmp_path / 'mlflow.db'}"}}


@pytest.fixture
def refused(tmp_path, tenfold):
    """Run an experiment that holds a mistake; returns the message."""

    def run(data, *arguments):
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(data))
        before = sorted(tmp_path.rglob("*"))
        code, _, text = tenfold("run", path, *arguments)
        assert code == 2, text
        assert text.count("error: ") == 1, text
        assert "Traceback" not in text
        assert sorted(tmp_path.rglob("*")) == before
        return text[text.index("error: ") :]

    return run


def with_data(experiment, path, **options):
    changed = copy.deepcopy(experiment)
    changed["config"]["data"] |= {"train": [{"path": str(path), **options}]}
    return changed


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_experiment_itself_is_good(experiment, tmp_path, tenfold):
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment))
    code, _, text = tenfold("run", path, "--plan")
    assert code == 0, text
    assert sorted(tmp_path.rglob("*")) == [path]


def test_an_unknown_method_names_the_nearest(experiment, refused):
    message = refused(experiment | {"method": "dksd"})
    assert "method = 'dksd': unknown method; did you mean dskd?" in message


def test_all_mistakes_of_the_file_and_the_overrides_come_in_one_message(experiment, refused):
    experiment["config"]["training"]["learning_rat"] = 1e-3
    message = refused(experiment, "compute.workers=0", "config.kd_rate=2", "config.training.max_step=5", "sed=1")
    assert "5 problem(s)" in message
    for told in (
        "did you mean config.training.learning_rate?",
        "compute.workers = 0",
        "config.kd_rate = 2",
        "did you mean config.training.max_steps?",
        "did you mean seed?",
    ):
        assert message.count(told) == 1, told


@pytest.mark.parametrize("override", ["config.objective", "=sft", "config..objective=sft"])
def test_an_override_without_key_or_equals_sign_shows_how_it_is_written(experiment, refused, override):
    message = refused(experiment, override)
    assert f"override {override!r}: write it as section.key=value" in message


def test_a_missing_data_file_is_named_with_the_folder_it_was_looked_for_in(experiment, refused, tmp_path):
    message = refused(with_data(experiment, "rows.jsonl"))
    assert f"rows.jsonl: no such file; relative paths start at {tmp_path}" in message


def test_an_empty_data_file_is_named(experiment, refused, tmp_path):
    (tmp_path / "rows.jsonl").touch()
    message = refused(with_data(experiment, tmp_path / "rows.jsonl"))
    assert f"{tmp_path / 'rows.jsonl'}: the file is empty" in message


def test_rows_without_a_response_are_named_with_file_and_line(experiment, refused, tmp_path):
    rows = [*GOOD_ROWS, {"instruction": "Say it."}, {"instruction": "Say it.", "output": None}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    message = refused(with_data(experiment, path))
    assert "2 of 22 train rows cannot be used" in message
    assert f"{path}, line 21: " in message
    assert f"{path}, line 22: " in message
    assert "skip_bad_rows: true" in message


def test_a_step_larger_than_the_data_says_both_numbers(experiment, refused, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", GOOD_ROWS)
    message = refused(with_data(experiment, path), "compute.workers=5")
    assert "a step takes 20 rows (4 x 1 x 5 workers), the training data has 16" in message


def test_a_tokenizer_larger_than_the_model_is_refused_with_both_sizes(experiment, refused, tiny_model_folder):
    # 320 rows in the head, 512 entries in the tokenizer
    experiment["config"]["student"] = {"model": str(tiny_model_folder), "tokenizer": STORIES}
    message = refused(experiment)
    assert f"{tiny_model_folder}: the tokenizer has 512 entries, the model's head only 320 rows" in message


def test_two_vocabularies_are_refused_by_the_objective_that_needs_one(experiment, refused, tiny_model_folder):
    experiment["config"] |= {"objective": "kl", "teacher": {"model": str(tiny_model_folder)}}
    message = refused(experiment)
    assert "config.objective = kl: needs one vocabulary" in message
    assert "512 entries, the teacher's 320" in message
    assert "config.objective=dual_space_v2" in message


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ({"on_policy": {}}, "use teacher_mode = live"),
        ({"on_policy": {}, "teacher_mode": "live", "objective": "uld"}, "on_policy works with kl"),
        ({"cma_std": "batch"}, "use teacher_mode = live"),
        ({"topk_vocab": 0}, "-1 for all"),
        ({"test_sets": {"mine": [{"path": "nowhere.json"}]}}, "nowhere.json"),
    ],
)
def test_options_that_do_not_fit_each_other_say_what_would(experiment, refused, option, told):
    experiment["config"] |= option
    assert told in refused(experiment)


@pytest.mark.parametrize("objective", ["sft", "seqkd", "dual_space_v1", "dual_space_v2", "overlap_kd", "uld", "mined"])
def test_all_others_take_a_teacher_of_another_vocabulary(experiment, tmp_path, tenfold, tiny_model_folder, objective):
    experiment["config"] |= {"objective": objective, "teacher": {"model": str(tiny_model_folder)}}
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment))
    code, _, text = tenfold("run", path, "--plan")
    assert code == 0, text


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("compute.workers=800", "the run asks for 800 worker(s)"),
        ("compute.gpus_per_worker=64", "compute.gpus_per_worker="),
        ("compute.cpus_per_worker=4096", "compute.cpus_per_worker="),
    ],
)
def test_more_than_the_machine_has_is_refused_by_a_plan(experiment, refused, override, told):
    experiment["config"]["data"]["train"] = [{"path": "sample:instruct/short_instructions.json"}]
    experiment["config"]["training"]["per_device_train_batch_size"] = 1
    message = refused(experiment, "--plan", override)
    assert told in message
    assert "the cluster has" in message


def test_storage_that_cannot_be_written_is_refused(experiment, refused, tmp_path):
    (tmp_path / "file").touch()
    message = refused(experiment | {"storage": str(tmp_path / "file" / "runs")})
    assert f"storage = '{tmp_path / 'file' / 'runs'}': cannot be written" in message
    message = refused(experiment | {"storage": "/proc/tenfold-runs"})
    assert "storage = '/proc/tenfold-runs': cannot be written" in message


@pytest.mark.parametrize("storage", ["ftp://127.0.0.1:1/runs", "~nobody_such/runs"])
def test_storage_that_cannot_be_opened_is_refused(experiment, refused, storage):
    assert f"storage = '{storage}': " in refused(experiment | {"storage": storage})


def test_an_mlflow_server_that_is_down_is_refused_with_its_address(experiment, refused):
    message = refused(experiment | {"tracking": {"uri": "http://127.0.0.1:1"}})
    assert "tracking.uri = 'http://127.0.0.1:1'" in message
    assert "mlflow server" in message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("zero4", "compute.deepspeed = 'zero4': give one of zero0, zero1"),
        ("absent.json", "compute.deepspeed = 'absent.json': no such file"),
        (["zero2"], "compute.deepspeed"),
        ({"zero_optimization": 3}, "compute.deepspeed.zero_optimization = 3: needs a section such as {stage: 2}"),
        ({"zero_optimization": {"stage": 7}}, "stage = 7: Input should be 0, 1, 2"),
        ({"zero_optimisation": {"stage": 2}}, "zero_optimisation: unknown; did you mean zero_optimization?"),
    ],
)
def test_a_wrong_deepspeed_setting_is_refused(experiment, refused, content, told):
    experiment["compute"]["deepspeed"] = content
    assert told in refused(experiment, "--plan")


@pytest.mark.parametrize("content", [b"{", b"[1]", b"3", b"\xff"])
def test_a_deepspeed_file_that_holds_no_object_is_refused(experiment, refused, tmp_path, content):
    path = tmp_path / "deepspeed.json"
    path.write_bytes(content)
    experiment["compute"]["deepspeed"] = str(path)
    message = refused(experiment)
    assert "compute.deepspeed: " in message
    assert str(path) in message


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("learning_rate=.inf", "learning_rate = inf: Input should be a finite number"),
        ("warmup_steps=.nan", "warmup_steps = nan: Input should be a finite number"),
        (
            "max_steps=1000000000000000000000000000000",
            "max_steps = 1000000000000000000000000000000: Input should be less",
        ),
        ("num_train_epochs=1e300", "num_train_epochs = 1e+300: Input should be less"),
        ("metric_for_best=nll", "metric_for_best = 'nll': String should match pattern '^eval/.'"),
    ],
)
def test_numbers_and_names_that_no_training_can_use_are_refused(experiment, refused, override, told):
    assert f"config.training.{told}" in refused(experiment, "--plan", f"config.training.{override}")


@pytest.mark.parametrize(
    ("key", "value"), [("storage", "runs"), ("storage", "./runs"), ("tracking.uri", "sqlite:///mlflow.db")]
)
def test_a_submitted_job_with_a_relative_address_is_refused(experiment, refused, monkeypatch, key, value):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    message = refused(experiment, f"{key}={value}")
    assert f"{key} = '{value}': relative, and Ray deletes the folder" in message
    assert "absolute path" in message


def test_a_submitted_job_with_absolute_addresses_passes(experiment, tmp_path, tenfold, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment))
    code, _, text = tenfold("run", path, "--plan")
    assert code == 0, text


def test_a_plan_with_ray_data_starts_no_cluster(experiment, tmp_path, tenfold):
    path = tmp_path / "experiment.yaml"
    rows = write_rows(tmp_path / "rows.jsonl", GOOD_ROWS)
    path.write_text(yaml.safe_dump(with_data(experiment, rows, format="ray")))
    code, _, text = tenfold("run", path, "--plan")
    assert code == 0, text


def test_an_unknown_method_with_nothing_near_lists_the_known_ones(tenfold):
    code, _, text = tenfold("methods", "zzz")
    assert code == 2
    assert "error: zzz: unknown method. Known: " in text


@pytest.mark.parametrize("content", [b"name: [", b"- a\n- b\n", b"", b"name: a\nname: b\n", b"name: \xff\n"])
def test_a_file_that_is_no_experiment_is_refused_with_its_name(tmp_path, tenfold, content):
    path = tmp_path / "experiment.yaml"
    path.write_bytes(content)
    code, _, said = tenfold("run", path)
    assert code == 2, said
    assert said.count("error: ") == 1
    assert str(path) in said
    assert "Traceback" not in said


def test_commands_for_runs_name_the_runs_there_are(tmp_path, tenfold):
    (tmp_path / "runs" / "demo-1234").mkdir(parents=True)
    (tmp_path / "runs" / "demo-1234" / "run.json").write_text("{}")
    for command in (["evaluate", "dmo-1234"], ["compare", "dmo-1234"], ["export", "dmo-1234", "folder"]):
        code, _, text = tenfold(*command)
        assert code == 2, text
        assert "error: dmo-1234: no such run; did you mean demo-1234?" in text
        assert text.count("error: ") == 1


@pytest.fixture
def finished(experiment, tmp_path):
    """The folder of a finished run of the experiment, which is in experiment.yaml."""
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment))
    folder = tmp_path / "runs" / load_experiment(str(path)).run_id
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    state = {"status": "finished", "created": 1.0, "mlflow_run_id": "17ab", "mlflow_uri": "sqlite:////m.db"}
    (folder / "run.json").write_text(json.dumps(state | {"metrics": {"eval/nll": 1.5}}))
    return folder


def commands_for(run):
    return ["evaluate", run], ["compare", run], ["compare", "dskd-contract", "--latest", 1], ["export", run, "folder"]


BAD_STATES = [
    b"",
    b"{",
    b"[1]",
    b"\xff",
    b"{}",
    b'{"status": "finished"}',
    b'{"status": ["finished"], "created": 1.0}',
]


@pytest.mark.parametrize("content", BAD_STATES)
def test_a_damaged_state_is_named_by_every_command_and_left_as_it_is(finished, tenfold, content):
    path = finished / "run.json"
    path.write_bytes(content)
    for command in (*commands_for(finished.name), ["run", "experiment.yaml"], ["run", "experiment.yaml", "--plan"]):
        code, _, text = tenfold(*command)
        assert code == 2, text
        assert f"error: {path} cannot be used: " in text
        assert "delete it and start the same experiment again" in text
        assert path.read_bytes() == content


@pytest.mark.parametrize("content", [None, b"", b"name: [", b"[1]", b"\xff", b"name: a", b"name: a\nname: b"])
def test_a_damaged_experiment_of_a_run_is_named_with_where_a_copy_is(finished, tenfold, content):
    path = finished / "experiment.yaml"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    for command in commands_for(finished.name):
        code, _, text = tenfold(*command)
        assert code == 2, text
        assert f"error: run {finished.name}: its experiment cannot be used: " in text
        assert f"Put back {path}: MLflow has a copy, the artifact experiment.yaml of run 17ab" in text


def test_a_damaged_run_of_another_name_does_not_matter(finished, tenfold):
    other = finished.with_name("other-1")
    other.mkdir()
    (other / "run.json").write_text("{")
    code, _, text = tenfold("compare", "dskd-contract", "--latest", 1)
    assert code == 0, text
