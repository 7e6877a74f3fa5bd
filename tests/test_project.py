"""Guards of the layout: packages, import arrows."""

import ast
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FOLDERS = ("platform", "methods", "serve", "samples")


def python_files(*folders):
    return [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]


def test_the_packages_list_equals_the_folders_on_disk():
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {"tenfold.platform"}
    for path in python_files(*FOLDERS):
        if path.name == "__init__.py":
            found.add("tenfold." + ".".join(path.parent.relative_to(REPOSITORY).parts))
    assert sorted(settings["packages"]) == sorted(found)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", python_files("platform", "methods", "serve"), ids=str)
def test_imports_follow_the_arrows(path):
    parts = path.relative_to(REPOSITORY).parts
    for module in imported(path):
        if not module.startswith("tenfold."):
            continue
        area = module.split(".")[1]
        if parts[0] == "platform":
            assert area == "platform" or (parts[-1] == "cli.py" and area == "serve"), module
        elif parts[0] == "serve":
            assert area in ("platform", "serve"), module
        elif area == "methods" and len(parts) > 2:
            assert module.split(".")[2:3] in ([parts[1]], []), module
