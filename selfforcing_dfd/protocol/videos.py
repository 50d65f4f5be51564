"""Video files to be measured: little loss, and coded the same way wherever chunks begin.

A stream's own file begins each chunk with a keyframe, so that it plays while it grows. A metric
sees that as a seam. Here the coder decides where keyframes are.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.video.reformatter import ColorRange
from torch import Tensor

from selfforcing_dfd.live.writers import SMPTE170M, as_pictures, require_even, yuv_converter

# one thread and no macroblock tree, so that equal frames give equal files on every machine
X264 = {"preset": "veryfast", "x264-params": "mbtree=0", "threads": "1"}


def encoder_of(crf: int) -> dict[str, Any]:
    """What is said of the encoding in result files."""
    return {"codec": "libx264", "pixels": "yuv420p", "matrix": "BT.601", "crf": crf, **X264}


def write_video(path: Path, parts: Iterable[Tensor], fps: int, crf: int) -> None:
    """Write uint8 frames [T, H, W, 3], which come in parts, as H.264 in mp4.

    The file does not depend on the parts. Memory does not grow with the length. Raises OutputError
    for odd sizes. crf: x264's loss; 0 is none but that of half-resolution colour.
    """
    to_yuv = yuv_converter()
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=Fraction(fps), options={"crf": str(crf), **X264}
        )
        stream.pix_fmt = "yuv420p"
        stream.codec_context.color_range = int(ColorRange.MPEG)
        stream.codec_context.colorspace = SMPTE170M
        number = 0
        for part in parts:
            for picture in as_pictures(part):
                if not number:
                    require_even(picture.shape[:2])
                    stream.height, stream.width = picture.shape[:2]
                frame = to_yuv(picture)
                frame.pts = number
                frame.time_base = 1 / Fraction(fps)
                container.mux(stream.encode(frame))
                number += 1
        container.mux(stream.encode(None))
