"""docs/study.md: the goal, what it found, and the tables behind it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from selfforcing_dfd.common import atomic_file
from selfforcing_dfd.evaluation.document import evaluated_with
from selfforcing_dfd.evaluation.paired import Paired, paired
from selfforcing_dfd.evaluation.tables import START, TERMINAL, Run, number
from selfforcing_dfd.evaluation.tiny_verdict import RULE, differences, mean
from selfforcing_dfd.study.choice import choices, chosen_in_words, has_families
from selfforcing_dfd.study.compare import (
    ROUNDING,
    Alignment,
    aligned,
    arms_in,
    budget_of,
    index_at,
    mean_of,
    null_check,
    spent,
    teacher_value,
    verdicts,
    with_rows,
)
from selfforcing_dfd.study.effects import effect_section, lines_of_words
from selfforcing_dfd.study.goal import GOAL, Criterion, criteria
from selfforcing_dfd.study.plan import CAUSAL, CAUSAL_FEW, CAUSAL_ROWS, LONG
from selfforcing_dfd.study.results import Study
from selfforcing_dfd.study.way_tables import (
    COLUMNS,
    Table,
    doses,
    gap_section,
    long_runs,
    markdown,
    ranged,
    streams,
    the_front,
)

OF_THE_CAUSAL_TEACHER = {
    CAUSAL: "its ODE in many steps, as it is",
    CAUSAL_FEW: "itself in the student's few steps, noise kept, not trained for them",
    "ideal_fresh": "a student that jumps to its ODE's end without error, with fresh noise",
    "ideal_kept": "the same with the noise kept",
}

COMPARED = ("coverage", "kl_prior_sample", "follow")
ALIGNMENTS: Mapping[Alignment, str] = {
    "compute": "At equal compute",
    "updates": "At equal student updates",
    "end": "At the end of each run",
}


def write_document(study: Study, path: Path, plots: Mapping[str, Path]) -> None:
    """The page of a study. plots: title -> file beside the page."""
    parts = list(sections(study))
    for title, plot in plots.items():
        parts += [f"## {title}", f"![{title}]({plot.relative_to(path.parent).as_posix()})"]
    text = "\n\n".join(wrapped(part) for part in parts)
    with atomic_file(path) as partial:
        partial.write_text(f"{text}\n", encoding="utf-8")


def wrapped(part: str) -> str:
    """Sentences in lines of TERMINAL columns; headings, tables and pictures as they are."""
    if part.startswith(("#", "|", "!")):
        return part
    lines = []
    for line in part.splitlines():
        indent = "  " if line.startswith("- ") else ""
        lines += textwrap.wrap(
            line, TERMINAL, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
    return "\n".join(lines)


def sections(study: Study) -> Iterator[str]:
    """The parts of the page, headings and texts and tables, in order."""
    yield f"# Study: {study.plan}"
    yield " ".join([study.about, *facts(study)]).strip()
    if has_families(study):
        yield from choices(study)
    elif study.goal:
        yield from (GOAL, RULE)
        yield "## What it found"
        yield from verdict_on_goal(study)
    if not study.goal:
        yield from effect_section(study)
    for alignment, title in ALIGNMENTS.items():
        yield f"## {title}"
        yield about_alignment(study, alignment)
        if alignment == "compute":
            yield from rows_of_the_causal_teacher(study)
        yield markdown(score_table(study, alignment))
    if study.goal and not has_families(study):
        yield from pairs_of_runs(study)
    yield from doses(study)
    yield from the_front(study)
    yield from long_runs(study)
    yield from streams(study)
    yield from gap_section(study)
    if study.goal:
        yield from effect_section(study)
    yield "## Arms"
    yield markdown(arms_table(study))


def pairs_of_runs(study: Study) -> Iterator[str]:
    """Every arm against every control, and the rule's outcomes."""
    yield "## Differences in pairs of runs"
    yield (
        "Arm minus control, mean over pairs of equal start and draws, with Student's 95 % interval "
        "and the exact p of flipping signs."
    )
    for control in study.controls:
        yield f"### Against {control}"
        yield markdown(paired_table(study, control))
    yield from outcomes(study)


def facts(study: Study) -> Iterator[str]:
    """What was run, as sentences."""
    starts = len({run.start for run in study.runs})
    draws = len({run.draw for run in study.runs})
    yield (
        f"{len(study.runs)} runs: {plural(starts, 'start')} x {plural(draws, 'draw')} of "
        f"{len(study.arms)} arms, {study.clips} clips a point."
    )
    yield evaluated_with([study.evaluation_seed])
    if study.missing:
        yield f"**{study.missing} runs of the plan are missing.**"
    if study.noise_core_seconds is None:
        yield "**What finding the noise stored with clips took is not known, and left out.**"
    elif study.noise_core_seconds:
        yield (
            f"Finding the noise stored with the clips took {study.noise_core_seconds:.0f} core "
            "seconds; arms that start from it are charged with them, and with the operations of "
            "the chunks that they use."
        )
    if study.commits:
        yield f"Code: {', '.join(study.commits)}."


def plural(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def verdict_on_goal(study: Study) -> Iterator[str]:
    """Who reaches the goal; if none, which parts each arm misses."""
    candidates = [arm for arm in study.arms if arm not in study.controls and not arm.endswith(LONG)]
    judged = {arm: criteria(study, arm) for arm in candidates if study.runs_of(arm)}
    if not judged:
        yield "There is no arm beside the controls."
        return
    reached = [arm for arm, parts in judged.items() if all(part.met for part in parts)]
    if reached:
        yield f"**{' and '.join(reached)} {'reaches' if len(reached) == 1 else 'reach'} the goal.**"
    else:
        nearest = max(judged, key=lambda arm: share_met(judged[arm]))
        met = sum(part.met for part in judged[nearest])
        yield (
            f"**No arm reaches the goal. {nearest} comes nearest: it meets {met} of its "
            f"{len(judged[nearest])} parts.**"
        )
    table = [["arm", "parts met", "bounds missed"]]
    for arm, parts in sorted(judged.items(), key=lambda item: -share_met(item[1])):
        missed = "; ".join(part.text for part in parts if not part.met and not part.control)
        table.append([arm, f"{sum(part.met for part in parts)} of {len(parts)}", missed or "none"])
    yield markdown(table)
    yield (
        "Coverage and follow test against each control: + is a certain gain, - a certain loss, "
        "~ neither. The numbers stand below, in the differences in pairs of runs."
    )
    yield markdown(gains_table(study, judged))
    waiting = [f"`{arm}`" for arm in candidates if arm not in judged]
    if waiting:
        yield f"Not run yet: {', '.join(waiting)}."


def gains_table(study: Study, judged: Mapping[str, Sequence[Criterion]]) -> Table:
    """For each arm and control, whether coverage and the follow test differ for certain."""
    marks = {1: "+", 0: "~", -1: "-"}
    table = [["arm", *study.controls]]
    for arm, parts in judged.items():
        row = [arm]
        for control in study.controls:
            signs = [marks[part.sign] for part in parts if part.control == control]
            row.append(" ".join(signs))
        table.append(row)
    return table


def share_met(parts: Sequence[Criterion]) -> float:
    return sum(part.met for part in parts) / len(parts)


def rows_of_the_causal_teacher(study: Study) -> Iterator[str]:
    """What the rows mean that only the causal teacher made."""
    measured = {name for rows in study.starts.values() for name in rows}
    there = [name for name in OF_THE_CAUSAL_TEACHER if name in measured]
    if there:
        lines = [f"- `{name}`: {OF_THE_CAUSAL_TEACHER[name]}" for name in there]
        yield "\n".join(["Rows of the starts' causal teachers:", *lines])


def about_alignment(study: Study, alignment: Alignment) -> str:
    fixed = "".join(
        f" {name} is {point.arm} after {point.update} updates."
        for name, point in study.fixed.items()
    )
    spread = f"Means over runs, with the smallest and the largest run's value.{fixed}"
    if alignment == "compute":
        return (
            f"Each arm's newest point that cost at most the operations of {study.budget}'s "
            f"{study.updates} student updates: matrix products and attention of the networks, "
            f"counted, two for a multiply-add, the optimizer's left out. {spread}"
            f"{beyond_the_budget(study)}"
        )
    if alignment == "updates":
        return f"Each arm's newest point within {study.updates} student updates. {spread}"
    return spread


def beyond_the_budget(study: Study) -> str:
    """Which arms have no row at equal compute, and what their first point took."""
    budget = budget_of(study)
    told = ""
    for arm in study.arms:
        costs = {update: each for update, each in spent(study, arm).items() if update}
        if costs and budget and min(costs.values()) > ROUNDING * budget:
            update = min(costs)
            more = 100 * (costs[update] / budget - 1)
            told += (
                f" {arm} has no such point: its first, after {update} updates, cost "
                f"{more:.0f} % more than the budget."
            )
    return told


def score_table(study: Study, alignment: Alignment) -> Table:
    """References, then arms: means with ranges."""
    runs = aligned(study, alignment)
    spent = spent_by(study, alignment)
    head = ["", "runs", "updates", "GFLOP", "core s", *(title for title, _ in COLUMNS.values())]
    table = [head]
    names = [*study.references, START]
    names += [*CAUSAL_ROWS, *arms_in(study)]
    for name in names:
        own = with_rows(runs, name)
        if own:
            cells = [
                ranged(mean_of(own, name, key), digits) for key, (_, digits) in COLUMNS.items()
            ]
            is_arm = name in study.arms or name in study.fixed
            num_runs = str(len(own)) if is_arm else ""
            table.append([name, num_runs, *spent.get(name, ("", "", "")), *cells])
    return table


def spent_by(study: Study, alignment: Alignment) -> dict[str, tuple[str, ...]]:
    """(student updates, operations in 10^9, core seconds) of each arm, means over its runs."""
    found = {}
    for name in arms_in(study):
        point = study.fixed.get(name)
        at = []
        for run in study.runs_of(point.arm if point else name):
            index = index_at(study, run, alignment)
            if point is not None:
                index = run.updates.index(point.update) if point.update in run.updates else None
            if index is not None:
                at.append((run.updates[index], run.gflop[index], run.core_seconds[index]))
        if at:
            means = [mean(column) for column in zip(*at, strict=True)]
            found[name] = tuple(number(round(each), 0) for each in means)
    return found


def paired_table(study: Study, control: str) -> Table:
    """Every arm minus one control, at equal compute and at equal updates."""
    chosen: list[Alignment] = ["compute", "updates"]
    runs = {alignment: aligned(study, alignment) for alignment in chosen}
    head = [f"{COLUMNS[key][0]}, equal {alignment}" for key in COMPARED for alignment in chosen]
    table = [["", *head]]
    for arm in arms_in(study):
        if arm != control:
            cells = [
                difference_text(arm, control, key, runs[alignment])
                for key in COMPARED
                for alignment in chosen
            ]
            table.append([arm, *cells])
    return table


def difference_text(arm: str, control: str, key: str, runs: Sequence[Run]) -> str:
    """`+0.31 [+0.20 +0.42] p .25`; - where no pair of runs has both."""
    both = with_rows(runs, arm, control)
    values = [each for each in differences(arm, control, key, both) if math.isfinite(each)]
    return paired_text(paired(values)) if values else "-"


def paired_text(difference: Paired) -> str:
    text = signed(difference.mean)
    if difference.num_runs == 1:
        return text
    between = f"{signed(difference.low)} {signed(difference.high)}"
    return f"{text} [{between}] p {difference.flip_p:.3f}"


def signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"  # never -0.00


def outcomes(study: Study) -> Iterator[str]:
    """The rule's outcomes, and the same rule where there is nothing to find."""
    found = verdicts(study, "compute")
    yield "## The rule's outcomes at equal compute"
    table = [["", *(f"against {control}" for control in study.controls)]]
    for arm in arms_in(study):
        own = [found.get((arm, control)) for control in study.controls]
        if any(own):
            cells = [finding.outcome if finding else "" for finding in own]
            table.append([arm, *cells])
    yield markdown(table)
    null = null_check(study)
    yield "### Control against itself"
    if not null:
        yield "A check of the rule on no difference needs two draws of a control."
        return
    false = [finding for finding in null if finding.outcome != "no clear difference"]
    texts = "".join(f"\n- {finding.text}" for finding in false)
    yield (
        f"One draw of a control against another of the same control: {len(false)} of {len(null)} "
        f"comparisons found a difference where there is none.{texts}"
    )


def arms_table(study: Study) -> Table:
    """How each arm is made, and how many settings were tried for it before."""
    table = [["arm", "settings tried", "settings", "about"]]
    for arm, facts in study.arms.items():
        if not arm.endswith(LONG):
            own = " ".join(f"`{each}`" for each in facts.settings)
            table.append([arm, str(facts.tried), own, facts.about])
    return table


def summary(study: Study) -> str:
    """What a terminal shows: the table at equal compute, and the verdict or what arms showed."""
    if not study.goal:
        found = lines_of_words(study)
    elif has_families(study):
        found = chosen_in_words(study)
    else:
        found = next(verdict_on_goal(study))
    first = found.replace("**", "")
    rows = score_table(study, "compute")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
    teacher = teacher_value(study, "coverage")
    return "\n".join([*lines, "", first, f"The teacher's own coverage is {teacher:.2f}."])
