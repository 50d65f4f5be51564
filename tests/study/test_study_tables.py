"""Comparisons and the page on made-up numbers, whose answers are known by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from selfforcing_dfd.evaluation.tiny_verdict import RULE
from selfforcing_dfd.study.compare import (
    aligned,
    front,
    gaps,
    index_at,
    mean_of,
    null_check,
    rank_correlation,
    verdicts,
    with_rows,
)
from selfforcing_dfd.study.goal import GOAL, criteria
from selfforcing_dfd.study.plan import FixedPoint
from selfforcing_dfd.study.plots import draw_arm
from selfforcing_dfd.study.results import (
    ArmFacts,
    Study,
    Trajectory,
    between,
    load_study,
    save_study,
)
from selfforcing_dfd.study.tables import paired_table, score_table, sections, write_document

TEACHER = {
    "valid": 1.0,
    "modes": 70.0,
    "coverage": 0.97,
    "kl_prior_sample": 0.4,
    "kl_floor": 0.38,
    "follow": 0.95,
    "saturation": 0.5,
    "contrast": 0.66,
    "speed_px": 0.9,
    "jitter_px": 0.3,
    "seam_excess_px": 0.0,
}
COLLAPSED = {**TEACHER, "coverage": 0.3, "kl_prior_sample": 2.0, "follow": 0.2, "contrast": 0.75}
STARTS = ("a", "b", "c")
DRAWS = (0, 1, 2)
# what training alone makes of coverage in the nine runs
CHANCE = (0.02, -0.03, 0.01, 0.0, 0.03, -0.01, -0.02, 0.01, -0.01)


def run(
    start: str, draw: int, arm: str, gflop: Sequence[float], points: Sequence[dict[str, float]]
) -> Trajectory:
    """A run measured every 12 updates, on a machine that gets slower with every draw."""
    scores = {key: [round(point[key], 4) for point in points] for key in TEACHER}
    return Trajectory(
        start=start,
        draw=draw,
        arm=arm,
        updates=list(range(12, 12 * len(points) + 1, 12)),
        core_seconds=[(1 + draw) * each for each in gflop],
        gflop=list(gflop),
        scores=scores,
        logged={"gap": [1.0 for _ in points]},
    )


def made_up() -> Study:
    """A control, a good cheap arm that costs half, and a rival that gets good late."""
    runs = []
    for number, (start, draw) in enumerate((start, draw) for start in STARTS for draw in DRAWS):
        chance = CHANCE[number]
        control = {**COLLAPSED, "coverage": 0.3 + chance}
        good = {**TEACHER, "coverage": 0.9 + 2 * chance, "follow": 0.9 + chance}
        first = {**good, "coverage": 0.5 + chance}
        runs.append(run(start, draw, "control", (60, 120), (COLLAPSED, control)))
        runs.append(run(start, draw, "good", (30, 60, 90, 120, 150), (first, *[good] * 4)))
        runs.append(run(start, draw, "rival", (110, 220), (COLLAPSED, good)))
        if draw == 0:
            runs.append(run(start, draw, "good_long", (300, 600), (first, good)))
    facts = {
        "control": ArmFacts("DMD alone", 1, ["run.stage=dmd"]),
        "good": ArmFacts("good", 7, []),
        "good_long": ArmFacts("good", 7, []),
        "rival": ArmFacts("forced", 2, [], forced=True),
    }
    return Study(
        plan="made_up",
        about="Numbers by hand.",
        updates=24,
        dmd_updates=48,
        clips=256,
        evaluation_seed=2000,
        budget="control",
        controls=["control"],
        long=10,
        fixed={"rival_first": FixedPoint(arm="rival", update=12)},
        arms=facts,
        references={"data": {**TEACHER, "coverage": 1.0}, "teacher": dict(TEACHER)},
        starts={start: {"start": dict(COLLAPSED)} for start in STARTS},
        start_streams={},
        runs=runs,
        missing=0,
        commits=["abc"],
        noise_core_seconds=None,
    )


STUDY = made_up()


def with_scores(
    study: Study,
    arm: str,
    key: str,
    values: Sequence[float],
    start: str | None = None,
    draw: int | None = None,
) -> Study:
    """The study with other scores in an arm's runs, or in those of one start and draw."""
    runs = []
    for each in study.runs:
        chosen = each.arm == arm and start in (None, each.start) and draw in (None, each.draw)
        scores = {**each.scores, key: list(values)}
        runs.append(dataclasses.replace(each, scores=scores) if chosen else each)
    return dataclasses.replace(study, runs=runs)


def cells(table: list[list[str]], name: str) -> dict[str, str]:
    """A row of a table by its column."""
    (row,) = [row for row in table if row[0] == name]
    return dict(zip(table[0], row, strict=True))


def test_equal_compute_takes_the_newest_point_within_the_budget():
    """Catches a point beyond the budget, the first point, and runs of an arm at several updates.

    The control's 24 updates are 120 GFLOP: the good arm's newest point is that of 120, the rival's
    its first one. At equal updates both stand at 24, at the end at their last. Clocks decide
    nothing: they ran slower in some draws.
    """
    by_name = {found.arm: found for found in STUDY.runs if (found.start, found.draw) == ("a", 0)}
    at = {
        alignment: [index_at(STUDY, by_name[arm], alignment) for arm in ("good", "rival")]
        for alignment in ("compute", "updates", "end")
    }
    assert at == {"compute": [3, 0], "updates": [1, 1], "end": [4, 1]}
    dearer = dataclasses.replace(by_name["good"], gflop=[120.1, 140, 150, 160, 170])
    others = [each for each in STUDY.runs if each.arm != "good"]
    study = dataclasses.replace(STUDY, runs=[*others, dearer])
    assert index_at(study, dearer, "compute") is None
    good = [each for each in STUDY.runs if each.arm == "good"]
    assert [index_at(STUDY, each, "compute") for each in good] == [3] * 9
    alone = dataclasses.replace(STUDY, runs=[by_name["good"]])
    assert index_at(alone, by_name["good"], "compute") is None
    row = cells(score_table(STUDY, "compute"), "good")
    assert [row[key] for key in ("updates", "GFLOP", "core s", "runs")] == ["48", "120", "240", "9"]
    assert cells(score_table(STUDY, "compute"), "rival")["updates"] == "12"


def test_an_arm_without_a_point_within_the_budget_is_in_no_row():
    """Catches an arm that is compared at a point that the others could not afford."""
    runs = []
    for each in STUDY.runs:
        late = [gflop + 500 for gflop in each.gflop]
        runs.append(dataclasses.replace(each, gflop=late) if each.arm == "rival" else each)
    study = dataclasses.replace(STUDY, runs=runs)
    assert not with_rows(aligned(study, "compute"), "rival")
    assert "rival" not in {row[0] for row in score_table(study, "compute")}
    assert len(with_rows(aligned(study, "updates"), "rival")) == 9
    assert ("rival", "control") not in verdicts(study, "compute")


def test_paired_differences_are_those_by_hand():
    """Catches runs that are paired with another draw's, and intervals of unpaired means.

    good - control = .6 + chance in each run: chance has mean 0 and, by hand, standard deviation
    .01936; Student's quantile for 8 degrees of freedom is 2.306. Of 512 sign flips two are as far.
    """
    half = 2.306 * math.sqrt(sum(each**2 for each in CHANCE) / 8) / 3
    row = cells(paired_table(STUDY, "control"), "good")
    assert row["coverage, equal compute"] == f"+0.60 [+{0.6 - half:.2f} +{0.6 + half:.2f}] p 0.004"
    assert row["coverage, equal compute"] == "+0.60 [+0.59 +0.61] p 0.004"
    assert row["KL, equal updates"] == "-1.60 [-1.60 -1.60] p 0.004"
    assert cells(paired_table(STUDY, "control"), "rival")["KL, equal compute"].startswith("+0.00")


def test_means_and_ranges_are_over_runs():
    """Catches a range over clips, and a mean over starts with unequal numbers of draws."""
    row = cells(score_table(STUDY, "updates"), "control")
    assert row["coverage"] == "0.30 [0.27 0.33]"
    assert row["contrast"] == "0.75"
    assert cells(score_table(STUDY, "updates"), "teacher")["runs"] == ""
    assert mean_of(aligned(STUDY, "updates"), "good", "coverage").value == pytest.approx(0.9)


def test_a_fixed_point_stays_where_it_is():
    """Catches the paper's dose that is held at another dose in one of the tables."""
    for alignment in ("compute", "updates", "end"):
        row = cells(score_table(STUDY, alignment), "rival_first")
        assert (row["updates"], row["coverage"]) == ("12", "0.30")


def test_the_rule_is_applied_to_pairs_of_runs():
    """Catches another rule than the reports', and a verdict that ignores compute."""
    found = verdicts(STUDY, "compute")
    assert found["good", "control"].outcome == "helped"
    assert found["rival", "control"].outcome == "no clear difference"
    assert verdicts(STUDY, "updates")["rival", "control"].outcome == "helped"


def test_control_against_control_finds_nothing():
    """Catches a check that pairs a draw with itself, or goes round in a circle to mean 0.

    Three draws give three pairs of draws over three starts. Where one draw is far better in every
    start, the check has to see it.
    """
    found = null_check(STUDY)
    assert [finding.outcome for finding in found] == ["no clear difference"] * 3
    assert "3 runs from 3 starts" in found[0].text
    lucky = with_scores(STUDY, "control", "coverage", [0.3, 0.3])
    for number, start in enumerate(STARTS):
        better = [0.3, 0.9 + 0.001 * number]
        lucky = with_scores(lucky, "control", "coverage", better, start=start, draw=2)
    outcomes = [finding.outcome for finding in null_check(lucky)]
    assert outcomes == ["no clear difference", "mixed", "mixed"]
    page = "\n".join(sections(lucky))
    assert "2 of 3 comparisons found a difference where there is none" in page


def test_the_goal_is_reached_by_what_reaches_it():
    """Catches a goal that nothing or everything reaches: each part is missed in its turn."""
    assert [part.text for part in criteria(STUDY, "good") if not part.met] == []
    assert len(criteria(STUDY, "good")) == 2 + 5 + 5 + 2
    rival = [part.text for part in criteria(STUDY, "rival") if not part.met]
    assert [text.split(" ")[0] for text in rival] == [
        "coverage",
        "goes",
        "contrast",
        "KL",
        "everything",
    ]
    assert "contrast 0.75 (bounds 0.63 to 0.69), missed by 0.06" in rival
    assert "everything at 10 times the length: not run" in rival
    missed = criteria(with_scores(STUDY, "good_long", "follow", [0.9, 0.8]), "good")
    assert [part.text for part in missed if not part.met] == [
        "follow 0.90, 0.80 at 10 times the length"
    ]


def test_arms_without_a_run_wait_and_are_not_judged():
    """Catches a page that says of arms which did not run that they missed everything."""
    arms = {**STUDY.arms, "later": ArmFacts("later", 1, [])}
    page = "\n".join(sections(dataclasses.replace(STUDY, arms=arms)))
    assert "\nNot run yet: `later`." in page
    tables, _, settings = page.partition("\n## Arms\n")
    assert "\n| later |" not in tables
    assert "\n| later |" in settings


def test_one_start_that_lost_is_a_goal_missed():
    """Catches a mean over all runs that hides a start in which the control was better."""
    study = with_scores(STUDY, "control", "coverage", [0.95, 0.95], start="b")
    missed = [part.text for part in criteria(study, "good") if not part.met]
    assert len(missed) == 1
    assert missed[0].startswith("coverage +0.39")


def test_the_front_holds_what_nothing_beats():
    """Catches contrast that is better the higher it is: only nearness to the teacher's counts."""
    found = {(point.arm, point.update) for point in front(STUDY)}
    assert found == {("good", update) for update in (24, 36, 48, 60)} | {("rival", 24)}
    pale = {**TEACHER, "coverage": 0.99, "contrast": 0.5}
    runs = [*STUDY.runs, run("a", 0, "rival", (1, 2), (pale, pale))]
    both = front(dataclasses.replace(STUDY, runs=runs[-1:] + STUDY.runs[:2]))
    assert {point.arm for point in both} == {"rival", "good"}


def test_gaps_are_means_since_the_point_before():
    """Catches a gap of one lucky update, and a mean over the whole run."""
    assert between([1.0, 3.0, None, 5.0, 9.0], [2, 4, 5]) == [2.0, 5.0, 9.0]
    assert between([None, None], [2]) == [None]
    assert {arm for arm, _, _ in gaps(STUDY)} == {"control", "good", "rival"}
    assert rank_correlation([(1, 5), (2, 4), (3, 1)]) == -1
    assert rank_correlation([(1, 5), (1, 5), (2, 7), (2, 7)]) == pytest.approx(1)
    assert math.isnan(rank_correlation([(1, 5), (2, 4)]))
    assert math.isnan(rank_correlation([(1, 5), (1, 4), (1, 6)]))


def test_the_page_says_the_rule_first_and_the_file_holds_it_all(tmp_path: Path):
    """Catches a page whose rule was written after its numbers, and a file that loses some."""
    save_study(STUDY, tmp_path / "made_up.json")
    assert load_study(tmp_path / "made_up.json") == STUDY
    write_document(STUDY, tmp_path / "study.md", {})
    page = (tmp_path / "study.md").read_text()
    flat = " ".join(page.split())
    assert flat.index(GOAL) < flat.index(RULE) < flat.index("What it found")
    assert "**good reaches the goal.**" in page
    assert "| rival | 24 | 0.50 | 0.90 |" in page  # a dose in units of the DMD run before
    assert "| good | 7 |" in page
    assert "| good | + + |" in page  # certain in coverage and in the follow test
    assert "| rival | ~ ~ |" in page
    assert "27 runs" not in page
    assert "30 runs: 3 starts x 3 draws of 4 arms, 256 clips a point" in flat
    assert [line for line in page.splitlines() if len(line) > 100 and line[0] != "|"] == []


@pytest.mark.parametrize("from_start", [True, False])
def test_a_line_begins_at_the_start_only_if_its_arm_does(from_start: bool):
    """Catches a plot in which an arm of another student seems to repair the start's."""
    good = dataclasses.replace(STUDY.arms["good"], from_start=from_start)
    study = dataclasses.replace(STUDY, arms={**STUDY.arms, "good": good})
    place = Figure().subplots()
    draw_arm(place, study, "good", "coverage", {"color": "black"}, by_compute=False)
    assert (0 in list(place.lines[0].get_xdata())) is from_start
