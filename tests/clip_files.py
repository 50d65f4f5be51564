"""Video files to test with."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
from torch import Tensor


def write_clip(path: Path | str, frames: Tensor, fps: int = 16) -> None:
    """uint8 [T, H, W, 3] as H.264 with nearly no loss but that of half-resolution chroma."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "10"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in frames.cpu().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
