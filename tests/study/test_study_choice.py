"""Choosing settings from a screening, on made-up numbers whose answer is known by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from test_study_tables import STUDY, TEACHER

from selfforcing_dfd.study.choice import RULE_OF_CHOICE, candidates, chosen, mark
from selfforcing_dfd.study.plots import looks, write_plots
from selfforcing_dfd.study.results import Study
from selfforcing_dfd.study.tables import sections, summary


def screening() -> Study:
    """The made-up study, whose three arms are settings of two methods."""
    families = {"control": "dmd", "good": "forced", "rival": "forced"}
    arms = {
        name: dataclasses.replace(facts, family=families.get(name, ""))
        for name, facts in STUDY.arms.items()
    }
    return dataclasses.replace(STUDY, arms=arms)


def test_the_mark_is_that_by_hand():
    """Catches a weight on one part, a distance with a sign, and coverage that pays beyond 1."""
    best = {**TEACHER, "coverage": 1.3, "follow": 0.9}
    assert mark(STUDY, best) == pytest.approx(1.9)
    off = {**best, "coverage": 0.5, "valid": 0.88, "saturation": 0.45, "contrast": 0.726}
    assert mark(STUDY, off) == pytest.approx(0.5 + 0.9 - 0.1 - 0.1 - 0.1)
    slow = {**best, "speed_px": 0.45}
    assert mark(STUDY, slow) == pytest.approx(1.9 - 0.5)


def test_each_family_gives_its_best_point_within_the_budget():
    """Catches a choice among points that others cannot afford, and arms of no family.

    The rival is good at 220 s alone, which the budget of 120 s forbids; the good arm is better from
    its second point on, where all marks are equal and the first one counts.
    """
    study = screening()
    best = chosen(study)
    assert {name: (each.arm, each.update) for name, each in best.items()} == {
        "dmd": ("control", 12),
        "forced": ("good", 24),
    }
    points = {(each.arm, each.update) for each in candidates(study)}
    assert ("rival", 24) not in points
    assert ("rival", 12) in points
    assert not any(each.arm == "good_long" for each in candidates(study))


def test_a_screening_says_its_rule_and_choice_and_gives_no_verdict():
    """Catches a goal that is judged on one run a setting."""
    page = "\n".join(sections(screening()))
    assert page.index(RULE_OF_CHOICE) < page.index("**Chosen, one of each family: control at 12")
    assert "reaches the goal" not in page
    assert "Differences in pairs" not in page
    assert "| forced | **good** | 24 | 60 |" in page
    assert "Chosen, one of each family" in summary(screening())
    assert "Chosen" not in "\n".join(sections(STUDY))
    assert write_plots(screening(), Path("nowhere")) == {}


def test_more_arms_than_looks_can_be_drawn():
    """Catches a KeyError for the thirty-third arm."""
    names = [f"arm{number}" for number in range(40)]
    assert list(looks(names)) == names
