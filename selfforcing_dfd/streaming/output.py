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

    A GPU copies each part while it decodes the next one. Pinned memory comes from torch's pool,
    which takes it back when the caller drops the frames: no later chunk writes over it, and after
    two chunks nothing is allocated.
    """

    _parts: list[Tensor] = field(default_factory=list)
    _events: list[torch.cuda.Event] = field(default_factory=list)

    def add(self, video: Tensor) -> None:
        """Start copying the next video frames [T, H, W, 3] in [0, 1]."""
        frames = to_uint8(video)
        if frames.device.type != "cuda":
            self._parts.append(frames)
            return
        host = torch.empty(frames.shape, dtype=torch.uint8, pin_memory=True)
        host.copy_(frames, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(frames.device))
        self._parts.append(host)
        self._events.append(event)

    def first(self) -> tuple[Tensor, float]:
        """The first part, and when it could be shown (seconds of `time.perf_counter`)."""
        if self._events:
            self._events[0].synchronize()
        return self._parts[0], time.perf_counter()

    def all(self) -> Tensor:
        """[T, H, W, 3] uint8 on the host. Waits for the last copy and for nothing else."""
        if self._events:
            self._events[-1].synchronize()
        return torch.cat(self._parts)
