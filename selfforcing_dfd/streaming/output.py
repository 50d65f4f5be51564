"""Copies decoded video to the host as uint8 frames, while the device goes on."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor


def to_uint8(video: Tensor) -> Tensor:
    """[..., 3] in [0, 1], clamped, as uint8, rounded to nearest; on the video's device."""
    return video.float().clamp(0, 1).mul_(255).round_().to(torch.uint8)


@dataclass(slots=True)
class FrameCopy:
    """The frames of one chunk on their way to the host.

    num_frames: how many there are at most. A GPU copies each part while it decodes the next one.
    All parts lie in one piece of pinned memory, so that they need not be joined. It comes from
    torch's pool, which takes it back when the caller drops the frames: no later chunk writes over
    it, and after two chunks nothing is allocated.
    """

    num_frames: int
    _host: Tensor | None = None
    _ends: list[int] = field(default_factory=list)  # of each part
    _events: list[torch.cuda.Event] = field(default_factory=list)

    def add(self, video: Tensor) -> None:
        """Start copying the next video frames [T, H, W, 3] in [0, 1]."""
        frames = to_uint8(video)
        on_gpu = frames.device.type == "cuda"
        if self._host is None:
            shape = (self.num_frames, *frames.shape[1:])
            with torch.inference_mode(False):  # the frames are the caller's own, to be drawn on
                self._host = torch.empty(shape, dtype=torch.uint8, pin_memory=on_gpu)
        start = self._ends[-1] if self._ends else 0
        self._ends.append(start + len(frames))
        self._host[start : self._ends[-1]].copy_(frames, non_blocking=True)
        if on_gpu:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(frames.device))
            self._events.append(event)

    def first(self) -> tuple[Tensor, float]:
        """The first part, and when it could be shown (seconds of `time.perf_counter`)."""
        if self._events:
            self._events[0].synchronize()
        return self._frames(self._ends[0]), time.perf_counter()

    def all(self) -> Tensor:
        """[T, H, W, 3] uint8 on the host. Waits for the last copy and for nothing else."""
        if self._events:
            self._events[-1].synchronize()
        return self._frames(self._ends[-1])

    def _frames(self, stop: int) -> Tensor:
        assert self._host is not None, "add() comes first"
        return self._host[:stop]
