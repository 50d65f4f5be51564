"""Typed, frozen settings as dataclasses; `stages.config_files` reads them from YAML.

Every number has a range beside its default. Sections that only some stages need belong to those
stages: they pass them to `stages.config_files.load`, and `Config.of` gives them back. Other code
never receives a `Config`; `training/build.py` unpacks it into plain arguments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

from selfforcing_dfd.common import UserError
from selfforcing_dfd.context import check_frames
from selfforcing_dfd.flow import few_step_ladder

SectionType = TypeVar("SectionType")


class ConfigError(UserError):
    """A setting that cannot be used; the message says which, why, and what to write instead."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


class Range(NamedTuple):
    """Numbers from low to high, both included unless `above` excludes low."""

    low: float
    high: float
    above: bool = False

    def check(self, name: str, value: float) -> None:
        """Raise ConfigError unless the value is finite and lies in the range."""
        high_enough = value > self.low if self.above else value >= self.low
        least = f"above {self.low:,g}" if self.above else f"at least {self.low:,g}"
        require(
            high_enough and value <= self.high,  # false for NaN
            f"{name} is {value}; it must be {least} and at most {self.high:,g}",
        )


def ranged(default: Any, low: float, high: float, above: bool = False) -> Any:
    """A setting with a range; of a tuple, each value has it."""
    return field(default=default, metadata={"range": Range(low, high, above)})


MILLION = 10**6
MOST_FRAMES = 10_000  # latent frames of a training clip


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    name: str = "run"  # the run's folder is out/name
    stage: str = "dfd"
    seed: int = ranged(0, 0, 2**63 - 1)
    student_updates: int = ranged(40, 1, 10 * MILLION)
    out: str = "runs"
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    retries: int = ranged(3, 0, 1000)  # back to a checkpoint, after values that are not finite
    gpus: int = ranged(1, 1, 4096)  # what --dry-run plans for
    timeout_s: int = ranged(1800, 1, MILLION)  # a process that waits longer for others gives up


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """How the networks compute. Their sizes come with their weights."""

    # what the backward pass computes again; selective: all but attention
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compute: Literal["float32", "bfloat16"] = "float32"  # trained weights stay float32
    attention: Literal["auto", "sdpa", "fa2", "fa3", "fa4"] = "auto"  # kernel in bfloat16
    compile: bool = False  # the blocks, attention excepted; the first updates take longer
    shard_ranks: int = ranged(0, 0, 4096)  # processes that hold a copy of the weights; 0: all
    sequence_ranks: int = ranged(1, 1, 1024)  # processes that share each sequence, by heads
    lora_rank: int = ranged(0, 0, 65_536)  # of adapters, trained in place of the weights; 0: none


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """Size of a network that starts without weights, as a first teacher does."""

    num_heads: int = ranged(4, 1, 1024)
    head_dim: int = ranged(32, 6, 1024)
    num_layers: int = ranged(6, 1, 1024)
    ffn_dim: int = ranged(384, 1, MILLION)
    channels: int = ranged(16, 1, 4096)  # of the latents
    text_dim: int = ranged(32, 1, MILLION)
    freq_dim: int = ranged(256, 2, MILLION)
    image_dim: int = ranged(0, 0, MILLION)  # of an image encoder's states; 0: text-to-video

    def __post_init__(self) -> None:
        require(
            self.head_dim % 2 == 0,
            f"network.head_dim is {self.head_dim}; rotary positions need an even number",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsConfig:
    """What to start from: a file or folder in any format that `weights` reads.

    Empty student or fake: from the teacher, or from nothing where there is none. The entry picks
    one network of a file that holds several, such as generator_ema of a Self-Forcing .pt file.
    """

    student: str = ""
    teacher: str = ""
    fake: str = ""
    causal: str = ""  # a causal teacher, as stage `causal` makes it
    student_entry: str = ""
    teacher_entry: str = ""
    fake_entry: str = ""
    causal_entry: str = ""
    student_adapter: str = ""  # to begin with, over the teacher's weights; for model.lora_rank
    fake_adapter: str = ""
    head_dim: int = ranged(0, 0, 1024)  # for files of no published size that do not state it


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    frames: int = ranged(9, 1, MOST_FRAMES)  # latent frames of a training clip
    chunk_frames: int = ranged(3, 1, MOST_FRAMES)  # latent frames generated together
    # timesteps before the shift
    ladder: tuple[float, ...] = ranged((1000.0, 750.0, 500.0, 250.0), 0, 1000, above=True)
    first_ladder: tuple[float, ...] = ranged((), 0, 1000, above=True)  # the first chunk's, if other
    shift: float = ranged(5.0, 0, 1000, above=True)
    # keys and values of earlier chunks: from a clean pass, or those of their last denoising step
    context: Literal["clean", "last_step"] = "clean"
    noise: Literal["fresh", "kept"] = "fresh"  # between steps
    given: int = ranged(0, 0, MOST_FRAMES)  # first latent frames that are not made; 1: of an image
    sink: int = ranged(0, 0, MOST_FRAMES)  # latent frames at the start that every chunk sees
    # latent frames of history and the chunk itself, the sink not counted; 0 is all of them
    window: int = ranged(0, 0, MOST_FRAMES)

    def __post_init__(self) -> None:
        check_frames("rollout.frames", self.frames, self.chunk_frames)
        check_frames("rollout.sink", self.sink, self.chunk_frames)
        if self.window != 0:
            check_frames("rollout.window", self.window, self.chunk_frames)
        for ladder in (self.ladder, self.first_ladder or self.ladder):
            few_step_ladder(tuple(ladder), self.shift)  # raises unless it falls from 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    kind: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, adamw for the rest
    lr: float = ranged(1e-4, 0, 1, above=True)
    betas: tuple[float, float] = ranged((0.0, 0.999), 0, 0.999999)
    weight_decay: float = ranged(0.01, 0, 10)
    clip: float = ranged(10.0, 0, MILLION, above=True)  # gradient norm
    warmup: int = ranged(0, 0, 10 * MILLION)  # updates of linear warm-up
    decay: float = ranged(1.0, 0, 1)  # half a cosine from lr to decay * lr; 1 is constant


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    student: OptimizerConfig = field(default_factory=OptimizerConfig)
    fake: OptimizerConfig = field(default_factory=OptimizerConfig)
    regression: OptimizerConfig = field(default_factory=OptimizerConfig)  # the student's, in DMD


@dataclass(frozen=True, kw_only=True, slots=True)
class EMAConfig:
    decay: float = ranged(0.9, 0, 0.999999)  # per student update
    start: int = ranged(0, 0, 10 * MILLION)  # student updates before averaging begins


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    size: int = ranged(16, 1, MILLION)  # samples an update, over all processes
    micro: int = ranged(16, 1, MILLION)  # samples a pass; size / micro gradients are added up

    def __post_init__(self) -> None:
        lower = max(self.size - self.size % self.micro, self.micro)
        require(
            self.size % self.micro == 0,
            f"batch.size ({self.size}) is not a multiple of batch.micro ({self.micro}); "
            f"use {lower} or {self.size + -self.size % self.micro}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyDataConfig:
    """Tiny-world clips to render and pack when data.shards does not exist; 0 clips makes none."""

    clips: int = ranged(0, 0, 10 * MILLION)
    seed: int = ranged(0, 0, 2**63 - 1)
    # how much captions say; mixed: one of the three for each clip; all: all three for each clip
    level: Literal["short", "medium", "long", "mixed", "all"] = "short"
    noise_steps: int = ranged(0, 0, 10_000)  # of the ODE that finds clips' noise; 0 finds none


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    shards: str = ""  # folder with index.json and tar shards
    # which caption is read where clips have several; mixed: drawn for each sample
    captions: Literal["", "short", "medium", "long", "mixed"] = ""
    # height and width of its clips, for --dry-run while there are no shards
    video_size: tuple[int, int] = ranged((64, 64), 8, 16_384)
    workers: int = ranged(0, 0, 256)
    tiny: TinyDataConfig = field(default_factory=TinyDataConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    every: int = ranged(10, 1, 10 * MILLION)  # student updates
    keep: int = ranged(3, 1, 10_000)
    # whether training goes on while they are written, from a copy in memory of the CPU; auto: where
    # a GPU trains
    background: Literal["auto", "always", "never"] = "auto"
    export: Literal["float16", "float32", "int8"] = "float16"  # int8: matrices in 8 bits a value


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """metrics.jsonl is always written."""

    trackers: tuple[str, ...] = ()  # of accelerate: tensorboard, wandb, mlflow, ...
    project: str = "selfforcing_dfd"  # what hosted trackers file the run under


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardsConfig:
    """Saturation, contrast, sharpness, motion and spread of the samples against the data's."""

    # warn where the ratio leaves 1 / (1 + tolerance) .. 1 + tolerance
    tolerance: float = ranged(0.5, 0, MILLION, above=True)
    stop: bool = False  # end the run instead of warning


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """The table after training; 0 clips writes none. Seeds from 2000 are for reporting alone."""

    clips: int = ranged(0, 0, MILLION)  # samples generated for each row
    seed: int = ranged(1000, 0, 2**63 - 1)  # of captions, real clips and noise
    follow_clips: int = ranged(96, 0, MILLION)  # real clips to go on from; 0: no follow test
    teacher_steps: int = ranged(16, 1, 10_000)  # of its ODE sampler, two network calls each
    teacher_guidance: float = ranged(1.0, 0, 1000)
    model: str = ""  # diffusers folder with the VAE of real video; empty: weights.teacher
    # student updates between samples while training; 0 makes none. Always the same clips
    every: int = ranged(0, 0, 10 * MILLION)
    every_clips: int = ranged(32, 1, MILLION)  # of these samples
    # score of the report -> [low, high] for each run's row; outside of it training ends in an error
    gate: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for score, bounds in self.gate.items():
            fits = len(bounds) == 2 and bounds[0] <= bounds[1]
            require(fits, f"report.gate.{score} is {list(bounds)}; it must be [low, high]")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The sections that every stage has, and in `stage` those of single stages, by name."""

    base: str = ""  # another config file that this one changes
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    arms: dict[str, list[str]] = field(default_factory=dict)  # runs to compare: name -> overrides
    stage: Mapping[str, Any] = field(default_factory=dict)

    def of(self, section: type[SectionType]) -> SectionType:
        """A stage's own section, by its class."""
        return next(value for value in self.stage.values() if isinstance(value, section))


def as_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict, as it is saved with a run; stage sections stand beside the others."""
    settings = dataclasses.asdict(config)
    stage_sections = settings.pop("stage")
    return {**settings, **stage_sections}
