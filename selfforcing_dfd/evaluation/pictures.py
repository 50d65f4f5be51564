"""Contact sheets, sample videos and moving pictures of clips, written by imageio."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from selfforcing_dfd.common import atomic_file

SHEET_FRAMES = 6
GAP = 4  # pixels between clips
ROW_GAP = 16  # pixels between rows that stand side by side
FRAME_GAP = 1  # pixels between video frames of a clip in a contact sheet
LABEL_PX = 16  # height of the letters over a moving picture
LABEL_ROOM = 26  # pixels for the line of labels
PAPER = 255  # white, between the rows of a moving picture
INK = (40, 44, 52)


def to_uint8(videos: Tensor) -> Tensor:
    """Videos in [0, 1] as uint8."""
    return (videos.clamp(0, 1) * 255).round().to(torch.uint8)


def contact_sheet(videos: Tensor, max_width: int) -> bytes:
    """PNG of uint8 clips [B, T, H, W, 3]: one column a clip, time downwards, gaps transparent.

    Clips that are wider than max_width pixels are shrunk.
    """
    num_frames = videos.shape[1]
    times = torch.linspace(0, num_frames - 1, min(SHEET_FRAMES, num_frames)).round().long()
    clips = shrunk(videos[:, times], max_width)
    height, width = clips.shape[2:4]
    down = height + FRAME_GAP
    across = width + GAP
    size = (len(times) * down - FRAME_GAP, len(clips) * across - GAP, 4)
    sheet = np.zeros(size, dtype=np.uint8)
    for column, clip in enumerate(clips.numpy()):
        for line, frame in enumerate(clip):
            top = line * down
            left = column * across
            tile = sheet[top : top + height, left : left + width]
            tile[..., :3] = frame
            tile[..., 3] = 255
    return bytes(imageio.imwrite("<bytes>", sheet, format="png"))


def shrunk(videos: Tensor, max_width: int) -> Tensor:
    """uint8 videos [B, T, H, W, 3], at most max_width wide, with even sides."""
    height, width = videos.shape[2:4]
    if width <= max_width:
        return videos
    return resized(videos, (round(height * max_width / width / 2) * 2, max_width // 2 * 2))


def resized(videos: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 videos [B, T, H, W, 3] at another height and width, smoothly."""
    pictures = videos.flatten(0, 1).permute(0, 3, 1, 2).float()
    other = torch.nn.functional.interpolate(pictures, size, mode="bicubic", antialias=True)
    other = other.round().clamp(0, 255).byte()
    return other.permute(0, 2, 3, 1).unflatten(0, videos.shape[:2])


def tiled(videos: Tensor, columns: int, paper: int = 0) -> Tensor:
    """Clips [B, T, H, W, 3] in a grid, row by row, on a ground of one grey value.

    Returns [T, rows (H + 4) - 4, columns (W + 4) - 4, 3].
    """
    num_clips, num_frames, height, width, _ = videos.shape
    down = height + GAP
    across = width + GAP
    rows = math.ceil(num_clips / columns)
    size = (num_frames, rows * down - GAP, columns * across - GAP, 3)
    grid = videos.new_full(size, paper)
    for index, clip in enumerate(videos):
        line, column = divmod(index, columns)
        top = line * down
        left = column * across
        grid[:, top : top + height, left : left + width] = clip
    return grid


def enlarged(frames: Tensor, scale: int) -> Tensor:
    """Video frames [T, H, W, 3] with every pixel repeated scale x scale times."""
    return frames.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)


def write_mp4(path: Path, frames: Tensor, fps: int) -> None:
    """uint8 [T, H, W, 3] as H.264 that browsers play. Even height and width."""
    encoder = {"codec": "libx264", "macro_block_size": 2, "output_params": ["-crf", "18"]}
    with atomic_file(path) as partial:
        imageio.mimwrite(partial, list(frames.numpy()), format="FFMPEG", fps=fps, **encoder)


def side_by_side(rows: Mapping[str, Tensor], columns: int, scale: int) -> Tensor:
    """The clips [B, T, H, W, 3] of every row as one video [T, H', W', 3], rows beside each other.

    A row takes an equal share of the width; between two rows lies a white gap. Clips are enlarged
    `scale` times, smoothly.
    """
    grids = []
    for clips in rows.values():
        height, width = clips.shape[2:4]
        large = resized(clips, (scale * height, scale * width)) if scale > 1 else clips
        grids.append(tiled(large, columns, PAPER))
    gap = grids[0].new_full((*grids[0].shape[:2], ROW_GAP, 3), PAPER)
    parts: list[Tensor] = []
    for grid in grids:
        parts += [grid, gap]
    return torch.cat(parts[:-1], dim=2)


def labelled(frames: Tensor, labels: Sequence[str]) -> Tensor:
    """Video frames [T, H, W, 3] of `side_by_side` under a line with a label over each row."""
    width = frames.shape[2]
    line = Image.new("RGB", (width, LABEL_ROOM), (PAPER, PAPER, PAPER))
    draw = ImageDraw.Draw(line)
    font = ImageFont.load_default(LABEL_PX)
    share = (width + ROW_GAP) / len(labels)
    for index, label in enumerate(labels):
        middle = index * share + (share - ROW_GAP) / 2
        draw.text((middle, LABEL_ROOM / 2), label, fill=INK, font=font, anchor="mm")
    head = torch.from_numpy(np.array(line)).expand(len(frames), -1, -1, -1)
    return torch.cat([head, frames], dim=1)


def write_moving_picture(path: Path, frames: Tensor, fps: int) -> None:
    """uint8 [T, H, W, 3] as an endless .gif or .webp, by the path's ending."""
    options: dict[str, Any] = {"duration": 1000 / fps, "loop": 0}
    if path.suffix == ".webp":
        options["quality"] = 80
    with atomic_file(path) as partial:
        imageio.mimwrite(partial, list(frames.numpy()), **options)
