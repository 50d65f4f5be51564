"""What the code may look like, checked on its syntax trees: who imports whom, sizes, and calls that
hide mistakes.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "selfforcing_dfd"
CORE = ("flow", "cache", "rollout", "objectives", "pairing")
# a textbook algorithm that the core calls, and the protocol that it talks to
BESIDE = ("assignment", "network")
PRINTING = {"train.py", f"{PACKAGE}/__main__.py", f"{PACKAGE}/commands.py", f"{PACKAGE}/runner.py"}

LEVELS = (
    {*CORE, *BESIDE, "rng"},
    {"models", "codecs", "tiny", "data", "sampling", "allocator", "files"},
    {"training", "streaming", "evaluation"},
    {"config", "build", "build_data", "estimate"},
    {
        "runner",
        "plan",
        "loading",
        "live",
        "benchmarking",
        "pipeline",
        "exporting",
        "model_card",
        "commands",
        "__main__",
        "tiny.report",
    },
    {"train", "inference"},
)
"""Each part may import from its own level and from those before it.
`tiny.report` is a program, not a part of the world.
"""


def sources() -> list[Path]:
    return [
        ROOT / "train.py",
        *sorted((ROOT / PACKAGE).rglob("*.py")),
        *sorted((ROOT / "inference").rglob("*.py")),
    ]


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def module_name(path: Path) -> str:
    """`selfforcing_dfd.models.wan`, or `train`, `inference.stream` outside the package."""
    return short(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything imported anywhere in a file; relative imports are not used here."""
    for node in ast.walk(tree(path)):
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
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield f"{short(path)}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call))


def test_dependencies_point_inward():
    """Catches a core that learns of configs or files, and training code that streaming needs."""
    wrong = [
        f"{short(path)} imports {name}"
        for path in sources()
        for name in imports(path)
        if name.startswith(f"{PACKAGE}.") and name != f"{PACKAGE}.__version__"
        if level(name) > level(module_name(path))
    ]
    assert wrong == []


def test_training_and_streaming_do_not_know_each_other():
    """Catches a sampler that needs the trainer to be installed, or the other way round."""
    wrong = [
        f"{short(path)} imports {name}"
        for path in sources()
        for name in imports(path)
        for one, other in (("training", "streaming"), ("streaming", "training"))
        if module_name(path).startswith(f"{PACKAGE}.{one}")
        and name.startswith(f"{PACKAGE}.{other}")
    ]
    assert wrong == []


def test_core_imports_torch_the_standard_library_and_itself():
    """Catches a convenience import that ties the method to a framework, a config or a device."""
    allowed = {"torch", *sys.stdlib_module_names}
    for name in (*CORE, *BESIDE):
        for imported in imports(ROOT / PACKAGE / f"{name}.py"):
            inner = imported.removeprefix(f"{PACKAGE}.").split(".")[0]
            assert imported.split(".")[0] in allowed or inner in (*CORE, *BESIDE), (
                f"{name}.py imports {imported}"
            )


def test_no_import_cycles():
    """Catches two modules that need each other, which an import inside a function hides until it
    runs.
    """
    names = {module_name(path): path for path in sources()}
    needs = {
        module: {
            n
            for name in imports(path)
            for n in (name, name.rpartition(".")[0])
            if n in names and n != PACKAGE
        }
        for module, path in names.items()
    }
    while free := [module for module, wanted in needs.items() if not wanted - {module}]:
        for module in free:
            del needs[module]
        for wanted in needs.values():
            wanted.difference_update(free)
    assert sorted(needs) == []


def test_core_fits_into_four_hundred_lines():
    """Catches growth of what a newcomer is promised to read in fifteen minutes."""
    lines = {name: len((ROOT / PACKAGE / f"{name}.py").read_text().splitlines()) for name in CORE}
    assert sum(lines.values()) < 400, lines


@pytest.mark.parametrize(
    ("pattern", "limit"),
    [
        ("train.py", 80),
        ("inference/*.py", 150),
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
        if short(path) not in PRINTING and not short(path).startswith("inference/")
        for call in calls(path)
        if isinstance(call.func, ast.Name) and call.func.id == "print"
    ]
    assert wrong == []


def test_no_exception_is_swallowed():
    """Catches `except: pass`: a broken clip, shard or update must be heard of."""
    wrong = [
        f"{short(path)}:{node.lineno}"
        for path in sources()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or all(isinstance(statement, ast.Pass) for statement in node.body))
    ]
    assert wrong == []


def texts() -> Iterator[Path]:
    """Every text file of the repository that a person wrote."""
    names = ("*.py", "*.yaml", "*.md", "*.toml", "*.txt", "Makefile", "run")
    for folder in ("", ".ci", "configs", "inference", PACKAGE, "tests"):
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
