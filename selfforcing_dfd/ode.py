"""The teacher's probability-flow ODE: sampling from noise, and inversion of real clips to noise."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from selfforcing_dfd.context import Cache, Conditioning, Context, Network, NetworkOutput
from selfforcing_dfd.flow import shift_sigma, x0_from_flow
from selfforcing_dfd.objectives import guided_x0
from selfforcing_dfd.rollout import Chunks, commit_chunk


def with_context(network: Network, fixed: Context) -> Network:
    """The network with one context for every call."""

    def run(
        x_t: Tensor,
        sigma: Tensor | float,
        conditioning: Conditioning,
        context: Context | None = None,
    ) -> NetworkOutput:
        return network(x_t, sigma, conditioning, fixed)

    return run


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
    """Integrate latents [B, F, C, H, W] along dx / dsigma = flow(x, sigma) with Heun's method.

    sigmas: the levels to pass through, rising or falling. At sigma 0 the flow is taken slightly
    above 0, where the data define it. The last step down to 0 is an Euler step, which is exact for
    a straight path. negative: guidance's unconditional text, zeros by default.
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
    """Sample clean latents from noise [B, F, C, H, W]; 2 num_steps - 1 network calls.

    network: bidirectional.
    """
    ladder = sampling_ladder(num_steps, shift)
    return integrate(teacher, noise, ladder, conditioning, guidance, negative)


def invert(
    teacher: Network, latents: Tensor, conditioning: Conditioning, num_steps: int, shift: float
) -> Tensor:
    """The noise from which the unguided ODE makes these clean latents: `sample` backwards."""
    return integrate(teacher, latents, sampling_ladder(num_steps, shift)[::-1], conditioning)


@torch.no_grad()
def teacher_forced_contexts(
    student: Network, latents: Tensor, conditioning: Conditioning, cache: Cache, chunks: Chunks
) -> tuple[Context, ...]:
    """The context of every chunk when all chunks before it are those of `latents`."""
    contexts = []
    for chunk in chunks:
        contexts.append(cache.read(chunk.frames))
        if chunk is not chunks[-1]:
            commit_chunk(student, chunk.of(latents), conditioning, cache)
    return tuple(contexts)


def invert_by_chunks(
    network: Network,
    latents: Tensor,
    conditioning: Conditioning,
    num_steps: int,
    shift: float,
    chunks: Chunks,
    cache: Cache,
) -> Tensor:
    """The noise from which a causal network's ODE makes each chunk, given the clean chunks before.

    Given these chunks, a chunk's noise is as good as fresh, so a student may learn to follow it in
    every chunk. This is the causal ODE of Causal-Forcing in the other direction: its end points are
    the data.
    """
    ladder = sampling_ladder(num_steps, shift)[::-1]
    contexts = teacher_forced_contexts(network, latents, conditioning, cache, chunks)
    noise = [
        integrate(with_context(network, context), chunk.of(latents), ladder, conditioning)
        for chunk, context in zip(chunks, contexts, strict=True)
    ]
    return torch.cat(noise, dim=1)
