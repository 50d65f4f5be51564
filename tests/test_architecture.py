"""What the code may look like, checked on its syntax trees.

Who imports whom, sizes, statements, and calls that hide mistakes.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from style import is_dense, is_parallel, nodes, statements

ROOT = Path(__file__).parents[1]
PACKAGE = "selfforcing_dfd"
CORE = ("flow", "context", "rollout", "objectives", "forcing")
CORE_LIBRARIES = {"torch"}
PRINTING = {"train.py"}
PRINTING_FOLDERS = ("benchmarks", "inference", f"{PACKAGE}/cli")

LEVELS = (
    {*CORE},
    {"rng", "common", "ode", "cost"},
    {"processes"},
    {"models", "codecs"},
    {"weights", "config", "tiny"},
    {"data"},
    {"stages", "streaming", "metrics"},
    {"training", "benchmark", "live", "curate"},
    {"evaluation"},
    {"study", "protocol", "journey"},
    {"cli"},
    {"__main__", PACKAGE, "train", "inference", "benchmarks"},
)
"""Each part may import from its own level and from those before it."""

TOP_LEVEL = {
    *(
        ".ci",
        ".gitignore",
        "assets",
        "benchmarks",
        "configs",
        "docs",
        "inference",
        PACKAGE,
        "tests",
    ),
    *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md"),
    *("pyproject.toml", "requirements.txt", "train.py"),
}

APART = {
    "streaming": ("training", "stages", "evaluation", "live", "benchmark", "cli"),
    "live": ("training", "stages", "evaluation", "benchmark", "cli"),
    "benchmark": ("training", "stages", "evaluation", "live", "cli"),
    "tiny": ("data", "training", "stages", "evaluation", "streaming"),
    "training": ("streaming", "live", "benchmark", "evaluation", "study", "cli"),
}
"""What a room needs nothing of, not even through others."""


def sources() -> list[Path]:
    return [
        ROOT / "train.py",
        *sorted((ROOT / PACKAGE).rglob("*.py")),
        *sorted((ROOT / "inference").rglob("*.py")),
        *sorted((ROOT / "benchmarks").rglob("*.py")),
    ]


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    """`selfforcing_dfd.models.wan`, or `train`, `inference.stream` outside the package."""
    return short(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything imported anywhere in a file."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{short(path)}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def level(module: str) -> int:
    """Where a module stands; the longest name in LEVELS that begins it decides."""
    name = module.removeprefix(f"{PACKAGE}.")
    fitting = [
        (len(part), i)
        for i, parts in enumerate(LEVELS)
        for part in parts
        if f"{name}.".startswith(f"{part}.")
    ]
    assert fitting, f"{module} stands in no level of test_architecture.LEVELS"
    return max(fitting)[1]


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name with place, and lines, of every function."""
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield f"{short(path)}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in nodes(path) if isinstance(node, ast.Call))


@cache
def modules() -> dict[str, Path]:
    return {module_name(path): path for path in sources()}


@cache
def needs(module: str) -> frozenset[str]:
    """The modules of this repository that a module imports anywhere in its file."""
    found = set()
    for name in imports(modules()[module]):
        for part in (name, name.rpartition(".")[0]):
            if part in modules() and part not in (PACKAGE, module):
                found.add(part)
    return frozenset(found)


@cache
def reaches(module: str) -> frozenset[str]:
    """All modules that a module needs, through others too."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        for other in needs(waiting.pop()) - found:
            found.add(other)
            waiting.append(other)
    return frozenset(found)


def room(module: str) -> str:
    """The folder of a module in the package, or the module itself in its root; the core is one."""
    name = module.removeprefix(f"{PACKAGE}.").split(".")[0]
    return "core" if name in CORE else name


def test_dependencies_point_inward():
    """Catches a core that learns of configs or files, and training code that streaming needs."""
    wrong = [
        f"{module} imports {name}"
        for module in modules()
        for name in needs(module)
        if level(name) > level(module)
    ]
    assert wrong == []


@pytest.mark.parametrize("apart", sorted(APART))
def test_rooms_that_must_not_know_each_other_do_not_reach_each_other(apart):
    """Catches a stream that loads the trainer through a third module."""
    wrong = [
        f"{module} reaches {other}"
        for module in modules()
        if room(module) == apart
        for other in reaches(module)
        if room(other) in APART[apart]
    ]
    assert wrong == []


def test_core_imports_torch_the_standard_library_and_itself():
    """Catches a convenience import that ties the method to a framework, a config or a device."""
    for name in CORE:
        module = f"{PACKAGE}.{name}"
        assert {room(other) for other in reaches(module)} <= {"core"}
        for imported in imports(modules()[module]):
            library = imported.split(".")[0]
            known = {PACKAGE, *CORE_LIBRARIES, *sys.stdlib_module_names}
            assert library in known, f"{name}.py imports {imported}"


def without_cycles(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """What is left of a graph when everything that needs nothing is taken away, again and again."""
    left = {name: set(wanted) - {name} for name, wanted in graph.items()}
    while free := [name for name, wanted in left.items() if not wanted]:
        for name in free:
            del left[name]
        for wanted in left.values():
            wanted.difference_update(free)
    return left


def test_no_import_cycles_of_modules():
    """Catches two modules that need each other.

    An import inside a function hides this until the function runs.
    """
    assert without_cycles({module: set(needs(module)) for module in modules()}) == {}


def test_no_import_cycles_of_rooms():
    """Catches two folders that need each other: neither can be read, or used, alone."""
    graph: dict[str, set[str]] = {}
    for module in modules():
        graph.setdefault(room(module), set()).update(room(other) for other in needs(module))
    assert without_cycles(graph) == {}


def test_the_root_holds_ten_modules():
    """Catches a module that stands loose in the package because no room was looked for."""
    root = {path.stem for path in (ROOT / PACKAGE).glob("*.py")} - {"__init__", "__main__"}
    assert len(root) <= 10, sorted(root)


def test_the_method_fits_into_six_hundred_lines():
    """Catches growth of what a newcomer is promised to read in fifteen minutes, DFD included."""
    lines = {name: len((ROOT / PACKAGE / f"{name}.py").read_text().splitlines()) for name in CORE}
    assert sum(lines.values()) <= 600, lines


def test_nothing_compares_the_name_of_a_stage():
    """Catches a sixth stage that has to be told to seven files."""
    wrong = []
    for path in sources():
        for node in nodes(path):
            if isinstance(node, ast.Compare):
                sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
                against_names = [side for side in sides if side.startswith(("'", "('", '"', "{'"))]
                if against_names and any(re.search(r"\bstage(\.name)?$", side) for side in sides):
                    wrong.append(f"{short(path)}:{node.lineno} {ast.unparse(node)}")
    assert wrong == []


def test_statements_are_not_dense():
    """Catches a statement that has to be decoded before it can be understood."""
    dense = [
        f"{short(path)}:{statement.lineno}"
        for path in sources()
        for statement in statements(path)
        if is_dense(statement)
    ]
    assert dense == []


def test_unrelated_values_are_assigned_one_by_one():
    """Catches `a, b = x, y` as a way to save a line; 80 in all the code may stay."""
    parallel = [
        f"{short(path)}:{statement.lineno}"
        for path in sources()
        for statement in statements(path)
        if is_parallel(statement)
    ]
    assert len(parallel) < 80, parallel


@pytest.mark.parametrize(
    ("pattern", "limit"),
    [
        ("train.py", 80),
        ("inference/*.py", 150),
        ("benchmarks/**/*.py", 400),
        (f"{PACKAGE}/**/*.py", 400),
        ("tests/**/*.py", 400),
    ],
)
def test_files_stay_short(pattern, limit):
    """Catches the file that everything ends up in."""
    sizes = {short(path): len(path.read_text().splitlines()) for path in ROOT.glob(pattern)}
    assert {name: size for name, size in sizes.items() if size > limit} == {}


def test_functions_stay_short():
    """Catches the function that everything ends up in: none over 80 lines, nine of ten under 40."""
    sizes = dict(pair for path in sources() for pair in functions(path))
    assert {name: size for name, size in sizes.items() if size > 80} == {}
    assert sorted(sizes.values())[int(0.9 * len(sizes))] < 40


def test_settings_are_never_asked_for_with_a_default():
    """Catches getattr(config, "x", 0.5): a misspelt setting would silently be one half."""
    wrong = []
    for path in sources():
        for call in calls(path):
            if isinstance(call.func, ast.Name) and call.func.id == "getattr":
                asked = ast.unparse(call.args[0]).split(".")[-1]
                if asked in ("config", "cfg", "options", "args"):
                    wrong.append(f"{short(path)}:{call.lineno}")
    assert wrong == []


def test_only_command_lines_print():
    """Catches output that cannot be turned off and tears progress bars."""
    wrong = [
        f"{short(path)}:{call.lineno}"
        for path in sources()
        if short(path) not in PRINTING and not short(path).startswith(PRINTING_FOLDERS)
        for call in calls(path)
        if isinstance(call.func, ast.Name) and call.func.id == "print"
    ]
    assert wrong == []


def test_no_exception_is_swallowed():
    """Catches `except: pass`: a broken clip, shard or update must be heard of."""
    wrong = [
        f"{short(path)}:{node.lineno}"
        for path in sources()
        for node in nodes(path)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or all(isinstance(statement, ast.Pass) for statement in node.body))
    ]
    assert wrong == []


def texts() -> Iterator[Path]:
    """Every text file of the repository that a person wrote."""
    names = ("*.py", "*.yaml", "*.md", "*.toml", "*.txt", "*.sh", "Makefile", "run")
    for folder in ("", ".ci", "benchmarks", "configs", "inference", PACKAGE, "tests"):
        for pattern in names:
            yield from (ROOT / folder).glob(pattern if not folder else f"**/{pattern}")


def test_no_path_of_one_machine():
    """Catches a default that exists on its author's machine only."""
    machine = re.compile(
        r"(?<![\w.])/(?:" + "|".join(("work", "root", "home", "tmp", "Users", "mnt")) + r")/"
    )
    found = [
        f"{short(path)}: {line.strip()[:80]}"
        for path in texts()
        for line in path.read_text().splitlines()
        if machine.search(line)
    ]
    assert found == []


def test_the_repository_holds_no_links_and_a_fixed_top_level():
    """Catches a link to a folder of one machine, and files that came in by accident."""
    if not (ROOT / ".git").exists():
        return  # an unpacked archive: nothing says what is tracked
    command = ["git", "ls-files", "--stage", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    entries = [entry.split("\t") for entry in listed.split("\0") if entry]
    assert [name for mode, name in entries if mode.startswith("120000")] == []
    assert {name.partition("/")[0] for _, name in entries} <= TOP_LEVEL


def test_nothing_is_left_for_later_or_left_out():
    """Catches work that was put off in a comment, and tests that pass by not running."""
    signs = [
        f"{a}{b}"
        for a, b in (
            ("TO", "DO"),
            ("FIX", "ME"),
            ("pytest.sk", "ip("),
            ("mark.x", "fail"),
            ("importor", "skip"),
        )
    ]
    found = [
        f"{short(path)}: {sign}" for path in texts() for sign in signs if sign in path.read_text()
    ]
    assert found == []


def test_files_of_tests_have_names_of_their_own():
    """Catches two files of one name: pytest imports one of them only, and leaves out the other."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice
