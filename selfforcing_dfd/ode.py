"""A teacher's probability-flow ODE: sampling, inversion of real clips, and the way between."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from selfforcing_dfd.context import Cache, Conditioning, Context, Network, NetworkOutput
from selfforcing_dfd.flow import add_noise, expand_sigma, shift_sigma, sigma_by_frame, x0_from_flow
from selfforcing_dfd.objectives import guided_x0
from selfforcing_dfd.rollout import Chunks, commit_chunk

INVERSION_SIGMA = 0.1
"""Where inversion starts. On the tiny world's clips: noise of std .98, and every clip found again
from it; from .02, std .86; from 0, .57.
"""


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
    given: int = 0,
) -> Tensor:
    """Integrate latents [B, F, C, H, W] along dx / dsigma = flow(x, sigma) with Heun's method.

    sigmas: the levels to pass through, rising or falling. At sigma 0 the flow is taken slightly
    above 0, where the data define it. The last step down to 0 is an Euler step, which is exact for
    a straight path. negative: guidance's unconditional text, zeros by default. given: how many of
    the first frames are clean; they stay as they are.
    """
    negative = negative or replace(conditioning, text=torch.zeros_like(conditioning.text))

    def flow(x: Tensor, sigma: float) -> Tensor:
        level = torch.full((x.shape[0],), max(sigma, 1e-3), dtype=x.dtype, device=x.device)
        seen = sigma_by_frame(level, x, given) if given else level
        x0 = guided_x0(network, x, seen, conditioning, negative, guidance)
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
    given: Tensor | None = None,
) -> Tensor:
    """Sample clean latents from noise [B, F, C, H, W]; 2 num_steps - 1 network calls.

    network: bidirectional. given: clean latents [B, g, C, H, W] that the clips begin with.
    """
    ladder = sampling_ladder(num_steps, shift)
    num_given = 0
    if given is not None:
        num_given = given.shape[1]
        noise = torch.cat([given, noise[:, num_given:]], dim=1)
    return integrate(teacher, noise, ladder, conditioning, guidance, negative, num_given)


def invert(
    teacher: Network,
    latents: Tensor,
    noise: Tensor,
    conditioning: Conditioning,
    num_steps: int,
    shift: float,
) -> Tensor:
    """The noise [B, F, C, H, W] from which the unguided ODE makes these clean latents.

    It starts at `INVERSION_SIGMA`, with that much fresh `noise` added. At sigma 0 the way up is not
    defined: clips fill few of their dimensions, and across the others the flow is that of noise
    which is not there. What comes out is then no standard normal draw, but depends on the clip.
    """
    return integrate(
        teacher,
        add_noise(latents, noise, INVERSION_SIGMA),
        inversion_ladder(num_steps, shift),
        conditioning,
    )


def inversion_ladder(num_steps: int, shift: float) -> tuple[float, ...]:
    """`num_steps + 1` sigmas from INVERSION_SIGMA up to 1, evenly spaced before the shift."""
    lowest = float(unshift_sigma(torch.tensor(INVERSION_SIGMA, dtype=torch.float64), shift))
    return tuple(
        shift_sigma(torch.linspace(lowest, 1, num_steps + 1, dtype=torch.float64), shift).tolist()
    )


def unshift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """u with shift_sigma(u, shift) = sigma."""
    return sigma / (shift - (shift - 1) * sigma)


@torch.no_grad()
def teacher_forced_contexts(
    student: Network,
    latents: Tensor,
    conditioning: Conditioning,
    cache: Cache,
    chunks: Chunks,
    sigma: Tensor | None = None,
) -> tuple[Context, ...]:
    """The context of every chunk when all chunks before it are those of `latents`.

    sigma: [B, F], their noise level for students without commit pass; None: they are clean.
    """
    contexts = []
    for chunk in chunks:
        contexts.append(cache.read(chunk.frames))
        if chunk is not chunks[-1]:
            level = 0.0 if sigma is None else chunk.of(sigma)
            commit_chunk(student, chunk.of(latents), conditioning, cache, level)
    return tuple(contexts)


def invert_by_chunks(
    network: Network,
    latents: Tensor,
    noise: Tensor,
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
    contexts = teacher_forced_contexts(network, latents, conditioning, cache, chunks)
    inverted = [
        invert(
            with_context(network, context),
            chunk.of(latents),
            chunk.of(noise),
            conditioning,
            num_steps,
            shift,
        )
        for chunk, context in zip(chunks, contexts, strict=True)
    ]
    return torch.cat(inverted, dim=1)


@torch.no_grad()
def descend(
    network: Network,
    x_t: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    context: Context,
    num_steps: int,
    shift: float,
    down_to: Tensor | None = None,
) -> Tensor:
    """Where the ODE leads from x_t [B, F, C, H, W] at noise levels sigma [B, F] > 0.

    Heun's method in num_steps steps, evenly spaced before the shift, 2 num_steps calls at most.
    down_to: the noise level of each frame where it ends, [B, F]; 0 without it.
    """
    start = unshift_sigma(sigma, shift)
    end = torch.zeros_like(start) if down_to is None else unshift_sigma(down_to, shift)
    for step in range(1, num_steps + 1):
        following = shift_sigma(start + (end - start) * (step / num_steps), shift)
        x_t = heun_step(network, x_t, sigma, conditioning, context, following)
        sigma = following
    return x_t


def heun_step(
    network: Network,
    x_t: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    context: Context,
    following: Tensor,
) -> Tensor:
    """x_t after a step from noise levels sigma to `following`, both [B, F].

    A step to 0 is one of Euler's method: without noise the flow is not determined.
    """
    flow = network(x_t, sigma, conditioning, context).flow
    step = expand_sigma(following - sigma, x_t)
    if not following.any():
        return x_t + step * flow
    second = network(x_t + step * flow, following, conditioning, context).flow
    second = torch.where(expand_sigma(following, x_t) > 0, second, flow)
    return x_t + step * 0.5 * (flow + second)


@torch.no_grad()
def sample_by_chunks(
    network: Network,
    noise: Tensor,
    conditioning: Conditioning,
    cache: Cache,
    chunks: Chunks,
    num_steps: int,
    shift: float,
) -> Tensor:
    """Clean latents of a causal teacher from noise [B, F, C, H, W], chunk after chunk."""
    clean = []
    for chunk in chunks:
        own = with_context(network, cache.read(chunk.frames))
        clean.append(sample(own, chunk.of(noise), conditioning, num_steps, shift))
        if chunk is not chunks[-1]:
            commit_chunk(network, clean[-1], conditioning, cache)
    return torch.cat(clean, dim=1)
