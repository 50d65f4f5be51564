"""How scores change over a long video: curves of all methods, from the windows of each video."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from selfforcing_dfd.evaluation.curves import PALETTE, figure, svg
from selfforcing_dfd.protocol.results import CHANGE, Result, Unit, by_unit
from selfforcing_dfd.tiny.bootstrap import Resamples, Score

CURVES = (
    "saturation",
    "contrast",
    "luma",
    "laplacian",
    "difference_by_contrast",
    "flow",
    "seam_excess",
    "frozen",
)


@dataclass(frozen=True, slots=True)
class Curve:
    """A score of one method over time: the mean of all videos in each stretch, by prompts.

    points: (seconds from the video's beginning to the middle of the stretch, score).
    """

    method: str
    score: str
    points: list[tuple[float, Score]]


def curve_of(result: Result, score: str) -> Curve:
    """Only stretches that all videos of the method have."""
    shortest = min((len(each["windows"]) for each in result.numbers), default=0)
    points = []
    for place in range(shortest):
        values: dict[Unit, float] = {}
        for cell, numbers in zip(result.cells, result.numbers, strict=True):
            value = numbers["windows"][place]["numbers"][score]
            if value is not None:
                values[cell.key] = value
        groups = list(by_unit(values, "prompt").values())
        if groups:
            window = result.numbers[0]["windows"][place]
            middle = window["start_s"] + window["frames"] / result.numbers[0]["settings"]["fps"] / 2
            every = Resamples.draw(len(groups), seed=0)
            mean = every.score(every.mean(torch.tensor(groups, dtype=torch.float64)))
            points.append((middle, mean))
    return Curve(result.method, score, points)


def all_curves(results: Mapping[str, Result]) -> list[Curve]:
    """Every score of CURVES of every method whose videos have stretches."""
    found = [curve_of(result, score) for score in CURVES for result in results.values()]
    return [curve for curve in found if curve.points]


def add_changes(result: Result) -> None:
    """Add each video's last stretch less its first to the scores that are compared in pairs."""
    changes: dict[str, dict[Unit, float]] = defaultdict(dict)
    for cell, numbers in zip(result.cells, result.numbers, strict=True):
        windows = numbers["windows"]
        if len(windows) > 1:
            for score in CURVES:
                first = windows[0]["numbers"][score]
                last = windows[-1]["numbers"][score]
                if first is not None and last is not None:
                    changes[f"{CHANGE}{score}"][cell.key] = last - first
    result.values |= changes


def plots(curves: list[Curve], methods: list[str]) -> Iterator[tuple[str, str]]:
    """(score, SVG document): a line for each method, with its 95 % interval over prompts.

    A method with a single stretch is a level line: all that is known of it.
    """
    ends = [seconds for curve in curves for seconds, _ in curve.points]
    for score in dict.fromkeys(curve.score for curve in curves):
        with figure(3.6, 2.0) as (drawing, axes):
            for curve in curves:
                if curve.score != score:
                    continue
                colour = PALETTE[methods.index(curve.method) % len(PALETTE)]
                times = [seconds for seconds, _ in curve.points]
                values = [point.value for _, point in curve.points]
                if len(times) == 1:
                    axes.axhline(values[0], color=colour, linestyle="--")
                    continue
                low = [point.low for _, point in curve.points]
                high = [point.high for _, point in curve.points]
                axes.plot(times, values, color=colour)
                axes.fill_between(times, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.set_xlim(0, max(ends))
            axes.set_xlabel("seconds")
            yield score, svg(drawing)
