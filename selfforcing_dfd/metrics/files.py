"""Videos as files, measured one by one, and the file of results that tables are made from."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import torch
from torch import Tensor

import selfforcing_dfd
from selfforcing_dfd.common import UserError, atomic_file, give_back_memory, sha256_of
from selfforcing_dfd.data.source import ClipError
from selfforcing_dfd.data.sources.video import VIDEOS, decoded_strictly, rate_of
from selfforcing_dfd.metrics.video import METRICS_VERSION, VideoMeter

SCHEMA = 1
# Frames. A few numbers of each are kept, between large blocks that are needed for a moment; what is
# free there is too small for others. So 1,000 frames of 480 x 832 took 2.2 GB, and .5 GB now.
GIVE_BACK_EVERY = 32


@dataclass(frozen=True, slots=True)
class Measured:
    """One video.

    seconds: that measuring took. numbers: by metric; NaN where there is none. track: of the
    picture, see `VideoMeter.track`.
    """

    file: Path
    frames: int
    fps: float
    size: tuple[int, ...]
    seconds: float
    numbers: Mapping[str, float]
    track: Tensor

    @property
    def speed(self) -> float:
        """How many times as fast as the video plays."""
        return self.frames / self.fps / self.seconds


def find_videos(paths: Sequence[Path]) -> list[Path]:
    """The files, and the videos in folders, in order. UserError for none."""
    found = []
    for path in paths:
        inside = sorted(each for each in path.rglob("*") if each.suffix.lower() in VIDEOS)
        if path.is_dir() and not inside:
            raise UserError(f"{path} holds no video; want files that end in {', '.join(VIDEOS)}")
        if not path.exists():
            raise UserError(f"{path} does not exist; name a video, or a folder of videos")
        found += inside if path.is_dir() else [path]
    return found


def frames_of(path: Path) -> Iterator[Tensor]:
    """Frames [H, W, 3] uint8, one at a time. ClipError for a damaged video."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ClipError(path.name, "no video stream; want a file with pictures in it")
            for frame in decoded_strictly(container, path.name):
                yield torch.from_numpy(frame.to_ndarray(format="rgb24"))
    except (av.error.FFmpegError, OSError) as error:
        problem = f"cannot be read ({error}); encode it again or leave it out"
        raise ClipError(path.name, problem) from error


def measure_file(
    path: Path,
    fps: float | None = None,
    chunk: int = 0,
    first_chunk: int = 0,
    seen: Callable[[Tensor], object] = lambda frame: None,
) -> Measured:
    """All metrics of a video. ClipError for one that is damaged or states no rate.

    fps: to take in place of the file's. chunk, first_chunk: see `VideoMeter`. seen: called after
    every frame.
    """
    rate = fps or rate_of(path)
    if not rate:
        list(frames_of(path))  # a damaged file says so itself
        raise ClipError(path.name, "states no frames a second; give --fps")
    meter = VideoMeter(float(rate), chunk, first_chunk)
    started = time.perf_counter()
    try:
        for frame in frames_of(path):
            meter.add(frame)
            seen(frame)
            if meter.frames % GIVE_BACK_EVERY == 0:
                give_back_memory()
    except ValueError as error:
        raise ClipError(path.name, f"{error}; leave it out") from error
    if not meter.frames:
        raise ClipError(path.name, "has no frame; leave it out")
    seconds = time.perf_counter() - started
    return Measured(
        path,
        meter.frames,
        meter.fps,
        meter.size[:2],
        seconds,
        numbers=meter.numbers(),
        track=meter.track(),
    )


def evaluation(measured: Sequence[Measured], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `evaluation.json` holds: everything that a number needs to be repeated."""
    names = list(measured[0].numbers)
    means = {name: mean_of([each.numbers[name] for each in measured]) for name in names}
    return {
        "schema": SCHEMA,
        "metrics": METRICS_VERSION,
        "settings": dict(settings),
        "software": {
            "selfforcing_dfd": selfforcing_dfd.__version__,
            "torch": torch.__version__,
            "pyav": av.__version__,
        },
        "videos": [described(each) for each in measured],
        "means": {name: stated(value) for name, value in means.items()},
    }


def described(video: Measured) -> dict[str, Any]:
    """One video. `made` is what a protocol has written beside it: weights, recipe, prompt, seed."""
    return {
        "file": video.file.name,
        "sha256": sha256_of(video.file),
        "frames": video.frames,
        "fps": video.fps,
        "size": list(video.size),
        "speed": round(video.speed, 3),
        "numbers": {name: stated(value) for name, value in video.numbers.items()},
        "made": made_of(video.file),
    }


def made_of(video: Path) -> dict[str, Any] | None:
    """What made a video, from NAME.json beside NAME.mp4; None where nothing says so."""
    beside = video.with_suffix(".json")
    if not beside.is_file():
        return None
    content = json.loads(beside.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) and "made" in content else None


def mean_of(values: Sequence[float]) -> float:
    """Of the values that are there; NaN for none."""
    there = [value for value in values if math.isfinite(value)]
    return sum(there) / len(there) if there else math.nan


def stated(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def write_evaluation(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
