"""Raw video files in tests: their bytes for given frames, for comparison to the bit."""

from __future__ import annotations

import io

from selfforcing_dfd.live.writers import Frames, Y4mWriter


def y4m(*chunks: Frames, fps: float = 16) -> bytes:
    """The file that a stream of these chunks [T, H, W, 3] leaves."""
    buffer = io.BytesIO()
    writer = Y4mWriter(buffer, fps)
    for chunk in chunks:
        writer.write(chunk)
    return buffer.getvalue()
