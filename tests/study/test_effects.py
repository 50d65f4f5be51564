"""Arms against the one arm that each of them changes, and the gap of Eq. 7, on made-up numbers."""

from __future__ import annotations

import dataclasses
import math

import pytest
from matplotlib.figure import Figure
from test_study_tables import STUDY, TEACHER, run

from selfforcing_dfd.study.effects import (
    SHARE,
    by_gap,
    correlations,
    draw_effects,
    effect_section,
    effects,
    in_words,
)
from selfforcing_dfd.study.results import ArmFacts, Study

WORK = {"short": (1.0, 0.5), "medium": (0.6, 0.7), "image": (0.1, 0.1)}
"""Gap of the forced arm, and the control's KL."""
PAPER = "less KL"


def with_own_controls() -> Study:
    """Three pairs of an arm and its control; each halves the KL of its control in start a.

    In start b data forcing adds to the KL the more, the smaller the gap is.
    """
    runs = []
    arms = {}
    for name, (gap, kl) in WORK.items():
        arms[name] = ArmFacts(
            about="", tried=1, settings=[], control=f"{name}_control", paper=PAPER
        )
        arms[f"{name}_control"] = ArmFacts(about="", tried=1, settings=[])
        for start, forced in (("a", kl / 2), ("b", kl + 0.2 - gap / 5)):
            plain = {**TEACHER, "kl_prior_sample": kl}
            own = {**TEACHER, "kl_prior_sample": forced}
            control = run(start, 0, f"{name}_control", (1, 2), (plain, plain))
            runs.append(dataclasses.replace(control, logged={"gap": [9.0, gap + 1]}))
            trained = run(start, 0, name, (1, 2), (plain, own))
            runs.append(dataclasses.replace(trained, logged={"gap": [9.0, gap]}))
    runs.append(run("a", 1, "short", (1, 2), (TEACHER, TEACHER)))  # without its control
    return dataclasses.replace(STUDY, runs=runs, arms=arms)


def test_each_arm_is_held_against_its_own_control():
    """Catches a comparison across captions, one with another start, and a gap of an early point."""
    found = by_gap(with_own_controls(), "a")
    assert [each.arm for each in found] == ["image", "medium", "short"]
    assert [each.control for each in found] == ["image_control", "medium_control", "short_control"]
    assert [each.gap for each in found] == [0.1, 0.6, 1.0]
    assert [each.control_gap for each in found] == [1.1, 1.6, 2.0]
    changes = [each.differences["kl_prior_sample"].value for each in found]
    assert changes == pytest.approx([-0.05, -0.35, -0.25])
    both = by_gap(with_own_controls())[2].differences["kl_prior_sample"]
    assert (both.low, both.high, both.num_runs) == pytest.approx((-0.25, 0.0, 2))


def test_the_order_is_told_for_each_start():
    """Catches an order that one start alone has."""
    found = correlations(with_own_controls(), "kl_prior_sample")
    assert found == pytest.approx({"a": -0.5, "b": -1.0})
    assert math.isnan(correlations(with_own_controls(), "coverage")["a"])


def test_what_there_was_to_gain_is_told_apart():
    """Catches an order of gains that is only the order of what controls had left to gain.

    In start a every arm takes half of its control's KL, whatever its gap.
    """
    study = with_own_controls()
    assert [each.share_of_kl for each in effects(study, "a")] == pytest.approx([-0.5] * 3)
    assert math.isnan(correlations(study, SHARE)["a"])
    assert correlations(study, SHARE)["b"] == pytest.approx(-1.0)


def test_one_line_says_what_changed_in_all_pairs():
    """Catches a change that one draw made alone, and one within what the control's draws differ."""
    study = with_own_controls()
    runs = [run_ for run_ in study.runs if run_.start == "a" and run_.draw == 0]
    again = []
    for each in runs:
        kl = each.scores["kl_prior_sample"]
        moved = {"image": 0.2, "medium": 0.1}.get(each.arm.removesuffix("_control"), 0.0)
        scores = {**each.scores, "kl_prior_sample": [value + moved for value in kl]}
        again.append(dataclasses.replace(each, draw=1, scores=scores))
    found = effects(dataclasses.replace(study, runs=[*runs, *again]))
    lines = {each.arm: in_words(each) for each in found}
    assert lines["short"].endswith("against `short_control`: KL -0.25. The paper: less KL.")
    assert "KL -0.35" in lines["medium"]
    assert "no clear change" in lines["image"]


def test_the_page_and_the_plot_show_them():
    """Catches arms that are left out, and a section in studies that have no such arms."""
    page = "\n".join(effect_section(with_own_controls()))
    assert "| image | image_control | 0.100 |" in page
    alone = [effect for effect in effects(with_own_controls(), "a") if effect.arm == "image"]
    assert in_words(alone[0]).startswith("- `image` against `image_control`: one pair of runs")
    assert "-1.00" in page
    assert not list(effect_section(STUDY))
    figure = Figure()
    draw_effects(with_own_controls(), figure)
    assert [len(axes.texts) for axes in figure.axes] == [3, 3]
