"""Which runs a journey makes, each as a config of its own.

`stable` is what the study found best (docs/study.md): the causal teacher learns its own ODE from
step to step. It starts from a causal teacher, which is made first where there is none. It has no
fake score. `noised_real` goes on from a few-step student's own weights, and is the study's best
form of data forcing. Its fake score is warmed up first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selfforcing_dfd.common import shipped
from selfforcing_dfd.config import Config
from selfforcing_dfd.journey.checkpoint import Checkpoint, JourneyError
from selfforcing_dfd.journey.request import Request
from selfforcing_dfd.models.identity import Recipe
from selfforcing_dfd.stages import arms_of, change, load_config
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.weights.runs import FAKE_FILE, STUDENT_FILE

RECIPES = {"tiny": "dfd_ar", "wan1.3b": "wan1.3b/dfd_ar", "wan14b": "wan14b/dfd_ar"}
"""The shipped comparison whose arm `stable` a journey follows, by the family of the weights."""
CAUSAL_RECIPES = {"tiny": "tiny/causal", "wan1.3b": "wan1.3b/init_tf", "wan14b": "wan14b/init_tf"}
"""The shipped recipe that makes a causal teacher."""
LAYERS_OF_14B = 40
TINY_SIZE = (64, 64)
WAN_SIZE = (480, 832)
SHARED_SECTIONS = ("model.", "batch.", "data.", "checkpoint.", "log.", "rollout.", "run.timeout_s")
"""Settings that hold for every run of a journey; others are the last run's alone."""
RESERVED = ("run.out", "run.name", "run.device", "run.gpus", "data.shards", "weights.", "report.")
REPORTING_SEED = 2000  # from here on seeds are kept for reporting
MOST_FAKE_PER_CYCLE = 25  # a cycle ends in a checkpoint
UNMOVED = 1e-30
"""Step of the student while its fake score warms up: too small to change a float32 weight."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The runs of a journey, in their order; None for one that is not needed.

    why: in one sentence, what the last run starts from.
    """

    checkpoint: Checkpoint
    recipe: str
    why: str
    student: Config
    causal: Config | None = None
    fake: Config | None = None

    @property
    def runs(self) -> dict[str, Config]:
        """Every run by its name."""
        named = {"causal": self.causal, "fake": self.fake, "student": self.student}
        return {name: config for name, config in named.items() if config is not None}

    @property
    def num_video_frames(self) -> int:
        """Of a training clip."""
        return 1 + 4 * (self.student.rollout.frames - 1)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the training clips."""
        height, width = self.student.data.video_size
        return height, width


def make_plan(request: Request, checkpoint: Checkpoint) -> Plan:
    """The runs that lead from the checkpoint to the student. Raises UserError."""
    check_overrides(request.overrides)
    if request.method == "noised_real":
        return plan_noised_real(request, checkpoint)
    return plan_stable(request, checkpoint)


def check_overrides(overrides: Sequence[str]) -> None:
    """JourneyError for settings that the journey makes itself."""
    for override in overrides:
        if override.startswith(RESERVED):
            raise JourneyError(
                f"{override}: the journey sets this itself; leave it out (--out, --device, "
                "--causal, --teacher and --fake are its options for it)"
            )


def family_of(checkpoint: Checkpoint) -> str:
    """A name in RECIPES."""
    if checkpoint.world == "tiny":
        return "tiny"
    return "wan14b" if checkpoint.size.num_layers >= LAYERS_OF_14B else "wan1.3b"


def plan_stable(request: Request, checkpoint: Checkpoint) -> Plan:
    """Recipe `stable`, after the run that makes its causal teacher where none is there."""
    family = family_of(checkpoint)
    causal = request.causal
    why = f"starts from the causal teacher {causal}"
    if not causal and checkpoint.role == "causal_teacher":
        causal = checkpoint.path
        why = "starts from the checkpoint, which is a causal teacher"
    elif not causal and family == "tiny":
        causal = "assets/tiny/causal.safetensors"
        why = f"starts from the shipped causal teacher {causal}"
    run = None
    if not causal:
        run = causal_run(request, checkpoint, family)
        causal = str(run_folder(run) / STUDENT_FILE)
        why = "starts from the causal teacher that the journey makes first"
    if checkpoint.role == "causal_student":
        why += (
            "; of the checkpoint it takes ladder, chunks and clip length, not the weights, which "
            "are measured beside it"
        )
    own = [f"weights.causal={causal}"]
    if causal == checkpoint.path and checkpoint.entry:
        own.append(f"weights.causal_entry={checkpoint.entry}")
    arm = [*load_config(RECIPES[family]).arms["stable"]]
    student = last_run(request, checkpoint, family, [*arm, *own])
    return Plan(checkpoint, f"arm stable of {RECIPES[family]}", why, student, causal=run)


def plan_noised_real(request: Request, checkpoint: Checkpoint) -> Plan:
    """Data forcing with pairing `noised_real`, after the warm-up of its fake score."""
    if checkpoint.role != "causal_student":
        role = checkpoint.role.replace("_", " ")
        raise JourneyError(
            f"{checkpoint.path} is a {role}; --recipe noised_real goes on from a few-step student: "
            "use --recipe stable"
        )
    family = family_of(checkpoint)
    teacher = teacher_of(request, checkpoint)
    own = [
        "dfd.pairing=noised_real",
        f"weights.student={checkpoint.path}",
        f"weights.student_entry={checkpoint.entry}",
        f"weights.teacher={teacher}",
    ]
    run = None
    fake = request.fake
    if not fake:
        cycles = math.ceil(request.fake_updates / MOST_FAKE_PER_CYCLE)
        warm = [
            "run.stage=dmd",
            f"run.student_updates={cycles}",
            f"score.fake_per_student={math.ceil(request.fake_updates / cycles)}",
            f"optim.student.lr={UNMOVED}",
            "optim.student.weight_decay=0.0",
            "checkpoint.every=1",
            f"weights.fake={teacher}",
        ]
        run = one_run(request, checkpoint, family, [*own, *warm], "fake")
        fake = str(run_folder(run) / FAKE_FILE)
    student = last_run(request, checkpoint, family, [*own, f"weights.fake={fake}"])
    why = "goes on from the checkpoint's own weights"
    name = f"pairing noised_real of {RECIPES[family]}"
    return Plan(checkpoint, name, why, student, fake=run)


def causal_run(request: Request, checkpoint: Checkpoint, family: str) -> Config:
    """The run that makes a causal teacher of a bidirectional one."""
    teacher = teacher_of(request, checkpoint)
    own = [*common(request, checkpoint, "causal"), f"weights.student={teacher}"]
    if teacher == checkpoint.path and checkpoint.entry:
        own.append(f"weights.student_entry={checkpoint.entry}")
    if request.causal_updates is not None:
        own.append(f"run.student_updates={request.causal_updates}")
    return load_config(CAUSAL_RECIPES[family], [*own, *shared(request.overrides)])


def last_run(
    request: Request, checkpoint: Checkpoint, family: str, settings: Sequence[str]
) -> Config:
    """The run whose student is exported; the user's settings come after all others."""
    return one_run(request, checkpoint, family, settings, "student", request.overrides)


def one_run(
    request: Request,
    checkpoint: Checkpoint,
    family: str,
    settings: Sequence[str],
    name: str,
    overrides: Sequence[str] | None = None,
) -> Config:
    """A run of the family's comparison with these settings in place of its arms.

    overrides: the user's; by default those that all runs share.
    """
    own = shared(request.overrides) if overrides is None else overrides
    base = load_config(RECIPES[family])
    arm = [*settings, *common(request, checkpoint, name)]
    (config,) = arms_of(dataclasses.replace(base, arms={"only": arm + list(own)}))
    return config


def common(request: Request, checkpoint: Checkpoint, name: str) -> list[str]:
    """Settings that every run of the journey has."""
    height, width = size_of(request, checkpoint)
    settings = [
        f"run.out={request.out}",
        f"run.name={name}",
        f"run.device={request.device}",
        f"data.shards={request.shards}",
        f"data.video_size=[{height},{width}]",
        "data.tiny.clips=0",
        "report.clips=0",
        "report.every=0",
        f"report.seed={REPORTING_SEED}",
        f"report.model={request.model or ''}",
    ]
    if checkpoint.recipe is not None:
        settings += rollout_of(checkpoint.recipe)
        if name != "student" or request.method == "noised_real":
            settings.append(f"rollout.noise={checkpoint.recipe.noise}")
    return settings


def rollout_of(recipe: Recipe) -> list[str]:
    """How a student runs, but for its noise, as settings."""
    ladder = ",".join(f"{timestep:g}" for timestep in recipe.ladder)
    first = ",".join(f"{timestep:g}" for timestep in recipe.first_ladder or ())
    return [
        f"rollout.ladder=[{ladder}]",
        f"rollout.first_ladder=[{first}]",
        f"rollout.context={recipe.context}",
        f"rollout.shift={recipe.shift}",
        f"rollout.chunk_frames={recipe.chunk_frames}",
        f"rollout.frames={recipe.frames}",
        f"rollout.sink={recipe.sink}",
        f"rollout.window={recipe.window}",
    ]


def as_given(plan: Plan) -> Config | None:
    """How the checkpoint runs as it came; None for a teacher."""
    recipe = plan.checkpoint.recipe
    if recipe is None:
        return None
    return change(plan.student, [*rollout_of(recipe), f"rollout.noise={recipe.noise}"])


def size_of(request: Request, checkpoint: Checkpoint) -> tuple[int, int]:
    """Height and width of the clips: asked for, else those of the checkpoint's training."""
    if request.size is not None:
        return request.size
    if checkpoint.world == "tiny":
        return TINY_SIZE
    data = checkpoint.found.data
    if data is None:
        return WAN_SIZE
    rows, columns = data.latent_size
    return 8 * rows, 8 * columns


def shared(overrides: Sequence[str]) -> list[str]:
    """The user's settings that hold for every run."""
    return [override for override in overrides if override.startswith(SHARED_SECTIONS)]


def teacher_of(request: Request, checkpoint: Checkpoint) -> str:
    """The bidirectional teacher: named, the checkpoint itself, or the world's own."""
    if request.teacher:
        return request.teacher
    if checkpoint.role == "teacher":
        return checkpoint.path
    if request.model is None:
        return "assets/tiny/teacher.safetensors"
    transformer = request.model / "transformer"
    if not (transformer / "config.json").is_file():
        raise JourneyError(
            f"{request.model} has no transformer; name the teacher with --teacher PATH, or a "
            "causal teacher with --causal PATH"
        )
    return str(transformer)


def exists(path: str) -> bool:
    """Whether weights are there, in this folder or with the package."""
    return Path(path).exists() or shipped(path).exists()
