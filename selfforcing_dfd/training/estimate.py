"""The cost of a run, estimated from sizes: operations and GPU-hours. Memory: see `memory`.

Arithmetic, not measurement. The stage says which passes an update makes. Operations are matrix
products and attention, two for each multiply-add.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from selfforcing_dfd.config import Config, NetworkConfig
from selfforcing_dfd.cost import network_flops, peak_tflops
from selfforcing_dfd.models.picture import NUM_TOKENS
from selfforcing_dfd.stages import stage_of
from selfforcing_dfd.stages.base import Pass, chunks_of
from selfforcing_dfd.training.adapter_costs import adapter_flops
from selfforcing_dfd.training.build import FROZEN, shape_of

PATCH = (2, 2)  # of Wan's transformer, height and width
UTILISATION = 0.24
"""Share of the bf16 peak that a GPU's operations reach, those that activation checkpointing makes
again included. Self-Forcing's README: 600 iterations in under 2 hours on 64 H100, which by the
operations below is 234 TFLOP/s a GPU. MFU counts no operation twice, so it is smaller.
"""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A board by its nominal memory."""

    name: str
    gigabytes: int


GPUS = (Gpu("H100", 80), Gpu("H200", 141), Gpu("A100", 80))


@dataclass(frozen=True, slots=True)
class Clip:
    """A training clip as the networks see it.

    chunks: latent frames of each; past: latent frames that each sees before itself. latent_size:
    rows and columns.
    """

    chunks: tuple[int, ...]
    past: tuple[int, ...]
    latent_size: tuple[int, int]
    text_tokens: int

    @property
    def frame_tokens(self) -> int:
        return (self.latent_size[0] // PATCH[0]) * (self.latent_size[1] // PATCH[1])

    @property
    def tokens(self) -> int:
        return sum(self.chunks) * self.frame_tokens

    def over(self, what: str) -> Clip:
        """The clip as a pass sees it: see `stages.base.Pass`."""
        if what == "clip":
            return replace(self, chunks=(sum(self.chunks),), past=(0,))
        start = 1 if what.startswith("later") else 0
        stop = len(self.chunks) - 1 if what.endswith("committed") else len(self.chunks)
        if what.startswith("first"):
            stop = min(stop, 1)
        return replace(self, chunks=self.chunks[start:stop], past=self.past[start:stop])


def clip_of(config: Config, latent_size: tuple[int, int], text_tokens: int) -> Clip:
    """A clip of the config's chunks, sink and window. latent_size: height and width."""
    rollout = config.rollout
    chunks = chunks_of(config)
    most = rollout.frames
    if rollout.window:
        most = rollout.sink + rollout.window - rollout.chunk_frames
    past = tuple(min(chunk.start, most) for chunk in chunks)
    return Clip(tuple(chunk.frames for chunk in chunks), past, latent_size, text_tokens)


@cache
def num_parameters(size: NetworkConfig) -> int:
    return sum(parameter.numel() for parameter in shape_of(size).parameters())


@cache
def clip_flops(size: NetworkConfig, clip: Clip, gradient: bool, checkpointing: bool) -> int:
    """One pass of one sample over a clip, each chunk seeing its past and itself."""
    return network_flops(
        shape_of(size),
        1,
        clip.chunks,
        clip.latent_size,
        clip.text_tokens,
        clip.past,
        gradient=gradient,
        checkpointing=checkpointing,
    )


def attention_flops(size: NetworkConfig, clip: Clip) -> int:
    """Of attention alone in one pass of one sample: to clip, past, text and picture."""
    frame = clip.frame_tokens
    keys = [own * (own + before) for own, before in zip(clip.chunks, clip.past, strict=True)]
    asked = clip.text_tokens + (NUM_TOKENS if size.image_dim else 0)
    pairs = sum(keys) * frame * frame + clip.tokens * asked
    return 4 * size.num_layers * size.num_heads * size.head_dim * pairs


@dataclass(frozen=True, slots=True)
class Estimate:
    """The costs of one run. sizes: of each role's network."""

    config: Config
    clip: Clip
    sizes: Mapping[str, NetworkConfig]

    @property
    def passes(self) -> dict[str, list[Pass]]:
        return stage_of(self.config).passes(self.config)

    @property
    def trained(self) -> list[str]:
        """Roles whose weights are trained; a gradient may also pass through a frozen network."""
        passes = [each for of_turn in self.passes.values() for each in of_turn]
        roles = {each.role for each in passes if each.gradient} - set(FROZEN)
        return sorted(roles, reverse=True)

    def flops(self, one: Pass, again: bool = True) -> int:
        """Of one kind of pass for one sample, its backward pass included.

        again: with what activation checkpointing makes again, as the GPU does it.
        """
        over = self.clip.over(one.over)
        if not over.chunks:
            return 0
        what = self.config.model.activation_checkpointing
        size = self.sizes[one.role]
        flops = clip_flops(size, over, one.gradient, one.gradient and what != "none")
        if one.gradient and what != "none" and not again:
            flops -= clip_flops(size, over, False, False)
        elif one.gradient and what == "selective":
            flops -= attention_flops(size, over)  # is not made again
        if self.config.model.lora_rank:
            flops += self.adapter_flops(one, again and what != "none")
        return int(one.times * flops)

    def adapter_flops(self, one: Pass, again: bool) -> int:
        """What adapters add to a pass: their own products, less the gradients of the weights."""
        if one.role in FROZEN:
            return 0
        over = self.clip.over(one.over)
        size = self.sizes[one.role]
        own = adapter_flops(size, self.config.model.lora_rank, over.tokens, over.text_tokens)
        if not one.gradient:
            return own
        of_weights = clip_flops(size, over, False, False) - attention_flops(size, over)
        return own * (4 if again else 3) - of_weights

    def turn_flops(self, turn: str, again: bool = True) -> dict[str, int]:
        """Of one update for one sample, by what they are for."""
        return {one.name: self.flops(one, again) for one in self.passes[turn]}

    def run_flops(self, num_items: int = 0, again: bool = True) -> int:
        """Of the whole run. num_items: samples of a stage without updates."""
        updates = stage_of(self.config).updates(self.config)
        samples = {turn: updates[turn] * self.config.batch.size for turn in updates}
        return sum(
            samples.get(turn, num_items) * sum(self.turn_flops(turn, again).values())
            for turn in self.passes
        )

    @property
    def width(self) -> int:
        """Bytes of a value that the networks compute with."""
        return 2 if self.config.model.compute == "bfloat16" else 4


def gpu_hours(flops: int, gpu: Gpu) -> float:
    """Of operations as the GPU makes them, at UTILISATION of its bf16 peak."""
    peak = peak_tflops(gpu.name)
    assert peak is not None, f"cost.py knows no peak of {gpu.name}"
    return flops / (peak * 1e12 * UTILISATION) / 3600
