"""Stage `decoder`: a small decoder learns to show latents as the codec's own decoder shows them.

The loss of a clip is the sum of three parts: the absolute difference of its pixels; that of what
the codec's encoder sees in both videos, as a share of what it sees in the full decode; and that of
the changes from one frame to the next, so that errors do not flicker. The full decode of the same
latents is the target, not the clip itself: what the codec lost cannot be shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from selfforcing_dfd.codecs.small_decoder import DecoderSize, SmallDecoder
from selfforcing_dfd.common import DTYPES, find_file
from selfforcing_dfd.config import Config, ranged, require
from selfforcing_dfd.cost import flops_of
from selfforcing_dfd.data.shards import Batch, ShardReader
from selfforcing_dfd.data.source import IMPORTED_CODEC
from selfforcing_dfd.data.sources.tiny import codec_beside
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.stages.base import Latents, Pass, StageLoss, Start, TrainingStage, register
from selfforcing_dfd.stages.decoder_teachers import (
    DecoderTeacher,
    TinyTeacher,
    load_wan_teacher,
    meta_wan_teacher,
)
from selfforcing_dfd.tiny.codec import BASIS, TinyCodec
from selfforcing_dfd.weights.decoders import decoder_metadata, read_decoder

FEWEST_FRAMES = 2  # of a clip, since frames are compared with the ones before
COPIES = 5  # of the weights in float32: themselves, gradient, two moments, average
EPSILON = 1e-6  # of a mean feature and of a mean square


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """A small decoder; see `codecs.small_decoder`."""

    vae: str = ""  # diffusers folder with Wan's VAE; empty: the tiny codec of the shards
    start: str = ""  # a decoder to go on from; empty: from nothing
    widths: tuple[int, ...] = ranged((320, 192, 64), 1, 8192)  # of its three levels
    depths: tuple[int, ...] = ranged((2, 3, 4), 1, 1000)  # blocks of each level
    frames: int = ranged(0, 0, 10_000)  # first latent frames of each clip that are used; 0: all
    crop: int = ranged(0, 0, 10_000)  # rows and columns of latents, from a random place; 0: all
    perceptual: float = ranged(0.5, 0, 1000)  # weight of what the encoder sees
    temporal: float = ranged(1.0, 0, 1000)  # weight of changes from frame to frame


@register
@dataclass(slots=True)
class DecoderStage(TrainingStage):
    """teacher: the codec's own decoder. frames, crop: of the latents that a pass takes; 0: all."""

    name = "decoder"
    sections = {"decoder": DecoderConfig}
    takes_given = False
    trains_transformers = False
    makes = "decoder"

    trained: dict[str, nn.Module]
    teacher: DecoderTeacher
    frames: int = 0
    crop: int = 0
    perceptual: float = 0.5
    temporal: float = 1.0

    @classmethod
    def build(
        cls, config: Config, networks: Mapping[str, nn.Module], negative: Tensor | None
    ) -> Self:
        own = config.of(DecoderConfig)
        student = networks["student"]
        teacher = load_teacher(config, next(student.parameters()).device)
        found = ShardReader(config.data.shards).index.fingerprints["codec"]
        require(
            fits(found, teacher.fingerprint, bool(own.vae)),
            f"{config.data.shards} holds latents of {found}, but the codec here is "
            f"{teacher.fingerprint}; name the one that they were packed with in decoder.vae",
        )
        return cls(
            {"student": student}, teacher, own.frames, own.crop, own.perceptual, own.temporal
        )

    @classmethod
    def check(cls, config: Config) -> None:
        own = config.of(DecoderConfig)
        frames = own.frames or config.rollout.frames
        require(
            FEWEST_FRAMES <= frames <= config.rollout.frames,
            f"decoder.frames is {own.frames} and rollout.frames {config.rollout.frames}; a clip "
            f"for the decoder has {FEWEST_FRAMES} latent frames at least",
        )
        DecoderSize(widths=own.widths, depths=own.depths)  # raises unless there are three levels
        model = config.model
        require(
            config.checkpoint.export != "int8",
            "checkpoint.export is int8, which is for transformers; use float16 or float32",
        )
        for name, value, neutral in (
            ("model.lora_rank", model.lora_rank, 0),
            ("model.compile", model.compile, False),
            ("model.activation_checkpointing", model.activation_checkpointing, "none"),
            ("report.clips", config.report.clips, 0),
            ("report.every", config.report.every, 0),
        ):
            require(
                value == neutral,
                f"{name} is {value}, which stage {cls.name} does not know, since it trains no "
                f"transformer: leave it at {neutral}",
            )

    @classmethod
    def check_shards(cls, config: Config, reader: ShardReader) -> None:
        frames, _, rows, columns = reader.index.latent_shape
        crop = config.of(DecoderConfig).crop
        require(
            frames == config.rollout.frames,
            f"{config.data.shards} holds clips of {frames} latent frames, but rollout.frames is "
            f"{config.rollout.frames}; use rollout.frames={frames}",
        )
        require(
            crop <= min(rows, columns),
            f"decoder.crop is {crop}, but latents are {rows} x {columns}; use at most "
            f"{min(rows, columns)}, or 0 for all",
        )

    @classmethod
    def starts(cls, config: Config) -> dict[str, Start]:
        return {}

    @classmethod
    def reads(cls, config: Config) -> dict[str, str]:
        own = config.of(DecoderConfig)
        named = {"decoder.vae": own.vae, "decoder.start": own.start}
        return {setting: path for setting, path in named.items() if path}

    @classmethod
    def latents(cls, config: Config) -> Latents:
        return "wan" if config.of(DecoderConfig).vae else "tiny"

    @classmethod
    def passes(cls, config: Config) -> dict[str, list[Pass]]:
        return {}

    @classmethod
    def describe(cls, config: Config) -> Iterator[tuple[str, str]]:
        own = config.of(DecoderConfig)
        with torch.device("meta"):
            network = SmallDecoder(size_of(config, channels=config.network.channels))
        count = sum(parameter.numel() for parameter in network.parameters())
        part = f"{own.frames or config.rollout.frames} latent frames"
        part += f", {own.crop} x {own.crop}" if own.crop else ""
        text = f"{count:,} parameters, from {part} of each clip; from {own.start or 'nothing'}"
        yield "decoder", text
        yield "teacher", own.vae or "the tiny codec of the shards"
        lasting = count * COPIES * torch.float32.itemsize / 1e9
        yield (
            "memory",
            f"{lasting:.2f} GB of weights, gradients, moments and average; activations and the "
            "teacher come on top, which is not estimated",
        )

    @classmethod
    def own_flops(cls, config: Config, latent_size: tuple[int, int]) -> dict[str, int]:
        own = config.of(DecoderConfig)
        rows, columns = (min(own.crop or side, side) for side in latent_size)
        size = size_of(config, config.network.channels)
        frames = own.frames or config.rollout.frames
        # all frames but the first cost the same
        one = counted(bool(own.vae), size, 1, (rows, columns))
        two = counted(bool(own.vae), size, 2, (rows, columns))
        return {name: one[name] + (frames - 1) * (two[name] - one[name]) for name in one}

    @classmethod
    def further_networks(
        cls, config: Config, networks: Mapping[str, Any], generator: torch.Generator
    ) -> dict[str, nn.Module]:
        start = config.of(DecoderConfig).start
        channels = ShardReader(config.data.shards).index.latent_shape[1]
        network = SmallDecoder(size_of(config, channels))
        network.init_weights(generator)
        if start:
            found = read_decoder(find_file(start)).network
            require(
                isinstance(found, SmallDecoder) and found.size == network.size,
                f"decoder.start is {start}, which is not a small decoder of {network.size}; set "
                "decoder.widths and decoder.depths to its own",
            )
            network.load_state_dict(found.state_dict())
        return {"student": network}

    @classmethod
    def metadata(cls, config: Config, reader: ShardReader) -> dict[str, str]:
        size = size_of(config, reader.index.latent_shape[1])
        return decoder_metadata(size, reader.index.fingerprints["codec"])

    def loss(self, turn: str, batch: Batch, draw: Draw, student_updates: int) -> StageLoss:
        latents = self.part_of(batch.latents, draw)
        with torch.no_grad():
            wanted = self.teacher.decode(latents).float()
            seen = self.teacher.features(wanted)
        video = self.trained[turn](latents)[0].float()
        values = {"pixel_loss": per_sample((video - wanted).abs())}
        of_features = zip(self.teacher.features(video), seen, strict=True)
        shares = [
            per_sample((ours - full).abs()) / (per_sample(full.abs()) + EPSILON)
            for ours, full in of_features
        ]
        values["perceptual_loss"] = torch.stack(shares).mean(dim=0)
        changes = video.diff(dim=1) - wanted.diff(dim=1)
        values["temporal_loss"] = per_sample(changes.abs())
        loss = (
            values["pixel_loss"]
            + self.perceptual * values["perceptual_loss"]
            + self.temporal * values["temporal_loss"]
        )
        shown = (video.detach().clamp(0, 1) - wanted).square()
        values["psnr_db"] = -10 * torch.log10(per_sample(shown) + EPSILON)
        return StageLoss(loss.mean(), {name: each.detach() for name, each in values.items()})

    def part_of(self, latents: Tensor, draw: Draw) -> Tensor:
        """The first frames of each clip, and of these a square from a place of its own."""
        used = latents[:, : self.frames or None]
        if not self.crop:
            return used
        rows, columns = used.shape[-2:]
        room = torch.tensor([rows - self.crop + 1, columns - self.crop + 1])
        corners = (draw.uniform("crop", (2,)) * room).long().tolist()
        squares = [
            clip[..., top : top + self.crop, left : left + self.crop]
            for clip, (top, left) in zip(used, corners, strict=True)
        ]
        return torch.stack(squares)


@cache
def counted(
    of_wan: bool, size: DecoderSize, frames: int, latent_size: tuple[int, int]
) -> dict[str, int]:
    """Operations of an update for a clip of so many latent frames, by what they are for."""
    teacher: DecoderTeacher = (
        meta_wan_teacher() if of_wan else TinyTeacher(TinyCodec.load(find_file(BASIS)))
    )
    with torch.device("meta"):
        network = SmallDecoder(size)
        latents = torch.empty(1, frames, size.channels, *latent_size)
        video = teacher.decode(latents).requires_grad_()

    def compare() -> None:
        torch.autograd.backward([each.sum() for each in teacher.features(video)])

    with torch.enable_grad():
        looks = flops_of(compare) + flops_of(lambda: teacher.features(video.detach()))
        return {
            "decoder with gradient": flops_of(lambda: network(latents)[0].sum().backward()),
            "full decode": flops_of(lambda: teacher.decode(latents)),
            "what the encoder sees": looks,
        }


def per_sample(values: Tensor) -> Tensor:
    """[B, ...] -> [B], the mean over all but the first axis."""
    return values.flatten(1).mean(dim=1)


def size_of(config: Config, channels: int) -> DecoderSize:
    own = config.of(DecoderConfig)
    return DecoderSize(channels, own.widths, own.depths)


def fits(found: str, wanted: str, of_wan: bool) -> bool:
    """Whether shards with this fingerprint hold the teacher's latents; imported ones are Wan's."""
    return found == wanted or (of_wan and found == IMPORTED_CODEC)


def basis(config: Config) -> Path:
    """The file of the tiny codec that made the shards."""
    return codec_beside(config.data.shards)


def load_teacher(config: Config, device: torch.device) -> DecoderTeacher:
    """The full decoder, in the dtype of the computation. CodecError for a folder without a VAE."""
    folder = config.of(DecoderConfig).vae
    if folder:
        return load_wan_teacher(find_file(folder), device, DTYPES[config.model.compute])
    return TinyTeacher(TinyCodec.load(basis(config)).to(device))
