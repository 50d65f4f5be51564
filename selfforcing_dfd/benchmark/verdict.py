"""Two results of the benchmark held against each other: which is faster, and is it certain?

Two runs of one program differ by more than their chunks' spread says: neighbouring chunks are slow
together, and a whole run may be slow because others use the machine. So a pace is only as certain
as the slowest and fastest parts of its run, and on a busy CPU it is not compared at all. What is
then compared is the time that the processor took, which its neighbours change far less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfforcing_dfd.benchmark.headline import figures
from selfforcing_dfd.benchmark.table import BUSY, WIDTH, fidelity_of, pairs, shown

SAME_MACHINE = ("device", "threads")
SAME_MODEL = ("size", "parameters", "resolution")
COMPARABLE = SAME_MACHINE + SAME_MODEL
"""Facts that must be equal, or there is nothing to compare."""
PASSES = ("chunk_frames", "ladder", "first_ladder", "commits")
PAST = ("visible_frames", "sink_frames", "window_frames", "positions")
WORK = PASSES + PAST + ("codec",)
"""Facts by which two runs do other work: the verdict names them."""
LEAST_MARGIN = {"cpu": 0.05, "gpu": 0.02}
"""Two runs of one program differ by as much on a quiet machine, whatever their own spread says.

Of a CPU the largest difference among ten pairs of runs; of a GPU a guess, since none was measured.
"""
BUSY_MARGIN = 0.20
"""Of the processor's time on a busy machine, one thread.

Any two of twelve runs, beside three to four busy processes on two cores, differed by up to 16 %,
while their frames a second differed by up to 51 %.
"""
TAIL_MARGIN = 0.10
"""For figures of few samples: first frames, prompts, memory."""
ERRORS = 3  # standard errors of the mean
JUDGED_BUSY = ("memory",)
"""Figures that a busy machine does not change."""


@dataclass(frozen=True, slots=True)
class Pace:
    """ratio: of the second's pace to the first's, above 1 where it is faster. unit: what is meant.

    margin: how far the ratio may be from 1 by chance.
    """

    ratio: float
    margin: float
    unit: str

    @property
    def is_equal(self) -> bool:
        return abs(self.ratio - 1) <= self.margin


def comparison(first: dict[str, Any], second: dict[str, Any], names: tuple[str, str]) -> str:
    """What differs, the headline's figures side by side, and a verdict in one sentence."""
    lines = [f"first:  {names[0]}", f"second: {names[1]}", *differences(first, second)]
    lines += small_decoders(first, second)
    lines += ["", f"{'':<{WIDTH}} {'first':>12} {'second':>12} {'ratio':>8}"]
    for name, (one, other, word) in judged(first, second).items():
        ratio = f"{other / one:.3f}" if one else "-"
        line = f"{name:<{WIDTH}} {shown(one):>12} {shown(other):>12} {ratio:>8}  {word}"
        lines.append(line.rstrip())
    return "\n".join([*lines, "", verdict(first, second)])


def judged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[float, float, str]]:
    """Both values of every figure that both have, and what the second is: better, worse, equal.

    No word for a tail, which few chunks decide, and on a busy machine for no time at all.
    """
    others = {name: value for name, value, _ in figures(second)}
    busy = on_busy_cpu(first, second)
    found = {}
    for name, value, more_is_better in figures(first):
        other = others[name]
        if value is None or other is None:
            continue
        margin = margin_of(first, second)
        if not name.startswith(("frames", "a chunk, p50")):
            margin = max(margin, TAIL_MARGIN)
        word = word_for(value, other, margin, more_is_better)
        is_unsure = "p99" in name or (busy and not name.startswith(JUDGED_BUSY))
        found[name] = (value, other, "" if is_unsure else word)
    return found


def word_for(value: float, other: float, margin: float, more_is_better: bool) -> str:
    if abs(other - value) <= margin * value:
        return "equal"
    return "better" if (other > value) is more_is_better else "worse"


def verdict(first: dict[str, Any], second: dict[str, Any]) -> str:
    """One sentence about the pace, decoder included; none about other machines and models."""
    unlike = differing(first, second, COMPARABLE)
    if unlike:
        return (
            f"verdict: none, since the two cannot be compared: other {', '.join(unlike)}; measure "
            "both with the same model on the same machine"
        )
    pace = compare_pace(first, second)
    if pace is None:
        return (
            f"verdict: none, since the machine was busy: the first waited {waits(first)} of its "
            f"time for a core, the second {waits(second)}; measure again when it is quiet, or both "
            "with --threads 1, whose processor time can be compared"
        )
    other_work = differing(first, second, WORK)
    of_what = f", with other work: {', '.join(other_work)}" if other_work else ""
    if pace.is_equal:
        return (
            f"verdict: equally fast: {pace.ratio:.3f} times the {pace.unit}, and less than "
            f"{pace.margin:.0%} cannot be told from noise here{of_what}"
        )
    which = "faster" if pace.ratio > 1 else "slower"
    return (
        f"verdict: the second is {which}: {pace.ratio:.3f} times the {pace.unit} "
        f"(± {pace.margin:.0%}){of_what}"
    )


def compare_pace(first: dict[str, Any], second: dict[str, Any]) -> Pace | None:
    """Frames a second; on a busy machine frames for the processor's time.

    None where that says nothing: threads that wait for each other use a processor while they wait.
    """
    margin = margin_of(first, second)
    if not on_busy_cpu(first, second):
        ratio = second["steady_fps_with_vae"] / first["steady_fps_with_vae"]
        return Pace(ratio, margin, "frames a second")
    if first["environment"]["threads"] > 1:
        return None
    ratio = first["processor_ms_per_frame"] / second["processor_ms_per_frame"]
    unit = "frames in the same processor time, as the machine was busy"
    return Pace(ratio, BUSY_MARGIN, unit)


def margin_of(first: dict[str, Any], second: dict[str, Any]) -> float:
    """By how much the ratio of two paces may be off, from how uneven both runs were."""
    least = LEAST_MARGIN["cpu" if is_cpu(first) else "gpu"]
    return max(least, ERRORS * math.hypot(error_of(first), error_of(second)))


def error_of(result: dict[str, Any]) -> float:
    """Standard error of a run's mean interval, relative to it, from the means of its parts."""
    parts = result["interval_parts_ms"]
    if len(parts) < 2:
        return math.inf
    return float(np.std(parts, ddof=1) / np.mean(parts) / math.sqrt(len(parts)))


def is_cpu(result: dict[str, Any]) -> bool:
    return result["environment"]["cuda"] is None


def on_busy_cpu(*results: dict[str, Any]) -> bool:
    """Whether one of them ran on a CPU, and waited long for it. A GPU's host has time to wait."""
    shares = [each["waited_share"] or 0.0 for each in results if is_cpu(each)]
    return max(shares, default=0.0) > BUSY


def waits(result: dict[str, Any]) -> str:
    share = result["waited_share"]
    return "an unknown part" if share is None else f"{share:.0%}"


def differing(
    first: dict[str, Any], second: dict[str, Any], names: tuple[str, ...] | None = None
) -> list[str]:
    """The facts of the environments, of those that are named, which are not the same."""
    ours = first["environment"]
    theirs = second["environment"]
    asked = names or tuple({**ours, **theirs})
    return [name for name in asked if ours.get(name) != theirs.get(name)]


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """A line for every fact that is not the same; a warning where the work is another."""
    lines = []
    for name in differing(first, second):
        kind = "warning: " if name in COMPARABLE + WORK else ""
        ours = first["environment"].get(name)
        theirs = second["environment"].get(name)
        lines.append(f"{kind}{name} differs: {ours} and {theirs}")
    return lines


def small_decoders(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """What a small decoder costs in quality stands beside what it gains in pace."""
    found = {"first": first["small_decoder"], "second": second["small_decoder"]}
    return [
        f"small decoder of the {which}: {fidelity_of(decoder['fidelity'])}"
        for which, decoder in found.items()
        if decoder is not None
    ]


def ratios(first: dict[str, Any], second: dict[str, Any]) -> dict[str, float]:
    """The second's value over the first's, of every figure that both have."""
    both = pairs(first, second)
    return {name: other / one for name, (one, other, _) in both.items() if one}
