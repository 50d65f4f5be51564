"""Draws the pictures of docs/running.md from the metrics of real runs of the tiny world.

    python docs/curves/draw.py RUNS DMD      # two folders

RUNS holds what `selfforcing-dfd train --config dfd_ar` writes, and the recipes that it starts from.
DMD is a run of `tiny/dmd.yaml` with 30 student updates.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from selfforcing_dfd.evaluation.curves import (
    PALETTE,
    QUIET,
    Panel,
    Points,
    Series,
    curve,
    figure,
    svg,
)
from selfforcing_dfd.training.metrics import SIGMA_BINS
from selfforcing_dfd.training.tracking import read_metrics

Lines = Sequence[Mapping[str, Any]]
QUIET_BAND = "flow_loss/sigma<=0.9"  # noise levels at which the loss varies least
SMOOTH = 5  # updates that a curve is averaged over


def smoothed(points: Points, width: int = SMOOTH) -> Points:
    """Each value as the mean of itself and its neighbours."""
    half = width // 2
    return tuple(
        (x, mean(y for _, y in points[max(n - half, 0) : n + half + 1]))
        for n, (x, _) in enumerate(points)
    )


def ratios(lines: Lines) -> Panel:
    """The guards: properties of the student's clips over those of the data."""
    names = ("saturation", "contrast", "motion", "spread")
    series = [
        Series(name, smoothed(curve(lines, "student", f"{name}_ratio")), colour)
        for colour, name in enumerate(names, start=1)
    ]
    return Panel("guards: samples / data", "ratio", tuple(series), reference=1.0)


def branches(lines: Lines) -> Panel:
    """|fake - teacher| in rows anchored by the student's sample, and in rows anchored by data."""
    dmd = Series("DMD", smoothed(curve(lines, "student", "discrepancy/dmd")), 3)
    dfd = Series("DFD", smoothed(curve(lines, "student", "discrepancy/dfd")), 4, dashed=True)
    return Panel("|fake - teacher|, by branch", "latents", (dmd, dfd))


def by_sigma(lines: Lines) -> Panel:
    """The fake score's loss in each interval of noise levels."""
    series = [
        Series(
            f"sigma up to {high:g}", smoothed(curve(lines, "fake", f"flow_loss/sigma<={high:g}")), n
        )
        for n, high in enumerate(SIGMA_BINS[1:])
    ]
    return Panel("fake score, by noise level", "loss", tuple(series))


def lag(lines: Lines) -> Panel:
    """The fake score's loss in the first turn after a student update, and in the last."""
    cycles: dict[int, list[float]] = defaultdict(list)
    for line in lines:
        if line["kind"] == "fake" and line.get(QUIET_BAND) is not None:
            cycles[line["student_update"]].append(line[QUIET_BAND])
    first = tuple((float(update), losses[0]) for update, losses in sorted(cycles.items()))
    last = tuple((float(update), losses[-1]) for update, losses in sorted(cycles.items()))
    return Panel(
        "critic lag: turns of a cycle, sigma .8 to .9",
        "loss",
        (Series("first turn", smoothed(first), 4), Series("last turn", smoothed(last), 1)),
    )


def error(lines: Lines, metric: str, title: str) -> Panel:
    return Panel(title, "loss", (Series(metric, smoothed(curve(lines, "student", metric), 9), 1),))


def draw(panel: Panel) -> str:
    """A panel with names beside its curves."""
    with figure(4.2, 2.1) as (drawing, axes):
        for series in panel.series:
            xs, values = zip(*series.points, strict=True)
            style = "--" if series.dashed else "-"
            axes.plot(xs, values, style, color=PALETTE[series.colour], label=series.name)
        if panel.reference is not None:
            axes.axhline(panel.reference, color=QUIET, linestyle=":", linewidth=1)
        axes.set_xlabel("student update")
        axes.set_ylabel(panel.unit)
        axes.set_title(panel.title, fontsize=8.5)
        if len(panel.series) > 1:
            axes.legend(frameon=False, fontsize=7.5, loc="center left", bbox_to_anchor=(1, 0.5))
        return svg(drawing)


def main(runs: Path, dmd: Path) -> None:
    def metrics(run: str) -> Lines:
        return read_metrics(runs / run / "metrics.jsonl")

    control = metrics("dfd_ar/control")
    run_on = metrics("dfd_ar/paper_run_on")
    pictures = {
        "healthy_teacher": error(metrics("tiny/teacher_all"), "flow_loss", "teacher"),
        "healthy_student": error(metrics("tiny/stable"), "error", "student of stage regression"),
        "by_sigma": by_sigma(control),
        "lag": lag(control),
        "branches": branches(run_on),
        "healthy_guards": ratios(read_metrics(dmd / "metrics.jsonl")),
        "sick_saturation": ratios(control),
        "sick_grey": ratios(run_on),
    }
    for name, panel in pictures.items():
        Path(__file__).with_name(f"{name}.svg").write_text(draw(panel), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
