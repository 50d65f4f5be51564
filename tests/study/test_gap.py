"""The gap of Eq. 7 beside what data forcing did to each arm's own control, on made-up numbers."""

from __future__ import annotations

import dataclasses
import math

import pytest
from matplotlib.figure import Figure
from test_study_tables import STUDY, TEACHER, run

from selfforcing_dfd.study.gap import correlations, draw_effects, effect_section, effects
from selfforcing_dfd.study.results import ArmFacts, Study

WORK = {"short": (1.0, 0.5), "medium": (0.6, 0.7), "image": (0.1, 0.1)}
"""Gap of the forced arm, and the control's KL."""


def with_own_controls() -> Study:
    """Three pairs of an arm and its control; each halves the KL of its control in start a.

    In start b data forcing adds to the KL the more, the smaller the gap is.
    """
    runs = []
    arms = {}
    for name, (gap, kl) in WORK.items():
        arms[name] = ArmFacts(about="", tried=1, settings=[], control=f"{name}_control")
        arms[f"{name}_control"] = ArmFacts(about="", tried=1, settings=[])
        for start, forced in (("a", kl / 2), ("b", kl + 0.2 - gap / 10)):
            control = {**TEACHER, "kl_prior_sample": kl}
            own = {**TEACHER, "kl_prior_sample": forced}
            runs.append(run(start, 0, f"{name}_control", (1, 2), (control, control)))
            trained = run(start, 0, name, (1, 2), (control, own))
            runs.append(dataclasses.replace(trained, logged={"gap": [9.0, gap]}))
    runs.append(run("a", 1, "short", (1, 2), (TEACHER, TEACHER)))  # without its control
    return dataclasses.replace(STUDY, runs=runs, arms=arms)


def test_each_arm_is_held_against_its_own_control():
    """Catches a comparison across captions, one with another start, and a gap of an early point."""
    found = effects(with_own_controls(), "a")
    assert [each.arm for each in found] == ["image", "medium", "short"]
    assert [each.control for each in found] == ["image_control", "medium_control", "short_control"]
    assert [each.gap for each in found] == [0.1, 0.6, 1.0]
    changes = [each.differences["kl_prior_sample"].value for each in found]
    assert changes == pytest.approx([-0.05, -0.35, -0.25])
    both = effects(with_own_controls())[2].differences["kl_prior_sample"]
    assert (both.low, both.high, both.num_runs) == pytest.approx((-0.25, 0.1, 2))


def test_the_order_is_told_for_each_start():
    """Catches an order that one start alone has."""
    found = correlations(with_own_controls(), "kl_prior_sample")
    assert found == pytest.approx({"a": -0.5, "b": -1.0})
    assert math.isnan(correlations(with_own_controls(), "coverage")["a"])


def test_the_page_and_the_plot_show_them():
    """Catches arms that are left out, and a section in studies that have no such arms."""
    page = "\n".join(effect_section(with_own_controls()))
    assert "| image | image_control | 0.100 |" in page
    assert not list(effect_section(STUDY))
    figure = Figure()
    draw_effects(with_own_controls(), figure)
    assert [len(axes.texts) for axes in figure.axes] == [3, 3]
