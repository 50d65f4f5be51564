"""Stages `dmd` and `dfd`: Self-Forcing with distribution matching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from selfforcing_dfd import forcing
from selfforcing_dfd.context import Conditioning, KVCache
from selfforcing_dfd.data.shards import Batch
from selfforcing_dfd.flow import shift_sigma
from selfforcing_dfd.forcing import Forcing, Pair
from selfforcing_dfd.objectives import Matching, distribution_matching, flow_matching
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.rollout import Chunks, Rollout, replay, rollout
from selfforcing_dfd.stages.base import StageLoss, no_text


@dataclass(slots=True)
class MatchingStage:
    """DMD, or DFD in the rows that `forcing` picks.

    The fake score learns by flow matching on the student's own samples, `fake_per_student` times
    for each student update. coin_shared_by: what shares one data-forcing coin. negative:
    [L, D_text], the text of guidance's unconditional half; None is zeros.
    """

    trained: dict[str, nn.Module]
    teacher: nn.Module
    chunks: Chunks
    ladder: tuple[float, ...]
    guidance: float
    shift: float
    sigma_min: float
    sigma_max: float
    min_normaliser: float
    fake_per_student: int
    forcing: Forcing = Forcing()
    coin_shared_by: Literal["update", "micro", "sample"] = "update"
    sink: int = 0
    window: int | None = None
    negative: Tensor | None = None

    def loss(self, turn: str, batch: Batch, draw: Draw, student_updates: int) -> StageLoss:
        if turn == "fake":
            return self.fake_loss(batch, draw)
        return self.student_loss(batch, draw, student_updates)

    def fake_loss(self, batch: Batch, draw: Draw) -> StageLoss:
        untied = torch.zeros(len(batch.latents), dtype=torch.bool, device=batch.latents.device)
        # only x0 is kept: the rollout's record would hold the K/V of all chunks
        x0 = self.roll_out(batch, draw, untied).x0
        noise, sigma = self.draw_score(draw, x0)
        loss = flow_matching(self.trained["fake"], x0, noise, sigma, Conditioning(batch.text))
        return StageLoss(loss.mean(), {"flow_loss": loss.detach(), "sigma": sigma})

    def student_loss(self, batch: Batch, draw: Draw, student_updates: int) -> StageLoss:
        conditioning = Conditioning(batch.text)
        coin = draw.coin("dfd", self.coin_shared_by)
        tied = forcing.tied_rows(coin, self.forcing, student_updates).to(batch.latents.device)
        record = self.roll_out(batch, draw, tied)
        noise, sigma = self.draw_score(draw, record.x0)
        x0 = replay(self.trained["student"], record, conditioning)
        generated = x0.detach()
        pair = forcing.pair(self.forcing.pairing, generated, batch.latents, batch.captions)
        anchored = forcing.anchored_rows(self.forcing, tied, sigma)
        matching = distribution_matching(
            x0,
            forcing.anchor(generated, pair.real, anchored),
            noise,
            sigma,
            teacher=self.teacher,
            fake=self.trained["fake"],
            conditioning=conditioning,
            negative=Conditioning(no_text(batch.text, self.negative)),
            guidance=self.guidance,
            min_normaliser=self.min_normaliser,
        )
        values = values_to_log(matching, pair if batch.has_clips else None, anchored, sigma)
        real = batch.latents if batch.has_clips else None
        return StageLoss(matching.loss.mean(), values, generated, real)

    def roll_out(self, batch: Batch, draw: Draw, tied: Tensor) -> Rollout:
        """The student's clips for the batch's captions; `tied` rows [B] as the pairing says."""
        shape = (len(self.ladder), *batch.latents.shape[1:])
        noise = draw.normal("rollout", shape, batch.latents).transpose(0, 1)
        pairing = self.forcing.pairing
        start = forcing.start_noise(pairing, noise[0], batch.noise, tied, self.chunks)
        return rollout(
            self.trained["student"],
            torch.cat([start[None], noise[1:]]),
            Conditioning(batch.text),
            KVCache(self.sink, self.window),
            self.ladder,
            self.chunks,
            exit_steps=(draw.choice("exit", len(self.ladder)),) * len(self.chunks),
            real_past=forcing.real_past(pairing, batch.latents, tied),
        )

    def draw_score(self, draw: Draw, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Noise like the latents, and the sigma [B] at which teacher and fake score are asked."""
        noise = draw.normal("score", latents.shape[1:], latents)
        sigma = score_sigma(draw.uniform("sigma"), self.shift, self.sigma_min, self.sigma_max)
        return noise, sigma.to(latents)


def score_sigma(u: Tensor, shift: float, low: float, high: float) -> Tensor:
    """Noise levels of the scores: uniform u in [0, 1) shifted, then clamped to [low, high]."""
    return shift_sigma(u, shift).clamp(low, high)


def values_to_log(
    matching: Matching, pair: Pair | None, anchored: Tensor, sigma: Tensor
) -> dict[str, Tensor]:
    """Per sample [B]; the gap only where there is a real clip."""
    gap = {"gap": pair.gap} if pair else {}
    return {
        "loss": matching.loss.detach(),
        "discrepancy": matching.discrepancy,
        "normaliser": matching.normaliser,
        **gap,
        "dfd": anchored.float(),
        "sigma": sigma,
    }
