"""Methods compared in pairs: videos of equal prompt and seed, or scores of equal prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from selfforcing_dfd.evaluation.paired import LEVEL, Signs, fewest_pairs, sign_test, smallest_effect
from selfforcing_dfd.protocol.plan import Protocol
from selfforcing_dfd.protocol.results import Result, by_unit
from selfforcing_dfd.tiny.bootstrap import Resamples, Score

FEW_UNITS = 20


@dataclass(frozen=True, slots=True)
class Difference:
    """One score of a method less that of another, over the units that both have.

    difference: the mean with its bootstrap interval over units. smallest: the mean difference that
    so many units of this spread would show.
    """

    score: str
    method: str
    other: str
    mean: float
    other_mean: float
    difference: Score
    signs: Signs
    smallest: float

    @property
    def is_shown(self) -> bool:
        """Whether sign test and interval both exclude that there is none."""
        apart = self.difference.low > 0 or self.difference.high < 0
        return apart and self.signs.p < LEVEL

    def as_json(self) -> dict[str, Any]:
        found = asdict(self)
        smallest = found.pop("smallest")
        return found | {"smallest": smallest if math.isfinite(smallest) else None}


def compared(score: str, one: Result, other: Result, unit: str) -> Difference | None:
    """A score of two methods; None where they share no unit."""
    ours = one.values.get(score, {})
    others = other.values.get(score, {})
    # a seed that one method lacks would make a prompt's two means of different seeds
    common = sorted(ours.keys() & others.keys())
    mine = by_unit({key: ours[key] for key in common}, unit)
    theirs = by_unit({key: others[key] for key in common}, unit)
    shared = sorted(mine)
    if not shared:
        return None
    differences = [mine[key] - theirs[key] for key in shared]
    every = Resamples.draw(len(shared), seed=0)
    return Difference(
        score,
        one.method,
        other.method,
        sum(mine[key] for key in shared) / len(shared),
        sum(theirs[key] for key in shared) / len(shared),
        every.score(every.mean(torch.tensor(differences, dtype=torch.float64))),
        sign_test(differences),
        smallest_effect(differences),
    )


def pairs_of(protocol: Protocol) -> list[tuple[str, str]]:
    """(method, what it is compared with): the control for all; teacher and data for the others."""
    references = (protocol.teacher, protocol.data)
    judged = [name for name in protocol.methods if name not in references]
    with_control = [(name, protocol.control) for name in judged if name != protocol.control]
    return with_control + [(name, reference) for name in judged for reference in references]


def all_compared(protocol: Protocol, results: Mapping[str, Result]) -> list[Difference]:
    """Every score of every pair of methods."""
    found = []
    for method, other in pairs_of(protocol):
        for score in results[method].values:
            difference = compared(score, results[method], results[other], protocol.unit)
            if difference is not None:
                found.append(difference)
    return found


def power_note(protocol: Protocol, differences: Sequence[Difference]) -> list[str]:
    """What so many units can show and what they cannot, in sentences."""
    if not differences:
        return []
    units = max(difference.difference.n for difference in differences)
    word = "prompts" if protocol.unit == "prompt" else "pairs of videos"
    notes = [
        f"A test counts {units} {word}"
        + (" (the mean over their seeds)." if protocol.unit == "prompt" else ".")
    ]
    if units < fewest_pairs():
        notes.append(
            f"With fewer than {fewest_pairs()} a sign test cannot fall below {LEVEL:g}, whatever "
            "the numbers are: nothing here is shown."
        )
    chance = LEVEL * len(differences)
    notes.append(
        f"{len(differences)} differences are tested; about {chance:.0f} would have p < {LEVEL:g} "
        "by chance if none were real."
    )
    notes.append(
        "`smallest` is the mean difference that so many units of this spread would show in four of "
        "five repetitions. One that is smaller and has no star is neither shown nor excluded."
    )
    if units < FEW_UNITS:
        notes.append(f"Bootstrap intervals of fewer than {FEW_UNITS} units are too narrow.")
    if protocol.unit == "pair":
        notes.append("Seeds of one prompt hang together, so these p are smaller than they should.")
    return notes
