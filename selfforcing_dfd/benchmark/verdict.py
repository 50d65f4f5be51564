"""Two results of the benchmark held against each other: which is faster, and is it certain?"""

from __future__ import annotations

import math
from typing import Any

from selfforcing_dfd.benchmark.headline import figures
from selfforcing_dfd.benchmark.table import WIDTH, pairs, shown

SAME_MACHINE = ("device", "threads")
SAME_MODEL = ("size", "parameters", "resolution", "codec", "chunk_frames")
SAME_PASSES = ("ladder", "first_ladder", "commits")
SAME_PAST = ("visible_frames", "sink_frames", "window_frames", "positions")
SAME_WORK = SAME_MACHINE + SAME_MODEL + SAME_PAST + SAME_PASSES
"""Facts that must be equal, or the two did not do the same work on the same machine."""
LEAST_MARGIN = 0.02
"""Two runs of one program differ by about as much, whatever their own spread says."""
TAIL_MARGIN = 0.10
"""For figures of few samples: tails, first frames, prompts, memory."""
ERRORS = 3  # standard errors of the mean


def comparison(first: dict[str, Any], second: dict[str, Any], names: tuple[str, str]) -> str:
    """What differs, the headline's figures side by side, and a verdict in one sentence."""
    lines = [f"first:  {names[0]}", f"second: {names[1]}", *differences(first, second), ""]
    lines.append(f"{'':<{WIDTH}} {'first':>12} {'second':>12} {'ratio':>8}")
    for name, (one, other, word) in judged(first, second).items():
        ratio = f"{other / one:.3f}" if one else "-"
        lines.append(f"{name:<{WIDTH}} {shown(one):>12} {shown(other):>12} {ratio:>8}  {word}")
    return "\n".join([*lines, "", verdict(first, second)])


def judged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[float, float, str]]:
    """Both values of every figure that both have, and what the second is: better, worse, equal."""
    others = {name: value for name, value, _ in figures(second)}
    found = {}
    for name, value, more_is_better in figures(first):
        other = others[name]
        if value is None or other is None:
            continue
        margin = margin_of(first, second)
        if not name.startswith(("frames", "a chunk, p50")):
            margin = max(margin, TAIL_MARGIN)
        found[name] = (value, other, word_for(value, other, margin, more_is_better))
    return found


def word_for(value: float, other: float, margin: float, more_is_better: bool) -> str:
    if abs(other - value) <= margin * value:
        return "equal"
    return "better" if (other > value) is more_is_better else "worse"


def verdict(first: dict[str, Any], second: dict[str, Any]) -> str:
    """One sentence about the frames a second, VAE included; none about different work."""
    other_work = differing(first, second, SAME_WORK)
    if other_work:
        return (
            f"verdict: none, since the two did not do the same work: {', '.join(other_work)} "
            "differ; measure both with the same options on the same machine"
        )
    ratio = second["steady_fps_with_vae"] / first["steady_fps_with_vae"]
    margin = margin_of(first, second)
    if abs(ratio - 1) <= margin:
        return (
            f"verdict: equally fast: {ratio:.3f} times the frames a second, and less than "
            f"{margin:.0%} cannot be told from noise here"
        )
    which = "faster" if ratio > 1 else "slower"
    return f"verdict: the second is {which}: {ratio:.3f} times the frames a second (± {margin:.0%})"


def margin_of(first: dict[str, Any], second: dict[str, Any]) -> float:
    """By how much the ratio of two paces may be off, from the spread of both runs' intervals."""
    return max(LEAST_MARGIN, ERRORS * math.hypot(error_of(first), error_of(second)))


def error_of(result: dict[str, Any]) -> float:
    """Standard error of a run's mean interval, relative to it."""
    mean = result["stages_ms"]["wall"]
    return result["jitter_ms"]["std"] / mean / math.sqrt(result["num_steady_chunks"])


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
        kind = "warning: " if name in SAME_WORK else ""
        ours = first["environment"].get(name)
        theirs = second["environment"].get(name)
        lines.append(f"{kind}{name} differs: {ours} and {theirs}")
    return lines


def ratios(first: dict[str, Any], second: dict[str, Any]) -> dict[str, float]:
    """The second's value over the first's, of every figure that both have."""
    both = pairs(first, second)
    return {name: other / one for name, (one, other, _) in both.items() if one}
