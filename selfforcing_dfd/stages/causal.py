"""Stage `causal`: a causal teacher, by teacher forcing at all noise levels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from selfforcing_dfd.config import Config
from selfforcing_dfd.stages.base import FlowConfig, cache_sizes, chunks_of, register
from selfforcing_dfd.stages.own_past import require_commits
from selfforcing_dfd.stages.published import PublishedConfig, check_published, turned_on
from selfforcing_dfd.stages.teacher_forcing import TeacherForcing


@register
@dataclass(slots=True)
class CausalStage(TeacherForcing):
    """Each chunk is denoised from fresh noise after the clean real chunks before it.

    At the end the network is a teacher whose ODE makes a video chunk by chunk, in many steps. A
    few-step student can be taught by that ODE (stage `regression`), and the noise to which it maps
    a clip belongs to each chunk alone.
    """

    name = "causal"
    sections = {"flow": FlowConfig, "published": PublishedConfig}
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
            negative=negative,
            given=config.rollout.given,
            published_weight=config.of(PublishedConfig).loss_weight,
            **cache_sizes(config),
        )

    @classmethod
    def as_published(cls, config: Config) -> tuple[str, ...]:
        return turned_on(config, ("loss_weight",))

    @classmethod
    def check(cls, config: Config) -> None:
        check_published(config, cls.as_published(config))
        require_commits(config)
