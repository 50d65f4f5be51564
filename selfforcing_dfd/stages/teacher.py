"""Stage `teacher`: bidirectional flow matching on data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from selfforcing_dfd.config import Config, ranged
from selfforcing_dfd.data.shards import Batch
from selfforcing_dfd.flow import shift_sigma
from selfforcing_dfd.objectives import flow_matching
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.stages.base import FlowConfig, StageLoss, TrainingStage, drop_text, register


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    # share of updates on the first rollout.chunk_frames frames alone: a causal student's first
    # chunk is such a clip, which a teacher of whole clips does not know
    first_chunk: float = ranged(0.0, 0, 1)


@register
@dataclass(slots=True)
class TeacherStage(TrainingStage):
    """negative: [L, D_text], the text that stands for no caption; None is zeros.

    first_chunk: share of updates on the first chunk_frames frames of each clip. given: first frames
    that it sees clean and has no loss at, as a teacher of image-to-video must know them.
    """

    name = "teacher"
    sections = {"flow": FlowConfig, "teacher": TeacherConfig}
    makes = "teacher"

    trained: dict[str, nn.Module]
    shift: float
    text_dropout: float
    chunk_frames: int = 0
    first_chunk: float = 0.0
    negative: Tensor | None = None
    given: int = 0

    @classmethod
    def build(
        cls, config: Config, networks: Mapping[str, nn.Module], negative: Tensor | None
    ) -> Self:
        flow = config.of(FlowConfig)
        return cls(
            {"student": networks["student"]},
            flow.shift,
            flow.text_dropout,
            config.rollout.chunk_frames,
            config.of(TeacherConfig).first_chunk,
            negative,
            config.rollout.given,
        )

    def loss(self, turn: str, batch: Batch, draw: Draw, student_updates: int) -> StageLoss:
        noise = draw.normal("noise", batch.latents.shape[1:], batch.latents)
        sigma = shift_sigma(draw.uniform("sigma"), self.shift).to(noise)
        conditioning = drop_text(batch, draw, self.text_dropout, self.negative)
        frames = noise.shape[1]
        if draw.coin("first_chunk", "update")[0] < self.first_chunk:
            frames = self.chunk_frames
        x0 = batch.latents[:, :frames]
        noise = noise[:, :frames]
        network = self.trained[turn]
        loss = flow_matching(network, x0, noise, sigma, conditioning, given=self.given)
        return StageLoss(loss.mean(), {"flow_loss": loss.detach()})
