"""docs/differences.md says what the recipes say, value by value."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from selfforcing_dfd.config import Config, as_dict
from selfforcing_dfd.stages import load_config
from selfforcing_dfd.stages.published import NAMES
from selfforcing_dfd.training.plan import difference
from selfforcing_dfd.training.state import leaves

TEXT = (Path(__file__).parents[1] / "docs" / "differences.md").read_text()
RECIPE = re.compile(r"`(wan1\.3b/\w+\.yaml)`")
CODE = re.compile(r"`([^`]+)`")

COMPLETE = ("dfd_ar", "dfd_t2v", "dmd_ar", "dmd_ar_dfd", "dmd_t2v", "init_tf")
"""Recipes of which every setting is in a table; of the others only what tells them apart."""
SECTIONS = ("rollout", "score", "dfd", "gan", "optim", "ema", "batch", "weights")
"""Sections that decide what is trained, and not how or where."""


class Ours(NamedTuple):
    recipe: str
    setting: str
    value: Any


def tables() -> Iterator[list[list[str]]]:
    """The cells of each table, its head first, without the line below it."""
    for block in re.findall(r"(?:^\|.*\n)+", TEXT, re.M):
        rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines()]
        yield [rows[0], *rows[2:]]


def ours() -> list[Ours]:
    """Every value of a recipe that a table tells."""
    found = []
    for head, *rows in tables():
        columns = [(place, RECIPE.fullmatch(cell)) for place, cell in enumerate(head)]
        for row in rows:
            for place, recipe in columns:
                if recipe:
                    (setting,) = CODE.findall(row[0])
                    (value,) = CODE.findall(row[place])
                    found.append(Ours(recipe[1], setting, yaml.safe_load(value)))
    return found


@cache
def settings_of(recipe: str) -> dict[str, Any]:
    """The loaded recipe's settings by dotted key; tuples as lists."""
    settings = leaves(as_dict(load_config(recipe)))
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()
    }


def test_our_values_are_those_of_the_recipes():
    """Catches a recipe that was changed and is still described as before."""
    wrong = [
        f"{each.recipe}: {each.setting} is {settings_of(each.recipe).get(each.setting)}, "
        f"not {each.value}"
        for each in ours()
        if settings_of(each.recipe).get(each.setting) != each.value
    ]
    assert wrong == []
    assert len(ours()) > 150


@pytest.mark.parametrize("name", COMPLETE)
def test_every_setting_of_a_recipe_is_told(name: str):
    """Catches a setting that was added to a recipe and stands beside no published value."""
    recipe = f"wan1.3b/{name}.yaml"
    config = load_config(recipe)
    defaults = Config(stage={key: type(section)() for key, section in config.stage.items()})
    changed = leaves(difference(as_dict(config), as_dict(defaults)))
    told = {each.setting for each in ours() if each.recipe == recipe}
    missing = [key for key in changed if key.startswith(SECTIONS) and key not in told]
    assert missing == []


def test_every_deviation_that_can_be_put_back_is_told():
    """Catches a setting that nobody finds, and one that is gone."""
    assert set(re.findall(r"^\| `published\.(\w+)` \| (?!by)", TEXT, re.M)) == set(NAMES)
