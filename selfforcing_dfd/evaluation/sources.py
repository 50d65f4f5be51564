"""The rows of a report: what makes the clips of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from selfforcing_dfd.common import find_device
from selfforcing_dfd.config import Config, ModelConfig, find_file, require
from selfforcing_dfd.evaluation.generate import (
    Decode,
    EvaluationSet,
    Videos,
    student_clips,
    teacher_clips,
)
from selfforcing_dfd.evaluation.tables import DATA, REFERENCES, START, TEACHER
from selfforcing_dfd.evaluation.world import World
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.training.build import (
    STUDENT_FILE,
    arms,
    build_chunks,
    build_ladder,
    load_frozen,
    run_folder,
    teacher_size,
)

PAIRINGS = {
    "caption": "the real clip shares the caption and nothing else, as in the paper",
    "assignment": "real clips of the same caption, each given to the nearest sample",
    "inversion": "the real clip's own noise",
    "prefix": "the first chunk from the real clip's noise, later ones after its real past",
}


@dataclass(frozen=True, slots=True)
class Source:
    """Something that makes clips: a row of the report to be."""

    name: str
    about: str
    clips: Callable[[EvaluationSet, Decode], Videos]


def sources(config: Config, world: World) -> list[Source]:
    """The rows of this config's report. Networks are loaded when their clips are asked for.

    Raises ConfigError for weights that are not there, and for an arm named like another row.
    """
    for name in config.arms:
        require(
            name not in REFERENCES and "/" not in name,
            f"an arm is called {name}, which the report needs for another row; rename it",
        )
    found = []
    if world.has_real_clips(config):
        found.append(data_source(config, world))
    own = str(run_folder(config) / STUDENT_FILE)
    weights = config.weights
    if config.run.stage == "teacher":
        return [*found, run_source(TEACHER, "", config, own)]
    if weights.teacher:
        size = teacher_size(config)
        found.append(teacher_source(config, size, weights.teacher, weights.teacher_entry))
    if weights.student and (config.arms or config.run.stage == "dfd"):
        about = "the student that training began from"
        found.append(student_source(START, about, config, weights.student, weights.student_entry))
    if not config.arms:
        return [*found, run_source("student", about_run(config), config, own)]
    for name, arm in zip(config.arms, arms(config), strict=True):
        found.append(run_source(name, about_run(arm), arm, str(run_folder(arm) / STUDENT_FILE)))
    return found


def about_run(config: Config) -> str:
    """How a run trained its student, in words."""
    method = {
        "dmd": "DMD alone, without data forcing",
        "dfd": f"data forcing, pairing {config.dfd.pairing}: "
        f"{PAIRINGS.get(config.dfd.pairing, 'see the settings')}",
    }.get(config.run.stage, f"stage {config.run.stage}")
    return f"{method}; {config.run.student_updates} student updates"


def data_source(config: Config, world: World) -> Source:
    """The real clips that the captions were taken from, once through the codec."""

    def clips(evaluation: EvaluationSet, decode: Decode) -> Videos:
        return world.real_clips(config, evaluation, decode)

    return Source(DATA, "real clips, once through the codec", clips)


def run_source(name: str, about: str, config: Config, weights: str) -> Source:
    """Clips of the network that a run trained: in stage teacher a teacher, else a student."""
    if config.run.stage == "teacher":
        return teacher_source(config, config.model, weights, "")
    return student_source(name, about, config, weights, "")


def teacher_source(config: Config, size: ModelConfig, weights: str, entry: str) -> Source:
    """Many-step samples of the network in a weights file or folder."""
    steps = config.report.teacher_steps
    guidance = config.report.teacher_guidance
    check_weights(weights)

    def clips(evaluation: EvaluationSet, decode: Decode) -> Videos:
        return teacher_clips(
            load(config, size, weights, entry),
            evaluation,
            decode,
            num_steps=steps,
            shift=config.flow.shift,
            guidance=guidance,
            description=TEACHER,
        )

    return Source(TEACHER, f"{steps} ODE steps, guidance {guidance:g}", clips)


def student_source(name: str, about: str, config: Config, weights: str, entry: str) -> Source:
    """Rollouts of the network in a weights file, with its config's ladder, chunks and window."""
    check_weights(weights)

    def clips(evaluation: EvaluationSet, decode: Decode) -> Videos:
        return student_clips(
            load(config, config.model, weights, entry),
            evaluation,
            decode,
            ladder=build_ladder(config),
            chunks=build_chunks(config),
            sink=config.rollout.sink,
            window=config.rollout.window or None,
            description=name,
        )

    return Source(name, about, clips)


def check_weights(weights: str) -> None:
    require(
        find_file(weights).exists(),
        f"no weights at {weights}; train them first, or correct the path",
    )


def load(config: Config, size: ModelConfig, weights: str, entry: str) -> WanTransformer:
    return load_frozen(size, weights, find_device(config.run.device, "run.device"), entry)
