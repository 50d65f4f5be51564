"""Minutes of video: nothing is kept of what has been written, and stretches join without a step."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from selfforcing_dfd.metrics.files import frames_of
from selfforcing_dfd.protocol.makers import DATA_FRAMES, TinyData
from selfforcing_dfd.protocol.plan import Cell, Prompt
from selfforcing_dfd.protocol.videos import write_video

CELL = Cell("data", Prompt(0, "a small red disc moves right slow"), 1)


def test_what_is_written_is_not_kept(tmp_path: Path):
    """Catches a video that is gathered before it is written: minutes of it fill the memory."""
    alive: list[weakref.ref[Tensor]] = []

    def parts() -> Iterator[Tensor]:
        for number in range(20):
            gc.collect()
            assert sum(part() is not None for part in alive) <= 1
            part = torch.full((12, 32, 32, 3), 10 * number, dtype=torch.uint8)
            alive.append(weakref.ref(part))
            yield part
            del part

    write_video(tmp_path / "long.mp4", parts(), 16, 10)
    assert sum(1 for _ in frames_of(tmp_path / "long.mp4")) == 240


def test_long_data_are_one_movement():
    """Catches a jump where the next frames of the world are drawn."""
    parts = list(TinyData(DATA_FRAMES + 20)(CELL))
    assert [len(part) for part in parts] == [DATA_FRAMES, 20]
    video = torch.cat(parts).float()
    steps = (video[1:] - video[:-1]).abs().mean(dim=(1, 2, 3))
    seam = steps[DATA_FRAMES - 1]
    around = steps[DATA_FRAMES - 6 : DATA_FRAMES + 5]
    assert around.min() > 0, "it moves"
    assert seam <= 1.2 * around.median()
    assert torch.equal(parts[0], next(TinyData(DATA_FRAMES)(CELL)))
