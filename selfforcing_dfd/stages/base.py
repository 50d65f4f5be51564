"""What a training stage is: networks, and a loss for one micro-batch. The loop does the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from selfforcing_dfd.context import Conditioning
from selfforcing_dfd.data.shards import Batch
from selfforcing_dfd.rng import Draw


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


class Stage(Protocol):
    """`trained` maps each turn to the network that it updates; `student` is always among them."""

    trained: dict[str, nn.Module]
    fake_per_student: int

    def loss(self, turn: str, batch: Batch, draw: Draw, student_updates: int) -> StageLoss: ...


def drop_text(
    batch: Batch, draw: Draw, share: float, negative: Tensor | None = None
) -> Conditioning:
    """The batch's text, with a share of samples left without caption, as guidance needs it."""
    keep = (draw.uniform("text_dropout") >= share).to(batch.text)[:, None, None]
    return Conditioning(batch.text * keep + no_text(batch.text, negative) * (1 - keep))


def no_text(text: Tensor, negative: Tensor | None = None) -> Tensor:
    """What stands for no caption, [B, L, D_text] like `text`: zeros, or `negative` [L, D_text]."""
    return torch.zeros_like(text) if negative is None else negative.to(text).expand_as(text)
