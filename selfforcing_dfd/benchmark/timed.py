"""Codecs and network calls that are timed, or left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from selfforcing_dfd.codecs.protocol import Decoder, Encoder, StreamingCodec
from selfforcing_dfd.rollout import Ladder
from selfforcing_dfd.streaming.latency import StageClock


@dataclass(slots=True)
class TimedDecoder:
    """A decoder whose calls are stages of a clock: `vae_first` for a video's first, then `vae`."""

    decoder: Decoder
    clock: StageClock
    started: bool = False

    def decode(self, latents: Tensor) -> Tensor:
        name = "vae" if self.started else "vae_first"
        self.started = True
        with self.clock.stage(name):
            return self.decoder.decode(latents)

    def clone(self) -> TimedDecoder:
        return TimedDecoder(self.decoder.clone(), self.clock, self.started)


@dataclass(frozen=True, slots=True)
class TimedCodec:
    """A codec whose decoders are timed."""

    codec: StreamingCodec
    clock: StageClock

    @property
    def channels(self) -> int:
        return self.codec.channels

    @property
    def strides(self) -> tuple[int, int, int]:
        return self.codec.strides

    def start_decoding(self) -> Decoder:
        return TimedDecoder(self.codec.start_decoding(), self.clock)

    def start_encoding(self) -> Encoder:
        return self.codec.start_encoding()


@dataclass(frozen=True, slots=True)
class NoDecoder:
    """Frames of one pixel without any work, so that a chunk is the DiT alone."""

    time_stride: int

    def decode(self, latents: Tensor) -> Tensor:
        return latents.new_zeros(latents.shape[0], latents.shape[1] * self.time_stride, 1, 1, 3)

    def clone(self) -> NoDecoder:
        return self


@dataclass(frozen=True, slots=True)
class NoCodec:
    """A codec that decodes nothing."""

    codec: StreamingCodec

    @property
    def channels(self) -> int:
        return self.codec.channels

    @property
    def strides(self) -> tuple[int, int, int]:
        return self.codec.strides

    def start_decoding(self) -> Decoder:
        return NoDecoder(self.strides[0])

    def start_encoding(self) -> Encoder:
        return self.codec.start_encoding()


@contextmanager
def timed_calls(
    student: nn.Module, clock: StageClock, ladder: Ladder, first_ladder: Ladder | None = None
) -> Iterator[None]:
    """Make each call of the student a stage: `dit_step_1` and so on, or `commit_pass`."""
    running: list[AbstractContextManager[None]] = []

    def begin(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        stage = clock.stage(call_name(inputs[1], ladder, first_ladder or ()))
        stage.__enter__()
        running.append(stage)

    def end(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        running.pop().__exit__(None, None, None)

    hooks = (student.register_forward_pre_hook(begin), student.register_forward_hook(end))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def call_name(sigma: float, ladder: Ladder, first_ladder: Ladder = ()) -> str:
    for steps in (ladder, first_ladder):
        if sigma in steps:
            return f"dit_step_{steps.index(sigma) + 1}"
    return "commit_pass"
