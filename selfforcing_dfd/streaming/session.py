"""Endless video, chunk by chunk. Everything that changes belongs to the session; weights are shared
and never change.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol, cast, get_args

import torch
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.codecs.protocol import Decoder, StreamingCodec
from selfforcing_dfd.context import ChunkKV, Conditioning, PackedContext
from selfforcing_dfd.flow import add_noise, x0_from_flow
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.rollout import Ladder, commit_chunk, denoise_chunk
from selfforcing_dfd.streaming.latency import StageClock, Timings
from selfforcing_dfd.streaming.output import FrameCopy
from selfforcing_dfd.streaming.ring import KVShape, Positions, RingCache, RingState

PromptMode = Literal["recache", "flush", "keep"]
"""What a new prompt does to the past. recache: the visible chunks are committed anew under it
(LongLive, arXiv 2509.22622). flush: all but the sink and the newest chunk is forgotten (arXiv
2511.20649). keep: nothing; the new prompt comes slowly.
"""


CLEAN = 0.0
"""The noise level at which finished chunks are committed."""


class TextEncoder(Protocol):
    def encode(self, captions: list[str]) -> Tensor:
        """[B, L, D_text], zeros past each prompt's end."""
        ...


@dataclass(frozen=True, slots=True)
class StreamModel:
    """What sessions share: weights and sizes.

    latent_size: rows and columns of the latents. decode_device: where the codec lives; None is
    where the student lives.
    """

    student: WanTransformer
    codec: StreamingCodec
    text: TextEncoder
    ladder: Ladder
    chunk_frames: int
    latent_size: tuple[int, int]
    decode_device: torch.device | None = None

    @property
    def device(self) -> torch.device:
        return self.student.patch_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.student.patch_embedding.weight.dtype

    @property
    def video_size(self) -> tuple[int, int]:
        """Height and width of a video frame."""
        return self.latent_size[0] * self.codec.strides[1], self.latent_size[
            1
        ] * self.codec.strides[2]

    def kv_shape(self) -> KVShape:
        config, patch = self.student.config, self.student.patch
        tokens = (self.latent_size[0] // patch[1]) * (self.latent_size[1] // patch[2])
        return KVShape(
            config["num_layers"],
            1,
            tokens,
            config["num_attention_heads"],
            config["attention_head_dim"],
        )


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """How one session runs. Sizes in latent frames; window_frames counts history and the current
    chunk, not the sink.

    merge_commit: the commit pass of a chunk goes through the network together with the first step
    of the next one; the same video for fewer, larger calls. Needs positions that never change:
    absolute, or no sink.
    """

    seed: int = 0
    sink_frames: int = 3
    window_frames: int = 9
    positions: Positions = "sink_relative"
    on_prompt: PromptMode = "recache"
    merge_commit: bool = False

    def __post_init__(self) -> None:
        if self.merge_commit and (
            self.positions == "window_relative"
            or (self.sink_frames and self.positions != "absolute")
        ):
            raise ValueError(
                f"merge_commit does not go with positions {self.positions!r} and {self.sink_frames} sink_frames: between a "
                "commit and the next step the sink would have to move; use absolute, or no sink, or no merging"
            )
        if self.on_prompt not in get_args(PromptMode):
            raise ValueError(
                f"on_prompt is {self.on_prompt!r}; use one of {', '.join(get_args(PromptMode))}"
            )


class StreamChunk(NamedTuple):
    """frames: uint8 [T, H, W, 3] on the host; 9 video frames in a stream's first chunk of three
    latent frames, then 12.
    """

    chunk_index: int
    frames: Tensor
    timings: Timings


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A moment between two chunks, to come back to."""

    ring: RingState
    decoder: Decoder
    history: tuple[tuple[int, Tensor], ...]
    pending: tuple[Tensor, Conditioning] | None
    conditioning: Conditioning
    prompt: str
    change: tuple[str, PromptMode] | None
    settings: StreamSettings
    chunk_index: int


class StreamSession:
    """An endless generator of chunks. The first N chunks do not depend on how many follow.

    context: video [T, H, W, 3] in [0, 1] to continue, T = 1 + 4 n; one video frame is
    image-to-video. Its frames, as the codec shows them, are `context_frames`; the chunks that
    follow begin after them. Raises ValueError for sizes that do not fit the model.
    """

    def __init__(
        self,
        model: StreamModel,
        prompt: str,
        settings: StreamSettings | None = None,
        context: Tensor | None = None,
    ) -> None:
        self.model, self.settings = model, settings or StreamSettings()
        options = (self.settings.sink_frames, self.settings.window_frames, self.settings.positions)
        self._ring = RingCache(
            model.kv_shape(), model.chunk_frames, *options, dtype=model.dtype, device=model.device
        )
        self._clock = StageClock(model.device)
        self.reset(prompt, context=context)

    def reset(
        self, prompt: str | None = None, seed: int | None = None, context: Tensor | None = None
    ) -> None:
        """A new stream in the memory of the old one; what is not given stays, but for the context."""
        if seed is not None:
            self.settings = replace(self.settings, seed=seed)
        self._ring.clear()
        self._decoder = self.model.codec.start_decoding()
        self._history: list[tuple[int, Tensor]] = []
        self._pending: tuple[Tensor, Conditioning] | None = None
        self._change: tuple[str, PromptMode] | None = None
        self._clock.take()
        self.chunk_index = 0
        if prompt is not None:
            self.prompt, self._conditioning = prompt, self._encode(prompt)
        self.context_frames = torch.empty((0, *self.model.video_size, 3), dtype=torch.uint8)
        if context is not None:
            self.context_frames = self._begin_with(context).all()

    def __iter__(self) -> Iterator[StreamChunk]:
        while True:
            yield self.next_chunk()

    @property
    def visible_frames(self) -> int:
        """K: latent frames that a chunk sees at most, itself and the sink included."""
        return self._ring.num_frames

    @property
    def next_frame(self) -> int:
        """Latent frames made so far, the context's included."""
        return self._ring.next_frame + (self._pending[0].shape[1] if self._pending else 0)

    @property
    def cache_bytes(self) -> int:
        """Memory of keys and values; constant."""
        return self._ring.num_bytes

    def set_prompt(self, prompt: str, mode: PromptMode | None = None) -> None:
        """Another prompt from the next chunk on. Encoded then, so that an error in it leaves the
        stream as it is.
        """
        settings = self.settings if mode is None else replace(self.settings, on_prompt=mode)
        self.model.text.encode([prompt])
        self._change = (prompt, settings.on_prompt)

    def next_chunk(self) -> StreamChunk:
        """The next chunk. On a GPU the host waits for its frames only, while the commit pass runs."""
        begun = time.perf_counter()
        with torch.inference_mode():
            copy = self._make_chunk()
        _, first_ready = copy.first()
        frames = copy.all()
        total, first = (1000 * (moment - begun) for moment in (time.perf_counter(), first_ready))
        self.chunk_index += 1
        return StreamChunk(self.chunk_index - 1, frames, Timings(total, first, self._clock.take()))

    def _make_chunk(self) -> FrameCopy:
        """Queue the work of one chunk; its frames are on their way when this returns."""
        merged = self.settings.merge_commit and self._change is None and self._pending is not None
        if not merged:
            self._commit_pending()
        self._apply_change()
        with self._clock.stage("noise"):
            noise = self._noise()
        with self._clock.stage("denoise"):
            x0 = self._commit_and_denoise(noise) if merged else self._denoise(noise)
        copy = self._decode(x0)
        self._pending = (x0, self._conditioning)
        if self.model.device.type == "cuda" and not self.settings.merge_commit:
            self._commit_pending()
        return copy

    def snapshot(self) -> Snapshot:
        """A copy of all state."""
        return Snapshot(
            self._ring.snapshot(),
            self._decoder.clone(),
            tuple(self._history),
            self._pending,
            self._conditioning,
            self.prompt,
            self._change,
            self.settings,
            self.chunk_index,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Back to a snapshot of this session, or of another one of the same model, window and sink."""
        self._ring.restore(snapshot.ring)
        self._decoder = snapshot.decoder.clone()
        self._history, self._pending = list(snapshot.history), snapshot.pending
        self._conditioning, self.prompt, self._change = (
            snapshot.conditioning,
            snapshot.prompt,
            snapshot.change,
        )
        self.settings, self.chunk_index = snapshot.settings, snapshot.chunk_index
        self._clock.take()

    def _encode(self, prompt: str) -> Conditioning:
        """Text with its cross-attention keys and values, worked out once."""
        with torch.inference_mode(), self._clock.stage("text"):
            text = self.model.text.encode([prompt]).to(self.model.device, self.model.dtype)
            return self.model.student.prepare(Conditioning(text), (*self.model.ladder, CLEAN))

    def _noise(self) -> Tensor:
        """[S, 1, f, C, h, w] float32, a function of seed, chunk and step."""
        shape = (1, self.model.chunk_frames, self.model.codec.channels, *self.model.latent_size)
        steps = range(len(self.model.ladder))
        seed, chunk = self.settings.seed, self.chunk_index
        draws = torch.stack(
            [rng.normal(shape, seed, "stream noise", chunk, step) for step in steps]
        )
        return draws.to(self.model.device, non_blocking=True)

    def _denoise(self, noise: Tensor) -> Tensor:
        past = self._ring.read(self.model.chunk_frames)
        return denoise_chunk(
            self.model.student, noise, self._conditioning, past, self.model.ladder
        )[0]

    def _commit_and_denoise(self, noise: Tensor) -> Tensor:
        """The pending chunk's commit pass and the next one's first step in one call, then the other
        steps.
        """
        assert self._pending is not None
        (finished, conditioning), self._pending = self._pending, None
        first, ladder, frames = self._ring.next_frame, self.model.ladder, self.model.chunk_frames
        lengths = (finished.shape[1], frames)
        clean = self._ring.read(lengths[0])
        self._ring.append(ChunkKV(lengths[0], ()))
        self._remember(first, finished)
        noisy = self._ring.read(frames)
        sigma = noise.new_zeros(1, sum(lengths))
        sigma[:, lengths[0] :] = ladder[0]
        both = torch.cat([finished, noise[0]], dim=1)
        flow = self.model.student(
            both, sigma, conditioning, PackedContext(cast(Any, (clean, noisy)), lengths)
        ).flow
        x0 = x0_from_flow(noise[0], flow[:, lengths[0] :], ladder[0])
        if len(ladder) == 1:
            return x0
        x_t = add_noise(x0, noise[1], ladder[1])
        return denoise_chunk(
            self.model.student, torch.cat([x_t[None], noise[2:]]), conditioning, noisy, ladder[1:]
        )[0]

    def _decode(self, x0: Tensor) -> FrameCopy:
        """Latent frame by latent frame, so that the first video frames leave before the last are
        decoded.
        """
        copy = FrameCopy()
        with self._clock.stage("decode"):
            latents = x0.to(self.model.decode_device or x0.device, non_blocking=True)
            for frame in range(latents.shape[1]):
                copy.add(self._decoder.decode(latents[:, frame : frame + 1])[0])
        return copy

    def _commit_pending(self) -> None:
        """Commit the newest chunk under the prompt that made it, if that has not been done."""
        if self._pending is None:
            return
        x0, conditioning = self._pending
        with self._clock.stage("commit"):
            self._commit(x0, conditioning)
        self._pending = None

    def _commit(self, x0: Tensor, conditioning: Conditioning) -> None:
        start = self._ring.next_frame
        commit_chunk(self.model.student, x0, conditioning, self._ring)
        self._remember(start, x0)

    def _remember(self, start: int, x0: Tensor) -> None:
        """Keep the latents of what the next chunk sees, and no others."""
        self._history.append((start, x0))
        visible = set(self._ring.visible_starts)
        self._history = [(start, latents) for start, latents in self._history if start in visible]

    def _apply_change(self) -> None:
        if self._change is None:
            return
        (self.prompt, mode), self._change = self._change, None
        self._conditioning = self._encode(self.prompt)
        with self._clock.stage("prompt"):
            if mode == "flush":
                self._ring.flush()
            elif mode == "recache":
                self._recache()

    def _recache(self) -> None:
        """Commit all visible chunks anew, the oldest first, each at its own place in the stream."""
        history, next_frame = self._history, self._ring.next_frame
        self._history = []
        self._ring.clear()
        for start, x0 in history:
            self._ring.next_frame = start
            self._commit(x0, self._conditioning)
        self._ring.next_frame = next_frame

    @torch.inference_mode()
    def _begin_with(self, context: Tensor) -> FrameCopy:
        """Encode, commit and decode the context; its frames as the codec shows them."""
        size, stride, device = (
            self.model.video_size,
            self.model.codec.strides[0],
            self.model.decode_device,
        )
        if (
            context.ndim != 4
            or tuple(context.shape[1:]) != (*size, 3)
            or context.shape[0] % stride != 1
        ):
            raise ValueError(
                f"context is {tuple(context.shape)} [T, H, W, 3]; want T = 1 + {stride} n video frames of "
                f"{size[0]} x {size[1]}: resize the pictures and cut the clip"
            )
        device = device or self.model.device
        latents = self.model.codec.start_encoding().encode(context[None].to(device)).float()
        full, rest = divmod(latents.shape[1], self.model.chunk_frames)
        lengths = (
            [rest, *[self.model.chunk_frames] * full] if rest else [self.model.chunk_frames] * full
        )
        for x0 in latents.to(self.model.device).split(lengths, dim=1):
            self._commit(x0, self._conditioning)
        return self._decode(latents)
