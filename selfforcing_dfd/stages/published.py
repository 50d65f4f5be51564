"""What the public Self-Forcing code does otherwise than its papers say, put back by settings.

docs/differences.md tells what each setting changes, and by how much. All of them are off unless a
config or `train --as-published` turns them on. They wrap what a stage hands to the core: the
student, its past, the score networks and their noise levels. What is off hands back what it got.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from selfforcing_dfd.config import Config, require
from selfforcing_dfd.context import (
    Attention,
    ChunkContext,
    ChunkKV,
    Conditioning,
    Context,
    Network,
    NetworkOutput,
    PackedContext,
)
from selfforcing_dfd.flow import PER_SAMPLE, add_noise, expand_sigma, shift_sigma
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.rollout import Chunk, RealRows

TIMESTEPS = 1000  # of every table
SCORE_SHIFT = 8.0  # of the score networks' table: they are built without the config's shift


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedConfig:
    """Deviations of the published code. All are off by default."""

    context_gradient: bool = False  # later chunks' losses reach the K/V of earlier chunks
    context_noise: bool = False  # what becomes context has noise of sigma .005, in training alone
    sigma_tables: bool = False  # scores take sigma from tables: one adds noise, another makes x0
    loss_weight: bool = False  # of stage `causal`: AR diffusion's weight by noise level


NAMES = tuple(field.name for field in dataclasses.fields(PublishedConfig))
AS_PUBLISHED = tuple(f"published.{name}=true" for name in NAMES)
"""The settings that `train --as-published` stands for."""


def turned_on(config: Config, known: Sequence[str]) -> tuple[str, ...]:
    """Which deviations are on, of those that a stage knows."""
    settings = dataclasses.asdict(config.of(PublishedConfig))
    return tuple(name for name in known if settings[name])


def check_published(config: Config, on: Sequence[str]) -> None:
    """Raise ConfigError for deviations, among those that are on, which cannot go with a setting."""
    window = config.rollout.window
    require(
        window == 0 or "context_gradient" not in on,
        f"published.context_gradient is on and rollout.window is {window}; the published code "
        "cannot train with a window: use rollout.window=0 or published.context_gradient=false",
    )
    context = config.rollout.context
    require(
        context == "clean" or not on,
        f"published.{', published.'.join(on)} and rollout.context={context}: the published code "
        "always has a commit pass; use rollout.context=clean, or turn these settings off",
    )
    given = config.rollout.given
    require(
        given == 0 or not on,
        f"published.{', published.'.join(on)} and rollout.given={given}: the published code knows "
        "of no frames that are given; use rollout.given=0, or turn these settings off",
    )


@dataclass(frozen=True, slots=True)
class Published:
    """The deviations of a student update and of a fake-score update.

    shift: of the table by which noise is added.
    """

    context_gradient: bool = False
    context_noise: bool = False
    sigma_tables: bool = False
    shift: float = 5.0

    @classmethod
    def of(cls, config: Config) -> Published:
        own = config.of(PublishedConfig)
        shift = config.rollout.shift
        return cls(own.context_gradient, own.context_noise, own.sigma_tables, shift)

    def replayed(self, student: Network) -> Network:
        """The student whose trained steps are repeated with gradient."""
        return InPlaceCache(student) if self.context_gradient else student

    def past(self, real_past: RealRows | None, latents: Tensor, draw: Draw) -> RealRows | None:
        """What stands for the student's chunks where they become context. latents: as a clip's."""
        if not self.context_noise:
            return real_past
        no_row = torch.zeros(len(latents), dtype=torch.bool, device=latents.device)
        real = real_past or RealRows(latents, no_row)
        noise = draw.normal("context_noise", latents.shape[1:], latents)
        sigma = float(sigma_table(self.shift)[-1])
        return NoisyPast(real.latents, real.rows, noise, sigma)

    def uniform(self, u: Tensor) -> Tensor:
        """u in [0, 1), from which a score's noise level is made: one of 1000 values."""
        return (u * TIMESTEPS).floor() / TIMESTEPS if self.sigma_tables else u

    def noised_at(self, sigma: Tensor) -> Tensor:
        """Sigma [B] of the noise that is added for scores at sigma [B]."""
        return looked_up(sigma, self.shift) if self.sigma_tables else sigma

    def score(self, network: Network, sigma: Tensor) -> Network:
        """A score network that is asked at sigma [B] about latents noised to `noised_at(sigma)`."""
        return ByTable(network, sigma) if self.sigma_tables else network


@cache
def sigma_table(shift: float) -> Tensor:
    """[1000] float32: the noise levels of the published scheduler, falling from 1."""
    return shift_sigma(torch.linspace(1, 0, TIMESTEPS + 1)[:-1], shift)


def nearest(sigma: Tensor, shift: float) -> Tensor:
    """The table's entry whose timestep is nearest to 1000 sigma, like sigma; int64."""
    timesteps = TIMESTEPS * sigma_table(shift).to(sigma.device)
    return (timesteps - TIMESTEPS * sigma.float()[..., None]).abs().argmin(-1)


def looked_up(sigma: Tensor, shift: float) -> Tensor:
    """Sigma as the published code finds it for a timestep 1000 sigma."""
    return sigma_table(shift).to(sigma)[nearest(sigma, shift)]


@cache
def weight_table(shift: float) -> Tensor:
    """[1000] float32: the loss weight of AR diffusion. Its mean is 1; at sigma 1 it is zero."""
    timesteps = TIMESTEPS * sigma_table(shift)
    bell = torch.exp(-2 * ((timesteps - TIMESTEPS / 2) / TIMESTEPS) ** 2)
    above_least = bell - bell.min()
    return above_least * (TIMESTEPS / above_least.sum())


def weighted_flow_matching(
    network: Network,
    x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    context: Context | None,
    shift: float,
) -> Tensor:
    """`flow_matching` with sigma [B, F], each latent frame weighted by its noise level."""
    flow = network(add_noise(x0, noise, sigma), sigma, conditioning, context).flow
    error = (flow - (noise - x0)).square()
    weight = weight_table(shift).to(sigma)[nearest(sigma, shift)]
    return (error * expand_sigma(weight, error)).mean(PER_SAMPLE)


@dataclass(frozen=True, slots=True)
class NoisyPast(RealRows):
    """The student's chunks, in some rows real ones, with noise [B, F, C, H, W] of sigma added."""

    noise: Tensor
    sigma: float

    def instead_of(self, x0: Tensor, chunk: Chunk) -> Tensor:
        clean = RealRows.instead_of(self, x0, chunk)
        return add_noise(clean, chunk.of(self.noise), self.sigma)


@dataclass(frozen=True, slots=True)
class ByTable:
    """A score network whose clean prediction is made with sigma of another table.

    sigma: [B], the noise level that the network is told. It is called with the sigma of the noise
    that was added, by which its caller makes x0 from the flow; the flow makes up for the ratio.
    """

    network: Network
    sigma: Tensor

    def __call__(
        self,
        x_t: Tensor,
        sigma: Tensor | float,
        conditioning: Conditioning,
        context: Context | None = None,
    ) -> NetworkOutput:
        times = len(x_t) // len(self.sigma)  # guidance asks about the batch twice
        told = self.sigma.repeat(times)
        out = self.network(x_t, told, conditioning, context)
        ratio = looked_up(told, SCORE_SHIFT) / sigma
        return NetworkOutput(expand_sigma(ratio, x_t) * out.flow, out.kv)


@dataclass(frozen=True, slots=True)
class InPlaceCache:
    """A student that computes its replay as if its cache had been written in place.

    The published code writes the K/V of a trained step into the cache, with their gradient, and
    later overwrites the values by those of the clean pass. So later chunks see the clean pass's
    values, and their losses' gradient goes into the trained step's K/V.
    """

    network: Network

    def __call__(
        self,
        x_t: Tensor,
        sigma: Tensor | float,
        conditioning: Conditioning,
        context: Context | None = None,
    ) -> NetworkOutput:
        if isinstance(context, PackedContext):
            last = context.contexts[-1]
            past = last.chunks if isinstance(last, ChunkContext) else ()
            context = LeakingContext(context.contexts, context.frames, past)
        return self.network(x_t, sigma, conditioning, context)


@dataclass(frozen=True, slots=True)
class LeakingContext(PackedContext):
    """Chunks that pass gradient on to the chunks before them.

    past: all chunks but the last, with the K/V of their clean passes.
    """

    past: tuple[ChunkKV, ...]

    def attend(self, attention: Attention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens_per_frame = q.shape[1] // sum(self.frames)
        lengths = [frames * tokens_per_frame for frames in self.frames]
        own_k = k.split(lengths, 1)
        own_v = v.split(lengths, 1)
        seen = [chunk.layers[layer] for chunk in self.past]
        past_k = [with_gradient(seen_k, own) for (seen_k, _), own in zip(seen, own_k, strict=False)]
        past_v = [with_gradient(seen_v, own) for (_, seen_v), own in zip(seen, own_v, strict=False)]
        attended = []
        for number, own_q in enumerate(q.split(lengths, 1)):
            keys = torch.cat([*past_k[:number], own_k[number]], dim=1)
            values = torch.cat([*past_v[:number], own_v[number]], dim=1)
            attended.append(attention(own_q, keys, values))
        return torch.cat(attended, dim=1)


def with_gradient(value: Tensor, of: Tensor) -> Tensor:
    """A value without gradient, with the gradient of another tensor."""
    return value + (of - of.detach())
