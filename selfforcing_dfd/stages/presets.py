"""Recipes by name: `dfd.preset=NAME` stands for several settings.

A preset replaces what a config file says. Settings on the command line and of arms come after it,
so each of its settings can still be changed alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from selfforcing_dfd.config import require

SETTING = "dfd.preset"
PRESETS: Mapping[str, tuple[str, ...]] = {
    # The student starts from a causal teacher and learns that teacher's ODE, entered from real
    # clips, from each step of its ladder to the next. Between steps it keeps its noise: with fresh
    # noise each step draws the clip anew, and even the teacher's own ODE loses motion and modes at
    # every draw (docs/method.md).
    "stable": (
        "run.stage=regression",
        "regression.target=next_step",
        "regression.steps=2",
        "weights.student=",
        "rollout.noise=kept",
    )
}


def expanded(overrides: Sequence[str]) -> list[str]:
    """Overrides in which each preset is followed by its settings. Raises ConfigError."""
    settings: list[str] = []
    for override in overrides:
        settings.append(override)
        key, _, name = override.partition("=")
        if key.strip() == SETTING and name.strip():
            settings += settings_of(name.strip())
    return settings


def settings_of(preset: str) -> tuple[str, ...]:
    """The settings that a preset stands for. Raises ConfigError for an unknown one."""
    known = ", ".join(PRESETS)
    require(preset in PRESETS, f"{SETTING} is {preset!r}; use one of {known}, or leave it out")
    return PRESETS[preset]
