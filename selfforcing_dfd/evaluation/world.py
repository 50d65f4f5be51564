"""What a report asks of the world that a run's clips belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from selfforcing_dfd.common import UserError
from selfforcing_dfd.config import Config
from selfforcing_dfd.evaluation.generate import Decode, EvaluationSet, GoOn, Videos
from selfforcing_dfd.evaluation.tables import Finding, Metric, Row, Run
from selfforcing_dfd.tiny.bootstrap import Score


@dataclass(frozen=True, slots=True)
class Layout:
    """How many of a row's first clips its pictures show, and how large.

    columns: clips beside each other in a sample video. scale: whole pixels for one in sample
    videos. max_width: pixels of a clip in contact sheets and in the comparison of all rows.
    """

    fps: int
    sample_clips: int
    sample_columns: int
    scale: int
    sheet_clips: int
    compared_clips: int
    compared_columns: int
    max_width: int


@dataclass(frozen=True, slots=True)
class Measured:
    """A row's scores; modes: number of moving clips in each mode, empty without modes."""

    scores: Mapping[str, Score]
    modes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture of the report for one row. svg: a whole SVG document."""

    row: str
    about: str
    svg: str


def refuse_given(config: Config) -> None:
    """Raise UserError where captions alone make no clips, since the first frames are given."""
    if config.rollout.given:
        raise UserError(
            f"rollout.given is {config.rollout.given}: clips of this run begin with given frames, "
            "and a caption has none; leave the captions out, or use inference/stream.py --image"
        )


class World(Protocol):
    """Everything about a kind of video that a report has to know. Worlds keep no state.

    name: in report.json. title: for people. metrics: the lines of the table, in order. glossary:
    words of the report and what they mean. chart_about: one sentence on `charts`.
    """

    name: str
    title: str
    metrics: tuple[Metric, ...]
    layout: Layout
    glossary: Mapping[str, str]
    chart_about: str

    def decoder(self, config: Config) -> Decode:
        """The codec of the run's shards."""
        ...

    def draw(self, config: Config, num_clips: int) -> EvaluationSet:
        """Captions of real clips; `real_clips` shows the same clips."""
        ...

    def ask(self, config: Config, captions: Sequence[str]) -> EvaluationSet:
        """A user's captions. Raises UserError for one that the world has no text for."""
        ...

    def real_clips(self, config: Config, evaluation: EvaluationSet, decode: Decode) -> Videos:
        """The real clips of a set that `draw` made, once through the codec."""
        ...

    def has_real_clips(self, config: Config) -> bool:
        """False where the run's data are captions without clips."""
        ...

    def measure(self, videos: Videos, captions: Sequence[str], chunk_frames: int) -> Measured:
        """The scores of one row's clips."""
        ...

    def follow(
        self, config: Config, evaluation: EvaluationSet, decode: Decode, go_on: GoOn
    ) -> Mapping[str, Score]:
        """How a row continues real clips; nothing where the world has no such test."""
        ...

    def findings(self, rows: Sequence[Row]) -> list[Finding]:
        """One sentence for each row that is judged, from a single run. It is no verdict."""
        ...

    def headline(self, rows: Sequence[Row], num_clips: int, num_runs: int = 1) -> str:
        """One sentence for a stranger, from these rows; empty where the world counts nothing.

        num_clips: of each row and run. num_runs: over which the scores are means.
        """
        ...

    def verdict(self, runs: Sequence[Run]) -> list[Finding]:
        """One sentence for each arm and control, over runs; nothing without a rule for it."""
        ...

    def background(self, config: Config) -> str:
        """What is known about the methods that this run compares; may be empty."""
        ...

    def notes(self, rows: Sequence[Row], num_runs: int = 1) -> list[str]:
        """How to read this world's numbers; what holds for every world is added to it."""
        ...

    def charts(self, rows: Sequence[Row]) -> list[Chart]:
        """One chart for each row; none where the world has nothing to count."""
        ...

    def facts(self) -> dict[str, Any]:
        """Constants of the world that report.json repeats."""
        ...
