"""Stage `causal`: a causal teacher, by teacher forcing at all noise levels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from selfforcing_dfd.config import Config
from selfforcing_dfd.stages.base import FlowConfig, cache_sizes, chunks_of, register
from selfforcing_dfd.stages.init import InitStage


@register
@dataclass(slots=True)
class CausalStage(InitStage):
    """Each chunk is denoised from fresh noise after the clean real chunks before it.

    At the end the network is a teacher whose ODE makes a video chunk by chunk, in many steps. A
    few-step student can be taught by that ODE (stage `regression`), and the noise to which it maps
    a clip belongs to each chunk alone.
    """

    name = "causal"
    sections = {"flow": FlowConfig}
    makes = "causal_teacher"

    @classmethod
    def build(
        cls, config: Config, networks: Mapping[str, nn.Module], negative: Tensor | None
    ) -> Self:
        flow = config.of(FlowConfig)
        return cls(
            {"student": networks["student"]},
            chunks_of(config),
            flow.shift,
            flow.text_dropout,
            num_stored_noise=0,
            negative=negative,
            **cache_sizes(config),
        )

    @classmethod
    def check(cls, config: Config) -> None:
        return

    @classmethod
    def needs_noise(cls, config: Config) -> str:
        return ""

    @classmethod
    def describe(cls, config: Config) -> Iterator[tuple[str, str]]:
        return iter(())
