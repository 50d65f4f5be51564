"""What a network's config says about its weights: role, a student's recipe, and the data behind it.

Teacher, student and fake score have the same tensors, so this has to be written down. Every config
that this package writes holds `"role"`, and a student's holds `"recipe"` as well; weights that were
trained here hold `"data"`. This module is the only place that reads and writes them. Wan's own
configs hold none of them; their class names say that they are teachers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from selfforcing_dfd.common import UserError
from selfforcing_dfd.context import check_frames
from selfforcing_dfd.flow import few_step_ladder

Role = Literal["teacher", "causal_teacher", "bidirectional_student", "causal_student", "fake_score"]
ROLES: tuple[Role, ...] = get_args(Role)
STUDENT_ROLES: tuple[Role, ...] = ("bidirectional_student", "causal_student")

# keys of config.json; diffusers' own classes ignore them with a warning
ROLE = "role"
RECIPE = "recipe"
DATA = "data"

# keys of files that were written before 2026-11-21, and the recipe's settings in them
OLD_ROLE = "causal"
OLD_RECIPE = "student"
OLD_SETTINGS = {"timesteps": "ladder", "num_frames": "frames"}

# settings of a recipe that are left out where they are these: files without are as they always were
LEFT_OUT = {"given": 0, "context": "clean"}

KEYS = (ROLE, RECIPE, DATA, OLD_ROLE, OLD_RECIPE)

TEACHER_CLASSES = ("WanTransformer3DModel", "WanModel")
STUDENT_CLASSES = ("CausalWanModel",)  # as the Self-Forcing code saves its own


def _sigmas(ladder: tuple[float, ...], shift: float) -> tuple[float, ...]:
    """The noise levels of a ladder; on the CPU also where a network is being built elsewhere."""
    with torch.device("cpu"):
        return few_step_ladder(ladder, shift)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a student was trained to run.

    ladder: timesteps before the shift, from 1000 down. chunk_frames, frames, sink and window are in
    latent frames: of one chunk, of a training clip, at the start of the video that every chunk
    sees, and of history and the current chunk together (0: all of the clip). first_ladder: the
    ladder of the first chunk where it differs. noise: `fresh` between steps, or `kept`. given:
    first latent frames of a video that the student does not make (1: it begins with a picture).
    context: `clean`, the keys and values of a finished chunk's commit pass, or `last_step`: those
    of its last denoising step, without a commit pass.
    Raises ValueError for a ladder that does not fall from 1000, and UserError for counts that
    chunks cannot serve.
    """

    ladder: tuple[float, ...]
    shift: float
    chunk_frames: int
    frames: int
    sink: int = 0
    window: int = 0
    first_ladder: tuple[float, ...] | None = None
    noise: str = "fresh"
    given: int = 0
    context: str = "clean"

    def __post_init__(self) -> None:
        if self.context not in ("clean", "last_step"):
            raise UserError(f"a recipe's context is {self.context!r}; use clean or last_step")
        if self.noise not in ("fresh", "kept"):
            raise UserError(f"a recipe's noise is {self.noise!r}; use fresh or kept")
        for ladder in (self.ladder, self.first_ladder):
            if ladder is not None:
                _sigmas(ladder, self.shift)
        if self.chunk_frames < 1 or self.frames < self.chunk_frames:
            raise UserError(
                f"a recipe has chunks of {self.chunk_frames} latent frames in clips of "
                f"{self.frames}; use at least one frame a chunk and one chunk a clip"
            )
        check_frames("sink", self.sink, self.chunk_frames)
        if self.window:
            check_frames("window", self.window, self.chunk_frames)
        check_given("given", self.given, self.chunk_frames)

    @property
    def keeps_noise(self) -> bool:
        """Whether the noise that a chunk starts from stays between its steps."""
        return self.noise == "kept"

    @property
    def commits(self) -> bool:
        """Whether a finished chunk is run once more, clean, for its keys and values."""
        return self.context == "clean"

    @property
    def first_sigmas(self) -> tuple[float, ...] | None:
        """The first chunk's ladder as noise levels; None where it is that of all chunks."""
        return _sigmas(self.first_ladder, self.shift) if self.first_ladder else None

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The ladder as noise levels."""
        return _sigmas(self.ladder, self.shift)


def check_given(name: str, given: int, chunk_frames: int) -> None:
    """Raise UserError unless a first chunk has frames to make beside those that are given."""
    if not 0 <= given < chunk_frames:
        raise UserError(
            f"{name} is {given} latent frames, but a chunk has {chunk_frames}, of which one at "
            f"least is made: use 0 to {chunk_frames - 1}, or longer chunks"
        )


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Which data weights were trained on.

    codec, text: fingerprints of what made the latents and the embeddings. latent_size: rows and
    columns of the latents.
    """

    codec: str
    text: str
    latent_size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Identity:
    """All that a config says about its weights; None for what it does not say."""

    role: Role | None = None
    recipe: Recipe | None = None
    data: TrainingData | None = None

    def notes(self) -> dict[str, Any]:
        """The entries of config.json, ready for JSON.

        Raises UserError for the recipe of weights that are no student's.
        """
        if self.recipe is not None and self.role not in STUDENT_ROLES:
            raise UserError(
                f"the role is {self.role}, and only students have a recipe; leave it out"
            )
        stated: dict[str, Any] = {} if self.role is None else {ROLE: self.role}
        for key, part in ((RECIPE, self.recipe), (DATA, self.data)):
            if part is not None:
                settings = dataclasses.asdict(part)
                stated[key] = {
                    name: _as_list(value)
                    for name, value in settings.items()
                    if name not in LEFT_OUT or value != LEFT_OUT[name]
                }
        return stated


SELF_FORCING = Recipe(ladder=(1000.0, 750.0, 500.0, 250.0), shift=5.0, chunk_frames=3, frames=21)
"""The recipe of Self-Forcing's published student (arXiv 2506.08009, self_forcing_dmd.yaml)."""


def identity_of(config: Mapping[str, Any]) -> Identity:
    """Everything that a config states about its weights. Raises UserError for impossible values.

    A recipe beside another role than a student's is ignored.
    """
    role = role_of(config)
    data = config.get(DATA)
    return Identity(
        role,
        recipe_of(config) if role in STUDENT_ROLES else None,
        TrainingData(data["codec"], data["text"], tuple(data["latent_size"])) if data else None,
    )


def role_of(config: Mapping[str, Any]) -> Role | None:
    """The role that a config states; None where it states none. Raises UserError for others."""
    role = config.get(ROLE)
    if role is not None and role not in ROLES:
        raise UserError(f"config's {ROLE!r} is {role!r}; use one of {', '.join(ROLES)}")
    if role is not None:
        return role
    if config.get(OLD_ROLE) is not None:
        return "causal_student" if config[OLD_ROLE] else "teacher"
    name = config.get("_class_name")
    if name in TEACHER_CLASSES:
        return "teacher"
    return "causal_student" if name in STUDENT_CLASSES else None


def recipe_of(config: Mapping[str, Any]) -> Recipe | None:
    """The recipe that a config states; None where it states none.

    Raises UserError for settings that a recipe does not have, or not such values.
    """
    stated = config.get(RECIPE)
    if not stated:
        old = config.get(OLD_RECIPE) or {}
        stated = {OLD_SETTINGS.get(name, name): value for name, value in old.items()}
    return make_recipe(stated) if stated else None


def make_recipe(settings: Mapping[str, Any]) -> Recipe:
    """A recipe from plain settings. Raises UserError for unknown, missing or impossible ones."""
    fields = dataclasses.fields(Recipe)
    known = [field.name for field in fields]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise UserError(f"a recipe has no {', '.join(unknown)}; known are {', '.join(known)}")
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in settings]
    if missing:
        raise UserError(f"a recipe lacks {', '.join(missing)}; write them beside the others")
    values = dict(settings)
    for name in ("ladder", "first_ladder"):
        if values.get(name) is not None:
            values[name] = tuple(float(timestep) for timestep in values[name])
    values["first_ladder"] = values.get("first_ladder") or None
    return Recipe(**values)


def recipe_of_rollout(rollout: Mapping[str, Any]) -> Recipe:
    """The recipe of a student that was trained with these settings, section `rollout` of a run."""
    names = {field.name for field in dataclasses.fields(Recipe)}
    return make_recipe({name: value for name, value in rollout.items() if name in names})


def mark(
    network: Any, role: Role, recipe: Recipe | None = None, data: TrainingData | None = None
) -> None:
    """Note in a network's config what its weights are and, for a student, how it wants to run."""
    network.register_to_config(**Identity(role, recipe, data).notes())


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
