"""Typed, frozen settings: YAML over dataclasses, dotlist overrides on top, every mistake named with
its cure.

    config = load_config("dfd_ar.yaml", ["optim.student.lr=1e-5"])

Objects never receive a `Config`; `build.py` unpacks it into plain arguments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from selfforcing_dfd.common import UserError, shipped
from selfforcing_dfd.context import check_frames
from selfforcing_dfd.flow import few_step_ladder


class ConfigError(UserError):
    """A setting that cannot be used; the message says which, why, and what to write instead."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    name: str = "run"  # the run's folder is out/name
    stage: Literal["teacher", "pairs", "init", "dmd", "dfd"] = "dfd"
    seed: int = 0
    student_updates: int = 40
    out: str = "runs"
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    gpus: int = 1  # what --dry-run plans for; training itself runs on one

    def __post_init__(self) -> None:
        require(self.gpus >= 1, f"run.gpus is {self.gpus}; it must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Size of student, teacher and fake score (Wan2.1's names in research and code: dim = heads *
    head_dim).
    """

    num_heads: int = 4
    head_dim: int = 32
    num_layers: int = 6
    ffn_dim: int = 384
    channels: int = 16  # of the latents
    text_dim: int = 32
    freq_dim: int = 256
    gradient_checkpointing: bool = False
    # bfloat16: trained weights stay float32, training/precision.py
    compute: Literal["float32", "bfloat16"] = "float32"
    # the kernel where compute is bfloat16
    attention: Literal["auto", "sdpa", "fa2", "fa3", "fa4"] = "auto"

    def __post_init__(self) -> None:
        require(
            self.head_dim % 2 == 0 and self.head_dim >= 6,
            f"model.head_dim is {self.head_dim}; rotary positions on three axes need an even number of at least 6",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsConfig:
    """What to start from; empty means from nothing (student, fake: from the teacher where there is
    one).

    A file or folder in any format of `models/weights.py`; the entry picks one model of a file that
    holds several.
    """

    student: str = ""
    teacher: str = ""
    fake: str = ""
    student_entry: str = ""  # such as generator_ema in a Self-Forcing .pt file
    teacher_entry: str = ""
    fake_entry: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    frames: int = 9  # latent frames of a training clip
    chunk_frames: int = 3  # latent frames generated together
    ladder: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)  # unshifted timesteps
    shift: float = 5.0
    sink: int = 0  # latent frames at the video's start that every chunk sees
    window: int = 0  # latent frames of history and the chunk itself, sink not counted; 0 is all

    def __post_init__(self) -> None:
        for name, frames in (("frames", self.frames), ("sink", self.sink), ("window", self.window)):
            if name != "window" or frames != 0:
                check_frames(f"rollout.{name}", frames, self.chunk_frames)
        # raises for a ladder that does not fall from 1000
        few_step_ladder(tuple(self.ladder), self.shift)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConfig:
    """Distribution matching: where teacher and fake score are compared, and how often each model
    learns.
    """

    guidance: float = 4.0  # uncond + w (cond - uncond); 1 is off. Self-Forcing's 3.0 is 4.0 here
    shift: float = 5.0
    sigma_min: float = 0.02
    sigma_max: float = 0.98
    min_normaliser: float = 1e-3
    fake_per_student: int = 5  # fake-score updates for each student update

    def __post_init__(self) -> None:
        require(
            0 < self.sigma_min < self.sigma_max <= 1,
            f"score.sigma_min ({self.sigma_min}) and score.sigma_max ({self.sigma_max}) must satisfy 0 < min < max <= 1",
        )
        require(
            self.fake_per_student >= 1,
            f"score.fake_per_student is {self.fake_per_student}; it must be at least 1",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DFDConfig:
    """Data forcing: which rows of a batch ask the teacher about a real video (arXiv 2606.18478, Eq.
    9-10).
    """

    p: float = 0.5  # probability that a row is anchored by data
    p_start: float = 0.5  # probability at the first student update, ramped linearly to p
    ramp_updates: int = 0  # student updates the ramp takes; 0 is constant p
    granularity: Literal["update", "micro", "sample"] = "update"  # what shares one coin
    pairing: Literal["caption", "assignment", "inversion", "prefix"] = "caption"
    sigma_range: tuple[float, float] = (0.0, 1.0)  # rows outside it fall back to DMD

    def __post_init__(self) -> None:
        require(
            0 <= self.p <= 1 and 0 <= self.p_start <= 1,
            f"dfd.p ({self.p}) and dfd.p_start ({self.p_start}) are probabilities in [0, 1]",
        )
        low, high = self.sigma_range
        require(
            0 <= low < high <= 1,
            f"dfd.sigma_range is {self.sigma_range}; it must satisfy 0 <= low < high <= 1",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowConfig:
    """Flow matching on data, for the stages teacher and init."""

    shift: float = 3.0  # of the training noise levels, and of the teacher's ODE in stage pairs
    text_dropout: float = 0.1  # share of samples trained without caption
    # stage init: all noise levels, or only those of rollout.ladder
    levels: Literal["any", "ladder"] = "any"
    paired: Literal["first", "all"] = (
        "first"  # stage init: the chunks that start from the stored noise, where there is some
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PairsConfig:
    """Stage pairs: noise and what the teacher's ODE makes of it, for each caption of data.shards,
    as shards of their own.
    """

    out: str = ""  # folder
    num: int = 0  # captions, from the first one; 0 takes all
    steps: int = 24  # of Heun's method, 2 steps - 1 calls
    guidance: float = 6.0

    def __post_init__(self) -> None:
        require(
            self.steps >= 1 and self.num >= 0,
            f"pairs.steps is {self.steps}, pairs.num {self.num}; use 1 and 0 at least",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    kind: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, adamw for the rest
    lr: float = 1e-4
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.01
    clip: float = 10.0  # gradient norm
    warmup: int = 0  # updates of linear warm-up
    # learning rate at the last update as a share of lr, by half a cosine; 1 is constant
    decay: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    student: OptimizerConfig = field(default_factory=OptimizerConfig)
    fake: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class EMAConfig:
    decay: float = 0.9  # per student update
    start: int = 0  # student updates before averaging begins


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    size: int = 16  # samples an update, over all processes
    micro: int = 16  # samples a forward pass; the gradient is accumulated over size / micro passes
    # neighbouring samples that share a caption (assignment pairing works within them)
    group: int = 1

    def __post_init__(self) -> None:
        require(
            self.size % self.micro == 0,
            f"batch.size ({self.size}) is not a multiple of batch.micro ({self.micro}); "
            f"use {max(self.size - self.size % self.micro, self.micro)} or {self.size + -self.size % self.micro}",
        )
        require(
            self.micro % self.group == 0,
            f"batch.micro ({self.micro}) is not a multiple of batch.group ({self.group}): groups would be cut apart; "
            f"use {self.micro + -self.micro % self.group}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyDataConfig:
    """How many tiny-world clips to render and pack when data.shards does not exist yet; 0 clips
    never makes data.
    """

    clips: int = 0
    seed: int = 0
    level: Literal["short", "medium", "long"] = "short"
    # steps of the teacher's ODE that finds each clip's noise (`inversion`, stage init); 0: none
    noise_steps: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    shards: str = ""  # folder with index.json and tar shards
    # height and width of its clips, for --dry-run while there are no shards
    video_size: tuple[int, int] = (64, 64)
    workers: int = 0
    tiny: TinyDataConfig = field(default_factory=TinyDataConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    every: int = 10  # student updates
    keep: int = 3
    export: Literal["float16", "float32"] = (
        "float16"  # of the finished weights; small steps of a large model need float32
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """metrics.jsonl is always written."""

    trackers: tuple[str, ...] = ()  # of accelerate: tensorboard, wandb, mlflow, ...
    project: str = "selfforcing_dfd"  # what hosted trackers file the run under


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardsConfig:
    """Saturation, contrast, sharpness, motion and spread of the student's samples against the
    data's.
    """

    tolerance: float = 0.5  # warn where the ratio leaves 1 / (1 + tolerance) .. 1 + tolerance
    stop: bool = False  # end the run instead of warning


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """The table after training; 0 clips writes none."""

    clips: int = 0  # samples generated for each row
    teacher_steps: int = 16  # of the teacher's ODE sampler, two network calls each
    teacher_guidance: float = 1.0
    # diffusers folder with the VAE that decodes clips of any codec but the tiny world's; empty:
    # weights.teacher
    model: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    base: str = ""  # another config file that this one changes
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher_model: ModelConfig | None = None  # where the teacher's size is not the student's
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    dfd: DFDConfig = field(default_factory=DFDConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    # runs to make and compare: name -> overrides
    arms: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        needs_teacher = self.run.stage in ("pairs", "dmd", "dfd")
        require(
            not needs_teacher or bool(self.weights.teacher),
            f"run.stage is {self.run.stage} but weights.teacher is empty: name the teacher's weights",
        )
        require(
            self.run.stage != "pairs" or bool(self.pairs.out),
            "run.stage is pairs but pairs.out is empty: name the folder for the teacher's clips and their noise",
        )
        self._check_teacher_model()
        require(
            not (
                self.run.stage == "dfd"
                and self.dfd.pairing == "assignment"
                and self.batch.group == 1
            ),
            "dfd.pairing is assignment but batch.group is 1: one sample has one possible partner; use batch.group=8",
        )
        require(
            bool(self.data.shards),
            "data.shards is empty: name a folder written by `python -m selfforcing_dfd pack`",
        )

    def _check_teacher_model(self) -> None:
        """A teacher of another size sees the same latents and text, and cannot stand in for the
        student or the fake score.
        """
        teacher, own, weights = self.teacher_model, self.model, self.weights
        if teacher is None:
            return
        ends = (teacher.channels, teacher.text_dim), (own.channels, own.text_dim)
        require(
            ends[0] == ends[1],
            f"teacher_model has (channels, text_dim) {ends[0]}, model has {ends[1]}; both see the same data: make them equal",
        )
        empty = [
            role
            for role, name in (("student", weights.student), ("fake", weights.fake))
            if not name
        ]
        require(
            self.run.stage not in ("dmd", "dfd") or not empty,
            f"teacher_model is set, but weights.{' and weights.'.join(empty)} would start from the teacher, which has "
            "another size; name weights of the student's size",
        )


def find_config(name: str) -> Path:
    """The config file of that name, in the current folder or in `configs/`; `.yaml` may be left out.

    Raises ConfigError with the names of all shipped configs.
    """
    configs = shipped("configs")
    for path in (Path(name), configs / name, Path(f"{name}.yaml"), configs / f"{name}.yaml"):
        if path.is_file():
            return path
    known = sorted(path.relative_to(configs).as_posix() for path in configs.rglob("*.yaml"))
    raise ConfigError(
        f"no config file {name}, neither here nor in configs/; there are {', '.join(known)}"
    )


def find_file(name: str) -> Path:
    """A path from a config: as it is, or, where it names a shipped asset, where that lies."""
    path = Path(name)
    return path if path.exists() or not shipped(name).exists() else shipped(name)


def load_config(name: str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Settings of the file `name` (and of its `base`), with dotlist overrides such as `dfd.p=0.3`
    on top.

    Raises ConfigError with the file and the full path of an unknown key, a wrong type or a value
    that does not fit.
    """
    with _explained(name):
        merged = OmegaConf.merge(OmegaConf.structured(Config), _layers(find_config(name)))
    return _to_config(merged, list(overrides), name)


def _to_config(settings: Any, overrides: list[str], name: str) -> Config:
    with _explained(name):
        for override in overrides:
            require(
                "=" in override, f"override {override!r} is not of the form section.setting=value"
            )
        # empty, not None
        dotlist = [
            f"{override}''" if override.endswith("=") else override for override in overrides
        ]
        config = OmegaConf.to_object(OmegaConf.merge(settings, OmegaConf.from_dotlist(dotlist)))
    assert isinstance(config, Config)
    return config


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what OmegaConf and our own checks raise into ConfigError with the file's name and the
    setting's path.
    """
    try:
        yield
    except (OmegaConfBaseException, ValueError) as error:
        reason, path = str(error).split("\n    full_key")[0], getattr(error, "full_key", None)
        raise ConfigError(f"{name}: {f'{path}: ' if path else ''}{reason}") from error


def change(config: Config, overrides: list[str]) -> Config:
    """The same settings with dotlist overrides on top. Raises ConfigError like `load_config`."""
    return _to_config(OmegaConf.structured(config), overrides, config.run.name)


def _layers(path: Path) -> Any:
    """The file's settings over those of its `base`, which is looked up beside it and then in
    `configs/`.
    """
    own: Any = OmegaConf.load(path)
    base = own.get("base") if OmegaConf.is_dict(own) else None
    if not base:
        return own
    beside = path.parent / base
    return OmegaConf.merge(_layers(beside if beside.is_file() else find_config(base)), own)


def as_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict, as it is saved with a run."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The resolved settings, loadable again anywhere: what came from `base` is in them."""
    return OmegaConf.to_yaml(OmegaConf.structured(dataclasses.replace(config, base="")))
