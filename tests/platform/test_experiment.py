"""Experiment files: every error at once, nearest keys, overrides, identity."""

import subprocess
import sys
from pathlib import Path

import pytest
from tenfold.platform.errors import ConfigError
from tenfold.platform.experiment import apply_override, load_experiment, parse_yaml
from tenfold.platform.method import packaged_experiments

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("name", sorted(packaged_experiments()))
def test_every_shipped_experiment_validates(name):
    assert load_experiment(name).experiment.method == name.split("/")[0]


def test_all_errors_are_shown_at_once_with_the_nearest_key():
    with pytest.raises(ConfigError) as caught:
        load_experiment("dskd/demo", ["config.objectiv=kl", "config.max_steps=5", "compute.wrkers=2", "seed=abc"])
    text = str(caught.value)
    assert "4 problem(s)" in text
    assert "did you mean config.objective?" in text
    assert "did you mean config.training.max_steps?" in text
    assert "did you mean compute.workers?" in text
    assert "seed = 'abc'" in text


def test_unknown_experiment_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean dskd/demo"):
        load_experiment("dskd/dmo")


def test_unknown_method_names_the_known_ones(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("name: a\nmethod: dskt\n")
    with pytest.raises(ConfigError, match="did you mean dskd"):
        load_experiment(str(path))


def test_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load_experiment("nowhere.yaml")


def test_repeated_key_is_refused():
    with pytest.raises(ConfigError, match=r"line 2.*given twice"):
        parse_yaml("a: 1\na: 2", "x")


def test_exponents_without_a_point_are_numbers():
    assert parse_yaml("a: 1e-3", "x") == {"a": 0.001}


def test_override_sets_nested_keys_and_list_items():
    data = {"a": {"b": 1}, "c": [{"d": 1}]}
    apply_override(data, "a.b=2")
    apply_override(data, "c.0.d=[1, 2]")
    apply_override(data, "e.f=x")
    assert data == {"a": {"b": 2}, "c": [{"d": [1, 2]}], "e": {"f": "x"}}


def test_a_base_gives_what_a_file_does_not_say(tmp_path):
    base, middle, top = (tmp_path / f"{name}.yaml" for name in ("base", "middle", "top"))
    middle.write_text("base: dskd/demo\nseed: 5\nconfig: {training: {learning_rate: 1.0e-3}}\n")
    top.write_text(f"base: {middle}\nname: top\nconfig: {{data: {{train: [{{path: a.json}}]}}}}\n")
    demo, changed = load_experiment("dskd/demo"), load_experiment(str(top))
    assert changed.experiment.name == "top"
    assert changed.experiment.seed == 5
    assert changed.config.training.learning_rate == 1e-3
    assert changed.config.training.num_train_epochs == demo.config.training.num_train_epochs
    assert [source.path for source in changed.config.data.train] == ["a.json"]
    assert "base" not in changed.resolved()

    base.write_text(f"base: {top}\n")
    middle.write_text(f"base: {base}\n")
    with pytest.raises(ConfigError, match="in a circle"):
        load_experiment(str(top))
    base.write_text("base: dskd/dmo\n")
    with pytest.raises(ConfigError, match=r"middle\.yaml: base: .*base\.yaml: base: .*did you mean dskd/demo"):
        load_experiment(str(top))


@pytest.mark.parametrize("override", ["novalue", "=1", "a..b=1", "a.b.c=1"])
def test_bad_override_is_refused(override):
    with pytest.raises(ConfigError, match="override"):
        apply_override({"a": {"b": 1}}, override)


def test_the_same_file_gives_the_same_run_and_a_changed_one_another():
    first, second = load_experiment("dskd/demo"), load_experiment("dskd/demo")
    assert first.run_id == second.run_id
    assert load_experiment("dskd/demo", ["config.kd_rate=0.4"]).run_id != first.run_id
    assert load_experiment("dskd/demo", ["seed=11"]).run_id != first.run_id
    assert load_experiment("dskd/demo", ["storage=/elsewhere"]).run_id == first.run_id


def test_help_is_quick_and_imports_neither_torch_nor_ray():
    code = (
        "import sys; sys.argv = ['tenfold', '--help']\nfrom tenfold.platform import cli\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip().endswith("[]")


def test_platform_folder_never_hides_the_standard_module():
    assert not (REPOSITORY / "platform" / "__init__.py").exists()
