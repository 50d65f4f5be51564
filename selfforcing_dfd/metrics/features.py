"""What encoders see in a few frames of each clip. Two encoders need no weights: pixels and motion.

Clips are compared by cosine, so features are unit vectors. A clip's own vector is the mean of its
frames' unit vectors, brought to length 1 again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from selfforcing_dfd.metrics.appearance import luma, thumbnail
from selfforcing_dfd.metrics.motion import block_flow

PLACES = 16  # frames of a clip that are looked at, as in the paper
PAIRS = 8  # pairs of frames a second apart are 1 / PAIRS: see `Sampled`
CELLS = (36, 64)  # rows and columns to which a frame is reduced for histograms
LEVELS = 4  # of each colour in a histogram
TURNS = 8  # orientations of edges, and directions of motion
SLOWEST = 1 / 64  # widths a second; bands of speed double from here on
BANDS = 9
MOVES = 0.5  # pixels a block must move within a pair to count half
STANDARD_MEAN = 128.0
STANDARD_SPREAD = 48.0
TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Sampled:
    """A few frames of a clip, each tensor uint8 [K, H, W, 3].

    frames: at even distances, the first and the last among them. before, after: frames near those
    places, `seconds` apart, for motion.
    """

    frames: Tensor
    before: Tensor
    after: Tensor
    seconds: float


class Encoder(Protocol):
    """Makes features of the frames of a clip."""

    @property
    def name(self) -> str: ...

    def __call__(self, clip: Sampled) -> Tensor:
        """[K, D] float32, one vector for each place. Their lengths mean nothing."""

    def described(self) -> dict[str, Any]:
        """What made the features: backend, versions, the weights' hash."""


def places_of(num_frames: int, places: int = PLACES) -> list[int]:
    """Frames at even distances, the first and the last among them; short clips repeat some."""
    return [round(n * (num_frames - 1) / max(places - 1, 1)) for n in range(places)]


def sample(frames: Iterable[Tensor], num_frames: int, fps: float, places: int = PLACES) -> Sampled:
    """Take what encoders need from frames [H, W, 3] uint8 that come one by one.

    num_frames: how many will come. Only those that are needed are kept.
    """
    plan = SamplePlan(places_of(num_frames, places), num_frames, fps)
    wanted = set(plan.wanted)
    return plan.take({place: frame for place, frame in enumerate(frames) if place in wanted})


@dataclass(frozen=True, slots=True)
class SamplePlan:
    """Which frames of a clip of `num_frames` encoders need, to look at the places `at`."""

    at: Sequence[int]
    num_frames: int
    fps: float

    @property
    def apart(self) -> int:
        """Frames between the two of a pair."""
        return min(max(round(self.fps / PAIRS), 1), self.num_frames - 1)

    @property
    def first(self) -> list[int]:
        """The earlier frame of each pair."""
        return [min(place, self.num_frames - 1 - self.apart) for place in self.at]

    @property
    def second(self) -> list[int]:
        """The later one."""
        return [place + self.apart for place in self.first]

    @property
    def wanted(self) -> list[int]:
        """All frames that are needed, in order."""
        pairs = [*self.first, *self.second]
        return sorted(set(self.at).union(pairs))

    def take(self, kept: Mapping[int, Tensor]) -> Sampled:
        """kept: the wanted frames by their places, [H, W, 3] uint8 each."""

        def stacked(group: Sequence[int]) -> Tensor:
            return torch.stack([kept[place] for place in group])

        before = stacked(self.first)
        after = stacked(self.second)
        return Sampled(stacked(self.at), before, after, self.apart / self.fps)


def standardised(clip: Sampled) -> Sampled:
    """The same clip with mean 128 and standard deviation 48 in each colour, over all its frames.

    So a clip that is grey, dark or vivid compares by its content. Colours that hardly vary are
    moved, not stretched more than 48 times.
    """
    values = clip.frames.float()
    mean = values.mean((0, 1, 2))
    spread = values.std((0, 1, 2), correction=0).clamp_min(1)

    def changed(frames: Tensor) -> Tensor:
        matched = STANDARD_MEAN + STANDARD_SPREAD * (frames.float() - mean) / spread
        return matched.round().clamp(0, 255).to(torch.uint8)

    return Sampled(changed(clip.frames), changed(clip.before), changed(clip.after), clip.seconds)


def encode(encoder: Encoder, clips: Iterable[Sampled]) -> Tensor:
    """Unit vectors [N, K, D] of all clips."""
    return unit(torch.stack([encoder(clip).float() for clip in clips]))


def pooled(frames: Tensor) -> Tensor:
    """[N, K, D] -> unit vectors [N, D] of whole clips."""
    return unit(frames.mean(dim=1))


def unit(vectors: Tensor) -> Tensor:
    """Vectors of length 1; zeros stay zeros."""
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(TINY)


@dataclass(frozen=True, slots=True)
class PixelEncoder:
    """Layout, colours and edges of each frame, a third each.

    Layout: a thumbnail of 9 x 16 less its mean. Colours: square roots of a soft histogram of 4 x 4
    x 4. Edges: square roots of a histogram of 8 orientations, weighted by the gradient.
    """

    name: str = "pixels"

    def __call__(self, clip: Sampled) -> Tensor:
        return torch.stack([self._look(frame.float()) for frame in clip.frames])

    def _look(self, frame: Tensor) -> Tensor:
        small = thumbnail(frame)
        reduced = adaptive_avg_pool2d(frame.permute(2, 0, 1), CELLS).permute(1, 2, 0)
        parts = [(small - small.mean((0, 1))).flatten(), colours(reduced), edges(luma(reduced))]
        return torch.cat([unit(part) for part in parts])

    def described(self) -> dict[str, Any]:
        return {"backend": "pixels", "version": 1, "weights_sha256": None}


def colours(frame: Tensor) -> Tensor:
    """[H, W, 3] -> [64]: square roots of shares; a colour between two levels counts for both."""
    position = frame.flatten(0, 1) / 255 * (LEVELS - 1)
    levels = torch.arange(LEVELS, dtype=frame.dtype)
    near = (1 - (position[..., None] - levels).abs()).clamp_min(0)  # [pixels, 3, levels]
    red, green, blue = near.unbind(1)
    return torch.einsum("pr,pg,pb->rgb", red, green, blue).flatten().div(len(near)).sqrt()


def edges(grey: Tensor) -> Tensor:
    """[H, W] -> [8]: square roots of the gradient by its orientation, over half a turn."""
    right = grey[1:, 1:] - grey[1:, :-1]
    down = grey[1:, 1:] - grey[:-1, 1:]
    angle = torch.atan2(down, right) % math.pi
    return directions(angle.flatten(), torch.hypot(right, down).flatten(), math.pi).sqrt()


def directions(angle: Tensor, weight: Tensor, whole: float) -> Tensor:
    """[TURNS]: weights by angle; an angle between two directions counts for both."""
    place = angle / whole * TURNS
    low = place.floor()
    share = place - low
    low = low.long() % TURNS
    found = torch.zeros(TURNS, dtype=weight.dtype)
    found.scatter_add_(0, low, weight * (1 - share))
    return found.scatter_add_(0, (low + 1) % TURNS, weight * share)


@dataclass(frozen=True, slots=True)
class MotionEncoder:
    """Directions and speeds of what moves, by block matching; blocks that stand still do not count.

    A histogram of 8 directions x 9 bands of speed, and one entry for a picture that stands still.
    """

    name: str = "motion"

    def __call__(self, clip: Sampled) -> Tensor:
        pairs = zip(clip.before, clip.after, strict=True)
        return torch.stack([self._look(*pair, clip.seconds) for pair in pairs])

    def _look(self, before: Tensor, after: Tensor, seconds: float) -> Tensor:
        flow = block_flow(luma(before.float()), luma(after.float()))
        right, down = flow.moved.unbind(1)
        weight = 1 - torch.exp2(-flow.length / MOVES)
        speed = flow.length / (seconds * before.shape[1])
        band = torch.log2(speed / SLOWEST).clamp(0, BANDS - 1)
        angle = torch.atan2(down, right) % (2 * math.pi)
        rows = []
        for number in range(BANDS):
            near = (1 - (band - number).abs()).clamp_min(0)
            rows.append(directions(angle, weight * near, 2 * math.pi))
        found = torch.cat([*rows, (1 - weight.amax()).clamp_min(0)[None]])
        return (found / found.sum().clamp_min(TINY)).sqrt()

    def described(self) -> dict[str, Any]:
        return {"backend": "block matching", "version": 1, "weights_sha256": None}


@dataclass(frozen=True, slots=True)
class JoinedEncoder:
    """Several encoders side by side, each with the same weight: cosines are means of theirs."""

    parts: Sequence[Encoder]

    @property
    def name(self) -> str:
        return "+".join(part.name for part in self.parts)

    def __call__(self, clip: Sampled) -> Tensor:
        return torch.cat([unit(part(clip).float()) for part in self.parts], dim=1)

    def described(self) -> dict[str, Any]:
        return {"parts": [part.described() for part in self.parts]}
