"""The README says only what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from selfforcing_dfd.__main__ import COMMANDS
from selfforcing_dfd.config import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```\n(.*?)```", README, re.S))


def test_commands_exist() -> None:
    """Catches a command that was renamed and left behind where a newcomer meets it first."""
    named = set(re.findall(r"python -m selfforcing_dfd (\w+)", README))
    assert named == {command.__name__ for command in COMMANDS}


def test_make_targets_exist() -> None:
    """Catches `make demo` without a demo."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"demo", "test"} <= set(re.findall(r"^make (\w+)", BLOCKS, re.M)) <= targets


@pytest.mark.parametrize("command", sorted(set(re.findall(r"train\.py (--config[^#\n]*)", BLOCKS))))
def test_training_commands_load(command: str) -> None:
    """Catches a setting in an example that no longer exists."""
    words = command.split()
    load_config(words[1], [word for word in words[2:] if not word.startswith("--")])


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
