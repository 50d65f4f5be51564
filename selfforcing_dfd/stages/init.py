"""Stage `init`: a causal student by teacher forcing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Self

from torch import Tensor, nn

from selfforcing_dfd.config import Config, require
from selfforcing_dfd.stages.base import FlowConfig, cache_sizes, chunks_of, ladder_of, register
from selfforcing_dfd.stages.own_past import context_sigma, require_one_ladder
from selfforcing_dfd.stages.teacher_forcing import TeacherForcing


@dataclass(frozen=True, kw_only=True, slots=True)
class InitConfig:
    sigmas: Literal["all", "ladder"] = "all"  # noise levels that are trained
    # chunks that start from the noise stored with their clip, where there is some
    stored_noise: Literal["first", "all"] = "first"


@register
@dataclass(slots=True)
class InitStage(TeacherForcing):
    """Teacher forcing from the noise that is stored with each clip, where there is some.

    Stored noise is what a teacher's ODE maps the clip to. It determines the clip, so a few steps
    suffice (regression along straight lines to the ODE's endpoints, Liu et al., arXiv 2209.03003;
    at sigma 1 that is regression along the ODE's own path). The noise of a bidirectional teacher is
    for the first chunk only: later chunks would follow their noise and not their context.
    """

    name = "init"
    sections = {"flow": FlowConfig, "init": InitConfig}
    takes_given = False  # stored noise is that of clips of which nothing is given

    num_stored_noise: int = 1

    @classmethod
    def build(
        cls, config: Config, networks: Mapping[str, nn.Module], negative: Tensor | None
    ) -> Self:
        flow = config.of(FlowConfig)
        own = config.of(InitConfig)
        chunks = chunks_of(config)
        return cls(
            {"student": networks["student"]},
            chunks,
            flow.shift,
            flow.text_dropout,
            num_stored_noise=len(chunks) if own.stored_noise == "all" else 1,
            sigmas=ladder_of(config) if own.sigmas == "ladder" else (),
            negative=negative,
            context_sigma=context_sigma(config),
            **cache_sizes(config),
        )

    @classmethod
    def check(cls, config: Config) -> None:
        require_one_ladder(config)
        require(
            config.of(InitConfig).stored_noise == "first" or bool(config.weights.causal),
            "init.stored_noise is all but weights.causal is empty: only a causal teacher gives "
            "noise that later chunks may start from; name one, which stage `causal` makes",
        )

    @classmethod
    def stored_noise(cls, config: Config) -> Literal["first", "all"]:
        return config.of(InitConfig).stored_noise

    @classmethod
    def needs_noise(cls, config: Config) -> str:
        own = config.of(InitConfig)
        if own == InitConfig():
            return ""
        return f"init.stored_noise is {own.stored_noise} and init.sigmas {own.sigmas}"

    @classmethod
    def describe(cls, config: Config) -> Iterator[tuple[str, str]]:
        own = config.of(InitConfig)
        yield "init", f"sigmas {own.sigmas}, stored noise in chunks: {own.stored_noise}"
