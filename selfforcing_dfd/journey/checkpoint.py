"""What the user's checkpoint is: its format, its role, its recipe, and the world it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from selfforcing_dfd.common import UserError, find_file
from selfforcing_dfd.config import NetworkConfig
from selfforcing_dfd.models.identity import Recipe, Role
from selfforcing_dfd.streaming.load import check_tiny, tiny_codec_file
from selfforcing_dfd.streaming.parts import check_parts
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.training.sizes import from_arguments
from selfforcing_dfd.weights.card import parameter_count
from selfforcing_dfd.weights.read import Description, describe
from selfforcing_dfd.weights.recipes import settle_recipe

World = Literal["tiny", "wan"]
ACCEPTED: tuple[Role, ...] = ("causal_student", "causal_teacher", "teacher")
"""What a journey can begin with."""


class JourneyError(UserError):
    """A journey that cannot be made from these inputs; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights to begin with.

    path: as the user named it. entry: which network of a file that holds several. recipe: of a
    student; None for a teacher.
    """

    path: str
    entry: str
    found: Description
    role: Role
    recipe: Recipe | None
    world: World

    @property
    def size(self) -> NetworkConfig:
        return from_arguments(self.found.sizes)

    @property
    def name(self) -> str:
        """Of the file or folder, without its ending."""
        return Path(self.path).resolve().stem

    def in_words(self) -> str:
        """Role, size and format, for people."""
        role = self.role.replace("_", " ")
        count = parameter_count(self.found.num_parameters)
        return f"{self.path}: {role}, {count}, {self.found.format}"


def open_checkpoint(path: str, entry: str = "", role: Role | None = None) -> Description:
    """The description of weights in any format that `weights` reads.

    Raises JourneyError where nothing states the role, or where another role is asked for.
    """
    found = describe(find_file(path), entry)
    if found.role is not None and role not in (None, found.role):
        raise JourneyError(f"{found.source} says that it is a {found.role}; leave --role out")
    if found.role is None and role is None:
        raise JourneyError(
            f"{found.source} does not say what it is; add --role causal_student, or "
            "--role causal_teacher or --role teacher"
        )
    return found


def inspect_checkpoint(
    path: str, entry: str = "", role: Role | None = None, model: Path | None = None
) -> Checkpoint:
    """What a journey begins with.

    model: a diffusers folder of Wan2.1; without it the weights have to be of the tiny world. Raises
    UserError for weights that cannot be read, or that no journey begins with.
    """
    found = open_checkpoint(path, entry, role)
    known = found.role or role
    if known is None or known not in ACCEPTED:
        wanted = ", ".join(each.replace("_", " ") for each in ACCEPTED)
        raise JourneyError(
            f"{found.source} is a {str(known).replace('_', ' ')}; a journey begins with a {wanted}"
        )
    if found.sizes["image_dim"]:
        raise JourneyError(
            f"{found.source} sees pictures (Wan2.1-I2V), for which `distil` has no recipe: see "
            "docs/image_to_video.md"
        )
    recipe = None
    if known == "causal_student":
        recipe = settle_recipe(found.recipe, {}, known, found.source)
    if recipe is not None and recipe.given:
        raise JourneyError(
            f"{found.source} begins with a picture (given is {recipe.given}); `distil` has no "
            "recipe for such students: see docs/image_to_video.md"
        )
    world: World = "wan"
    if model is not None:
        check_parts(model, find_file(path))
    else:
        check_tiny(found, TinyCodec.load(tiny_codec_file(find_file(path))))
        world = "tiny"
    return Checkpoint(path, entry, found, known, recipe, world)
