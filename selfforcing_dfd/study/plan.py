"""What a study runs: arms x starts x draws, from a YAML file in `configs/study/`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from selfforcing_dfd.common import shipped
from selfforcing_dfd.config import Config, ConfigError, require
from selfforcing_dfd.evaluation.tables import REFERENCES
from selfforcing_dfd.stages import change, checked, load_config
from selfforcing_dfd.stages import config_files as settings
from selfforcing_dfd.weights.runs import FAKE_FILE, STUDENT_FILE

STUDY_CONFIGS = "configs/study"
FOLDER = "START"  # stands for a start's folder in settings of an arm
BASE = "base"  # how the names of files there begin that are no plans
CAUSAL = "causal"  # the causal teacher's row
CAUSAL_FILE = "causal.safetensors"
# its ODE at each step of a student's ladder: what a student without error would be
IDEALS = {"ideal_fresh": False, "ideal_kept": True}  # name -> whether it keeps its noise
IDEAL_STEPS = 5
CAUSAL_FEW = "causal_few"  # the causal teacher in the student's steps, noise kept, untrained
CAUSAL_ROWS = (CAUSAL, CAUSAL_FEW, *IDEALS)
LONG = "_long"  # how the names of lengthened arms end
# added for each start after the first; an arm that takes nothing of its start would repeat itself
OF_START = 100
RESULTS = "results"
START_FILE = "start.json"  # a start's own result, beside the folders of its draws


@dataclass(frozen=True, kw_only=True)
class ArmPlan:
    """One method. set: settings on top of the study's base, such as `run.stage=dmd`."""

    like: str = ""  # an arm above, whose settings come first
    set: list[str] = field(default_factory=list)
    tried: int = 1  # settings that were tried for this arm before the study
    every: int = 0  # student updates between checkpoints; 0 is the study's
    # which of them are measured; empty is all. Of a lengthened run always all
    points: list[int] = field(default_factory=list)
    draws: int = 0  # how many of the study's draws, from the first on; 0 is all
    family: str = ""  # arms of one family are settings of one method, to choose from
    long: bool = False  # also run `study.long` times as long, in the first draw of each start
    stream: bool = False  # also stream freely, in the first draw of each start
    control: str = ""  # the arm of which it changes one thing
    paper: str = ""  # what arXiv 2606.18478 found of this change


@dataclass(frozen=True, kw_only=True)
class FixedPoint:
    """A row of its own: an arm after so many student updates, whatever the others are held at."""

    arm: str
    update: int


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """Free streaming. windows: how many training lengths; prompts: how many streams."""

    windows: int = 16
    prompts: int = 16


@dataclass(frozen=True, kw_only=True)
class StartStage:
    """One training on the way to a start: `train.py --config CONFIG SET...`."""

    config: str
    set: list[str] = field(default_factory=list)
    # a file of the run's folder, such as student -> where a copy of it belongs
    copy: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A study. Every run is `base` with the study's settings, the start's weights and an arm's."""

    about: str = ""
    base: str = "study/base.yaml"
    out: str = "runs/study"  # runs and results
    document: str = "docs/study.md"  # with NAME.json and plots in a folder named like it
    starts: dict[str, str]  # name -> folder with {student,fake,causal}.safetensors
    made: list[StartStage] = field(default_factory=list)  # how starts are made, in this order
    draws: list[int]  # seeds of training
    updates: int  # student updates of an arm that sets no other number
    every: int  # student updates between measured points
    dmd_updates: int  # of the DMD runs that made the starts; doses are in units of them
    clips: int
    follow_clips: int = 96
    evaluation_seed: int  # from 2000 on for reporting alone
    budget: str  # the arm whose operations are the budget of equal compute
    controls: list[str]  # what every other arm is compared with
    arms: dict[str, ArmPlan]
    fixed: dict[str, FixedPoint] = field(default_factory=dict)
    goal: bool = True  # whether arms are judged by the study's goal
    long: int = 10
    stream: StreamPlan = field(default_factory=StreamPlan)


@dataclass(frozen=True)
class StudyRun:
    """One training. updates: student updates at which it is measured."""

    start: str
    draw: int
    arm: str
    config: Config
    updates: tuple[int, ...]
    result: Path
    streams: bool

    @property
    def name(self) -> str:
        return f"{self.start}, draw {self.draw}, {self.arm}"


def find_plan(name: str) -> Path:
    """The plan's file: `configs/study/NAME.yaml`, or a path that ends in .yaml."""
    path = Path(name) if name.endswith(".yaml") else shipped(STUDY_CONFIGS) / f"{name}.yaml"
    if not path.is_file():
        files = sorted(shipped(STUDY_CONFIGS).glob("*.yaml"))
        known = ", ".join(file.stem for file in files if not file.stem.startswith(BASE))
        raise ConfigError(f"there is no plan {name}; use one of {known}, or a path to a .yaml file")
    return path


def load_plan(name: str) -> Plan:
    """A plan by its name or path. Raises ConfigError with the file and the wrong key."""
    path = find_plan(name)
    with settings.explained(str(path)):
        plan = settings.typed(path, Plan)
        check(plan)
    return plan


def check(plan: Plan) -> None:
    """Raise ConfigError for names of arms that do not exist, and for numbers that do not fit."""
    known = ", ".join(plan.arms)
    rows = Counter((*REFERENCES, *CAUSAL_ROWS))
    rows.update(list(plan.arms))
    rows.update(list(plan.fixed))
    for name, times in rows.items():
        require(times == 1, f"{name} is the name of another row; rename that arm")
    named = {plan.budget, *plan.controls}
    named.update(point.arm for point in plan.fixed.values())
    named.update(arm.control for arm in plan.arms.values() if arm.control)
    for name in named:
        require(name in plan.arms or name in plan.fixed, f"no arm {name}; the arms are {known}")
    require(plan.budget in plan.arms, f"budget is {plan.budget}; use one of the arms {known}")
    require(bool(plan.starts) and bool(plan.draws), "starts or draws are empty; name at least one")
    above: list[str] = []
    for name, arm in plan.arms.items():
        require(arm.like in ("", *above), f"{name} is like {arm.like}, which is no arm above it")
        above.append(name)
    for name in [*rows, *plan.starts]:
        plain = name.replace("_", "").isalnum() and not name.endswith(LONG)
        require(plain, f"{name} is no name: use letters, digits and _, without {LONG} at the end")
    require(plan.long >= 2, f"long is {plan.long}; lengthened arms need 2 or more")
    for name, arm in plan.arms.items():
        fits = 0 <= arm.draws <= len(plan.draws)
        require(fits, f"{name} has draws: {arm.draws}; use 0 (all) to {len(plan.draws)}")
    for option, value in (("updates", plan.updates), ("every", plan.every), ("clips", plan.clips)):
        require(value >= 1, f"{option} is {value}; it must be at least 1")


def settings_of_arm(plan: Plan, name: str) -> list[str]:
    """An arm's settings, with those of the arm that it is like before them."""
    arm = plan.arms[name]
    inherited = settings_of_arm(plan, arm.like) if arm.like else []
    return inherited + arm.set


def runs_of(plan: Plan, only: Sequence[str] = ()) -> list[StudyRun]:
    """All runs, the first draw of every start first. only: names of arms; empty is all.

    Raises ConfigError for an unknown arm and for settings that cannot be used.
    """
    for name in only:
        require(name in plan.arms, f"no arm {name}; the arms are {', '.join(plan.arms)}")
    base = load_config(plan.base)
    arms = {name: configs_of_arm(plan, base, name) for name in only or plan.arms}
    found: list[StudyRun] = []
    for draw in plan.draws:
        for start in plan.starts:
            for name, configs in arms.items():
                if draw in plan.draws[: plan.arms[name].draws or None]:
                    found += runs_of_arm(plan, start, draw, name, configs)
    return found


def is_bidirectional(config: Config) -> bool:
    """Whether its student makes a clip at once, and so has no past and cannot go on."""
    return config.rollout.chunk_frames == config.rollout.frames


def configs_of_arm(plan: Plan, base: Config, name: str) -> dict[str, Config]:
    """Settings of an arm and of its lengthened twin, if it has one, for no start and draw yet."""
    arm = plan.arms[name]
    every = arm.every or plan.every
    own = [*common_settings(plan), f"checkpoint.every={every}", *settings_of_arm(plan, name)]
    named = replace(base, run=replace(base.run, name=f"arm {name}"))  # as errors call it
    config = checked(change(named, own), f"arm {name}")
    require(
        not (arm.stream and is_bidirectional(config)),
        f"arm {name} has stream: true, but makes a clip at once and cannot go on; leave it out",
    )
    configs = {name: config}
    if arm.long:
        lengthened = [
            f"run.student_updates={plan.long * config.run.student_updates}",
            f"checkpoint.every={plan.long * every}",
        ]
        configs[name + LONG] = change(config, lengthened)
    return configs


def common_settings(plan: Plan) -> list[str]:
    """What all runs of a plan share, for no start yet."""
    return [
        f"run.out={plan.out}",
        f"run.student_updates={plan.updates}",
        f"weights.student={FOLDER}/{STUDENT_FILE}",
        f"weights.fake={FOLDER}/{FAKE_FILE}",
        f"weights.causal={FOLDER}/{CAUSAL_FILE}",
        "checkpoint.keep=10000",  # all points are kept until they are measured
        "checkpoint.export=float32",
        f"report.clips={plan.clips}",
        f"report.follow_clips={plan.follow_clips}",
        f"report.seed={plan.evaluation_seed}",
    ]


def reference_config(plan: Plan, start: str) -> Config:
    """Settings for rows that no arm trains: data, teachers, a start's student."""
    return in_start(plan, change(load_config(plan.base), common_settings(plan)), start)


def in_start(plan: Plan, config: Config, start: str) -> Config:
    """The settings with the weights of a start."""
    folder = plan.starts[start]
    weights = replace(
        config.weights,
        student=config.weights.student.replace(FOLDER, folder),
        fake=config.weights.fake.replace(FOLDER, folder),
        causal=config.weights.causal.replace(FOLDER, folder),
    )
    return replace(config, weights=weights)


def runs_of_arm(
    plan: Plan, start: str, draw: int, name: str, configs: Mapping[str, Config]
) -> Iterator[StudyRun]:
    """An arm's run, and in the first draw its lengthened run."""
    arm = plan.arms[name]
    first = draw == plan.draws[0]
    seed = draw + OF_START * list(plan.starts).index(start)
    folder = Path(plan.out) / RESULTS / start / str(draw)
    for each, config in configs.items():
        if each == name or first:
            run = replace(config.run, name=f"runs/{start}/{draw}/{each}", seed=seed)
            placed = in_start(plan, replace(config, run=run), start)
            result = folder / f"{each}.json"
            streams = arm.stream and first
            points = points_of(placed, arm.points if each == name else [])
            yield StudyRun(start, draw, each, placed, points, result, streams)


def points_of(config: Config, wanted: Sequence[int]) -> tuple[int, ...]:
    """Student updates at which a run is measured: those wanted, or all that have a checkpoint.

    Raises ConfigError for a wanted one without a checkpoint.
    """
    last = config.run.student_updates
    every = config.checkpoint.every
    saved = (*range(every, last, every), last)
    other = sorted(set(wanted) - set(saved))
    require(
        not other,
        f"{config.run.name} is to be measured at {other}, but has checkpoints at {list(saved)}; "
        "use some of them",
    )
    return tuple(wanted) or saved
