"""Which recipe a student runs with: what its file states, and what the user asked for."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from selfforcing_dfd.common import UserError
from selfforcing_dfd.models.identity import SELF_FORCING, Recipe, Role, make_recipe

logger = logging.getLogger(__name__)


def settle_recipe(
    stated: Recipe | None, asked: Mapping[str, Any], role: Role | None, source: str
) -> Recipe:
    """The stated recipe with the asked settings in place of its own.

    Without a stated recipe it is Self-Forcing's; for a bidirectional student with one chunk for the
    whole clip. A warning says what was assumed, and another one where asked and stated settings
    differ. Raises UserError for settings that a recipe cannot have.
    """
    base = stated or SELF_FORCING
    if stated is None and role == "bidirectional_student":
        base = dataclasses.replace(base, chunk_frames=base.frames)
    recipe = make_recipe(dataclasses.asdict(base) | dict(asked))
    if stated is None:
        assumed = {name: value for name, value in _settings(recipe).items() if name not in asked}
        if _in_words(assumed):
            logger.warning(
                "%s does not state its recipe; assumed Self-Forcing's recipe: %s; if the student "
                "differs, say --chunk-frames/--ladder",
                source,
                _in_words(assumed),
            )
        return recipe
    given = _settings(stated)
    changed = {name: value for name, value in _settings(recipe).items() if value != given[name]}
    if changed:
        logger.warning(
            "%s states the recipe %s; asked for and used: %s",
            source,
            _in_words({name: given[name] for name in changed}),
            _in_words(changed),
        )
    return recipe


def asked_settings(
    ladder: str | None = None, first_ladder: str | None = None, **others: float | str | None
) -> dict[str, Any]:
    """Settings of a recipe from command-line flags; those that are None were not asked for.

    ladder, first_ladder: timesteps with commas between them. Raises UserError for anything else.
    """
    asked: dict[str, Any] = {name: value for name, value in others.items() if value is not None}
    for name, steps in (("ladder", ladder), ("first_ladder", first_ladder)):
        if steps is None:
            continue
        try:
            asked[name] = tuple(float(timestep) for timestep in steps.split(","))
        except ValueError as error:
            raise UserError(
                f"{name} is {steps!r}; want timesteps such as 1000,750,500,250"
            ) from error
    return asked


def asked_by(options: argparse.Namespace) -> dict[str, Any]:
    """`asked_settings` of a command that streams: all options that change a recipe."""
    return asked_settings(
        options.ladder,
        options.first_ladder,
        context=options.context,
        shift=options.shift,
        chunk_frames=options.chunk_frames,
    )


def _settings(recipe: Recipe) -> dict[str, Any]:
    return dataclasses.asdict(recipe)


def _in_words(settings: Mapping[str, Any]) -> str:
    """Settings as the flags are called: `ladder 1000,750, chunk-frames 3`; empty ones left out."""
    parts = []
    for name, value in settings.items():
        if value is None:
            continue
        values = value if isinstance(value, tuple) else (value,)
        text = ",".join(each if isinstance(each, str) else f"{each:g}" for each in values)
        parts.append(f"{name.replace('_', '-')} {text}")
    return ", ".join(parts)
