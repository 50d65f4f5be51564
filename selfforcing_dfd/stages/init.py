"""Stage `init`: a causal student by teacher forcing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn

from selfforcing_dfd.config import Config, require
from selfforcing_dfd.context import KVCache, PackedContext
from selfforcing_dfd.data.shards import Batch
from selfforcing_dfd.flow import shift_sigma
from selfforcing_dfd.objectives import flow_matching
from selfforcing_dfd.ode import teacher_forced_contexts
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.rollout import Chunks
from selfforcing_dfd.stages.base import (
    FlowConfig,
    Pass,
    StageLoss,
    TrainingStage,
    cache_sizes,
    chunks_of,
    drop_text,
    ladder_of,
    register,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class InitConfig:
    sigmas: Literal["all", "ladder"] = "all"  # noise levels that are trained
    # chunks that start from the noise stored with their clip, where there is some
    stored_noise: Literal["first", "all"] = "first"


@register
@dataclass(slots=True)
class InitStage(TrainingStage):
    """Each chunk is denoised after the clean real chunks before it.

    Where the shards hold the noise that the teacher's ODE maps each clip to, the first
    `num_stored_noise` chunks start from it: noise then determines the clip, and a few steps suffice
    (regression along straight lines to the ODE's endpoints, Liu et al., arXiv 2209.03003; at sigma
    1 that is regression along the ODE's own path). The noise of a bidirectional teacher is for the
    first chunk only: later chunks would follow their noise and not their context. For them fresh
    noise is drawn.

    sigmas: those that are trained; none is all of them, shifted. negative: [L, D_text], the text of
    no caption; None is zeros.
    """

    name = "init"
    sections = {"flow": FlowConfig, "init": InitConfig}

    trained: dict[str, nn.Module]
    chunks: Chunks
    shift: float
    text_dropout: float
    sink: int = 0
    window: int | None = None
    num_stored_noise: int = 1
    sigmas: tuple[float, ...] = ()
    negative: Tensor | None = None

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
            **cache_sizes(config),
        )

    @classmethod
    def check(cls, config: Config) -> None:
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
    def passes(cls, config: Config) -> dict[str, list[Pass]]:
        clean = Pass("clean past", "student", "committed")
        return {"student": [clean, Pass("with gradient", "student", "chunks", gradient=True)]}

    @classmethod
    def describe(cls, config: Config) -> Iterator[tuple[str, str]]:
        own = config.of(InitConfig)
        yield "init", f"sigmas {own.sigmas}, stored noise in chunks: {own.stored_noise}"

    def loss(self, turn: str, batch: Batch, draw: Draw, student_updates: int) -> StageLoss:
        student = self.trained[turn]
        conditioning = drop_text(batch, draw, self.text_dropout, self.negative)
        noise = draw.normal("noise", batch.latents.shape[1:], batch.latents)
        if batch.noise is not None:
            for chunk in self.chunks[: self.num_stored_noise]:
                chunk.of(noise).copy_(chunk.of(batch.noise))
        frames = tuple(chunk.frames for chunk in self.chunks)
        sigma = self.draw_sigma(draw.uniform("sigma", (len(frames),))).to(noise)
        sigma = sigma.repeat_interleave(torch.tensor(frames, device=sigma.device), dim=1)
        cache = KVCache(self.sink, self.window)
        contexts = teacher_forced_contexts(student, batch.latents, conditioning, cache, self.chunks)
        context = PackedContext(contexts, frames)
        loss = flow_matching(student, batch.latents, noise, sigma, conditioning, context)
        return StageLoss(loss.mean(), {"flow_loss": loss.detach()})

    def draw_sigma(self, u: Tensor) -> Tensor:
        """Noise levels for uniform u in [0, 1)."""
        if not self.sigmas:
            return shift_sigma(u, self.shift)
        return torch.tensor(self.sigmas, dtype=u.dtype)[(u * len(self.sigmas)).long()]
