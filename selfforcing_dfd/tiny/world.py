"""The tiny world: procedural clips of one soft-edged shape that moves on a torus.

Captions name some of the factors of a clip: the shape, or also the hue, or all but saturation and
position. The other factors are free, with known and skewed priors. A mode-seeking objective drops
the rare values, and here they can be counted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import imageio.v2 as imageio
import torch
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.common import atomic_file

Level = Literal["short", "medium", "long", "mixed"]
"""How much a caption says: the shape; also the hue; all but saturation and position; or each of
these in turn, clip by clip.
"""
Levels = Level | Literal["all"]
"""What clips are written with; `all` is a short, a medium and a long caption for each."""

SIDE = 64  # pixels; the torus is SIDE x SIDE
FPS = 16
CLIP_FRAMES = 33  # video frames of a clip
BACKGROUND = 0.35
VALUE = 0.9  # HSV value of the shape's colour
# scale of the logistic edge; the slope of its middle would cross from 0 to 1 in 4 times this
EDGE_PX = 0.9

SHAPES = ("disc", "square", "cross")
HUES = ("red", "yellow", "green", "cyan", "blue", "magenta")
DIRECTIONS = ("right", "down", "left", "up")
SPEEDS = ("slowly", "steadily", "quickly")
SIZES = ("small", "large")

SHAPE_PRIOR = torch.tensor([1 / 3, 1 / 3, 1 / 3])
HUE_PRIOR = torch.tensor([0.35, 0.25, 0.16, 0.12, 0.08, 0.04])
DIRECTION_PRIOR = torch.tensor([0.4, 0.3, 0.2, 0.1])
SPEED_PRIOR = torch.tensor([0.5, 0.35, 0.15])
SIZE_PRIOR = torch.tensor([0.6, 0.4])
# [72], hue x direction x speed
MODE_PRIOR = torch.einsum("h,d,s->hds", HUE_PRIOR, DIRECTION_PRIOR, SPEED_PRIOR).flatten()

SPEED_PX = torch.tensor([0.5, 1.0, 2.0])  # pixels per video frame
# half-extent of the square; the other shapes have about its area
SIZE_PX = torch.tensor([9.0, 13.0])
HEADINGS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])  # (x, y); y points down

_NAMES = {"shape": SHAPES, "hue": HUES, "direction": DIRECTIONS, "speed": SPEEDS, "size": SIZES}
_FACTOR_OF_WORD = {
    word: (factor, index) for factor, words in _NAMES.items() for index, word in enumerate(words)
}
_TEMPLATES: dict[str, str] = {
    "short": "a {shape} moves",
    "medium": "a {hue} {shape} moves",
    "long": "a {size} {hue} {shape} moves {direction} {speed}",
}
# near-lossless; one thread and no macroblock tree, so that equal clips give equal files
X264 = ("-crf", "6", "-preset", "veryfast", "-x264-params", "mbtree=0", "-threads", "1")
IN_TURN: tuple[Level, ...] = ("short", "medium", "long")
_RENDER_BATCH = 16  # clips drawn at once, so that the working set stays in cache


@dataclass(frozen=True, slots=True)
class Factors:
    """Everything that a clip is made from, each a tensor [B]: indices into the names, or floats."""

    shape: Tensor
    hue: Tensor
    direction: Tensor
    speed: Tensor
    size: Tensor
    saturation: Tensor  # in (0, 1)
    x: Tensor  # pixels, at video frame 0; a pixel's centre lies at k + 0.5
    y: Tensor

    @classmethod
    def join(cls, parts: Sequence[Factors]) -> Factors:
        """The clips of all parts, in order."""
        joined = {}
        for field in fields(cls):
            joined[field.name] = torch.cat([getattr(part, field.name) for part in parts])
        return cls(**joined)

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: slice | Tensor) -> Factors:
        return Factors(*(getattr(self, field.name)[index] for field in fields(self)))


def draw_factors(num_clips: int, generator: torch.Generator) -> Factors:
    """Independent draws from the data law.

    Saturation is Beta(6, 6): the sixth smallest of eleven uniforms.
    """

    def category(prior: Tensor) -> Tensor:
        return torch.multinomial(prior, num_clips, replacement=True, generator=generator)

    return Factors(
        shape=category(SHAPE_PRIOR),
        hue=category(HUE_PRIOR),
        direction=category(DIRECTION_PRIOR),
        speed=category(SPEED_PRIOR),
        size=category(SIZE_PRIOR),
        saturation=torch.rand(num_clips, 11, generator=generator).median(dim=1).values,
        x=torch.rand(num_clips, generator=generator) * SIDE,
        y=torch.rand(num_clips, generator=generator) * SIDE,
    )


def mode(hue: Tensor, direction: Tensor, speed: Tensor) -> Tensor:
    """Index into MODE_PRIOR: one of 72 modes, hue x direction x speed.

    All three are free under a short caption.
    """
    return (hue * len(DIRECTIONS) + direction) * len(SPEEDS) + speed


def colour(hue: Tensor, saturation: Tensor) -> Tensor:
    """RGB [B, 3] of HSV (hue index / 6, saturation, VALUE)."""
    sector = (torch.tensor([5.0, 3.0, 1.0], device=hue.device) + hue[:, None]) % 6
    return VALUE * (1 - saturation[:, None] * torch.minimum(sector, 4 - sector).clamp(0, 1))


def track(factors: Factors, num_frames: int) -> Tensor:
    """Centre (x, y) of the shape at every video frame, [B, T, 2] pixels, not wrapped."""
    start = torch.stack([factors.x, factors.y], dim=-1)
    step = HEADINGS.to(start)[factors.direction] * SPEED_PX.to(start)[factors.speed][:, None]
    return start[:, None] + step[:, None] * torch.arange(num_frames, device=start.device)[:, None]


def coverage(shape: Tensor, size: Tensor, centres: Tensor) -> Tensor:
    """How much of each pixel the shape covers, [B, T, SIDE, SIDE] in [0, 1].

    It is a logistic function of the signed distance. shape, size: indices [B]; centres: [B, T, 2]
    pixels.
    """
    grid = torch.arange(SIDE, device=centres.device) + 0.5
    offset = ((grid - centres[..., None] + SIDE / 2) % SIDE - SIDE / 2).abs()  # [B, T, 2, SIDE]
    across = offset[:, :, 0, None, :]
    down = offset[:, :, 1, :, None]
    half = SIZE_PX.to(centres)[size][:, None, None, None]
    distance = centres.new_empty(*centres.shape[:2], SIDE, SIDE)
    for index in shape.unique().tolist():
        rows = shape == index
        distance[rows] = _signed_distance(SHAPES[index], across[rows], down[rows], half[rows])
    return distance.div_(-EDGE_PX).sigmoid_()


def _signed_distance(shape: str, across: Tensor, down: Tensor, half: Tensor) -> Tensor:
    """Pixels to the outline, negative inside, from distances to the centre along x and y."""
    if shape == "disc":
        return (across**2 + down**2).sqrt_() - 1.1 * half
    if shape == "square":
        return torch.maximum(across, down) - half
    arm = 0.42 * half
    reach = 1.3 * half
    upright = torch.maximum(across - arm, down - reach)
    lying = torch.maximum(across - reach, down - arm)
    return torch.minimum(upright, lying)


def paint(alpha: Tensor, colours: Tensor, background: Tensor | float = BACKGROUND) -> Tensor:
    """Pictures [B, T, H, W, 3] from the coverage alpha [B, T, H, W].

    They show colours [B, 3] where alpha is 1, and the background (float or [B, 3]) where it is 0.
    """
    ground = torch.as_tensor(background, dtype=alpha.dtype, device=alpha.device).expand(
        colours.shape
    )
    return ground[:, None, None, None] + alpha[..., None] * (colours - ground)[:, None, None, None]


def render(factors: Factors, num_frames: int = CLIP_FRAMES) -> Tensor:
    """The clips of these factors, float32 [B, T, SIDE, SIDE, 3] in [0, 1]."""
    if num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}, want at least 1")
    video = torch.empty(len(factors), num_frames, SIDE, SIDE, 3)
    for start in range(0, len(factors), _RENDER_BATCH):
        part = factors[slice(start, start + _RENDER_BATCH)]
        alpha = coverage(part.shape, part.size, track(part, num_frames))
        video[start : start + _RENDER_BATCH] = paint(alpha, colour(part.hue, part.saturation))
    return video


def captions(factors: Factors, level: Level) -> list[str]:
    """What the clips show, in words; the level says how much of it."""
    if level not in get_args(Level):
        names = ", ".join(get_args(Level))
        raise ValueError(f"caption level is {level!r}, want one of {names}")
    indices = {name: getattr(factors, name).tolist() for name in _NAMES}
    written = []
    for clip in range(len(factors)):
        words = {name: names[indices[name][clip]] for name, names in _NAMES.items()}
        written.append(_TEMPLATES[level_of(clip, level)].format(**words))
    return written


def captions_by_level(factors: Factors) -> dict[str, str]:
    """What one clip shows, in a short, a medium and a long caption."""
    return {level: captions(factors, level)[0] for level in IN_TURN}


def level_of(clip: int, level: Level) -> Level:
    """How much the caption of clip number `clip` says."""
    return IN_TURN[clip % len(IN_TURN)] if level == "mixed" else level


def parse_caption(text: str) -> dict[str, int]:
    """The factors that a caption names, as {factor: index}; other words are ignored."""
    named: dict[str, int] = {}
    for word in re.findall("[a-z]+", text.lower()):
        factor, index = _FACTOR_OF_WORD.get(word, ("", 0))
        if factor and named.setdefault(factor, index) != index:
            other = _NAMES[factor][named[factor]]
            raise ValueError(
                f"caption {text!r} names the {factor} twice: {other} and {word}; keep one"
            )
    return named


def unknown_words(text: str, level: Level = "mixed") -> list[str]:
    """The words of a prompt that no caption of a level has, each once, in order.

    mixed: captions of all levels. A student that was trained on such captions never met the words.
    """
    templates = _TEMPLATES.values() if level == "mixed" else [_TEMPLATES[level]]
    pattern = " ".join(templates)
    known = set(re.findall(r"[a-z]+", re.sub(r"{\w+}", " ", pattern)))
    for factor in re.findall(r"{(\w+)}", pattern):
        known.update(_NAMES[factor])
    words = dict.fromkeys(re.findall(r"[^\W\d_]+", text.lower()))
    return [word for word in words if word not in known]


def clip_number(clip: int, seed: int, level: Level) -> tuple[Factors, str]:
    """Clip number `clip` of a data set, and its caption; a function of these arguments alone."""
    factors = draw_factors(1, rng.generator(seed, "tiny clip", clip))
    return factors, captions(factors, level_of(clip, level))[0]


def write_clips(
    folder: Path | str,
    num_clips: int,
    seed: int,
    level: Levels = "short",
    num_frames: int = CLIP_FRAMES,
) -> list[Path]:
    """Write `000000.mp4` and `000000.txt` and so on; the paths of the videos.

    Captions of all levels are `000000.short.txt`, `000000.medium.txt` and `000000.long.txt`. Clip i
    is a function of (seed, i) alone, so a longer folder begins with the clips of a shorter one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for clip in range(num_clips):
        factors, caption = clip_number(clip, seed, "long" if level == "all" else level)
        path = folder / f"{clip:06d}.mp4"
        named = captions_by_level(factors) if level == "all" else {"": caption}
        for name, text in named.items():
            beside = path.with_suffix(f".{name}.txt" if name else ".txt")
            beside.write_text(text + "\n", encoding="utf-8")
        _write_mp4(path, (render(factors, num_frames)[0] * 255).round().to(torch.uint8))
        paths.append(path)
    return paths


def _write_mp4(path: Path, frames: Tensor) -> None:
    """Near-lossless H.264 of uint8 [T, H, W, 3].

    Full chroma, so that a codec sees the true colours at the edges.
    """
    encoder = {"codec": "libx264", "pixelformat": "yuv444p", "output_params": list(X264)}
    with atomic_file(path) as partial:
        imageio.mimwrite(
            partial, list(frames.numpy()), format="FFMPEG", fps=FPS, macro_block_size=2, **encoder
        )
