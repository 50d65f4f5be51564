"""The noise that is stored with clips: where a teacher's ODE leads from each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from selfforcing_dfd.common import find_device
from selfforcing_dfd.config import Config, require
from selfforcing_dfd.context import Conditioning, KVCache
from selfforcing_dfd.data.noise import Invert
from selfforcing_dfd.ode import INVERSION_SIGMA, invert, invert_by_chunks
from selfforcing_dfd.stages import arms_of, stage_of
from selfforcing_dfd.stages.base import (
    FlowConfig,
    cache_sizes,
    causal_start,
    chunks_of,
    teacher_start,
)
from selfforcing_dfd.training.build import load_frozen
from selfforcing_dfd.weights.tensors import model_fingerprint


@dataclass(frozen=True, slots=True)
class Inversion:
    """invert: from clips to their noise. fingerprint: names network, way and solver."""

    invert: Invert
    fingerprint: str


def build_inversion(config: Config, num_steps: int) -> Inversion:
    """The inversion that a config's run, or those of its arms that need noise, ask for.

    With weights.causal, chunk by chunk: given the chunks before, the noise of a chunk determines
    it. Else weights.teacher is bidirectional. The noise of a whole clip does not determine its
    first chunk, so where only first chunks start from stored noise, theirs is found alone (a
    teacher has to know such short clips), and later frames get fresh noise. Raises ConfigError for
    arms that need noise of both kinds.
    """
    device = find_device(config.run.device, "run.device")
    shift = config.of(FlowConfig).shift
    chunks = chunks_of(config)
    causal = bool(config.weights.causal)
    start = causal_start(config) if causal else teacher_start(config)
    network = load_frozen(config, start, device)
    require(
        not network.takes_picture,
        f"{start.path} is an image-to-video network with further input channels; noise is found "
        "for text-to-video networks alone",
    )

    def by_chunks(latents: Tensor, noise: Tensor, text: Conditioning) -> Tensor:
        cache = KVCache(**cache_sizes(config))
        return invert_by_chunks(network, latents, noise, text, num_steps, shift, chunks, cache)

    def whole(latents: Tensor, noise: Tensor, text: Conditioning) -> Tensor:
        return invert(network, latents, noise, text, num_steps, shift)

    def first(latents: Tensor, noise: Tensor, text: Conditioning) -> Tensor:
        frames = chunks[0].frames
        found = whole(latents[:, :frames], noise[:, :frames], text)
        return torch.cat([found, noise[:, frames:]], dim=1)

    way = by_chunks if causal else {"first": first, "all": whole}[kind_of_noise(config)]

    def run(latents: Tensor, text: Tensor, noise: Tensor) -> Tensor:
        conditioning = Conditioning(text.to(device))
        return way(latents.to(device), noise.to(device), conditioning).cpu()

    fingerprint = f"{model_fingerprint(network)}-{way.__name__}-{num_steps}-{INVERSION_SIGMA:g}"
    return Inversion(run, fingerprint)


def kind_of_noise(config: Config) -> Literal["first", "all"]:
    """Which chunks start from stored noise in the runs of a config."""
    runs = list(arms_of(config))
    needing = [run for run in runs if stage_of(run).needs_noise(run)]
    kinds = {stage_of(run).stored_noise(run) for run in needing or runs[:1]}
    require(
        len(kinds) == 1,
        "some arms start their first chunk from stored noise and some every chunk; a bidirectional "
        "teacher finds these separately: give the arms data.shards of their own, or weights.causal",
    )
    return kinds.pop()
