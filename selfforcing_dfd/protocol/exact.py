"""The tiny world's exact counts in a protocol: what is read from the pixels of its video files.

A video is read in stretches that are as long as a clip of the world. Modes are counted in the first
stretch of every video, since the law is that of clips; shares and means are over all stretches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from selfforcing_dfd.common import UserError
from selfforcing_dfd.protocol.plan import TINY_DATA, Protocol
from selfforcing_dfd.tiny.bootstrap import Resamples
from selfforcing_dfd.tiny.codec import TIME
from selfforcing_dfd.tiny.metrics import mode_laws, mode_scores
from selfforcing_dfd.tiny.readout import Reading, read
from selfforcing_dfd.tiny.world import CLIP_FRAMES, SIDE, parse_caption

EXACT = "exact."
OVER_VALID = {
    "saturation": "saturation",
    "speed_px": "speed_px",
    "jitter_px": "jitter",
    "seam_excess_px": "seam_excess",
}
"""Our name of a mean over valid stretches -> the field of `Reading`."""
OVER_TIME = tuple(f"{EXACT}{name}" for name in ("valid", "saturation", "contrast", "speed_px"))
OF_CAPTIONS = ("shape", "hue", "direction", "speed", "size")
SHOWN = ("modes", "coverage", "kl_prior_sample", "kl_floor", "valid", "moving", "shape", "hue")
"""Of all counts those of a report's first table."""


def is_exact(protocol: Protocol) -> bool:
    """Whether its videos are of the tiny world, so that they can be counted."""
    return protocol.methods[protocol.data].kind == TINY_DATA


class StretchReader:
    """Reads a video's frames, which come one by one, in stretches of a clip's length.

    A later stretch leaves out its first three video frames, so that it begins, as a clip does, with
    the last frame of a latent frame. A rest that is shorter is not read. Memory: one stretch.
    """

    def __init__(self, chunk_frames: int) -> None:
        self.chunk_frames = chunk_frames
        self._frames: list[Tensor] = []
        self._readings: list[Reading] = []

    def add(self, frame: Tensor) -> None:
        """frame: [H, W, 3] uint8. Raises UserError for another size than the world's."""
        if tuple(frame.shape) != (SIDE, SIDE, 3):
            height, width = frame.shape[:2]
            raise UserError(
                f"a video is {width}x{height}, and clips of the tiny world are {SIDE}x{SIDE}; "
                "with data of kind tiny_data all methods make such videos"
            )
        self._frames.append(frame)
        skipped = TIME - 1 if self._readings else 0
        if len(self._frames) == CLIP_FRAMES + skipped:
            self._read(self._frames[skipped:])
            self._frames = []

    def found(self) -> list[dict[str, Any]]:
        """A reading of each stretch, ready for JSON; of a video below a clip's length, its own."""
        if not self._readings:
            self._read(self._frames)
        return [as_json(reading) for reading in self._readings]

    def _read(self, frames: Sequence[Tensor]) -> None:
        self._readings.append(
            read(torch.stack(list(frames))[None].float() / 255, self.chunk_frames)
        )


def as_json(reading: Reading) -> dict[str, Any]:
    """Of one clip, without its pixels."""
    return {
        field.name: getattr(reading, field.name)[0].tolist()
        for field in fields(Reading)
        if field.name != "pixels"
    }


def from_json(content: Mapping[str, Any]) -> Reading:
    """Inverse of `as_json`, with no pixels."""
    return Reading(**{name: torch.tensor([each]) for name, each in content.items()}, pixels=_NONE)


_NONE = torch.zeros(1, 0)


def counts(readings: Sequence[Reading], captions: Sequence[str]) -> dict[str, float]:
    """Modes, coverage and divergences of the videos' first stretches, by `exact.` name."""
    joined = Reading.join(readings)
    every = Resamples.draw(len(joined), seed=0)
    scores = mode_scores(joined, mode_laws(captions), every)
    return {f"{EXACT}{name}": score.value for name, score in scores.items()}


def change_of_video(stretches: Sequence[Reading], caption: str) -> dict[str, float]:
    """The last stretch less the first, by `exact.` name; nothing for a single one."""
    if len(stretches) < 2:
        return {}
    first = of_video(stretches[:1], caption)
    last = of_video(stretches[-1:], caption)
    return {name: last[name] - first[name] for name in OVER_TIME if name in first and name in last}


def of_video(stretches: Sequence[Reading], caption: str) -> dict[str, float]:
    """Shares and means over the stretches of one video, by `exact.` name.

    The share of stretches that show what the caption names is of valid ones, for each factor that
    it names. What only valid stretches have is missing where there is none.
    """
    named = parse_caption(caption)
    values: dict[str, list[float]] = defaultdict(list)
    for reading in stretches:
        values["valid"].append(float(reading.valid))
        values["moving"].append(float(reading.moving))
        values["contrast"].append(float(reading.contrast))
        if not reading.valid:
            continue
        for name, field in OVER_VALID.items():
            values[name].append(float(getattr(reading, field)))
        for factor in OF_CAPTIONS:
            if factor in named:
                values[factor].append(float(getattr(reading, factor) == named[factor]))
    return {f"{EXACT}{name}": sum(found) / len(found) for name, found in values.items()}
