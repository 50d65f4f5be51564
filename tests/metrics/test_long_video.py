"""A long video is measured in constant memory, with the allocator as commands set it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor, stack

from selfforcing_dfd.protocol.videos import write_video
from selfforcing_dfd.rng import uniform

FRAMES = 1000
PROGRAM = """
import sys
from pathlib import Path
from selfforcing_dfd.common import resident_bytes, tune_allocator
tune_allocator()
from selfforcing_dfd.metrics.files import measure_file
held = []
measure_file(Path(sys.argv[1]), seen=lambda frame: held.append(resident_bytes()))
assert len(held) == 1000
print(max(held[100:200]), max(held[-100:]))
"""


def moving(number: int) -> Tensor:
    """Ten frames [10, 480, 832, 3] of a coarse texture that moves."""
    texture = (255 * uniform((75, 130, 3), 0, "texture")).byte()
    large = texture.repeat_interleave(8, 0).repeat_interleave(8, 1)
    starts = [(number * 10 + frame) % 100 for frame in range(10)]
    return stack([large[start : start + 480, 2 * start : 2 * start + 832] for start in starts])


@pytest.mark.soak
def test_a_thousand_frames_take_the_memory_of_a_hundred(tmp_path: Path):
    """Catches what is kept of every frame, and freed memory that is in too small pieces to use."""
    path = tmp_path / "long.mp4"
    write_video(path, (moving(number) for number in range(FRAMES // 10)), 16, 18)
    command = [sys.executable, "-c", PROGRAM, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    early, late = map(int, done.stdout.split())
    # a tenth: what a few numbers of each frame take, and where the allocator happens to stand
    assert late <= 1.1 * early, f"{early / 1e6:.0f} MB, later {late / 1e6:.0f} MB"
