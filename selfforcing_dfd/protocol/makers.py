"""What makes the videos of a protocol's methods, in parts as they come.

Networks of one seed and one length of chunks start from the same noise, so their videos can be
paired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.codecs.pictures import PictureEncoder
from selfforcing_dfd.codecs.protocol import StreamingCodec
from selfforcing_dfd.codecs.text import WanText
from selfforcing_dfd.codecs.wan_vae import WanCodec
from selfforcing_dfd.common import UserError, find_file
from selfforcing_dfd.context import Conditioning, KVCache
from selfforcing_dfd.data.sources.video import read_last_frames
from selfforcing_dfd.evaluation.generate import ODESteps
from selfforcing_dfd.evaluation.pictures import to_uint8
from selfforcing_dfd.models.picture import Picture, conditioning_of
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.ode import sample
from selfforcing_dfd.protocol.plan import Cell
from selfforcing_dfd.rollout import Chunks, commit_chunk, plan_chunks
from selfforcing_dfd.streaming.load import TinyPrompts, default_dtype, latent_size, tiny_codec_file
from selfforcing_dfd.streaming.load_wan import asked_size, text_cache
from selfforcing_dfd.streaming.model import StreamModel, TextEncoder
from selfforcing_dfd.streaming.session import StreamSession, StreamSettings
from selfforcing_dfd.tiny.codec import SPACE, TinyCodec
from selfforcing_dfd.tiny.text import TinyText
from selfforcing_dfd.tiny.world import SIDE, draw_factors, parse_caption, render, track
from selfforcing_dfd.weights.read import describe, load_network

DATA_FRAMES = 64  # video frames of the tiny world that are drawn at once
Make = Callable[[Cell], Iterator[Tensor]]
"""A video of a prompt and a seed, in parts uint8 [T, H, W, 3]."""


def picture_of(cell: Cell, size: tuple[int, int]) -> Tensor | None:
    """What a prompt's videos begin with, [1, H, W, 3] in [0, 1]; None for text alone."""
    if not cell.prompt.image:
        return None
    return read_last_frames(find_file(cell.prompt.image), 1, size).float() / 255


@dataclass(frozen=True, slots=True)
class Student:
    """Streams: memory does not grow with the length."""

    model: StreamModel
    settings: StreamSettings
    num_frames: int

    def __call__(self, cell: Cell) -> Iterator[Tensor]:
        settings = replace(self.settings, seed=cell.seed)
        picture = picture_of(cell, self.model.video_size)
        session = StreamSession(self.model, cell.prompt.text, settings, picture)
        frames = session.context_frames
        left = self.num_frames
        while left > 0:
            yield frames[:left]
            left -= len(frames)
            if left > 0:
                frames = session.next_chunk().frames


@dataclass(frozen=True, slots=True)
class Parts:
    """A network with its codec and text.

    latent_size: rows and columns of the latents. see: for Wan2.1-I2V, what it sees of a picture.
    """

    network: WanTransformer
    codec: StreamingCodec
    text: TextEncoder
    latent_size: tuple[int, int]
    see: Callable[[Tensor], Picture] | None = None

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def conditioning(self, prompt: str, picture: Tensor | None = None) -> Conditioning:
        """Text, and for Wan2.1-I2V what it sees of a picture [1, H, W, 3]."""
        weight = next(self.network.parameters())
        text = self.text.encode([prompt]).to(weight)
        if self.see is None or picture is None:
            return Conditioning(text)
        return conditioning_of(text, self.see(picture.to(self.device)))

    def picture(self, cell: Cell) -> Tensor | None:
        """What a prompt's videos begin with. UserError where Wan2.1-I2V is given none."""
        _, down, across = self.codec.strides
        rows, columns = self.latent_size
        found = picture_of(cell, (rows * down, columns * across))
        if found is None and self.see is not None:
            raise UserError(
                f"prompt {cell.prompt.text!r} has no picture, without which Wan2.1-I2V makes no "
                "video; write one behind it, after a tab"
            )
        return found

    def noise(self, seed: int, chunk: int, frames: int) -> Tensor:
        """[1, f, C, h, w] float32: what a student's chunk starts from."""
        shape = (1, frames, self.codec.channels, *self.latent_size)
        return rng.normal(shape, seed, "stream noise", chunk, 0).to(self.device)

    def given(self, picture: Tensor | None) -> Tensor | None:
        """Clean latents [1, 1, C, h, w] that a video begins with; none where it is only seen."""
        if picture is None or self.see is not None:
            return None
        latents = self.codec.start_encoding().encode(picture[None].to(self.device))
        return latents.float().to(self.device)

    @torch.no_grad()
    def decoded(self, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
        """Video frames of latents [1, f, C, h, w] that come one by one."""
        decoder = self.codec.start_decoding()
        for latents in chunks:
            yield to_uint8(decoder.decode(latents)[0].float()).cpu()


def tiny_parts(weights: Path, device: torch.device) -> Parts:
    """A network of the tiny world."""
    network = load_network(weights, device=device, dtype=torch.float32)
    codec = TinyCodec.load(tiny_codec_file(weights)).to(device)
    words = TinyPrompts(TinyText(network.config["text_dim"]))
    return Parts(network, codec, words, (SIDE // SPACE, SIDE // SPACE))


def wan_parts(
    weights: Path,
    folder: Path,
    size: tuple[int | None, int | None],
    device: torch.device,
    latent_frames: int,
) -> Parts:
    """A network of Wan, with the VAE, the text and the image encoder of a folder."""
    dtype = default_dtype(device)
    network = load_network(weights, device=device, dtype=dtype)
    video_size = asked_size(size, describe(weights).data)
    rows_columns = latent_size(video_size, WanCodec.strides, network.patch)
    vae = WanCodec.from_pretrained(folder, device, dtype, channels_last=device.type == "cuda")
    text = WanText.cached(folder, text_cache(), device, dtype)
    see = None
    if network.takes_picture:
        encoder = PictureEncoder.from_pretrained(folder, vae, device)
        see = partial(encoder.encode, frames=latent_frames)
    return Parts(network, vae, text, rows_columns, see)


@dataclass(frozen=True, slots=True)
class Sampler:
    """How an ODE is followed. negative: the text of no caption; empty for zeros."""

    steps: int
    shift: float
    guidance: float = 1.0
    negative: str = ""


@dataclass(frozen=True, slots=True)
class Teacher:
    """Many-step ODE samples of a bidirectional network: the whole clip at once, guided."""

    parts: Parts
    sampler: Sampler
    chunks: Chunks

    @torch.no_grad()
    def __call__(self, cell: Cell) -> Iterator[Tensor]:
        parts = self.parts
        sampler = self.sampler
        noise = [
            parts.noise(cell.seed, number, chunk.frames) for number, chunk in enumerate(self.chunks)
        ]
        picture = parts.picture(cell)
        negative = parts.conditioning(sampler.negative) if sampler.negative else None
        latents = sample(
            parts.network,
            torch.cat(noise, dim=1),
            parts.conditioning(cell.prompt.text, picture),
            sampler.steps,
            sampler.shift,
            sampler.guidance,
            negative,
            parts.given(picture),
        )
        yield from parts.decoded(chunk.of(latents) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class CausalTeacher:
    """Many-step ODE samples of a causal network, chunk after chunk, for any length.

    window: latent frames that it sees, as many as a stream's sink and window together. A sink is
    none of them: its place would move away from what the network knows.
    """

    parts: Parts
    sampler: Sampler
    chunks: Chunks
    window: int

    def __call__(self, cell: Cell) -> Iterator[Tensor]:
        return self.parts.decoded(self.latents(cell))

    @torch.no_grad()
    def latents(self, cell: Cell) -> Iterator[Tensor]:
        """Chunks [1, f, C, h, w]."""
        network = self.parts.network
        cache = KVCache(0, self.window)
        picture = self.parts.picture(cell)
        conditioning = self.parts.conditioning(cell.prompt.text, picture)
        make = ODESteps(self.sampler.steps, self.sampler.shift)
        given = self.parts.given(picture)
        for number, chunk in enumerate(self.chunks):
            noise = self.parts.noise(cell.seed, number, chunk.frames)[None]
            x0 = make(network, noise, conditioning, cache.read(chunk.frames), given)
            given = None  # the first chunk's alone
            yield x0
            if chunk is not self.chunks[-1]:
                commit_chunk(network, x0, conditioning, cache)


@dataclass(frozen=True, slots=True)
class TinyData:
    """Clips of the tiny world that show a prompt; what it leaves open is drawn from the law."""

    num_frames: int

    def __call__(self, cell: Cell) -> Iterator[Tensor]:
        random = rng.generator(cell.seed, "protocol data", cell.prompt.number)
        factors = draw_factors(1, random)
        named = parse_caption(cell.prompt.text)
        if not named or cell.prompt.image:
            raise UserError(
                f"prompt {cell.prompt.text!r} names nothing of the tiny world or has a picture, so "
                "it has no data; try 'a disc moves'"
            )
        factors = replace(factors, **{name: torch.tensor([n]) for name, n in named.items()})
        for start in range(0, self.num_frames, DATA_FRAMES):
            x, y = track(factors, start + 1)[:, -1].unbind(dim=1)
            part = replace(factors, x=x, y=y)
            yield to_uint8(render(part, min(DATA_FRAMES, self.num_frames - start))[0])


def chunks_of(latent_frames: int, chunk_frames: int) -> Chunks:
    """Raises UserError where chunks do not fit."""
    if latent_frames % chunk_frames:
        raise UserError(
            f"latent_frames is {latent_frames}, which chunks of {chunk_frames} do not fill; use a "
            "multiple"
        )
    return plan_chunks(latent_frames, chunk_frames)
