"""The documents beside the code say what pyproject.toml and the package say."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import yaml

import selfforcing_dfd

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = selfforcing_dfd.__version__


def test_one_version_and_one_licence():
    """Catches a release whose changelog or citation is of the one before."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == VERSION
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    changes = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert changes[0] == VERSION


def test_one_list_of_dependencies():
    """Catches a second list, which is out of date as soon as the first one changes."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [line for line in lines if not line.startswith("#")]
    assert [line.split("==")[0] for line in wanted] == ["torch", "-e .[dev]"]


def test_what_is_imported_is_installed():
    """Catches an import that only works where a developer happens to have the package."""
    files = (ROOT / "selfforcing_dfd").rglob("*.py")
    trees = [ast.parse(path.read_text()) for path in files]
    imports = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Import)]
    froms = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules = [alias.name for node in imports for alias in node.names]
    modules += [node.module or "" for node in froms]
    imported = {module.split(".")[0] for module in modules}
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    named = {re.split(r"[><=;\[ ]", item)[0] for group in groups for item in group}
    names = {"PIL"} | {name.replace("-", "_") for name in named}
    foreign = imported - {"selfforcing_dfd"} - set(sys.stdlib_module_names)
    assert foreign - names <= {"yaml"}, "yaml comes with omegaconf"


def test_contributors_find_the_files_that_are_named():
    """Catches a guide to folders that have moved."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"`((?:tests|configs|stages|weights|evaluation|tiny)/[\w./]*)`", text):
        places = (ROOT, ROOT / "selfforcing_dfd")
        assert any((place / name).exists() for place in places), name
