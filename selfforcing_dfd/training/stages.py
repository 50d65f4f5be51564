"""What each stage of the pipeline optimises: teacher, init, and distribution matching (DMD and
DFD).

A stage owns its networks and turns one micro-batch and its draws into a loss; the loop does
everything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from selfforcing_dfd import rng
from selfforcing_dfd.cache import Context, KVCache, PackedContext
from selfforcing_dfd.data.shards import Batch
from selfforcing_dfd.flow import score_sigma, shift_sigma
from selfforcing_dfd.network import Conditioning
from selfforcing_dfd.objectives import Matching, distribution_matching, flow_matching
from selfforcing_dfd.pairing import PAIRINGS, Pair
from selfforcing_dfd.rollout import Chunk, Rollout, commit_chunk, replay, rollout
from selfforcing_dfd.sampling import over_whole_clips


@dataclass(frozen=True, slots=True)
class Draw:
    """The randomness of one micro-batch. Positions count the samples of the run from its beginning,
    over all processes.

    update: position where this update's samples begin; micro: where this micro-batch's begin;
    positions: one per sample.
    """

    seed: int
    update: int
    micro: int
    positions: tuple[int, ...]

    def normal(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """[B, *shape], each sample's own noise."""
        return torch.stack([rng.normal(shape, self.seed, name, n) for n in self.positions]).to(like)

    def uniform(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """[B, *shape] in [0, 1), float64."""
        return torch.stack([rng.uniform(shape, self.seed, name, n) for n in self.positions])

    def choice(self, name: str, options: int) -> int:
        """One of `options`, the same for the whole update on every process."""
        return int(rng.uniform((), self.seed, name, self.update) * options)


@dataclass(frozen=True, slots=True)
class StageLoss:
    """loss: scalar, the mean over the micro-batch; values: per-sample numbers [B] to log, keyed by
    what they are.

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


@dataclass(slots=True)
class TeacherStage:
    """Bidirectional flow matching on data: how a teacher is made.

    negative: [L, D_text], the text that stands for no caption; None is zeros.
    """

    trained: dict[str, nn.Module]
    shift: float
    text_dropout: float
    fake_per_student: int = 0
    negative: Tensor | None = None

    def loss(self, turn: str, batch: Batch, draw: Draw, student_updates: int) -> StageLoss:
        noise = draw.normal("noise", batch.latents.shape[1:], batch.latents)
        sigma = shift_sigma(draw.uniform("sigma"), self.shift).to(noise)
        conditioning = drop_text(batch, draw, self.text_dropout, self.negative)
        loss = flow_matching(
            over_whole_clips(self.trained[turn]), batch.latents, noise, sigma, conditioning
        )
        return StageLoss(loss.mean(), {"flow_loss": loss.detach()})


@dataclass(slots=True)
class InitStage:
    """Causal student by teacher forcing: each chunk is denoised after the clean real chunks before
    it.

    Where the shards hold the noise that the teacher's ODE maps each clip to, the first `num_paired`
    chunks start from it: noise then determines the clip, and a few steps suffice (regression along
    straight lines to the ODE's endpoints, Liu et al., arXiv 2209.03003; at sigma 1 that is
    regression along the ODE's own path). The noise of a bidirectional teacher is for the first
    chunk only: later chunks would follow their noise and not their context. For them fresh noise is
    drawn.

    levels: the sigmas that are trained; none is all of them, shifted. negative: [L, D_text], no
    caption; None is zeros.
    """

    trained: dict[str, nn.Module]
    chunks: tuple[Chunk, ...]
    shift: float
    text_dropout: float
    sink: int = 0
    window: int | None = None
    fake_per_student: int = 0
    num_paired: int = 1
    levels: tuple[float, ...] = ()
    negative: Tensor | None = None

    def loss(self, turn: str, batch: Batch, draw: Draw, student_updates: int) -> StageLoss:
        student = self.trained[turn]
        conditioning = drop_text(batch, draw, self.text_dropout, self.negative)
        noise = draw.normal("noise", batch.latents.shape[1:], batch.latents)
        if batch.noise is not None:
            for chunk in self.chunks[: self.num_paired]:
                chunk.of(noise).copy_(chunk.of(batch.noise))
        frames = tuple(chunk.frames for chunk in self.chunks)
        sigma = self.sigmas(draw.uniform("sigma", (len(frames),))).to(noise)
        sigma = sigma.repeat_interleave(torch.tensor(frames, device=sigma.device), dim=1)
        context = PackedContext(self.clean_contexts(student, batch.latents, conditioning), frames)
        loss = flow_matching(student, batch.latents, noise, sigma, conditioning, context)
        return StageLoss(loss.mean(), {"flow_loss": loss.detach()})

    def sigmas(self, u: Tensor) -> Tensor:
        """Noise levels for uniform u in [0, 1)."""
        if not self.levels:
            return shift_sigma(u, self.shift)
        return torch.tensor(self.levels, dtype=u.dtype)[(u * len(self.levels)).long()]

    def clean_contexts(
        self, student: nn.Module, latents: Tensor, conditioning: Conditioning
    ) -> tuple[Context, ...]:
        """The context of every chunk when all chunks before it are the given latents."""
        cache, contexts = KVCache(self.sink, self.window), []
        for chunk in self.chunks:
            contexts.append(cache.read(chunk.frames))
            if chunk is not self.chunks[-1]:
                commit_chunk(student, chunk.of(latents), conditioning, cache)
        return tuple(contexts)


@dataclass(frozen=True, slots=True)
class DataForcing:
    """Which rows of a batch are anchored by real videos (arXiv 2606.18478, Eq. 9-10); p = 0 is DMD."""

    p: float = 0.0
    p_start: float = 0.0
    ramp_updates: int = 0
    granularity: str = "update"
    pairing: str = "caption"
    sigma_range: tuple[float, float] = (0.0, 1.0)

    def probability(self, student_updates: int) -> float:
        """p at this student update."""
        if student_updates >= self.ramp_updates:
            return self.p
        return self.p_start + (self.p - self.p_start) * student_updates / self.ramp_updates

    def rows(self, draw: Draw, student_updates: int) -> Tensor:
        """[B] bool: the rows whose coin says data. The coin's granularity decides how many rows
        share one.
        """
        key = {
            "update": (draw.update,) * len(draw.positions),
            "micro": (draw.micro,) * len(draw.positions),
        }
        counters = key.get(self.granularity, draw.positions)
        coin = torch.stack([rng.uniform((), draw.seed, "dfd", n) for n in counters])
        return coin < self.probability(student_updates)

    def at(self, sigma: Tensor) -> Tensor:
        """[B] bool: the noise levels at which a real anchor is used."""
        low, high = self.sigma_range
        return (sigma >= low) & (sigma <= high)


@dataclass(slots=True)
class MatchingStage:
    """Self-Forcing with distribution matching: DMD, or DFD in the rows that `forcing` picks.

    The fake score learns by flow matching on the student's own samples, `fake_per_student` times
    for each student update. negative: [L, D_text], the text of guidance's unconditional half; None
    is zeros.
    """

    trained: dict[str, nn.Module]
    teacher: nn.Module
    chunks: tuple[Chunk, ...]
    ladder: tuple[float, ...]
    guidance: float
    shift: float
    sigma_min: float
    sigma_max: float
    min_normaliser: float
    fake_per_student: int
    forcing: DataForcing = DataForcing()
    sink: int = 0
    window: int | None = None
    negative: Tensor | None = None

    def loss(self, turn: str, batch: Batch, draw: Draw, student_updates: int) -> StageLoss:
        return (
            self.fake_loss(batch, draw)
            if turn == "fake"
            else self.student_loss(batch, draw, student_updates)
        )

    def roll_out(self, batch: Batch, draw: Draw, rows: Tensor | None = None) -> Rollout:
        """The student's own clips for the batch's captions, tied to their real clips in the DFD
        `rows`.

        Pairing `inversion`: they start from the noise stored with the real clip. `prefix`: so does
        their first chunk, and each later chunk sees the real chunks before it in place of the
        student's own.
        """
        noise = draw.normal(
            "rollout", (len(self.ladder), *batch.latents.shape[1:]), batch.latents
        ).transpose(0, 1)
        prefix = self.forcing.pairing == "prefix"
        real = torch.zeros(len(batch.latents), dtype=torch.bool) if rows is None else rows
        mask = real.to(noise.device)[:, None, None, None, None]
        if batch.noise is not None and self.forcing.pairing in ("inversion", "prefix"):
            tied = self.chunks[:1] if prefix else self.chunks
            for chunk in tied:
                start = chunk.of(noise[0])
                start.copy_(torch.where(mask, chunk.of(batch.noise), start))
        exit_steps = (draw.choice("exit", len(self.ladder)),) * len(self.chunks)
        return rollout(
            self.trained["student"],
            noise,
            Conditioning(batch.text),
            KVCache(self.sink, self.window),
            self.ladder,
            self.chunks,
            exit_steps,
            lambda chunk, x0: torch.where(mask, chunk.of(batch.latents), x0) if prefix else x0,
        )

    def score_draw(self, draw: Draw, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Noise like the latents and sigma [B] at which the scores are asked."""
        noise = draw.normal("score", latents.shape[1:], latents)
        return noise, score_sigma(
            draw.uniform("sigma"), self.shift, self.sigma_min, self.sigma_max
        ).to(latents)

    def fake_loss(self, batch: Batch, draw: Draw) -> StageLoss:
        x0 = self.roll_out(
            batch, draw
        ).x0  # of its record, the past of all chunks would lie in memory beside the gradient
        noise, sigma = self.score_draw(draw, x0)
        loss = flow_matching(
            over_whole_clips(self.trained["fake"]), x0, noise, sigma, Conditioning(batch.text)
        )
        return StageLoss(loss.mean(), {"flow_loss": loss.detach(), "sigma": sigma})

    def student_loss(self, batch: Batch, draw: Draw, student_updates: int) -> StageLoss:
        conditioning, negative = (
            Conditioning(batch.text),
            Conditioning(no_text(batch.text, self.negative)),
        )
        rows = self.forcing.rows(draw, student_updates).to(batch.latents.device)
        record = self.roll_out(batch, draw, rows)
        noise, sigma = self.score_draw(draw, record.x0)
        rows = rows & self.forcing.at(sigma)
        x0 = replay(self.trained["student"], record, conditioning)
        pair = PAIRINGS[self.forcing.pairing](x0.detach(), batch.latents, batch.captions)
        anchor = torch.where(rows[:, None, None, None, None], pair.real, x0.detach())
        matching = distribution_matching(
            x0,
            anchor,
            noise,
            sigma,
            teacher=over_whole_clips(self.teacher),
            fake=over_whole_clips(self.trained["fake"]),
            conditioning=conditioning,
            negative=negative,
            guidance=self.guidance,
            min_normaliser=self.min_normaliser,
        )
        values = _matching_values(matching, pair if batch.has_clips else None, rows, sigma)
        return StageLoss(
            matching.loss.mean(), values, x0.detach(), batch.latents if batch.has_clips else None
        )


def _matching_values(
    matching: Matching, pair: Pair | None, rows: Tensor, sigma: Tensor
) -> dict[str, Tensor]:
    return {
        "loss": matching.loss.detach(),
        "discrepancy": matching.discrepancy,
        "normaliser": matching.normaliser,
        **({"gap": pair.gap} if pair else {}),
        "dfd": rows.float(),
        "sigma": sigma,
    }


def drop_text(
    batch: Batch, draw: Draw, share: float, negative: Tensor | None = None
) -> Conditioning:
    """The batch's text with a share of samples left without caption, so that guidance has its
    unconditional half.
    """
    keep = (draw.uniform("text_dropout") >= share).to(batch.text)[:, None, None]
    return Conditioning(batch.text * keep + no_text(batch.text, negative) * (1 - keep))


def no_text(text: Tensor, negative: Tensor | None = None) -> Tensor:
    """What stands for no caption, [B, L, D_text] like `text`: zeros, or `negative` [L, D_text] in
    every row.
    """
    return torch.zeros_like(text) if negative is None else negative.to(text).expand_as(text)
