"""The wheel alone, in a fresh environment: what it holds, and that it works away from the repository."""

import importlib.metadata
import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[1]
FOLDERS = ("platform", "methods", "serve", "samples")
BUILD_SECONDS = 300


def setuptools_is_here():
    """Say whether the build needs nothing that is not installed: then it needs no network."""
    try:
        return Version(importlib.metadata.version("setuptools")) >= Version("77")
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # From a copy: building leaves files in its source, and takes up what an earlier build left there.
    source = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "dist", "."]
    if setuptools_is_here():
        command.insert(-1, "--no-build-isolation")
    built = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    assert built.returncode == 0, built.stderr
    [path] = (source / "dist").glob("tenfold-*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A virtual environment with the wheel, which sees this one's dependencies but not this one's tenfold."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin" / "python"
    # Before the other packages are in sight: pip would take away their tenfold.
    install = ["--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    command = [sys.executable, "-m", "pip", *install, str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    # A path in a .pth file is searched, but .pth files in it are not read: an editable install there has no effect.
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    (Path(paths["purelib"]) / "dependencies.pth").write_text("\n".join(sorted(here)) + "\n")
    return folder


@pytest.fixture
def run(environment, tmp_path):
    """Run a program of the environment in an empty folder outside the repository; returns its output."""

    def call(program, *arguments):
        env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RAY_ADDRESS")}
        env |= {"VIRTUAL_ENV": str(environment), "RAY_TMPDIR": str(tmp_path)}
        done = subprocess.run(
            [environment / "bin" / program, *arguments],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return call


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(names):
    wanted = set()
    for folder in FOLDERS:
        for path in (REPOSITORY / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                wanted.add(f"tenfold/{path.relative_to(REPOSITORY).as_posix()}")
    assert {name for name in names if ".dist-info/" not in name} == wanted


def test_experiments_readmes_and_samples_are_in_the_wheel(names):
    for method in sorted(path.parent for path in (REPOSITORY / "methods").glob("*/method.py")):
        assert f"tenfold/methods/{method.name}/README.md" in names
        for path in method.glob("configs/*.yaml"):
            assert f"tenfold/methods/{method.name}/configs/{path.name}" in names
    for place in ("methods/dskd/configs/demo.yaml", "serve/serve.yaml", "samples/README.md"):
        assert f"tenfold/{place}" in names
    assert "tenfold/samples/instruct/short_instructions.json" in names
    assert "tenfold/samples/models/stories260K/model.safetensors" in names


def test_the_wheel_never_hides_pythons_platform_module(names):
    assert "tenfold/platform/cli.py" in names
    assert "tenfold/platform/__init__.py" not in names
    assert "tenfold/__init__.py" not in names


def test_tenfold_is_the_wheels_and_every_module_imports(run, environment, names):
    modules = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in names if name.endswith(".py")
    )
    assert len(modules) > 50
    code = (
        "import importlib, json, platform, sys, tenfold, tenfold.platform\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    importlib.import_module(name)\n"
        "print(json.dumps([list(tenfold.__path__), list(tenfold.platform.__path__), platform.system()]))"
    )
    top, inner, system = json.loads(run("python", "-c", code, json.dumps(modules)).splitlines()[-1])
    assert len(top) == 1
    assert Path(top[0]).is_relative_to(environment)
    assert [Path(path) for path in inner] == [Path(top[0]) / "platform"]
    assert system


def test_methods_are_listed_and_explained_outside_the_repository(run):
    listed = json.loads(run("tenfold", "methods", "--json"))
    assert {fact["name"] for fact in listed} >= {"dskd"}
    assert all(fact["experiments"] for fact in listed)
    assert "dskd" in run("tenfold", "methods")
    assert "dskd/demo" in run("tenfold", "methods", "dskd")


def test_every_packaged_experiment_validates_outside_the_repository(run):
    code = (
        "from tenfold.platform.experiment import load_experiment\n"
        "from tenfold.platform.method import packaged_experiments\n"
        "for name in packaged_experiments():\n"
        "    print(name, load_experiment(name).run_id)"
    )
    lines = run("python", "-c", code).splitlines()
    shipped = {f"{path.parts[-3]}/{path.stem}" for path in (REPOSITORY / "methods").glob("*/configs/*.yaml")}
    assert {line.split()[0] for line in lines} == shipped
