"""Stage `teacher`: bidirectional flow matching on data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from selfforcing_dfd.config import Config
from selfforcing_dfd.data.shards import Batch
from selfforcing_dfd.flow import shift_sigma
from selfforcing_dfd.objectives import flow_matching
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.stages.base import FlowConfig, StageLoss, TrainingStage, drop_text, register


@register
@dataclass(slots=True)
class TeacherStage(TrainingStage):
    """negative: [L, D_text], the text that stands for no caption; None is zeros."""

    name = "teacher"
    sections = {"flow": FlowConfig}
    makes = "teacher"

    trained: dict[str, nn.Module]
    shift: float
    text_dropout: float
    negative: Tensor | None = None

    @classmethod
    def build(
        cls, config: Config, networks: Mapping[str, nn.Module], negative: Tensor | None
    ) -> Self:
        flow = config.of(FlowConfig)
        return cls({"student": networks["student"]}, flow.shift, flow.text_dropout, negative)

    def loss(self, turn: str, batch: Batch, draw: Draw, student_updates: int) -> StageLoss:
        noise = draw.normal("noise", batch.latents.shape[1:], batch.latents)
        sigma = shift_sigma(draw.uniform("sigma"), self.shift).to(noise)
        conditioning = drop_text(batch, draw, self.text_dropout, self.negative)
        loss = flow_matching(self.trained[turn], batch.latents, noise, sigma, conditioning)
        return StageLoss(loss.mean(), {"flow_loss": loss.detach()})
