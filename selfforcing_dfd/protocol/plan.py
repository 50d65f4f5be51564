"""What a protocol runs: prompts x seeds x methods, from a YAML file in `configs/protocol/`."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfforcing_dfd.common import find_file, shipped
from selfforcing_dfd.config import ConfigError, require
from selfforcing_dfd.metrics.feature_files import WEIGHTLESS, WITH_WEIGHTS
from selfforcing_dfd.stages import config_files as settings

PROTOCOL_CONFIGS = "configs/protocol"
STUDENT = "student"
TEACHER = "teacher"
CAUSAL = "causal"
TINY_DATA = "tiny_data"
VIDEOS = "videos"
KINDS = (STUDENT, TEACHER, CAUSAL, TINY_DATA, VIDEOS)
ONE_SET = "all"  # the set of prompts that a plan does not divide
SET = "{set}"  # stands for the set of a prompt in paths
UNITS = ("prompt", "pair")
AVERAGE = "average"  # of a table's columns to the left
FIELDS = ("number", "seed", "set")  # of the names of videos that others made


@dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """One way to make a video of a prompt and a seed. Relative paths start where the command does.

    kind: `student` (streams), `teacher` (many-step ODE of the whole clip), `causal` (many-step ODE,
    chunk after chunk), `tiny_data` (clips of the tiny world), `videos` (files that others made).
    """

    kind: str
    about: str = ""
    weights: str = ""  # `{set}` stands for the set of the prompt
    model: str = ""  # folder of Wan2.1 with VAE and text encoder; empty: the tiny world
    settings: str = ""  # of a stream: a preset in configs/stream
    steps: int = 50  # of an ODE
    guidance: float = 1.0  # of a teacher
    shift: float = 5.0  # of an ODE's steps
    # of files that others made: `clips/{set}/{number}-{seed}.mp4`; number counts prompts from 0
    files: str = ""
    latent_frames: int = 0  # 0: as the plan's
    poses: str = ""  # ViPE's results for the videos of this method


@dataclass(frozen=True, kw_only=True)
class PaperPlan:
    """A published table, to be shown beside what is measured here.

    columns: the paper's name of a column -> our score of the same definition; empty where we have
    none, `average` for the mean of the columns to the left. rows: method -> column -> number.
    """

    source: str
    columns: dict[str, str]
    rows: dict[str, dict[str, float]]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A protocol. Every method makes one video for each prompt and seed."""

    about: str = ""
    out: str  # everything that is made
    # a file of one prompt a line, or set -> file, or the prompts themselves; a picture that videos
    # begin with stands behind the prompt, after a tab
    prompts: Any
    extended: bool = False  # whether a language model has made the prompts longer
    seeds: list[int]
    latent_frames: int  # of each video
    chunk_frames: int = 3  # latent frames of a chunk, for seams, whoever made the video
    fps: int = 16
    crf: int = 10  # loss of the video files: 0 for none, 18 for what the eye takes for none
    size: list[int] = field(default_factory=list)  # height and width; empty: the model's
    methods: dict[str, MethodPlan]
    teacher: str  # the two references, by the names of their methods
    data: str
    control: str  # the method that the others are compared with
    unit: str = "prompt"  # what counts once in a test: a prompt, or a pair of videos
    features: list[str] = field(default_factory=list)  # as --features of `evaluate`
    window_s: float = 0.0  # seconds of a point on the curves over time; 0: no curves
    show: list[str] = field(default_factory=list)  # scores of the first table
    paper: PaperPlan | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """number: counted over all sets from 0. image: what its videos begin with; may be empty."""

    number: int
    text: str
    set: str = ONE_SET
    image: str = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """One video of a protocol."""

    method: str
    prompt: Prompt
    seed: int

    @property
    def name(self) -> str:
        return f"{self.prompt.number:03d}-{self.seed}"

    @property
    def key(self) -> tuple[int, int]:
        """What the videos of two methods are paired by."""
        return self.prompt.number, self.seed


def find_protocol(name: str) -> Path:
    """The plan's file: `configs/protocol/NAME.yaml`, or a path that ends in .yaml."""
    folder = shipped(PROTOCOL_CONFIGS)
    path = Path(name) if name.endswith(".yaml") else folder / f"{name}.yaml"
    if not path.is_file():
        files = sorted(folder.rglob("*.yaml"))
        known = ", ".join(file.relative_to(folder).as_posix()[:-5] for file in files)
        raise ConfigError(
            f"there is no protocol {name}; use one of {known}, or a path to a .yaml file"
        )
    return path


def load_protocol(name: str) -> Protocol:
    """A protocol by its name or path. Raises ConfigError with the file and the wrong key."""
    path = find_protocol(name)
    with settings.explained(str(path)):
        protocol = settings.typed(path, Protocol)
        check(protocol)
    return protocol


def check(protocol: Protocol) -> None:
    """Raise ConfigError for names of methods that do not exist, and for what cannot be run."""
    known = ", ".join(protocol.methods)
    roles = {"teacher": protocol.teacher, "data": protocol.data, "control": protocol.control}
    for role, method in roles.items():
        require(
            method in protocol.methods,
            f"{role} is {method!r}, which is no method; the methods are {known}",
        )
    require(
        protocol.teacher != protocol.data,
        "teacher and data are one method; numbers need both to be held against",
    )
    require(protocol.unit in UNITS, f"unit is {protocol.unit!r}; use {' or '.join(UNITS)}")
    require(
        len(set(protocol.seeds)) == len(protocol.seeds) > 0,
        f"seeds are {protocol.seeds}; name at least one, and each once",
    )
    for name, value in (("latent_frames", protocol.latent_frames), ("fps", protocol.fps)):
        require(value >= 1, f"{name} is {value}; it must be at least 1")
    require(0 <= protocol.crf <= 51, f"crf is {protocol.crf}; use 0 to 51")
    require(len(protocol.size) in (0, 2), f"size is {protocol.size}; use [height, width] or []")
    require(protocol.window_s >= 0, f"window_s is {protocol.window_s}; use seconds, or 0")
    for name, plan in protocol.methods.items():
        check_method(name, plan)
    for text in protocol.features:
        check_features(text)
    if protocol.paper is not None:
        check_paper(protocol.paper, protocol.methods)


def check_method(name: str, method: MethodPlan) -> None:
    plain = name.replace("_", "").replace("-", "").isalnum()
    require(plain, f"{name!r} is no name of a method: use letters, digits, _ and -")
    require(method.kind in KINDS, f"methods.{name}.kind is {method.kind!r}; use {', '.join(KINDS)}")
    needed = {VIDEOS: "files", TINY_DATA: ""}.get(method.kind, "weights")
    given = {"files": method.files, "weights": method.weights}
    for setting, value in given.items():
        if setting == needed:
            require(bool(value), f"methods.{name}.{setting} is empty; name the {setting}")
        else:
            require(not value, f"methods.{name}: kind {method.kind} takes no {setting}; drop it")
    require(method.steps >= 1, f"methods.{name}.steps is {method.steps}; use at least 1")
    if method.files:
        parts = [part[1] for part in string.Formatter().parse(method.files) if part[1] is not None]
        require(
            set(parts) <= set(FIELDS) and {"number", "seed"} <= set(parts),
            f"methods.{name}.files is {method.files!r}; it needs {{number}} and {{seed}}, and may "
            "have {set}",
        )


def check_features(text: str) -> None:
    for part in text.split("+"):
        name, equals, _ = part.partition("=")
        known = name in (WITH_WEIGHTS if equals else WEIGHTLESS)
        require(
            known,
            f"features has {text!r}; want {', '.join(WEIGHTLESS)}, or "
            f"{', '.join(f'{each}=FOLDER' for each in WITH_WEIGHTS)}, or several joined by +",
        )


def check_paper(paper: PaperPlan, methods: dict[str, MethodPlan]) -> None:
    for row, numbers in paper.rows.items():
        require(row in methods, f"paper.rows has {row}, which is no method; add it, or drop it")
        unknown = sorted(set(numbers) - set(paper.columns))
        require(not unknown, f"paper.rows.{row} has {unknown}, which are no columns")


def prompts_of(protocol: Protocol) -> list[Prompt]:
    """All prompts in order. Raises ConfigError for files that are missing or empty."""
    named = protocol.prompts
    sets = named if isinstance(named, dict) else {ONE_SET: named}
    found: list[Prompt] = []
    for name, source in sets.items():
        texts = list(source) if isinstance(source, list) else lines_of(str(source))
        require(bool(texts), f"prompts of {name}: {source} is empty; give one prompt a line")
        for line in texts:
            text, _, image = str(line).partition("\t")
            found.append(Prompt(len(found), " ".join(text.split()), str(name), image.strip()))
    seen = [(prompt.text, prompt.image) for prompt in found]
    twice = sorted({text for text, image in seen if seen.count((text, image)) > 1})
    require(not twice, f"the prompt {twice[:1]} is there twice; each counts once")
    return found


def lines_of(name: str) -> list[str]:
    path = find_file(name)
    require(path.is_file(), f"{name} is not there; write one prompt a line into it")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def missing_prompts(protocol: Protocol) -> str:
    """Which file of prompts is not there, in words; empty if all are."""
    named = protocol.prompts
    sources = list(named.values()) if isinstance(named, dict) else [named]
    files = [str(source) for source in sources if not isinstance(source, list)]
    lacking = [file for file in files if not find_file(file).is_file()]
    return f"no prompts at {', '.join(lacking)}" if lacking else ""


def hash_of(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of all prompts with their sets and the names of their pictures, in order."""
    words = [[prompt.set, prompt.text, Path(prompt.image).name] for prompt in prompts]
    content = json.dumps(words, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()
