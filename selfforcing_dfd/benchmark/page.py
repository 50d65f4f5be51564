"""A benchmark's result as one HTML file: headline, bars of the stages, all figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from selfforcing_dfd.benchmark.headline import headline, time_of
from selfforcing_dfd.benchmark.table import environment_lines, remarks, rows, shown

REST = ("denoise_rest", "commit_rest", "convert_and_copy", "copy_and_rest", "unattributed")
"""Parts that are what is left of a stage; they are shown in another colour."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One part of a time. share: of the chart's longest bar, in per cent."""

    name: str
    share: float
    text: str
    is_rest: bool


@dataclass(frozen=True, slots=True)
class Chart:
    title: str
    about: str
    bars: tuple[Bar, ...]


def render(result: dict[str, Any]) -> str:
    """The page; it fetches nothing."""
    loader = PackageLoader(__package__, "templates")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    title, *setting = environment_lines(result)
    measured = [row for row in rows(result) if row[1] is not None]
    environment.filters["shown"] = shown
    return environment.get_template("benchmark.html").render(
        title=title,
        setting=setting,
        headline=[line.split("  ", 1) for line in headline(result)],
        remarks=list(remarks(result)),
        charts=charts(result),
        rows=measured,
        facts=result["environment"].items(),
    )


def charts(result: dict[str, Any]) -> list[Chart]:
    """Stages of a chunk, parts of the first frame, and the ramp."""
    stages = dict(result["stages_ms"])
    wall = stages.pop("wall")
    ramp = {f"chunk {i}": ms for i, ms in enumerate(result["ramp_latency_ms"])}
    found = [
        chart(
            "A chunk of the steady state, by stage",
            f"Mean times; together {time_of(wall)} from one chunk to the next.",
            stages,
        )
    ]
    for kind in ("warm", "cached", "cold"):
        total = time_of(result[f"ttff_{kind}_ms"])
        parts = result[f"ttff_split_{kind}_ms"]
        found.append(chart(f"The first frame, {kind}", f"Together {total}.", parts))
    about = "Chunks from the start of a stream, until the window is full and the sink moves."
    return [*found, chart("The ramp", about, ramp)]


def chart(title: str, about: str, times_ms: Mapping[str, float]) -> Chart:
    """Bars of these times; a negative one, where stages overlap, has no length."""
    longest = max(*times_ms.values(), 1e-9)
    bars = tuple(
        Bar(
            name.replace("_", " "),
            round(100 * max(ms, 0.0) / longest, 2),
            f"-{time_of(-ms)}" if ms < 0 else time_of(ms),
            name in REST,
        )
        for name, ms in times_ms.items()
    )
    return Chart(title, about, bars)
