"""README and docs say only what is there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from selfforcing_dfd.cli.main import COMMANDS, parse
from selfforcing_dfd.stages import load_config

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "selfforcing_dfd"
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MEGABYTE = 10**6
MOST_LINES = 130
MOST_COLUMNS = 100

PROGRAMS = {
    ("selfforcing-dfd",): [],
    ("python", "train.py"): ["train"],
    ("python", "inference/stream.py"): ["stream"],
    ("python", "inference/benchmark.py"): ["benchmark"],
    ("python", "inference/evaluate.py"): ["evaluate"],
}
"""How a command line may begin, and the words of ours that stand for it."""

OTHERS = [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
FILE_WORD = re.compile(r"`((?:[\w.]+/)*[\w.]+\.(?:py|yaml|md|json))`")
MADE_BY_RUNS = {
    *("config.json", "config.yaml", "curation.json", "evaluation.json", "metrics.jsonl"),
    *("run.json", "tokenizer.json", "pipeline.py", "tiny_pipeline.py"),
}
OF_OTHERS = {"self_forcing_dmd.yaml", "self_forcing_dfd.yaml", "wan_causal_ode.yaml"}
FOLDERS = (ROOT, ROOT / "configs", PACKAGE, ROOT / "tests")


def read(document: Path) -> str:
    return document.read_text()


def blocks(text: str) -> list[str]:
    """What stands between fences, with continued lines joined."""
    found = re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
    return [block.replace("\\\n", " ") for block in found]


def inline_code(text: str) -> list[str]:
    """What stands between backticks in sentences and tables."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def our_words(line: str) -> list[str] | None:
    """The words after the program in one shell line; None if it is no command of ours."""
    words = shlex.split(line.split(" | ")[0], comments=True)
    for beginning, stands_for in PROGRAMS.items():
        if tuple(words[: len(beginning)]) == beginning:
            return stands_for + words[len(beginning) :]
    return None


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """Every command of ours in all documents, with the document's name."""
    for document in DOCUMENTS:
        text = read(document)
        lines = [line for block in blocks(text) for line in block.splitlines()]
        inline = [code for code in inline_code(text) if code.startswith("selfforcing-dfd ")]
        for line in [*lines, *inline]:
            if "COMMAND" in line or line.startswith(("from ", "session", "for ", " ")):
                continue
            words = our_words(line)
            if words and words != ["--help"]:
                yield document.name, words


COMMAND_LINES = list(command_lines())
BARE = ("invert", "import")
"""Commands that sentences name without their options."""


def labels() -> list[str]:
    return [f"{name}: {' '.join(words)}" for name, words in COMMAND_LINES]


@pytest.mark.parametrize("words", [words for _, words in COMMAND_LINES], ids=labels())
def test_commands_parse(words: list[str]) -> None:
    """Catches an option or a setting in an example that was renamed."""
    if len(words) == 1 and words[0] in BARE:
        assert words[0] in COMMANDS
        return
    options = parse(words)
    if words[0] == "train" and options.config != "NAME":
        load_config(options.config, options.overrides)


def test_every_command_is_shown() -> None:
    """Catches a command that no document explains."""
    assert {words[0] for _, words in COMMAND_LINES} == set(COMMANDS)


def test_make_targets_exist() -> None:
    """Catches `make demo` without a demo."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    text = "\n".join(read(document) for document in DOCUMENTS)
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.M))
    assert {"demo", "test"} <= named <= targets


def python_examples() -> list[str]:
    text = "\n".join(read(document) for document in DOCUMENTS)
    return re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)


def test_python_example_runs() -> None:
    """Catches an interface that changed under the documents' own example."""
    (example,) = python_examples()
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["session"].prompt == "a cross moves"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(document: Path) -> None:
    """Catches a file or config that has moved since it was named."""
    named = set(FILE_WORD.findall(read(document))) - MADE_BY_RUNS - OF_OTHERS
    lost = [word for word in named if not any((folder / word).exists() for folder in FOLDERS)]
    assert lost == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    """Catches a link or picture that is not in the repository."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", read(document))
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_tests_exist(document: Path) -> None:
    """Catches a claim whose test is gone."""
    source = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w*[a-z])`", read(document))
    assert [name for name in named if f"def {name}(" not in source] == []


def test_the_map_names_every_module_and_folder() -> None:
    """Catches a module of the package's root that the README leaves unexplained."""
    place = README.split("## The package")[1].split("\n## ")[0]
    modules = {path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("_")}
    folders = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert set(inline_code(place)) - {"selfforcing-dfd"} == modules | folders


def test_the_method_is_as_long_as_the_readme_says() -> None:
    """Catches a promise of 600 lines that has become untrue."""
    names = ("flow", "context", "rollout", "objectives", "forcing")
    lines = sum(len((PACKAGE / f"{name}.py").read_text().splitlines()) for name in names)
    assert f"{round(lines, -2)} lines together" in README


def test_pictures_are_small() -> None:
    """Catches a picture that makes the front page slow."""
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert len(pictures) == 2
    for picture in pictures:
        assert (ROOT / picture).stat().st_size < 1.5 * MEGABYTE


def test_the_front_page_stays_a_page() -> None:
    """Catches a README that grows into a manual again."""
    assert len(README.splitlines()) <= MOST_LINES


@pytest.mark.parametrize("document", [*DOCUMENTS, *OTHERS], ids=lambda path: path.name)
def test_lines_are_short(document: Path) -> None:
    """Catches prose that is hard to review; only rows of tables in docs/ may be longer."""
    in_readme = document.name == "README.md"
    lines = read(document).splitlines()
    checked = [line for line in lines if in_readme or not line.startswith("|")]
    assert [line for line in checked if len(line) > MOST_COLUMNS] == []


def test_configs_have_short_lines() -> None:
    """Catches a comment in a recipe that has to be scrolled."""
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert [line for line in path.read_text().splitlines() if len(line) > MOST_COLUMNS] == []
