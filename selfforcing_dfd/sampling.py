"""The teacher's probability-flow ODE: many-step sampling from noise, and inversion of real clips back to their noise."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from selfforcing_dfd.flow import shift_sigma, x0_from_flow
from selfforcing_dfd.network import Conditioning, Network
from selfforcing_dfd.objectives import guided_x0


def sampling_ladder(num_steps: int, shift: float) -> tuple[float, ...]:
    """`num_steps + 1` sigmas from 1 down to 0."""
    return tuple(shift_sigma(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift).tolist())


@torch.no_grad()
def integrate(
    network: Network,
    latents: Tensor,
    sigmas: tuple[float, ...],
    conditioning: Conditioning,
    guidance: float = 1.0,
) -> Tensor:
    """Move latents [B, F, C, H, W] along dx / dsigma = flow(x, sigma) through `sigmas`, up or down, with Heun's method.

    At sigma 0 the flow is asked just above, where it is defined by the data; the last step down to 0 is Euler's, which is
    exact for a straight path.
    """
    negative = Conditioning(torch.zeros_like(conditioning.text))

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
    teacher: Network, noise: Tensor, conditioning: Conditioning, num_steps: int, shift: float, guidance: float = 1.0
) -> Tensor:
    """Clean latents from noise [B, F, C, H, W] with a bidirectional network; about 2 num_steps network calls."""
    return integrate(teacher, noise, sampling_ladder(num_steps, shift), conditioning, guidance)


def invert(teacher: Network, latents: Tensor, conditioning: Conditioning, num_steps: int, shift: float) -> Tensor:
    """The noise from which the unguided ODE makes these clean latents: `sample` backwards."""
    return integrate(teacher, latents, sampling_ladder(num_steps, shift)[::-1], conditioning)
