"""Settings: absurd values, wrong types, unknown names, and files that are hardly YAML."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from selfforcing_dfd.common import shipped
from selfforcing_dfd.stages import load_config
from selfforcing_dfd.stages.config_files import to_yaml
from tests.attack.harms import ABSURD, harm_content
from tests.attack.trials import Kind, Tell, Wrong, command

RECIPES = ("tiny/init", "tiny/dmd", "tiny/stable", "tiny/teacher", "wan1.3b/dmd_ar")
NO_NUMBER = re.compile(r"(?<![\w/])-?(nan|inf)(?![\w/])", re.IGNORECASE)
LINES = (
    "\t- x",
    "run: {name: a}\nrun: {name: b}",
    "run: [",
    "a: &a [x,x,x]\nb: &b [*a,*a,*a]\nc: [*b,*b,*b]",
    "run: !!python/object/apply:os.system ['touch pwned']",
    "base: dfd_ar",
    "base: [1]",
    "base: config.yaml",
    "? [complex, key]\n: x",
    "--- \n---",
    "- a\n- list",
    "just text",
    "1: 2",
    "null: null",
    "run:\n  stage: {}",
    "arms: {a: x, b: [], c: [x], d: [run.seed=x]}",
    "report: {gate: {a: [1], b: x}}",
    "[" * 500,
    "\ufeffrun: {}",
)


def settings_of(name: str, *overrides: str) -> list[str]:
    """All settings of a recipe, dotted."""
    found: list[str] = []

    def walk(tree: Any, prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                walk(value, f"{prefix}{key}.")
            else:
                found.append(f"{prefix}{key}")

    walk(OmegaConf.to_container(OmegaConf.create(to_yaml(load_config(name, list(overrides))))), "")
    return found


class Configs(Kind):
    """`--dry-run` with settings that make no sense. It costs nothing and must say no nonsense."""

    name = "configs"

    def prepare(self, folder: Path) -> None:
        self.settings = {recipe: settings_of(recipe) for recipe in RECIPES}
        command("train", "--config", RECIPES[0], "--dry-run")  # imports, which trials then share

    def attack(self, chance: random.Random, place: Path, tell: Tell) -> None:
        recipe = chance.choice(RECIPES)
        overrides: list[str] = []
        if chance.random() < 0.6:
            overrides = self.absurd(recipe, chance)
            tell(f"{recipe} {' '.join(overrides)}")
            words = ("train", "--config", recipe, "--dry-run", *overrides)
        else:
            path = place / "config.yaml"
            path.write_bytes(shipped(f"configs/{recipe}.yaml").read_bytes())
            tell(f"{recipe}: {self.harm_text(path, chance)}")
            words = ("train", "--config", str(path), "--dry-run")
        plan = command(*words)
        for override in overrides:  # numbers have ranges, so what passes is a text, such as a path
            value = override.partition("=")[2]
            if NO_NUMBER.fullmatch(value):
                plan = plan.replace(value, "")
        if NO_NUMBER.search(plan):
            raise Wrong(f"the plan holds numbers that are none:\n{plan}")

    def absurd(self, recipe: str, chance: random.Random) -> list[str]:
        """One to three settings with values that no one would choose."""
        overrides = []
        for _ in range(chance.randint(1, 3)):
            setting = chance.choice(self.settings[recipe])
            if chance.random() < 0.1:
                setting = chance.choice((f"{setting}.x", setting.partition(".")[0], "x.y", "", "a"))
            overrides.append(f"{setting}={chance.choice(ABSURD)}")
        return overrides

    def harm_text(self, path: Path, chance: random.Random) -> str:
        if chance.random() < 0.5:
            return harm_content(path, chance)
        line = chance.choice(LINES)
        text = path.read_text()
        lines = text.split("\n")
        if chance.random() < 0.5:
            lines = []
        lines.insert(chance.randint(0, len(lines)), line)
        path.write_text("\n".join(lines))
        return f"with {line[:60]!r}"
