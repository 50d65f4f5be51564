"""Choosing one setting of each method from a screening, by a rule that was written before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from selfforcing_dfd.evaluation.tiny_verdict import LEAST_VALIDITY
from selfforcing_dfd.study.compare import ROUNDING, along, budget_of, spent, teacher_value
from selfforcing_dfd.study.results import Study
from selfforcing_dfd.study.way_tables import COLUMNS, Table, markdown

NEAR = ("saturation", "contrast", "speed_px")  # should be the teacher's
SHOWN = ("coverage", "follow", "valid", *NEAR)

RULE_OF_CHOICE = (
    "The rule, written before the runs. Of each family the setting and the point with the highest "
    "mark is chosen, among points that cost at most the budget's operations. A mark is coverage (1 "
    "at most) plus the share of chunks that go on, minus by how much validity lies below "
    f"{LEAST_VALIDITY}, and minus the distances of saturation, contrast and speed to the "
    "teacher's, each as a share of the teacher's."
)


@dataclass(frozen=True)
class Candidate:
    """One setting at one of its points. scores: means over runs."""

    family: str
    arm: str
    update: int
    gflop: float
    scores: dict[str, float]
    mark: float


def has_families(study: Study) -> bool:
    """Whether the study chooses settings instead of comparing methods."""
    return any(facts.family for facts in study.arms.values())


def candidates(study: Study) -> list[Candidate]:
    """All points within the budget, the best of each family first."""
    found = []
    for arm, facts in study.arms.items():
        if not facts.family:
            continue
        costs = spent(study, arm)
        scores = {key: dict(along(study, arm, key)) for key in SHOWN}
        for update in sorted(set.intersection(*(set(own) for own in scores.values()))):
            if costs[update] <= ROUNDING * budget_of(study):
                at = {key: own[update].value for key, own in scores.items()}
                marked = mark(study, at)
                found.append(Candidate(facts.family, arm, update, costs[update], at, marked))
    order = list(dict.fromkeys(facts.family for facts in study.arms.values()))
    return sorted(found, key=lambda each: (order.index(each.family), -each.mark))


def mark(study: Study, scores: dict[str, float]) -> float:
    """The mark of a point, as RULE_OF_CHOICE says."""
    off = sum(abs(scores[key] / teacher_value(study, key) - 1) for key in NEAR)
    invalid = max(0.0, LEAST_VALIDITY - scores["valid"])
    return min(scores["coverage"], 1.0) + scores["follow"] - invalid - off


def chosen(study: Study) -> dict[str, Candidate]:
    """The best of each family."""
    best: dict[str, Candidate] = {}
    for each in candidates(study):
        best.setdefault(each.family, each)
    return best


def chosen_in_words(study: Study) -> str:
    names = [f"{each.arm} at {each.update} updates" for each in chosen(study).values()]
    return f"Chosen, one of each family: {', '.join(names)}." if names else "Nothing ran yet."


def choices(study: Study) -> Iterator[str]:
    """The section of a screening's page."""
    yield RULE_OF_CHOICE
    yield "## What was chosen"
    yield f"**{chosen_in_words(study)}**"
    best = list(chosen(study).values())
    head = ["family", "setting", "updates", "GFLOP", *(COLUMNS[key][0] for key in SHOWN), "mark"]
    table: Table = [head]
    for each in candidates(study):
        cells = [f"{each.scores[key]:.2f}" for key in SHOWN]
        arm = f"**{each.arm}**" if each in best else each.arm
        place = [each.family, arm, str(each.update), f"{each.gflop:.0f}"]
        table.append([*place, *cells, f"{each.mark:.2f}"])
    yield markdown(table)
