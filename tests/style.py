"""Find statements that are hard to read: `python tests/style.py PATH...`.

Dense: one statement with three or more comprehensions, lambdas, conditional expressions, boolean
operators, assignment expressions or star arguments. Parallel: `a, b = x, y` of values that were not
together before; a swap is none.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

CONSTRUCTS = (
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
    ast.Lambda,
    ast.IfExp,
    ast.BoolOp,
    ast.NamedExpr,
    ast.Starred,
)
MAX_CONSTRUCTS = 2


def own_expressions(statement: ast.stmt) -> Iterator[ast.expr]:
    """The expressions of a statement, without the statements of its body."""
    for _, value in ast.iter_fields(statement):
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, ast.expr):
                yield item
            elif isinstance(item, ast.withitem):
                yield item.context_expr


def is_dense(statement: ast.stmt) -> bool:
    nodes = (node for expression in own_expressions(statement) for node in ast.walk(expression))
    return sum(isinstance(node, CONSTRUCTS) for node in nodes) > MAX_CONSTRUCTS


def is_parallel(statement: ast.stmt) -> bool:
    if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Tuple):
        return False
    (target, *_), values = statement.targets, statement.value.elts
    if not isinstance(target, ast.Tuple) or any(isinstance(v, ast.Starred) for v in values):
        return False
    names = {ast.unparse(name) for name in target.elts}
    return names != {ast.unparse(value) for value in values}


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """All nodes of a file's syntax tree, which is read once."""
    return tuple(ast.walk(ast.parse(path.read_text())))


def statements(path: Path) -> Iterator[ast.stmt]:
    return (node for node in nodes(path) if isinstance(node, ast.stmt))


def main() -> None:
    for argument in sys.argv[1:]:
        place = Path(argument)
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            for statement in statements(path):
                for name, found in (("dense", is_dense), ("parallel", is_parallel)):
                    if found(statement):
                        line = ast.unparse(statement).splitlines()[0]
                        print(f"{path}:{statement.lineno} {name}: {line[:90]}")


if __name__ == "__main__":
    main()
