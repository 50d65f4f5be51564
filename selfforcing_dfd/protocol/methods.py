"""The methods of a protocol: what makes the videos of each, and what has to be said about it.

Networks of one seed and one length of chunks start from the same noise, so their videos can be
paired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.codecs.prompts import NEGATIVE_PROMPT
from selfforcing_dfd.codecs.protocol import StreamingCodec
from selfforcing_dfd.codecs.text import WanText
from selfforcing_dfd.codecs.wan_vae import WanCodec
from selfforcing_dfd.common import UserError, find_device, find_file
from selfforcing_dfd.context import Conditioning, KVCache
from selfforcing_dfd.evaluation.generate import ODESteps
from selfforcing_dfd.evaluation.pictures import to_uint8
from selfforcing_dfd.models.identity import SELF_FORCING
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.ode import sample
from selfforcing_dfd.protocol.plan import (
    CAUSAL,
    SET,
    STUDENT,
    TEACHER,
    TINY_DATA,
    VIDEOS,
    Cell,
    MethodPlan,
    Protocol,
)
from selfforcing_dfd.rollout import commit_chunk, plan_chunks
from selfforcing_dfd.streaming.load import (
    TinyPrompts,
    asked_size,
    default_dtype,
    latent_size,
    load_settings,
    load_stream_model,
    load_wan_model,
    text_cache,
    tiny_codec_file,
)
from selfforcing_dfd.streaming.model import StreamModel, TextEncoder
from selfforcing_dfd.streaming.session import StreamSession, StreamSettings
from selfforcing_dfd.tiny.codec import SPACE, TIME, TinyCodec
from selfforcing_dfd.tiny.text import TinyText
from selfforcing_dfd.tiny.world import SIDE, draw_factors, parse_caption, render, track
from selfforcing_dfd.weights.read import describe, load_network

DATA_FRAMES = 64  # video frames of the tiny world that are drawn at once
Make = Callable[[Cell], Iterator[Tensor]]
"""A video of a prompt and a seed, in parts uint8 [T, H, W, 3] as they come."""


@dataclass(frozen=True, slots=True)
class Method:
    """One method of a protocol for one set of prompts. Nothing is loaded before `make`."""

    name: str
    plan: MethodPlan
    protocol: Protocol
    set: str

    @property
    def weights(self) -> str:
        return self.plan.weights.replace(SET, self.set)

    @property
    def latent_frames(self) -> int:
        return self.plan.latent_frames or self.protocol.latent_frames

    @property
    def num_frames(self) -> int:
        """Video frames of one video."""
        return 1 + TIME * (self.latent_frames - 1)

    @property
    def size(self) -> tuple[int | None, int | None]:
        height, width = self.protocol.size or (None, None)
        return height, width

    def file(self, cell: Cell) -> Path:
        """A video that others made."""
        number = f"{cell.prompt.number:03d}"
        return Path(self.plan.files.format(number=number, seed=cell.seed, set=cell.prompt.set))

    def missing(self, cells: list[Cell]) -> str:
        """What is not there, in words; empty if the method can be run."""
        if self.plan.kind == VIDEOS:
            lacking = [self.file(cell) for cell in cells if not self.file(cell).is_file()]
            if lacking:
                return f"{len(lacking)} of {len(cells)} videos are not there, such as {lacking[0]}"
        if self.plan.weights and not find_file(self.weights).exists():
            return f"no weights at {self.weights}"
        if self.plan.model and not find_file(self.plan.model).exists():
            return f"no folder {self.plan.model}"
        return ""

    def described(self) -> dict[str, Any]:
        """What a video depends on beside prompt and seed; two of another description differ."""
        if self.plan.kind == VIDEOS:
            return {"kind": VIDEOS, "files": self.plan.files}
        about: dict[str, Any] = {"kind": self.plan.kind, "latent_frames": self.latent_frames}
        about |= {"fps": self.protocol.fps, "size": list(self.protocol.size)}
        if self.plan.kind == STUDENT:
            return about | self._described_student()
        if self.plan.kind in (TEACHER, CAUSAL):
            steps = self.plan.steps
            sampler = {"ode": "Heun", "steps": steps, "shift": self.plan.shift}
            if self.plan.kind == TEACHER:
                sampler |= {"guidance": self.plan.guidance, "negative": self._negative()}
            return about | {"sampler": sampler, "chunk_frames": self.protocol.chunk_frames}
        return about

    def _described_student(self) -> dict[str, Any]:
        recipe = describe(find_file(self.weights)).recipe
        settings = asdict(self.settings())
        del settings["seed"]
        found = asdict(recipe or SELF_FORCING)
        found["ladder"] = list(found["ladder"])
        return {"sampler": found, "recipe_stated": recipe is not None, "stream": settings}

    def settings(self) -> StreamSettings:
        """How its streams run; of a causal teacher, how far it looks back."""
        recipe = describe(find_file(self.weights)).recipe
        preset = "default" if self.plan.model else "tiny"
        found = load_settings(self.plan.settings, default=preset, recipe=recipe)
        if recipe is not None and recipe.chunk_frames == recipe.frames:
            # it makes a clip at once and has no past
            return replace(found, sink_frames=0, window_frames=recipe.chunk_frames)
        return found

    def _negative(self) -> str:
        return NEGATIVE_PROMPT if self.plan.model and self.plan.guidance != 1 else ""

    def load(self, device: str) -> Make:
        """What makes its videos, with its network on a device."""
        if self.plan.kind == STUDENT:
            return Student(self._load_stream(device), self.settings(), self.num_frames)
        if self.plan.kind == TINY_DATA:
            return TinyData(self.num_frames)
        parts = load_parts(self, device)
        if self.plan.kind == CAUSAL:
            return CausalTeacher(self, parts)
        return Teacher(self, parts)

    def _load_stream(self, device: str) -> StreamModel:
        if not self.plan.model:
            return load_stream_model(checkpoint=self.weights, device=device)
        model = find_file(self.plan.model)
        return load_wan_model(model, self.weights, device, size=self.size)


@dataclass(frozen=True, slots=True)
class Student:
    """Streams: memory does not grow with the length."""

    model: StreamModel
    settings: StreamSettings
    num_frames: int

    def __call__(self, cell: Cell) -> Iterator[Tensor]:
        settings = replace(self.settings, seed=cell.seed)
        session = StreamSession(self.model, cell.prompt.text, settings)
        left = self.num_frames
        while left > 0:
            frames = session.next_chunk().frames[:left]
            left -= len(frames)
            yield frames


@dataclass(frozen=True, slots=True)
class Parts:
    """A network with its codec and text. latent_size: rows and columns of the latents."""

    network: WanTransformer
    codec: StreamingCodec
    text: TextEncoder
    latent_size: tuple[int, int]

    def conditioning(self, prompt: str) -> Conditioning:
        weight = next(self.network.parameters())
        return Conditioning(self.text.encode([prompt]).to(weight))

    def noise(self, seed: int, chunk: int, frames: int) -> Tensor:
        """[1, f, C, h, w] float32: what a student's chunk starts from."""
        shape = (1, frames, self.codec.channels, *self.latent_size)
        device = next(self.network.parameters()).device
        return rng.normal(shape, seed, "stream noise", chunk, 0).to(device)


def load_parts(method: Method, device: str) -> Parts:
    """The parts of a teacher of the tiny world or of Wan."""
    run_on = find_device(device)
    weights = find_file(method.weights)
    if not method.plan.model:
        network = load_network(weights, device=run_on, dtype=torch.float32)
        codec = TinyCodec.load(tiny_codec_file(weights)).to(run_on)
        words = TinyPrompts(TinyText(network.config["text_dim"]))
        return Parts(network, codec, words, (SIDE // SPACE, SIDE // SPACE))
    folder = find_file(method.plan.model)
    dtype = default_dtype(run_on)
    network = load_network(weights, device=run_on, dtype=dtype)
    video_size = asked_size(method.size, describe(weights).data)
    rows_columns = latent_size(video_size, WanCodec.strides, network.patch)
    vae = WanCodec.from_pretrained(folder, run_on, dtype, channels_last=run_on.type == "cuda")
    text = WanText.cached(folder, text_cache(), run_on, dtype)
    return Parts(network, vae, text, rows_columns)


@dataclass(frozen=True, slots=True)
class Teacher:
    """Many-step ODE samples of a bidirectional network: the whole clip at once, guided."""

    method: Method
    parts: Parts

    @torch.no_grad()
    def __call__(self, cell: Cell) -> Iterator[Tensor]:
        plan = self.method.plan
        chunk_frames = self.method.protocol.chunk_frames
        noise = [
            self.parts.noise(cell.seed, number, chunk.frames)
            for number, chunk in enumerate(plan_chunks(self.method.latent_frames, chunk_frames))
        ]
        conditioning = self.parts.conditioning(cell.prompt.text)
        negative = None
        if plan.model and plan.guidance != 1:
            negative = self.parts.conditioning(NEGATIVE_PROMPT)
        latents = sample(
            self.parts.network,
            torch.cat(noise, dim=1),
            conditioning,
            plan.steps,
            plan.shift,
            plan.guidance,
            negative,
        )
        yield from decoded(self.parts.codec, iter(latents.split(chunk_frames, dim=1)))


@dataclass(frozen=True, slots=True)
class CausalTeacher:
    """Many-step ODE samples of a causal network, chunk after chunk, for any length.

    It sees as many frames as a stream does, all of them in a window: the places of a sink would
    move away from what it knows.
    """

    method: Method
    parts: Parts

    def __call__(self, cell: Cell) -> Iterator[Tensor]:
        yield from decoded(self.parts.codec, self.latents(cell))

    @torch.no_grad()
    def latents(self, cell: Cell) -> Iterator[Tensor]:
        """Chunks [1, f, C, h, w]."""
        plan = self.method.plan
        settings = self.method.settings()
        cache = KVCache(0, settings.sink_frames + settings.window_frames)
        network = self.parts.network
        conditioning = self.parts.conditioning(cell.prompt.text)
        make = ODESteps(plan.steps, plan.shift)
        chunks = plan_chunks(self.method.latent_frames, self.method.protocol.chunk_frames)
        for number, chunk in enumerate(chunks):
            noise = self.parts.noise(cell.seed, number, chunk.frames)[None]
            x0 = make(network, noise, conditioning, cache.read(chunk.frames))
            yield x0
            if chunk is not chunks[-1]:
                commit_chunk(network, x0, conditioning, cache)


@torch.no_grad()
def decoded(codec: StreamingCodec, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    """Video frames uint8 [T, H, W, 3] of latents [1, f, C, h, w] that come one by one."""
    decoder = codec.start_decoding()
    for latents in chunks:
        yield to_uint8(decoder.decode(latents)[0].float()).cpu()


@dataclass(frozen=True, slots=True)
class TinyData:
    """Clips of the tiny world that show a prompt; what it leaves open is drawn from the law."""

    num_frames: int

    def __call__(self, cell: Cell) -> Iterator[Tensor]:
        random = rng.generator(cell.seed, "protocol data", cell.prompt.number)
        factors = draw_factors(1, random)
        named = parse_caption(cell.prompt.text)
        if not named:
            raise UserError(
                f"prompt {cell.prompt.text!r} names nothing of the tiny world, so it has no data; "
                "try 'a disc moves'"
            )
        factors = replace(factors, **{name: torch.tensor([n]) for name, n in named.items()})
        for start in range(0, self.num_frames, DATA_FRAMES):
            x, y = track(factors, start + 1)[:, -1].unbind(dim=1)
            part = replace(factors, x=x, y=y)
            yield to_uint8(render(part, min(DATA_FRAMES, self.num_frames - start))[0])
