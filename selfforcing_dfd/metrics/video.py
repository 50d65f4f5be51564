"""All numbers of one video, from its frames as they come. Memory does not grow with its length."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from selfforcing_dfd.metrics.appearance import appearance, luma, thumbnail
from selfforcing_dfd.metrics.motion import CameraPath, block_flow, fit_camera

APPEARANCE = (
    "saturation",
    "chroma",
    "colorful",
    "contrast",
    "luma",
    "clipped",
    "gradient",
    "laplacian",
)
FLOW_RATE = 8  # pairs a second, as VBench's dynamic degree takes them
TOP_SHARE = 0.05
DYNAMIC_PX = 6.0 / 256  # of the shorter side: a pair moves if its quickest blocks go farther
DYNAMIC_SHARE = 4 / 16
FROZEN = 0.002  # mean difference of two frames, as a share of 255 times the contrast
APART_S = 2.0  # frames that far apart may repeat each other
MOST_THUMBNAILS = 256
MOST_DIFFERENCES = 65_536  # kept for the median; then every second one
METRICS_VERSION = 2
"""Changes where a definition does, so that numbers of two versions are not put in one table."""


@dataclass(slots=True)
class Mean:
    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else math.nan


@dataclass(slots=True)
class Thinned:
    """Values at even distances, at most so many: when full, every second one is dropped."""

    most: int
    every: int = 1
    seen: int = 0
    kept: list[tuple[int, Tensor]] = field(default_factory=list)

    def add(self, value: Tensor) -> None:
        if self.seen % self.every == 0:
            self.kept.append((self.seen, value))
            if len(self.kept) > self.most:
                self.kept = self.kept[::2]
                self.every *= 2
        self.seen += 1


@dataclass(slots=True)
class VideoMeter:
    """Takes frames [H, W, 3] uint8 in order; `numbers` says what was found so far.

    fps: frames a second. chunk: video frames that were generated together, for drift and seams; 0
    for a video that has none. The first chunk has `first_chunk` frames.
    """

    fps: float
    chunk: int = 0
    first_chunk: int = 0
    frames: int = 0
    means: dict[str, Mean] = field(default_factory=lambda: {name: Mean() for name in APPEARANCE})
    first_second: dict[str, Mean] = field(default_factory=dict)
    last_second: list[dict[str, float]] = field(default_factory=list)
    slopes: dict[str, Slope] = field(default_factory=dict)
    difference: Mean = field(default_factory=Mean)
    at_seams: Mean = field(default_factory=Mean)
    elsewhere: Mean = field(default_factory=Mean)
    largest: float = 0.0
    differences: Thinned = field(default_factory=lambda: Thinned(MOST_DIFFERENCES))
    residual: Mean = field(default_factory=Mean)
    flicker: Mean = field(default_factory=Mean)
    flow: Mean = field(default_factory=Mean)
    quickest: Mean = field(default_factory=Mean)
    pairs_that_move: int = 0
    camera: CameraPath | None = None
    camera_track: Thinned = field(default_factory=lambda: Thinned(MOST_THUMBNAILS))
    thumbnails: Thinned = field(default_factory=lambda: Thinned(MOST_THUMBNAILS))
    recent: list[Tensor] = field(default_factory=list)  # the last two frames, float32
    flow_frame: Tensor | None = None
    brightness: list[float] = field(default_factory=list)  # of the last three frames

    @torch.no_grad()
    def add(self, frame: Tensor) -> None:
        """One more frame. ValueError if its size is another one."""
        if self.recent and frame.shape != self.recent[-1].shape:
            raise ValueError(f"a frame is {tuple(frame.shape)}, those before {self.size}")
        frame = frame.float()
        brightness = self._look(frame)
        self._compare(frame, brightness)
        if self.frames % self.stride == 0:
            self._move(luma(frame))
        self.recent = [*self.recent[-1:], frame]
        self.frames += 1

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.recent[-1].shape)

    @property
    def stride(self) -> int:
        """Frames between two of a flow."""
        return max(round(self.fps / FLOW_RATE), 1)

    def _look(self, frame: Tensor) -> float:
        """Appearance: means, first and last second, slopes. Returns the mean luma."""
        values = appearance(frame)
        second = max(round(self.fps), 1)
        for name, value in values.items():
            self.means[name].add(value)
            self.slopes.setdefault(name, Slope()).add(self.frames / self.fps, value)
            if self.frames < second:
                self.first_second.setdefault(name, Mean()).add(value)
        self.last_second = [*self.last_second[-(second - 1) :], values][-second:]
        self.thumbnails.add(thumbnail(frame).flatten())
        return 255 * values["luma"]

    def _compare(self, frame: Tensor, brightness: float) -> None:
        """Differences of neighbouring frames, and of three in a row."""
        self.brightness = [*self.brightness[-2:], brightness]
        if not self.recent:
            return
        difference = float((frame - self.recent[-1]).abs().mean())
        self.difference.add(difference)
        self.differences.add(torch.tensor(difference))
        self.largest = max(self.largest, difference)
        (self.at_seams if self._begins_chunk() else self.elsewhere).add(difference)
        if len(self.recent) == 2:
            middle = 2 * self.recent[1] - self.recent[0] - frame
            self.residual.add(float(middle.abs().mean()) / 2)
            first, second, third = self.brightness
            self.flicker.add(abs(first - 2 * second + third))

    def _begins_chunk(self) -> bool:
        first = self.first_chunk or self.chunk
        after = self.frames - first
        return bool(self.chunk) and after >= 0 and after % self.chunk == 0

    def _move(self, grey: Tensor) -> None:
        """Block flow and camera since the last frame of a flow."""
        before = self.flow_frame
        self.flow_frame = grey
        if before is None:
            return
        flow = block_flow(before, grey)
        lengths = flow.length
        top = lengths.topk(max(round(TOP_SHARE * len(lengths)), 1)).values.mean()
        self.flow.add(float(lengths.mean()))
        self.quickest.add(float(top))
        self.pairs_that_move += bool(top > DYNAMIC_PX * min(grey.shape))
        self.camera = self.camera or CameraPath(grey.shape[1])
        self.camera.add(fit_camera(flow))
        place = (self.camera.x, self.camera.y, self.camera.log_zoom)
        self.camera_track.add(torch.tensor(place, dtype=torch.float64))

    def numbers(self) -> dict[str, float]:
        """All metrics by name, see docs/evaluation.md. NaN for what so few frames leave open."""
        numbers = {name: mean.value for name, mean in self.means.items()}
        numbers |= self._changes()
        numbers |= self._motion()
        for name, first in self.first_second.items():
            last = [values[name] for values in self.last_second]
            numbers[f"drift_{name}"] = sum(last) / len(last) - first.value
            numbers[f"slope_{name}"] = 60 * self.slopes[name].value
        return numbers

    def track(self) -> Tensor:
        """Where the picture has moved to, [N, 3]: x and y in widths and the log of the zoom.

        From the origin on, at even distances in time.
        """
        places = [place for _, place in self.camera_track.kept]
        return torch.stack([torch.zeros(3, dtype=torch.float64), *places])

    def _changes(self) -> dict[str, float]:
        difference = self.difference.value
        contrast = self.means["contrast"].value
        values = [float(value) for _, value in self.differences.kept]
        typical = median(values) if values else math.nan
        still = FROZEN * 255 * contrast
        return {
            "difference": difference,
            "temporal_flicker": 1 - difference / 255,
            "difference_by_contrast": divided(difference, 255 * contrast),
            "residual": self.residual.value,
            "residual_share": divided(self.residual.value, difference),
            "luma_flicker": self.flicker.value,
            "largest_difference": divided(self.largest, typical),
            "seam_excess": divided(self.at_seams.value - self.elsewhere.value, difference),
            "frozen": divided(sum(value <= still for value in values), len(values)),
            "repeats": repeats(self.thumbnails, APART_S * self.fps),
        }

    def _motion(self) -> dict[str, float]:
        needed = max(round(DYNAMIC_SHARE * self.flow.count), 1)
        camera = self.camera or CameraPath(1)
        return {
            "flow": self.flow.value,
            "flow_top": self.quickest.value,
            "dynamic": float(self.pairs_that_move >= needed) if self.flow.count else math.nan,
            **camera.numbers(),
        }


@dataclass(slots=True)
class Slope:
    """Least squares of values over time, from running sums."""

    n: int = 0
    t: float = 0.0
    v: float = 0.0
    tt: float = 0.0
    tv: float = 0.0

    def add(self, time: float, value: float) -> None:
        """Welford's update, so that long videos lose no digits."""
        self.n += 1
        dt = time - self.t
        self.t += dt / self.n
        self.v += (value - self.v) / self.n
        self.tt += dt * (time - self.t)
        self.tv += dt * (value - self.v)

    @property
    def value(self) -> float:
        """Change in a second."""
        return divided(self.tv, self.tt)


def repeats(thumbnails: Thinned, apart: float) -> float:
    """How much the frame that comes back most is like itself: 1 is an exact copy.

    1 - the least distance of two thumbnails at least `apart` frames from each other, in units of
    the mean distance of all such pairs. NaN for videos that are too short.
    """
    if len(thumbnails.kept) < 2:
        return math.nan
    places = torch.tensor([float(place) for place, _ in thumbnails.kept])
    values = torch.stack([value for _, value in thumbnails.kept])
    distances = torch.cdist(values, values)[(places[:, None] - places[None]) >= apart]
    if not len(distances):
        return math.nan
    return 1 - divided(float(distances.min()), float(distances.mean()))


def divided(value: float, by: float) -> float:
    return value / by if by else math.nan


def measure(
    frames: Iterable[Tensor], fps: float, chunk: int = 0, first_chunk: int = 0
) -> dict[str, float]:
    """Numbers of a video whose frames [H, W, 3] uint8 come one by one. See `VideoMeter`."""
    meter = VideoMeter(fps, chunk, first_chunk)
    for frame in frames:
        meter.add(frame)
    return meter.numbers()
