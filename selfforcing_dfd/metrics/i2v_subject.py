"""How far a video keeps the subject of the picture that it begins with: VBench-I2V's `i2v_subject`.

Features are DINO's CLS tokens. Source: vbench2_beta_i2v/i2v_subject.py of Vchitect/VBench, where
the weights and the two ways to prepare a picture and a frame come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from selfforcing_dfd.common import UserError

SHORTER_SIDE = 256
CROP = 224
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)
WEIGHTS = (0.4, 0.3, 0.3)
"""Of the best likeness to the picture, the mean and the least likeness of neighbouring frames."""
BATCH = 16
PICTURES = (".png", ".jpg", ".jpeg", ".webp")

Encode = Callable[[Tensor], Tensor]
"""Prepared pictures [n, 3, 224, 224] -> features [n, D]."""
T = TypeVar("T")


@torch.no_grad()
def i2v_subject(encode: Encode, picture: Image.Image, frames: Iterable[Tensor]) -> float:
    """The score of one video, whose frames [H, W, 3] uint8 come one by one.

    All frames are looked at. A frozen copy of the picture has nearly 1. ValueError for fewer than
    two frames.
    """
    given = encode(prepared_picture(picture)[None])
    likeness: list[Tensor] = []
    neighbours: list[Tensor] = []
    before: Tensor | None = None
    for group in groups_of(frames, BATCH):
        features = encode(torch.stack([prepared_frame(frame) for frame in group]))
        likeness.append(cosine_similarity(features, given))
        joined = features if before is None else torch.cat([before, features])
        neighbours.append(cosine_similarity(joined[1:], joined[:-1]))
        before = features[-1:]
    consecutive = torch.cat(neighbours).clamp_min(0) if neighbours else torch.empty(0)
    if not len(consecutive):
        raise ValueError("i2v_subject compares neighbouring frames; the video has fewer than two")
    of_best, of_mean, of_least = WEIGHTS
    best = torch.cat(likeness).clamp_min(0).amax()
    return float(of_best * best + of_mean * consecutive.mean() + of_least * consecutive.amin())


def groups_of(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Items in lists of `size`; the last may be shorter."""
    source = iter(items)
    while group := list(islice(source, size)):
        yield group


def prepared_frame(frame: Tensor) -> Tensor:
    """uint8 [H, W, 3] -> [3, 224, 224]: shorter side 256 (bicubic, antialiased), middle cut out."""
    pixels = frame.permute(2, 0, 1)[None].float()
    size = resized(frame.shape[0], frame.shape[1])
    small = interpolate(pixels, size, mode="bicubic", antialias=True)[0]
    return normalised(middle(small) / 255)


def prepared_picture(picture: Image.Image) -> Tensor:
    """The same of a picture, which is resized in whole numbers, as Pillow does it."""
    height, width = resized(picture.height, picture.width)
    small = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1).float()
    return normalised(middle(pixels) / 255)


def resized(height: int, width: int) -> tuple[int, int]:
    """Height and width with a shorter side of 256."""
    shorter = min(height, width)
    return height * SHORTER_SIDE // shorter, width * SHORTER_SIDE // shorter


def middle(pixels: Tensor) -> Tensor:
    """The 224 x 224 in the middle of [3, h, w]."""
    top = round((pixels.shape[1] - CROP) / 2)
    left = round((pixels.shape[2] - CROP) / 2)
    return pixels[:, top : top + CROP, left : left + CROP]


def normalised(pixels: Tensor) -> Tensor:
    """[3, h, w] in [0, 1] as networks trained on ImageNet take it."""
    mean = torch.tensor(MEAN)[:, None, None]
    deviation = torch.tensor(DEVIATION)[:, None, None]
    return (pixels - mean) / deviation


def picture_of(video: Path, folder: Path) -> Path:
    """The picture that a video begins with: of the same name, in a folder. UserError for none."""
    for ending in PICTURES:
        path = folder / f"{video.stem}{ending}"
        if path.is_file():
            return path
    endings = ", ".join(PICTURES)
    raise UserError(f"{folder} has no picture for {video.name}; want {video.stem} with {endings}")
