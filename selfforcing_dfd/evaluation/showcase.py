"""Pictures of a finished comparison for a front page: clips that move, or scores as dots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfforcing_dfd.common import atomic_file
from selfforcing_dfd.config import Config, require
from selfforcing_dfd.evaluation import curves, tables
from selfforcing_dfd.evaluation.combine import load_report
from selfforcing_dfd.evaluation.page import colours
from selfforcing_dfd.evaluation.pictures import (
    labelled,
    shrunk,
    side_by_side,
    to_uint8,
    write_moving_picture,
)
from selfforcing_dfd.evaluation.sources import sources
from selfforcing_dfd.evaluation.tables import DATA, Metric, Row
from selfforcing_dfd.evaluation.worlds import world_named, world_of
from selfforcing_dfd.stages import load_config
from selfforcing_dfd.weights.runs import config_of

MOVING = (".gif", ".webp")
PLOTS = (".svg", ".png")


def write_showcase(
    run: Path, out: Path, labels: Mapping[str, str], metrics: Sequence[str] = ()
) -> None:
    """Show some rows of a run's report in one picture, by the ending of `out`.

    .gif, .webp: the first clips of the evaluation set, rows side by side. .svg, .png: metrics with
    their intervals, from report.json. labels: the rows to show, with the text for each. metrics:
    keys to plot; all by default. Raises UserError for an unknown ending, row or metric.
    """
    require(
        out.suffix in MOVING + PLOTS,
        f"{out} ends in {out.suffix or 'nothing'}; use one of {', '.join(MOVING + PLOTS)}",
    )
    if out.suffix in PLOTS:
        plot_scores(run, out, labels, metrics)
        return
    show_clips(load_config(str(config_of(run))), out, labels)


def show_clips(config: Config, out: Path, labels: Mapping[str, str]) -> None:
    """A moving picture of each row's first clips, in step."""
    world = world_of(config)
    layout = world.layout
    found = {source.name: source for source in sources(config, world)}
    check_known("row", labels, found)
    evaluation = world.draw(config, layout.compared_clips)
    decode = world.decoder(config)
    rows = {}
    for name in labels:
        clips = torch.cat([to_uint8(part) for part in found[name].clips(evaluation, decode)])
        rows[name] = shrunk(clips, layout.max_width)
    frames = side_by_side(rows, layout.compared_columns, layout.scale)
    write_moving_picture(out, labelled(frames, list(labels.values())), layout.fps)


def plot_scores(run: Path, out: Path, labels: Mapping[str, str], metrics: Sequence[str]) -> None:
    """One panel for each metric: every row's value with its interval, the data's as a band."""
    report = load_report(run)
    world = world_named(report["world"])
    rows = {row.name: row for row in map(tables.from_json, report["rows"])}
    known = {metric.key: metric for metric in tables.shown(list(rows.values()), world.metrics)}
    check_known("row", labels, rows)
    check_known("metric", metrics, known)
    wanted = [known[key] for key in metrics or known]
    colour = colours(list(rows.values()))
    with matplotlib.rc_context(curves.STYLE):
        size = (2.5 * len(wanted), 0.8 + 0.3 * len(labels))
        drawing = Figure(figsize=size, layout="constrained")
        panels = drawing.subplots(1, len(wanted), sharey=True, squeeze=False)[0]
        for axes, metric in zip(panels, wanted, strict=True):
            plot_metric(axes, metric, [rows[name] for name in labels], rows.get(DATA), colour)
        panels[0].set_yticks(range(len(labels)), list(labels.values()))
        panels[0].invert_yaxis()
        with atomic_file(out) as partial:
            # without a date, equal scores give equal files
            drawing.savefig(
                partial, transparent=True, dpi=150, metadata=curves.NO_METADATA[out.suffix]
            )


def plot_metric(
    axes: Axes, metric: Metric, rows: Sequence[Row], data: Row | None, colour: Mapping[str, int]
) -> None:
    """Dots with intervals, one line a row."""
    if data is not None and metric.key in data.scores:
        score = data.scores[metric.key]
        axes.axvspan(score.low, score.high, color=curves.LIGHT, linewidth=0)
    for line, row in enumerate(rows):
        if metric.key not in row.scores:
            continue  # a bidirectional teacher does not go on from a chunk
        score = row.scores[metric.key]
        shade = curves.PALETTE[colour[row.name]]
        axes.plot([score.low, score.high], [line, line], color=shade)
        axes.plot(score.value, line, "o", color=shade, markersize=5)
        number = tables.number(score.value, metric.digits)
        axes.annotate(number, (score.value, line), (0, 5), textcoords="offset points", ha="center")
    axes.set_title(metric.title.replace("||", "‖"), fontsize=9.5)
    axes.margins(x=0.15, y=0.25)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def check_known(
    what: str, wanted: Sequence[str] | Mapping[str, str], known: Mapping[str, object]
) -> None:
    for name in wanted:
        require(name in known, f"no {what} {name!r}; there are {', '.join(known)}")
