"""The rows of a report: what makes the clips of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from selfforcing_dfd.common import find_device, find_file
from selfforcing_dfd.config import Config, require
from selfforcing_dfd.evaluation.generate import (
    Decode,
    EvaluationSet,
    FewSteps,
    GoOn,
    MakeChunk,
    ODESteps,
    Videos,
    causal_clips,
    teacher_clips,
)
from selfforcing_dfd.evaluation.tables import DATA, REFERENCES, START, TEACHER
from selfforcing_dfd.evaluation.world import World
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.stages import arms_of, stage_of
from selfforcing_dfd.stages.base import (
    FlowConfig,
    Start,
    cache_sizes,
    chunks_of,
    keeps_noise,
    ladder_of,
    student_start,
    teacher_start,
)
from selfforcing_dfd.stages.own_past import commits, first_ladder_of
from selfforcing_dfd.training.build import load_frozen
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.weights.run_record import require_result
from selfforcing_dfd.weights.runs import STUDENT_FILE


@dataclass(frozen=True, slots=True)
class Source:
    """Something that makes clips: a row of the report to be.

    go_on: how it continues real clips; None for a network that makes all frames at once.
    """

    name: str
    about: str
    clips: Callable[[EvaluationSet, Decode], Videos]
    go_on: GoOn | None = None


def sources(config: Config, world: World) -> list[Source]:
    """The rows of this config's report. Networks are loaded when their clips are asked for.

    Raises ConfigError for weights that are not there, and for an arm named like another row;
    RunError for weights that are not what their run exported.
    """
    for name in config.arms:
        require(
            name not in REFERENCES and "/" not in name,
            f"an arm is called {name}, which the report needs for another row; rename it",
        )
    found = list(references(config, world))
    for name, run in runs_of(config).items():
        found.append(run_source(name, run, run_folder(run) / STUDENT_FILE))
        require_result(run_folder(run), STUDENT_FILE)
    return found


def references(config: Config, world: World) -> Iterator[Source]:
    """The rows that the runs are held against: the data, the teacher, and where students began."""
    if world.has_real_clips(config):
        yield data_source(config, world)
    stage = stage_of(config)
    if stage.makes == "teacher":
        return
    if config.weights.teacher:
        yield teacher_source(TEACHER, config, teacher_start(config))
    if config.weights.student and (config.arms or stage.continues_student):
        about = "the student that training began from"
        yield student_source(START, about, config, student_start(config))


def runs_of(config: Config) -> dict[str, Config]:
    """Each run behind a row, by the row's name."""
    alone = TEACHER if stage_of(config).makes == "teacher" else "student"
    return dict(zip(config.arms or [alone], arms_of(config), strict=True))


def data_source(config: Config, world: World) -> Source:
    """The real clips that the captions were taken from, once through the codec."""

    def clips(evaluation: EvaluationSet, decode: Decode) -> Videos:
        return world.real_clips(config, evaluation, decode)

    def go_on(evaluation: EvaluationSet, real: Tensor, decode: Decode) -> Videos:
        yield decode(real)

    return Source(DATA, "real clips, once through the codec", clips, go_on)


def run_source(name: str, config: Config, weights: Path, entry: str = "") -> Source:
    """Clips of the network that a run trained: a teacher, a causal teacher or a student.

    entry: which network of a checkpoint.
    """
    start = Start(str(weights), entry)
    stage = stage_of(config)
    if stage.makes == "teacher":
        return teacher_source(name, config, start)
    about = f"{stage.about(config)}; {config.run.student_updates} student updates"
    if published := stage.as_published(config):
        about += f"; as the public code: {', '.join(published)}"
    if stage.makes == "causal_teacher":
        steps = config.report.teacher_steps
        ode = ODESteps(steps, config.of(FlowConfig).shift)
        return causal_source(name, f"{about}; {steps} ODE steps", config, start, ode)
    return student_source(name, about, config, start)


def teacher_source(name: str, config: Config, start: Start) -> Source:
    """Many-step samples of the network in a weights file or folder."""
    check_weights(start.path)
    steps = config.report.teacher_steps
    guidance = config.report.teacher_guidance
    shift = config.of(FlowConfig).shift

    def clips(evaluation: EvaluationSet, decode: Decode) -> Videos:
        return teacher_clips(
            load(config, start),
            evaluation,
            decode,
            num_steps=steps,
            shift=shift,
            guidance=guidance,
            description=name,
        )

    return Source(name, f"{steps} ODE steps, guidance {guidance:g}", clips)


def student_source(name: str, about: str, config: Config, start: Start) -> Source:
    """Rollouts of the network in a weights file, with its config's ladder, chunks and window."""
    steps = FewSteps(
        ladder_of(config), keeps_noise(config), first_ladder_of(config), commits(config)
    )
    return causal_source(name, about, config, start, steps)


def causal_source(
    name: str, about: str, config: Config, start: Start, make_chunk: MakeChunk
) -> Source:
    """Clips of a causal network, chunk by chunk, with its config's chunks and window."""
    check_weights(start.path)
    chunks = chunks_of(config)
    cache = cache_sizes(config)

    def make(evaluation: EvaluationSet, decode: Decode, begun: Tensor | None) -> Videos:
        return causal_clips(
            load(config, start),
            evaluation,
            decode,
            make_chunk=make_chunk,
            chunks=chunks,
            **cache,
            begun=begun,
            description=name if begun is None else f"{name}, follow test",
        )

    def clips(evaluation: EvaluationSet, decode: Decode) -> Videos:
        return make(evaluation, decode, None)

    def go_on(evaluation: EvaluationSet, real: Tensor, decode: Decode) -> Videos:
        return make(evaluation, decode, chunks[0].of(real))

    return Source(name, about, clips, go_on)


def check_weights(weights: str) -> None:
    require(
        find_file(weights).exists(),
        f"no weights at {weights}; train them first, or correct the path",
    )


def load(config: Config, start: Start) -> WanTransformer:
    return load_frozen(config, start, find_device(config.run.device, "run.device"))
