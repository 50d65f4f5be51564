"""Tables of arms along their way: doses, the front, long runs, streams, the gap."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from selfforcing_dfd.evaluation.tables import START, number
from selfforcing_dfd.evaluation.tiny_verdict import mean
from selfforcing_dfd.study.compare import Mean, along, front, gaps, rank_correlation
from selfforcing_dfd.study.plan import LONG
from selfforcing_dfd.study.results import Scores, Study

COLUMNS = {
    "valid": ("validity", 2),
    "modes": ("modes of 72", 0),
    "coverage": ("coverage", 2),
    "kl_prior_sample": ("KL", 2),
    "follow": ("goes on", 2),
    "saturation": ("saturation", 2),
    "contrast": ("contrast", 2),
    "speed_px": ("speed, px", 2),
    "jitter_px": ("jitter, px", 2),
    "seam_excess_px": ("seam excess, px", 2),
}
DOSE_COLUMNS = ("coverage", "kl_prior_sample", "valid", "saturation", "contrast", "speed_px")
STREAMED = ("valid", "saturation", "contrast", "speed_px", "seam_excess_px")
Table = list[list[str]]


def doses(study: Study) -> Iterator[str]:
    """Data-forced arms along their way, in units of the DMD run before."""
    forced = [arm for arm, facts in study.arms.items() if facts.forced and not arm.endswith(LONG)]
    if not forced:
        return
    yield "## Dose"
    yield (
        "Means over runs along the data-forced arms. A dose is student updates in units of the DMD "
        f"run before, which had {study.dmd_updates}."
    )
    table = [["arm", "updates", "dose", *(COLUMNS[key][0] for key in DOSE_COLUMNS)]]
    for arm in forced:
        scores = {key: dict(along(study, arm, key)) for key in DOSE_COLUMNS}
        for update in sorted(set().union(*scores.values())):
            cells = [
                number(own[update].value, COLUMNS[key][1]) if update in own else "-"
                for key, own in scores.items()
            ]
            table.append([arm, str(update), f"{update / study.dmd_updates:.2f}", *cells])
    yield markdown(table)


def the_front(study: Study) -> Iterator[str]:
    yield "## The front of coverage against contrast and validity"
    yield (
        "Points of all arms, means over runs, that no other point beats in coverage, in the "
        "distance of contrast to the teacher's, and in validity together."
    )
    table = [["arm", "updates", "runs", "coverage", "contrast / teacher", "validity"]]
    for point in front(study):
        texts = [f"{each:.2f}" for each in (point.coverage, point.contrast, point.valid)]
        table.append([point.arm, str(point.update), str(point.num_runs), *texts])
    yield markdown(table)


def long_runs(study: Study) -> Iterator[str]:
    """Lengthened arms along their way."""
    arms = [arm for arm in study.arms if arm.endswith(LONG) and study.runs_of(arm)]
    if not arms:
        return
    yield f"## Stability at {study.long} times the length"
    table = [["arm", "updates", *(title for title, _ in COLUMNS.values())]]
    for arm in arms:
        scores = {key: dict(along(study, arm, key)) for key in COLUMNS}
        for update in sorted(scores["coverage"]):
            cells = [
                ranged(own[update], COLUMNS[key][1]) if update in own else "-"
                for key, own in scores.items()
            ]
            table.append([arm, str(update), *cells])
    yield markdown(table)


def streams(study: Study) -> Iterator[str]:
    """Free streams at 1, 4 and 16 training lengths."""
    of_starts = [stream for stream in study.start_streams.values() if stream]
    by_arm: dict[str, list[list[Scores]]] = {START: of_starts}
    for run in study.runs:
        if run.stream:
            by_arm.setdefault(run.arm, []).append(run.stream)
    if not any(by_arm.values()):
        return
    yield "## Free streaming"
    lengths = [length for length in (1, 4, 16) if length <= longest(by_arm)]
    yield (
        f"Streams without end, read at {' -> '.join(map(str, lengths))} training lengths; means "
        "over streams and runs."
    )
    table = [["", "runs", *(COLUMNS[key][0] for key in STREAMED)]]
    for arm, several in by_arm.items():
        cells = []
        for key in STREAMED:
            values = [streamed(several, key, length - 1) for length in lengths]
            cells.append(" -> ".join(number(each, COLUMNS[key][1]) for each in values))
        if several:
            table.append([arm, str(len(several)), *cells])
    yield markdown(table)


def longest(by_arm: Mapping[str, list[list[Scores]]]) -> int:
    return max(len(stream) for several in by_arm.values() for stream in several)


def streamed(several: Sequence[Sequence[Scores]], key: str, window: int) -> float:
    """Mean over streams' runs of a score in one training length, of those that state it."""
    found = [stream[window][key] for stream in several if window < len(stream)]
    known = [each for each in found if each is not None]
    return mean(known) if known else math.nan


def gap_section(study: Study) -> Iterator[str]:
    """The gap of Eq. 7 beside what came of it."""
    found = gaps(study)
    if not found:
        return
    yield "## The gap and the outcome"
    correlation = rank_correlation([(gap, coverage) for _, gap, coverage in found])
    about = "" if math.isnan(correlation) else f" Rank correlation over arms: {correlation:+.2f}."
    yield (
        "The gap of Eq. 7 in arXiv 2606.18478, E|anchor - G|^2 in latents, as logged before the "
        "point at equal updates; for regression, the distance to its target. Beside it, the "
        f"coverage there.{about}"
    )
    table = [["arm", "gap", "coverage"]]
    for arm, gap, coverage in sorted(found, key=lambda each: each[1]):
        table.append([arm, f"{gap:.3f}", f"{coverage:.2f}"])
    yield markdown(table)


def markdown(table: Table) -> str:
    """Lines of cells as a Markdown table; the first line is the head."""
    head, *rows = table
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ranged(value: Mean, digits: int) -> str:
    """`0.71 [0.65 0.78]`; the range is left out for a single run."""
    text = number(value.value, digits)
    if value.num_runs < 2 or value.low == value.high:
        return text
    return f"{text} [{number(value.low, digits)} {number(value.high, digits)}]"
