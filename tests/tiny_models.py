"""Real classes at tiny size, and one exact model.

All weights and inputs are functions of a seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.context import ChunkKV, Conditioning, NetworkOutput
from selfforcing_dfd.data.shards import Batch
from selfforcing_dfd.flow import expand_sigma
from selfforcing_dfd.forcing import PAIRINGS, Forcing, tied_rows
from selfforcing_dfd.models.identity import Identity, Recipe, Role
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.weights.tensors import save_weights
from selfforcing_dfd.weights.write import file_metadata

TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,  # rotary axes of 8, 4, 4 values: a wrong split shows
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 12,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
}
FRAMES, CHUNK = 6, 2
SHAPE = (4, 4, 6)  # C, H, W: not square, so that rows and columns cannot be confused
TEXT_LENGTH = 5
LADDER = (1.0, 0.9375, 5 / 6, 0.625)


def fill_weights(module: torch.nn.Module, seed: int) -> None:
    """Random weights of sensible size without zeros, so that every parameter has an effect."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = rng.normal(tuple(parameter.shape), seed, f"weights {name}")
            if parameter.ndim == 1:
                values = 0.2 * values + (1.0 if name.endswith("weight") else 0.0)
            elif "scale_shift_table" in name:
                values = 0.3 * values
            else:
                values = values / parameter[0].numel() ** 0.5
            parameter.copy_(values)


def tiny_network(seed: int = 0, dtype: torch.dtype = torch.float64, **sizes: Any) -> WanTransformer:
    """A two-layer network, by default in float64, where identities hold to rounding."""
    network = WanTransformer(**{**TINY, **sizes})
    fill_weights(network, seed)
    return network.to(dtype)


def save_network(
    path: Path, network: WanTransformer, role: Role = "teacher", recipe: Recipe | None = None
) -> None:
    """One safetensors file that says what it holds, as a run exports it."""
    save_weights(path, network, file_metadata(network.config, Identity(role, recipe=recipe)))


def latents(
    name: str,
    frames: int = FRAMES,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Tensor:
    """[B, F, C, H, W] standard normal; the name is what it is for."""
    return rng.normal((batch, frames, *SHAPE), seed, name).to(dtype)


def ladder_noise(
    frames: int = FRAMES, batch: int = 2, seed: int = 0, steps: int = len(LADDER)
) -> Tensor:
    """[S, B, F, C, H, W] float64: one draw for each ladder step."""
    return rng.normal((steps, batch, frames, *SHAPE), seed, "ladder noise").double()


def conditioning(batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0) -> Conditioning:
    """Text of growing length, zeros past each prompt's end."""
    text = rng.normal((batch, TEXT_LENGTH, TINY["text_dim"]), seed, "text").to(dtype)
    for row in range(batch):
        text[row, 2 + row % (TEXT_LENGTH - 1) :] = 0
    return Conditioning(text)


def tiny_batch(
    batch: int = 2, frames: int = FRAMES, with_noise: bool = False, seed: int = 0
) -> Batch:
    """Clips as the reader hands them out, in float64; two clips share each caption."""
    return Batch(
        latents=latents("clips", frames, batch, seed=seed),
        text=conditioning(batch, seed=seed).text,
        captions=tuple(f"caption {row // 2}" for row in range(batch)),
        keys=tuple(f"{row:06d}" for row in range(batch)),
        noise=latents("clip noise", frames, batch, seed=seed) if with_noise else None,
    )


@dataclass(frozen=True)
class DataForcing:
    """Data forcing as a config says it: what a matching stage gets, and who is tied."""

    p: float = 0.0
    p_start: float = 0.0
    ramp_updates: int = 0
    granularity: Literal["update", "micro", "sample"] = "sample"
    pairing: str = "caption"
    sigma_range: tuple[float, float] = (0.0, 1.0)
    input_range: tuple[float, float] = (0.0, 1.0)

    def settings(self) -> dict[str, Any]:
        forcing = Forcing(
            PAIRINGS[self.pairing], self.p, self.p_start, self.ramp_updates, self.sigma_range
        )
        return {
            "forcing": forcing,
            "coin_shared_by": self.granularity,
            "input_range": self.input_range,
        }

    def rows(self, draw: Draw, student_updates: int) -> Tensor:
        coin = draw.coin("dfd", self.granularity)
        return tied_rows(coin, self.settings()["forcing"], student_updates)


class ExactGaussian:
    """The perfect denoiser of data N(mean, std^2): x0 = E[data | x_t], in closed form.

    It has no text and no parameters. dimensions: how many values of a clip vary, from the first
    on; the others are the mean. None is all.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0):
        self.mean, self.std = mean, std
        self.dimensions: int | None = None

    def posterior_mean(self, x_t: Tensor, sigma: Tensor | float) -> Tensor:
        level = expand_sigma(sigma, x_t)
        gain = self.std**2 * (1 - level) / (self.std**2 * (1 - level) ** 2 + level**2)
        if self.dimensions is not None:
            varies = torch.arange(x_t[0].numel()) < self.dimensions
            gain = gain * varies.view(x_t.shape[1:])
        return self.mean + gain * (x_t - (1 - level) * self.mean)

    def __call__(
        self, x_t: Tensor, sigma: Tensor | float, conditioning: Conditioning, context: object = None
    ) -> NetworkOutput:
        flow = (x_t - self.posterior_mean(x_t, sigma)) / expand_sigma(sigma, x_t)
        return NetworkOutput(flow, ChunkKV(x_t.shape[1], ()))
