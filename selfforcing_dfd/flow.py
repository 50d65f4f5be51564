"""Flow-matching algebra on the straight path between data and noise.

    x_t = (1 - sigma) x0 + sigma noise        flow = noise - x0        x0 = x_t - sigma flow

Sigma in [0, 1] is the only measure of time: there are no timesteps and no lookup tables. It is a
float or a tensor [B] or [B, F], and it broadcasts over latents [B, F, C, H, W].
"""

import torch
from torch import Tensor

PER_SAMPLE = (1, 2, 3, 4)  # the dimensions of [B, F, C, H, W] that a per-sample mean takes


def expand_sigma(sigma: Tensor | float, like: Tensor) -> Tensor:
    """Sigma [B] or [B, F] or float as a tensor that broadcasts over `like` [B, F, C, H, W]."""
    sigma = sigma.to(like) if isinstance(sigma, Tensor) else like.new_full((), sigma)
    return sigma.reshape(sigma.shape + (1,) * (like.ndim - sigma.ndim))


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """The point x_t at noise level sigma on the line from x0 (sigma 0) to noise (sigma 1)."""
    sigma = expand_sigma(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def sigma_by_frame(sigma: Tensor | float, like: Tensor, given: int = 0) -> Tensor:
    """Sigma as [B, F] for latents `like`; 0 in their first `given` frames, which are clean."""
    by_frame = expand_sigma(sigma, like)[..., 0, 0, 0].expand(like.shape[:2])
    return by_frame * (torch.arange(like.shape[1], device=like.device) >= given)


def x0_from_flow(x_t: Tensor, flow: Tensor, sigma: Tensor | float) -> Tensor:
    """The clean latents that a flow at x_t points back to."""
    return x_t - expand_sigma(sigma, x_t) * flow


def shift_sigma(u: Tensor, shift: float) -> Tensor:
    """Wan's time shift, s u / (1 + (s - 1) u): above 1 it spends more of [0, 1] at high noise."""
    return shift * u / (1 + (shift - 1) * u)


def few_step_ladder(timesteps: tuple[float, ...], shift: float) -> tuple[float, ...]:
    """The decreasing sigmas of few-step sampling from unshifted timesteps in (0, 1000].

    (1000, 750, 500, 250) under shift 5 is (1, .9375, .8333, .625), as in Self-Forcing.
    """
    steps = torch.tensor(timesteps, dtype=torch.float64)
    if steps.numel() == 0 or steps[0] != 1000 or (steps <= 0).any() or (steps.diff() >= 0).any():
        raise ValueError(f"ladder is {timesteps}; it must start at 1000, fall, and stay above 0")
    return tuple(shift_sigma(steps / 1000, shift).tolist())
