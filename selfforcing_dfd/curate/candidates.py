"""Candidates of a cluster: clips at even ranks of the distance to its centre, looked at closely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfforcing_dfd.curate.intake import FrameReader
from selfforcing_dfd.data.source import ClipError
from selfforcing_dfd.data.sources.listing import Clip
from selfforcing_dfd.metrics.appearance import luma

DARKEST = 0.04  # mean luma of a clip that can be used, of 1
STILLEST = 0.1  # mean difference of neighbouring frames, of 255; what coding leaves of none
JUMP = 8.0  # largest difference of neighbouring frames beside the median: there is a cut in it


@dataclass(frozen=True, slots=True)
class Candidate:
    """A clip that may be picked.

    number: in its cluster's sheet. row: of the features. problem: why it cannot be read; empty if
    it can. light: mean luma, of 1. motion: median difference of neighbouring frames, of 255. jump:
    the largest such difference in units of the median. sharpness: mean gradient of luma.
    """

    number: int
    row: int
    clip: str
    distance: float
    problem: str = ""
    light: float = 0.0
    motion: float = 0.0
    jump: float = 0.0
    sharpness: float = 0.0

    @property
    def fault(self) -> str:
        """What is wrong with it, in a word; empty for a clip that may be picked unseen."""
        if self.problem:
            return "unreadable"
        if self.light < DARKEST:
            return "dark"
        if self.motion < STILLEST:
            return "frozen"
        return "cut" if self.jump > JUMP else ""

    def to_fields(self) -> dict[str, Any]:
        return asdict(self)


def even_ranks(count: int, most: int) -> list[int]:
    """At most `most` ranks of `count`, at even distances, the first and the last among them."""
    return sorted({round(float(rank)) for rank in np.linspace(0, count - 1, min(most, count))})


@dataclass(frozen=True, slots=True)
class Shown:
    """A candidate with pictures of it, uint8 [pictures, H, W, 3]; None for an unreadable one."""

    candidate: Candidate
    pictures: Tensor | None


def look_at(reader: FrameReader, clip: Clip, candidate: Candidate, num_pictures: int) -> Shown:
    """Read a candidate's frames; see `Candidate` for what is measured."""
    try:
        frames = reader.read(clip)
    except ClipError as error:
        fields = {**candidate.to_fields(), "problem": error.reason}
        return Shown(Candidate(**fields), None)
    fields = {**candidate.to_fields(), **measured(frames)}
    places = torch.linspace(0, len(frames) - 1, num_pictures).round().long()
    return Shown(Candidate(**fields), frames[places])


def measured(frames: Tensor) -> dict[str, float]:
    """light, motion, jump and sharpness of frames uint8 [T, H, W, 3], rounded."""
    pairs = pairwise(frames.float())
    steps = [float((after - before).abs().mean()) for before, after in pairs]
    usual = median(steps) if steps else 0.0
    grey = [luma(frame.float()) for frame in frames]
    sharpness = [gradient(picture) for picture in grey]
    found = {
        "light": float(torch.stack(grey).mean()) / 255,
        "motion": usual,
        "jump": max(steps, default=0.0) / max(usual, STILLEST),
        "sharpness": sum(sharpness) / len(sharpness),
    }
    return {name: round(value, 6) for name, value in found.items()}


def gradient(grey: Tensor) -> float:
    """Mean absolute difference of neighbouring pixels, of 255."""
    steps = [grey.diff(dim=0).abs().flatten(), grey.diff(dim=1).abs().flatten()]
    return float(torch.cat(steps).mean())


def pick_by_rule(
    candidates: Sequence[Candidate], features: np.ndarray, wanted: int, duplicate: float
) -> list[int]:
    """Numbers of candidates that differ most, for a baseline without a person.

    Candidates with a fault are left out, and those less sharp than nineteen in twenty. The first
    is the nearest to the centre; each further one is the farthest from all before it. One whose
    cosine with any of them is above `duplicate` ends the search. features: unit vectors
    [candidates, D].
    """
    sharpness = [one.sharpness for one in candidates if not one.fault]
    if not sharpness:
        return []
    least = float(np.quantile(sharpness, 0.05))
    left = [n for n, one in enumerate(candidates) if not one.fault and one.sharpness >= least]
    cosines = features @ features.T
    picked = [left[0]]
    while len(picked) < wanted:
        nearest = cosines[:, picked].max(axis=1)
        far = min(left, key=lambda n: (float(nearest[n]), n))
        if far in picked or nearest[far] > duplicate:
            break
        picked.append(far)
    return sorted(candidates[n].number for n in picked)
