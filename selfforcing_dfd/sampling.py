"""The teacher's probability-flow ODE: many-step sampling from noise, and inversion of real clips
back to their noise.

Also what asks a network about a whole clip without collecting its keys and values.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from selfforcing_dfd.cache import Attention, KVCache
from selfforcing_dfd.flow import shift_sigma, x0_from_flow
from selfforcing_dfd.network import Conditioning, Network, NetworkOutput, Past
from selfforcing_dfd.objectives import guided_x0
from selfforcing_dfd.rollout import Chunk, commit_chunk


@dataclass(frozen=True, slots=True)
class WholeClip:
    """The past of a whole clip: none. Nobody asks for the clip's keys and values, so nobody keeps
    them.

    A network collects those of all layers unless its past stores them: 6 GB a row at 1.3B and 21
    latent frames.
    """

    next_frame = 0
    stores = True

    def attend(self, attention: Attention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v)


def with_past(network: Network, past: Past) -> Network:
    """The network with a fixed past, for whoever asks it without one."""

    def run(
        x_t: Tensor, sigma: Tensor | float, conditioning: Conditioning, context: Past | None = None
    ) -> NetworkOutput:
        return network(x_t, sigma, conditioning, past)

    return run


def over_whole_clips(network: Network) -> Network:
    """The network as teacher or fake score: bidirectional, its keys and values not kept."""
    return with_past(network, WholeClip())


def sampling_ladder(num_steps: int, shift: float) -> tuple[float, ...]:
    """`num_steps + 1` sigmas from 1 down to 0."""
    return tuple(
        shift_sigma(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift).tolist()
    )


@torch.no_grad()
def integrate(
    network: Network,
    latents: Tensor,
    sigmas: tuple[float, ...],
    conditioning: Conditioning,
    guidance: float = 1.0,
    negative: Conditioning | None = None,
) -> Tensor:
    """Move latents [B, F, C, H, W] along dx / dsigma = flow(x, sigma) through `sigmas`, up or down,
    with Heun's method.

    At sigma 0 the flow is asked just above, where it is defined by the data; the last step down to
    0 is Euler's, which is exact for a straight path. negative: guidance's unconditional text, zeros
    by default.
    """
    negative = negative or Conditioning(torch.zeros_like(conditioning.text))

    def flow(x: Tensor, sigma: float) -> Tensor:
        level = torch.full((x.shape[0],), max(sigma, 1e-3), dtype=x.dtype, device=x.device)
        x0 = guided_x0(network, x, level, conditioning, negative, guidance)
        return (x - x0) / level[:, None, None, None, None]

    for sigma, following in itertools.pairwise(sigmas):
        first = flow(latents, sigma)
        moved = latents + (following - sigma) * first
        if following == 0:
            latents = x0_from_flow(latents, first, sigma)
        else:
            latents = latents + (following - sigma) * 0.5 * (first + flow(moved, following))
    return latents


def sample(
    teacher: Network,
    noise: Tensor,
    conditioning: Conditioning,
    num_steps: int,
    shift: float,
    guidance: float = 1.0,
    negative: Conditioning | None = None,
) -> Tensor:
    """Clean latents from noise [B, F, C, H, W] with a bidirectional network; 2 num_steps - 1
    network calls.
    """
    ladder = sampling_ladder(num_steps, shift)
    return integrate(over_whole_clips(teacher), noise, ladder, conditioning, guidance, negative)


def invert(
    teacher: Network, latents: Tensor, conditioning: Conditioning, num_steps: int, shift: float
) -> Tensor:
    """The noise from which the unguided ODE makes these clean latents: `sample` backwards."""
    return integrate(
        over_whole_clips(teacher), latents, sampling_ladder(num_steps, shift)[::-1], conditioning
    )


def invert_by_chunks(
    student: Network,
    latents: Tensor,
    conditioning: Conditioning,
    num_steps: int,
    shift: float,
    chunks: tuple[Chunk, ...],
    cache: KVCache,
) -> Tensor:
    """The noise from which a causal network's ODE makes each chunk of these clean latents after the
    clean chunks before it.

    Given the past, a chunk's noise is as good as fresh: a student may learn to follow it in every
    chunk (the causal ODE of Causal-Forcing, turned round: its endpoints are the data itself).
    """
    noise = torch.empty_like(latents)
    for chunk in chunks:
        after_past = with_past(student, cache.read(chunk.frames))
        ladder = sampling_ladder(num_steps, shift)[::-1]
        chunk.of(noise).copy_(integrate(after_past, chunk.of(latents), ladder, conditioning))
        if chunk is not chunks[-1]:
            commit_chunk(student, chunk.of(latents), conditioning, cache)
    return noise
