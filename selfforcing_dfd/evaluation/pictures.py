"""Contact sheets and sample videos of tiny-world clips, as files that any browser shows."""

from __future__ import annotations

import math
import os
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch
from torch import Tensor

from selfforcing_dfd.tiny.world import FPS

SHEET_CLIPS, SHEET_FRAMES = 8, 6
GRID_CLIPS, GRID_COLUMNS = 16, 4
_GAP = 4  # pixels between clips
_FRAME_GAP = 1  # pixels between video frames of a clip


def to_uint8(videos: Tensor) -> Tensor:
    """Videos in [0, 1] as uint8."""
    return (videos.clamp(0, 1) * 255).round().to(torch.uint8)


def contact_sheet(videos: Tensor) -> bytes:
    """PNG of the first clips of uint8 [B, T, H, W, 3]: one column a clip, time downwards,
    transparent in between.
    """
    videos = videos[:SHEET_CLIPS]
    clips, num_frames, height, width, _ = videos.shape
    times = torch.linspace(0, num_frames - 1, min(SHEET_FRAMES, num_frames)).round().long()
    down, across = height + _FRAME_GAP, width + _GAP
    sheet = np.zeros((len(times) * down - _FRAME_GAP, clips * across - _GAP, 4), dtype=np.uint8)
    for column, clip in enumerate(videos[:, times].numpy()):
        for line, frame in enumerate(clip):
            tile = sheet[
                line * down : line * down + height, column * across : column * across + width
            ]
            tile[..., :3], tile[..., 3] = frame, 255
    return bytes(imageio.imwrite("<bytes>", sheet, format="png"))


def write_grid(path: Path, videos: Tensor, columns: int, scale: int = 2) -> None:
    """One H.264 mp4 of uint8 clips [B, T, H, W, 3] in a grid, enlarged `scale` times; `path` is
    replaced whole.
    """
    pictures = [
        grid.repeat(scale, axis=0).repeat(scale, axis=1) for grid in tiled(videos, columns).numpy()
    ]
    partial = path.with_name(f".tmp-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    encoder = {"codec": "libx264", "macro_block_size": 2, "output_params": ["-crf", "18"]}
    imageio.mimwrite(partial, pictures, format="FFMPEG", fps=FPS, **encoder)
    os.replace(partial, path)


def tiled(videos: Tensor, columns: int) -> Tensor:
    """Clips [B, T, H, W, 3] in a grid, row by row: [T, rows (H + 4) - 4, columns (W + 4) - 4, 3],
    black in between.
    """
    num_clips, num_frames, height, width, _ = videos.shape
    rows = math.ceil(num_clips / columns)
    grid = videos.new_zeros(
        num_frames, rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3
    )
    for index, clip in enumerate(videos):
        top, left = index // columns * (height + _GAP), index % columns * (width + _GAP)
        grid[:, top : top + height, left : left + width] = clip
    return grid
