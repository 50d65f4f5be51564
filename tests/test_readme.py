"""The README says only what is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from selfforcing_dfd.cli.main import COMMANDS, parse
from selfforcing_dfd.stages import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```\n(.*?)```", README, re.S))


def test_commands_exist() -> None:
    """Catches a command that was renamed and left behind where a newcomer meets it first."""
    named = set(re.findall(r"python -m selfforcing_dfd (\w+)", README))
    assert named == set(COMMANDS) - {"train", "stream", "benchmark"}


def test_make_targets_exist() -> None:
    """Catches `make demo` without a demo."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"demo", "test"} <= set(re.findall(r"^make (\w+)", BLOCKS, re.M)) <= targets


@pytest.mark.parametrize("command", sorted(set(re.findall(r"train\.py (--config[^#\n]*)", BLOCKS))))
def test_training_commands_load(command: str) -> None:
    """Catches a setting in an example that no longer exists."""
    words = command.split()
    load_config(words[1], [word for word in words[2:] if not word.startswith("--")])


@pytest.mark.parametrize("script", ["stream", "benchmark"])
def test_inference_commands_parse(script: str) -> None:
    """Catches an option in an example that was renamed."""
    commands = re.findall(rf"inference/{script}\.py ([^#|\n]*)", BLOCKS)
    assert commands
    for command in commands:
        parse([script, *shlex.split(command)])


def test_python_example_runs() -> None:
    """Catches an interface that changed under the README's own example."""
    (example,) = (
        block for block in re.findall(r"```\n(.*?)```", README, re.S) if block.startswith("from ")
    )
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["session"].prompt == "a cross moves"


def test_files_of_the_tree_exist() -> None:
    """Catches a tree drawn from memory."""
    tree = README.split("## Where things are")[1].split("```")[1]
    folder = ""
    for line in tree.strip().splitlines():
        names = re.match(r"\s*((?:[\w./]+ )*[\w./]+)", line)
        assert names is not None
        indented = line.startswith("  ")
        for name in names[1].split():
            if "." not in name and not name.endswith("/"):
                break
            path = ROOT / (folder if indented else "") / name
            assert path.exists(), f"{name} of the README's tree is not at {path.relative_to(ROOT)}"
            if not indented and name.endswith("/"):
                folder = name
