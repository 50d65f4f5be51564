"""Teacher forcing: what stages `init` and `causal` share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from selfforcing_dfd.config import Config
from selfforcing_dfd.context import KVCache, PackedContext
from selfforcing_dfd.data.shards import Batch
from selfforcing_dfd.flow import shift_sigma
from selfforcing_dfd.objectives import flow_matching
from selfforcing_dfd.ode import teacher_forced_contexts
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.rollout import Chunks
from selfforcing_dfd.stages.base import Pass, StageLoss, TrainingStage, drop_text
from selfforcing_dfd.stages.own_past import real_past
from selfforcing_dfd.stages.published import weighted_flow_matching


@dataclass(slots=True)
class TeacherForcing(TrainingStage):
    """Each chunk is denoised after the clean real chunks before it.

    num_stored_noise: first chunks that start from the noise stored with their clip, if there is
    some; the others start from fresh noise. sigmas: those that are trained; none is all of them,
    shifted. negative: [L, D_text], the text of no caption; None is zeros. given: first frames of a
    clip that its first chunk sees clean, without loss. published_weight: latent frames are weighted
    by their noise level, as in the public code. context_sigma: noise level of the chunks before.
    """

    trained: dict[str, nn.Module]
    chunks: Chunks
    shift: float
    text_dropout: float
    sink: int = 0
    window: int | None = None
    num_stored_noise: int = 0
    sigmas: tuple[float, ...] = ()
    negative: Tensor | None = None
    given: int = 0
    published_weight: bool = False
    context_sigma: float = 0.0

    @classmethod
    def passes(cls, config: Config) -> dict[str, list[Pass]]:
        past = Pass("past", "student", "committed")
        return {"student": [past, Pass("with gradient", "student", "chunks", gradient=True)]}

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
        past, level = real_past(batch.latents, draw, self.context_sigma)
        contexts = teacher_forced_contexts(student, past, conditioning, cache, self.chunks, level)
        context = PackedContext(contexts, frames)
        matching = partial(flow_matching, given=self.given)
        if self.published_weight:
            matching = partial(weighted_flow_matching, shift=self.shift)
        loss = matching(student, batch.latents, noise, sigma, conditioning, context)
        return StageLoss(loss.mean(), {"flow_loss": loss.detach()})

    def draw_sigma(self, u: Tensor) -> Tensor:
        """Noise levels for uniform u in [0, 1)."""
        if not self.sigmas:
            return shift_sigma(u, self.shift)
        return torch.tensor(self.sigmas, dtype=u.dtype)[(u * len(self.sigmas)).long()]
