"""Endless video, chunk by chunk.

All state belongs to the session. Weights are shared between sessions and never change.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.context import Conditioning, Network
from selfforcing_dfd.flow import add_noise, sigma_by_frame
from selfforcing_dfd.models.picture import Picture, conditioning_of
from selfforcing_dfd.models.prepared import PreparedConditioning
from selfforcing_dfd.rollout import Ladder, commit_chunk, denoise_chunk
from selfforcing_dfd.streaming.beginning import check_context, require_context, whole_chunks
from selfforcing_dfd.streaming.latency import StageClock, Timings
from selfforcing_dfd.streaming.model import CLEAN
from selfforcing_dfd.streaming.model import StreamModel as StreamModel
from selfforcing_dfd.streaming.noise import ChunkNoise
from selfforcing_dfd.streaming.output import FrameCopy
from selfforcing_dfd.streaming.ring import RingCache
from selfforcing_dfd.streaming.state import PromptChange, Seen, Snapshot
from selfforcing_dfd.streaming.state import PromptMode as PromptMode
from selfforcing_dfd.streaming.state import StreamChunk as StreamChunk
from selfforcing_dfd.streaming.state import StreamSettings as StreamSettings
from selfforcing_dfd.streaming.static_calls import StaticStudent


class StreamSession:
    """An endless generator of chunks. The first N chunks do not depend on how many follow.

    context: video [T, H, W, 3] in [0, 1] to continue, T = 1 + 4 n; one video frame is
    image-to-video. `context_frames` holds its frames as the codec shows them; the chunks that
    follow begin after them. A student that is trained with given frames needs a context: as many
    frames as these are the first of chunk 0, which shows them, and `context_frames` is empty; a
    longer clip is continued. So it is with a student of Wan2.1-I2V, which sees the context's first
    frame and makes it again. Raises UserError for sizes that do not fit the model.
    """

    def __init__(
        self,
        model: StreamModel,
        prompt: str,
        settings: StreamSettings | None = None,
        context: Tensor | None = None,
    ) -> None:
        self.model = model
        self.settings = settings or StreamSettings()
        self._ring = RingCache(
            model.kv_shape(),
            model.chunk_frames,
            self.settings.sink_frames,
            self.settings.window_frames,
            self.settings.positions,
            dtype=model.dtype,
            device=model.device,
        )
        self._student: Network = model.student
        if model.calls != "plain":
            self._student = StaticStudent(model.student, capture=model.calls == "graph")
        self._clock = StageClock(model.device)
        self._host_runs_ahead = model.device.type == "cuda"  # what it queues is done later
        self._ahead: ChunkNoise | None = None
        self._given: Tensor | None = None
        self._picture: Picture | None = None
        self.prompt = prompt
        self.reset(prompt, context=context)

    def reset(
        self, prompt: str | None = None, seed: int | None = None, context: Tensor | None = None
    ) -> None:
        """Start a new stream in the same memory. Prompt, seed and given frames stay without others.

        An error in prompt or context leaves the stream as it is.
        """
        model = self.model
        if context is not None:
            stride = model.codec.strides[0]
            check_context(context, model.video_size, stride, model.num_given_video_frames)
        elif self._given is None and self._picture is None:
            require_context(model.num_given_video_frames)
        self._clock.take()
        picture = self._see(context)
        if prompt is not None or picture is not None:
            wanted = self.prompt if prompt is None else prompt
            self._conditioning = self._encode(wanted, picture)
            self._picture = self._conditioning.picture
            self.prompt = wanted
        if seed is not None:
            self.settings = replace(self.settings, seed=seed)
        self._ring.clear()
        self._decoder = model.codec.start_decoding()
        self._history: list[Seen] = []
        self._pending: tuple[Tensor, Conditioning] | None = None
        self._change: PromptChange | None = None
        self.chunk_index = 0
        self.context_frames = torch.empty((0, *model.video_size, 3), dtype=torch.uint8)
        if context is not None:
            self._begin_with(context)

    def __iter__(self) -> Iterator[StreamChunk]:
        while True:
            yield self.next_chunk()

    @property
    def visible_frames(self) -> int:
        """K: latent frames that a chunk sees at most, itself and the sink included."""
        return self._ring.num_frames

    @property
    def next_frame(self) -> int:
        """Latent frames made so far, those of the context included."""
        uncommitted = self._pending[0].shape[1] if self._pending else 0
        return self._ring.next_frame + uncommitted

    @property
    def cache_bytes(self) -> int:
        """Memory of keys and values; constant."""
        return self._ring.num_bytes

    def set_prompt(self, prompt: str, mode: PromptMode | None = None) -> None:
        """Use another prompt from the next chunk on.

        The text is encoded here, once. An error in it leaves the stream as it is.
        """
        settings = self.settings if mode is None else replace(self.settings, on_prompt=mode)
        self._change = PromptChange(prompt, self._encode(prompt), settings.on_prompt)

    def next_chunk(self) -> StreamChunk:
        """The next chunk. On a GPU the host waits for the frames only; the commit pass goes on."""
        started = time.perf_counter()
        with torch.inference_mode():
            copy = self._make_chunk()
        _, first_ready = copy.first()
        frames = copy.all()
        total_ms = 1000 * (time.perf_counter() - started)
        first_ms = 1000 * (first_ready - started)
        self.chunk_index += 1
        timings = Timings(total_ms, first_ms, self._clock.take())
        return StreamChunk(self.chunk_index - 1, frames, timings)

    def _make_chunk(self) -> FrameCopy:
        """Queue the work of one chunk; its frames are on their way when this returns."""
        self._commit_pending()
        self._apply_change()
        ladder = self.model.ladder_of(is_first=self._ring.next_frame == 0)
        with self._clock.stage("noise"):
            noise = self._noise(self.chunk_index, ladder)
            noise.draw(1 if self._host_runs_ahead else None)  # the rest beside the steps
        with self._clock.stage("denoise"):
            x0 = self._denoise(noise, ladder)
        copy = self._decode(x0)
        if self.model.commits:
            self._pending = (x0, self._conditioning)
        if self._host_runs_ahead:
            self._commit_pending()
            self._ahead = self._noise(self.chunk_index + 1, self.model.ladder)
            self._ahead.draw()
        return copy

    def snapshot(self) -> Snapshot:
        """A copy of all state."""
        return Snapshot(
            ring=self._ring.snapshot(),
            decoder=self._decoder.clone(),
            history=tuple(self._history),
            pending=self._pending,
            given=self._given,
            conditioning=self._conditioning,
            prompt=self.prompt,
            change=self._change,
            settings=self.settings,
            chunk_index=self.chunk_index,
        )

    def restore(self, snapshot: Snapshot, keeps_prompt: bool = False) -> None:
        """Go back to a snapshot of a session of the same model, window and sink.

        keeps_prompt: what `set_prompt` has asked for since then still comes with the next chunk.
        """
        change = self._change if keeps_prompt else snapshot.change
        self._ring.restore(snapshot.ring)
        self._decoder = snapshot.decoder.clone()
        self._history = list(snapshot.history)
        self._pending = snapshot.pending
        self._given = snapshot.given
        self._picture = snapshot.conditioning.picture
        self._conditioning = snapshot.conditioning
        self.prompt = snapshot.prompt
        self._change = change
        self.settings = snapshot.settings
        self.chunk_index = snapshot.chunk_index
        self._clock.take()

    def _encode(self, prompt: str, picture: Picture | None = None) -> PreparedConditioning:
        """Text and picture with cross-attention K/V and the ladder's noise levels, computed once.

        picture: None is the stream's own, if it has one.
        """
        with torch.inference_mode(), self._clock.stage("text"):
            text = self.model.text.encode([prompt]).to(self.model.device, self.model.dtype)
            asked = conditioning_of(text, picture or self._picture)
            return self.model.student.prepare(asked, self.model.noise_levels)

    @torch.inference_mode()
    def _see(self, context: Tensor | None) -> Picture | None:
        """What a student of Wan2.1-I2V sees of a context; None for other students."""
        if context is None or self.model.see is None:
            return None
        device = self.model.decode_device or self.model.device
        return self.model.see(context[:1].to(device)).to(self.model.device)

    def _noise(self, chunk_index: int, ladder: Ladder) -> ChunkNoise:
        """The noise of a chunk: a draw for each step, or one if it is kept; maybe drawn already."""
        model = self.model
        num_draws = 1 if model.keeps_noise else len(ladder)
        seed = self.settings.seed
        if self._ahead is not None and self._ahead.is_for(seed, chunk_index, num_draws):
            return self._ahead
        shape = (1, model.chunk_frames, model.codec.channels, *model.latent_size)
        return ChunkNoise(seed, chunk_index, shape, num_draws, model.device)

    def _denoise(self, noise: ChunkNoise, ladder: Ladder) -> Tensor:
        """The next chunk's clean latents. Without commits its last step's K/V stay in the ring."""
        start = self._ring.next_frame
        given = self._given if start == 0 else None
        context = self._ring.read(self.model.chunk_frames)
        remember = None if self.model.commits else self._ring
        x0, x_last = denoise_chunk(
            self._student,
            noise,
            self._conditioning,
            context,
            ladder,
            given=given,
            remember=remember,
        )
        if remember is not None:
            sigma: Tensor | float = ladder[-1]
            if given is not None:
                sigma = sigma_by_frame(sigma, x_last, given.shape[1])
            self._see_later(Seen(start, x_last, sigma))
        return x0

    def _decode(self, x0: Tensor) -> FrameCopy:
        """Decode latent frame by latent frame, so that the first video frames leave early."""
        copy = FrameCopy(x0.shape[1] * self.model.codec.strides[0])
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

    def _commit(
        self, latents: Tensor, conditioning: Conditioning, sigma: Tensor | float = CLEAN
    ) -> None:
        """Put a finished chunk into the ring, as it was at noise level sigma."""
        start = self._ring.next_frame
        commit_chunk(self._student, latents, conditioning, self._ring, sigma)
        self._see_later(Seen(start, latents, sigma))

    def _see_later(self, chunk: Seen) -> None:
        """Keep a chunk's latents while the next chunk sees it."""
        visible = self._ring.visible_starts
        self._history = [each for each in (*self._history, chunk) if each.start in visible]

    def _apply_change(self) -> None:
        """Switch to the prompt of `set_prompt`, if there is a new one."""
        if self._change is None:
            return
        self.prompt = self._change.prompt
        self._conditioning = self._change.conditioning
        with self._clock.stage("prompt"):
            if self._change.mode == "flush":
                self._ring.flush()
            elif self._change.mode == "recache":
                self._recache()
        self._change = None

    def _recache(self) -> None:
        """Commit all visible chunks again, the oldest first, each at its place in the stream."""
        history = self._history
        next_frame = self._ring.next_frame
        self._history = []
        self._ring.clear()
        for chunk in history:
            self._ring.next_frame = chunk.start
            self._commit(chunk.latents, self._conditioning, chunk.sigma)
        self._ring.next_frame = next_frame

    @torch.inference_mode()
    def _begin_with(self, context: Tensor) -> None:
        """Encode the context; commit and show it, or keep it for the first chunk to begin with."""
        device = self.model.decode_device or self.model.device
        latents = self.model.codec.start_encoding().encode(context[None].to(device)).float()
        latents = latents.to(self.model.device)
        if self.model.given:
            self._given = latents[:, : self.model.given]
        if latents.shape[1] == self.model.num_given_latent_frames:
            return  # the first chunk shows all of it
        for number, x0 in enumerate(whole_chunks(latents, self.model.chunk_frames)):
            self._commit_given(x0, number)
        self.context_frames = self._decode(latents).all()

    def _commit_given(self, x0: Tensor, number: int) -> None:
        """Put a chunk of the context into the ring, noised where students see chunks so."""
        sigma = CLEAN
        if not self.model.commits:
            sigma = self.model.ladder_of(is_first=number == 0)[-1]
            noise = rng.normal(tuple(x0.shape), self.settings.seed, "context noise", number)
            x0 = add_noise(x0, noise.to(x0), sigma)
        self._commit(x0, self._conditioning, sigma)
