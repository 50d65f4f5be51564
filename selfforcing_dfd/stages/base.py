"""What a training stage is. One stage is one file of this folder; nothing else compares its name.

A stage says which settings are its own, which networks it wants and what each starts from, what it
needs of the data, which passes an update costs, and the loss of one micro-batch. The training loop,
the data set, `--dry-run` and the report ask it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from selfforcing_dfd.config import Config, ranged, require
from selfforcing_dfd.context import Conditioning
from selfforcing_dfd.data.shards import Batch, ShardReader
from selfforcing_dfd.flow import few_step_ladder
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.rollout import Chunks, plan_chunks

Makes = Literal["teacher", "causal_teacher", "causal_student", "decoder", "shards"]
Latents = Literal["", "tiny", "wan"]
"""Whose latents a stage takes; empty where its networks tell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowConfig:
    """Flow matching on data."""

    shift: float = ranged(3.0, 0, 1000, above=True)  # of the noise levels, and of the teacher's ODE
    text_dropout: float = ranged(0.1, 0, 1)  # share of samples trained without caption


@dataclass(frozen=True, slots=True)
class StageLoss:
    """loss: scalar, the mean over the micro-batch. values: per-sample numbers [B] to log, by name.

    generated, real: [B, F, C, H, W], the student's samples and the data of the same captions, for
    the guards.
    """

    loss: Tensor
    values: dict[str, Tensor]
    generated: Tensor | None = None
    real: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """The weights that a network starts from: a file or folder; empty for a network from nothing.

    entry: which network of a file that holds several. head_dim: see `WeightsConfig`. adapter: a
    file of what is added to these weights; empty for nothing.
    """

    path: str
    entry: str = ""
    head_dim: int = 0
    adapter: str = ""


Over = Literal[
    "clip", "chunks", "first", "later", "committed", "first committed", "later committed"
]


@dataclass(frozen=True, slots=True)
class Pass:
    """One kind of network call in an update, for estimates of cost.

    over: `clip`, all frames at once; `chunks`, each chunk after its past; `first` and `later`, the
    first of them, and the others; `committed`, all chunks but the last; `first committed` and
    `later committed`. times: passes of one sample, on average. rows: how many are made at once.
    """

    name: str
    role: str
    over: Over
    times: float = 1.0
    rows: int = 1
    gradient: bool = False


class Stage:
    """What a config, the data set, `--dry-run` and the report ask of a stage."""

    name: ClassVar[str]
    sections: ClassVar[Mapping[str, type]]  # its own settings, by their name in a config
    needs_clips: ClassVar[bool] = True  # else captions without clips will do
    has_guards: ClassVar[bool] = False  # whether guards watch the student's samples
    takes_given: ClassVar[bool] = True  # whether it knows of frames that are given
    # whether it goes on from a finished student, which the report then shows beside its own
    continues_student: ClassVar[bool] = False
    # else the stage makes what it trains by `further_networks`
    trains_transformers: ClassVar[bool] = True
    makes: ClassVar[Makes] = "causal_student"

    @classmethod
    def check(cls, config: Config) -> None:
        """Raise ConfigError for settings that do not go together in this stage."""

    @classmethod
    def starts(cls, config: Config) -> dict[str, Start]:
        """What each network starts from, by role."""
        return {"student": student_start(config)}

    @classmethod
    def reads(cls, config: Config) -> dict[str, str]:
        """Files and folders that it reads beside those of `starts`, by their settings."""
        return {}

    @classmethod
    def latents(cls, config: Config) -> Latents:
        """Whose latents it takes."""
        return ""

    @classmethod
    def own_flops(cls, config: Config, latent_size: tuple[int, int]) -> dict[str, int]:
        """Operations of an update for one sample, by what they are for, without transformers."""
        return {}

    @classmethod
    def uses_clips(cls, config: Config) -> str:
        """The setting that needs clips where the stage alone does not; empty where none does."""
        return ""

    @classmethod
    def stored_noise(cls, config: Config) -> Literal["first", "all"]:
        """Which chunks start from the noise stored with their clip."""
        return "all"

    @classmethod
    def needs_noise(cls, config: Config) -> str:
        """The setting that needs noise stored with the clips; empty where none does."""
        return ""

    @classmethod
    def passes(cls, config: Config) -> dict[str, list[Pass]]:
        """The network calls of one sample in one update, by turn."""
        return {"student": [Pass("with gradient", "student", "clip", gradient=True)]}

    @classmethod
    def updates(cls, config: Config) -> dict[str, int]:
        """How many updates each turn makes in the whole run."""
        return {"student": config.run.student_updates}

    @classmethod
    def num_items(cls, config: Config, num_samples: int) -> int:
        """How many samples a stage without updates goes through, of `num_samples` in the shards."""
        return num_samples

    @classmethod
    def about(cls, config: Config) -> str:
        """How it trains, in a few words for the report."""
        return f"stage {cls.name}"

    @classmethod
    def as_published(cls, config: Config) -> tuple[str, ...]:
        """In what it trains as the public code does against its papers: settings of `published`."""
        return ()

    @classmethod
    def describe(cls, config: Config) -> Iterator[tuple[str, str]]:
        """(name, text) of what `--dry-run` says about this stage alone."""
        return iter(())


class TrainingStage(Stage, ABC):
    """A stage that trains networks, built from a config for one run.

    trained: the network that each turn updates; `student` is always among them.
    """

    trained: dict[str, nn.Module]
    fake_per_student: int = 0
    regression_per_student: int = 0

    @classmethod
    @abstractmethod
    def build(
        cls, config: Config, networks: Mapping[str, nn.Module], negative: Tensor | None
    ) -> Self:
        """networks: by role. negative: [L, D_text], the text of no caption; None is zeros."""

    @classmethod
    def further_networks(
        cls, config: Config, networks: Mapping[str, Any], generator: torch.Generator
    ) -> dict[str, nn.Module]:
        """What the stage trains beside its transformers, by role, with weights from the generator.

        networks: the transformers, by role.
        """
        return {}

    @classmethod
    def check_shards(cls, config: Config, reader: ShardReader) -> None:
        """Raise ConfigError for shards that do not fit what is no transformer."""

    @classmethod
    def metadata(cls, config: Config, reader: ShardReader) -> dict[str, str]:
        """What the exported file of what is no transformer says of it."""
        return {}

    def learners_of(self, turn: str) -> tuple[str, ...]:
        """Which of `trained` learn in a turn: the turn's own first."""
        return (turn,)

    @abstractmethod
    def loss(self, turn: str, batch: Batch, draw: Draw, student_updates: int) -> StageLoss:
        """The loss of one micro-batch for the network of this turn."""


class ShardStage(Stage, ABC):
    """A stage that trains nothing and writes shards."""

    makes = "shards"

    @classmethod
    @abstractmethod
    def make_shards(
        cls,
        config: Config,
        networks: Mapping[str, nn.Module],
        fingerprints: Mapping[str, str],
        reader: ShardReader,
        resume: bool,
    ) -> str:
        """Write the shards and return one line about them. fingerprints: of the networks."""


STAGES: dict[str, type[Stage]] = {}
"""Every stage by the name that `run.stage` gives it."""


def register(stage: type[Stage]) -> type[Stage]:
    """Make a stage known; a class decorator."""
    STAGES[stage.name] = stage
    return stage


def stage_of(config: Config) -> type[Stage]:
    """The stage of a config. Raises ConfigError for an unknown one."""
    require(
        config.run.stage in STAGES,
        f"run.stage is {config.run.stage!r}; use one of {', '.join(sorted(STAGES))}",
    )
    return STAGES[config.run.stage]


def student_start(config: Config) -> Start:
    """The student's weights, or the teacher's where it has none of its own."""
    weights = config.weights
    if weights.student:
        return Start(weights.student, weights.student_entry, weights.head_dim)
    return replace(teacher_start(config), adapter=weights.student_adapter)


def teacher_start(config: Config) -> Start:
    weights = config.weights
    return Start(weights.teacher, weights.teacher_entry, weights.head_dim)


def causal_start(config: Config) -> Start:
    """The causal teacher's weights."""
    weights = config.weights
    return Start(weights.causal, weights.causal_entry, weights.head_dim)


def require_teacher(config: Config) -> None:
    require(
        bool(config.weights.teacher),
        f"run.stage is {config.run.stage} but weights.teacher is empty: name the teacher's weights",
    )


def chunks_of(config: Config) -> Chunks:
    """The chunks of a training clip."""
    return plan_chunks(config.rollout.frames, config.rollout.chunk_frames)


def ladder_of(config: Config) -> tuple[float, ...]:
    """The ladder's sigmas."""
    return few_step_ladder(tuple(config.rollout.ladder), config.rollout.shift)


def keeps_noise(config: Config) -> bool:
    """Whether a chunk's noise stays between the student's steps."""
    return config.rollout.noise == "kept"


def cache_sizes(config: Config) -> dict[str, Any]:
    """Sink and window as `KVCache` takes them."""
    return {"sink": config.rollout.sink, "window": config.rollout.window or None}


def drop_text(
    batch: Batch, draw: Draw, share: float, negative: Tensor | None = None
) -> Conditioning:
    """What the batch asks for, with a share of samples without caption, as guidance needs it.

    Pictures stay: guidance of image-to-video asks without caption, and never without the picture.
    """
    keep = (draw.uniform("text_dropout") >= share).to(batch.text)[:, None, None]
    text = batch.text * keep + no_text(batch.text, negative) * (1 - keep)
    return replace(batch.conditioning, text=text)


def no_text(text: Tensor, negative: Tensor | None = None) -> Tensor:
    """What stands for no caption, [B, L, D_text] like `text`: zeros, or `negative` [L, D_text]."""
    return torch.zeros_like(text) if negative is None else negative.to(text).expand_as(text)
