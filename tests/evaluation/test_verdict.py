"""The verdict on made-up rows: what counts as help, what as harm, and what as chance."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import pytest
import torch
from tiny_rows import NAN, USUAL, row

from selfforcing_dfd.evaluation import tiny_verdict
from selfforcing_dfd.evaluation.tables import ReportError, Row, Run
from selfforcing_dfd.evaluation.worlds import TINY
from selfforcing_dfd.rng import generator

GOOD = {"coverage": 0.9, "kl_prior_sample": 0.6, "follow": 0.9}
# as much as two trainings of one method differ, one standard deviation
SPREAD = {
    "valid": 0.004,
    "coverage": 0.05,
    "kl_prior_sample": 0.3,
    "follow": 0.05,
    "contrast": 0.01,
    "saturation": 0.01,
    "speed_px": 0.03,
    "jitter_px": 0.005,
    "seam_excess_px": 0.05,
}


def trained(name: str, random: torch.Generator, values: Mapping[str, float]) -> Row:
    """A row of one training of a method that scores `values` on average."""
    usual = {key: value for key, (value, _) in USUAL.items()} | values
    base = {key: score.value for key, score in row(name).scores.items()} | usual
    scattered = {}
    for key, value in base.items():
        noise = float(torch.randn((), generator=random)) * SPREAD.get(key, 0.0)
        scattered[key] = (value + noise, 0.01)
    return row(name, **scattered)


def runs_of(
    arm: Mapping[str, float],
    control: Mapping[str, float] | None = None,
    starts: int = 3,
    draws: int = 3,
    seed: int = 0,
    more: Sequence[Row] = (),
) -> list[Run]:
    """Runs of an arm and a control, from several starts with several draws each."""
    random = generator(seed, "test verdict")
    runs = []
    for start in range(starts):
        for _ in range(draws):
            rows = [row("data"), row("teacher"), *more]
            rows.append(trained("control", random, control or {}))
            rows.append(trained("arm", random, arm))
            runs.append(Run(f"start {start}", rows))
    return runs


def outcome(runs: Sequence[Run]) -> str:
    (finding,) = TINY.verdict(runs)
    return finding.outcome


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        (GOOD, "helped"),
        (GOOD | {"follow": 0.2}, "helped"),  # a gain is enough where nothing is lost
        ({}, "no clear difference"),
        ({"coverage": 0.1, "kl_prior_sample": 4.0}, "harmed"),
        ({"follow": 0.01}, "harmed"),
        (GOOD | {"follow": 0.01}, "mixed"),
        # out of bounds, from either side: none of these was ever a loss below the control's
        (GOOD | {"contrast": 0.5}, "mixed"),
        (GOOD | {"contrast": 0.8}, "mixed"),
        (GOOD | {"saturation": 0.6}, "mixed"),
        (GOOD | {"speed_px": 0.6}, "mixed"),
        (GOOD | {"valid": 0.9}, "mixed"),
        (GOOD | {"jitter_px": 0.9}, "mixed"),
        (GOOD | {"seam_excess_px": 0.6}, "mixed"),
        ({"contrast": 0.5}, "harmed"),
        ({"seam_excess_px": 0.9}, "harmed"),
        # better than the data in what may not be too high only
        (GOOD | {"jitter_px": 0.05, "seam_excess_px": -0.2}, "helped"),
    ],
)
def test_verdict_follows_its_rule(arm: dict[str, float], expected: str):
    """Catches a success at any price, and a harm that does not count."""
    assert outcome(runs_of(arm)) == expected


def test_bounds_are_the_teachers_not_the_controls():
    """Catches an arm that is let down to the control's failure, and one blamed for it alone."""
    slow = {"speed_px": 0.3}
    assert outcome(runs_of(GOOD | slow, slow)) == "mixed"
    assert outcome(runs_of(slow, slow)) == "no clear difference"
    runs = runs_of(GOOD | slow, slow)
    for run in runs:
        run.rows[1] = row("teacher", speed_px=(0.3, 0.01))  # type: ignore[index]
    assert outcome(runs) == "helped"


def test_two_trainings_of_one_method_rarely_differ():
    """Catches a rule that calls chance a result: two controls against each other.

    The rule may err in 5 % of verdicts, over all its comparisons together. Of 300, more than 26 err
    with probability .003. By clips of one run, three of six such pairs were called different.
    """
    wrong = sum(outcome(runs_of({}, seed=seed)) != "no clear difference" for seed in range(300))
    assert wrong <= 26


def test_real_help_is_found_in_nine_runs():
    """Catches a rule so strict that nothing can pass: twice the coverage, in 50 of 50 studies."""
    arm = {"coverage": 0.6}
    assert all(outcome(runs_of(arm, seed=seed)) == "helped" for seed in range(50))


def test_help_must_hold_in_every_start():
    """Catches a mean that one start carries: two improve, and one gets worse."""
    runs = runs_of({"coverage": 0.9}, draws=8, seed=1)
    for index, run in enumerate(runs):
        if run.start == "start 2":
            runs[index] = dataclasses.replace(
                run, rows=[*run.rows[:-1], row("arm", **USUAL | {"coverage": (0.25, 0.01)})]
            )
    assert outcome(runs) == "no clear difference"


def test_one_run_has_no_outcome():
    """Catches a claim about methods from clips of one training."""
    rows = runs_of(GOOD, starts=1, draws=1)[0].rows
    (finding,) = TINY.findings(rows)
    assert finding.outcome == ""
    assert "one run, so no verdict about methods, only about these clips" in finding.text
    assert "coverage 0.9" in finding.text
    assert "(control 0.3" in finding.text
    assert outcome([Run("", rows)]) == "no clear difference"


def test_arm_is_judged_against_every_control():
    """Catches an arm that beats distribution matching and is no better than regression alone."""
    regression = row("regression", **USUAL | {key: (value, 0.0) for key, value in GOOD.items()})
    runs = runs_of(GOOD, more=[regression])
    found = TINY.verdict(runs)
    assert [finding.name for finding in found] == ["arm", "arm"]
    told = {finding.text.split(" in 9 runs")[0]: finding.outcome for finding in found}
    assert told == {
        "arm helped against control": "helped",
        "arm made no clear difference against regression": "no clear difference",
    }


def test_verdict_says_what_it_rests_on():
    """Catches a verdict without numbers, runs or bounds."""
    (finding,) = TINY.verdict(runs_of(GOOD | {"contrast": 0.5}))
    assert finding.text.startswith("arm is mixed against control in 9 runs from 3 starts: coverage")
    assert "+0.6" in finding.text
    assert "outside its bounds: contrast 0.50 (bounds 0.63 to 0.69, control 0.6" in finding.text


def test_what_is_not_stated_decides_nothing():
    """Catches a gain by NaN, and a bound that is met by NaN."""
    runs = runs_of(GOOD)
    for index, run in enumerate(runs):
        blank = row("arm", **dict.fromkeys(("coverage", "kl_prior_sample", "follow"), (NAN, NAN)))
        runs[index] = dataclasses.replace(run, rows=[*run.rows[:-1], blank])
    assert outcome(runs) == "no clear difference"
    bound = next(bound for bound in tiny_verdict.BOUNDS if bound.key == "speed_px")
    one = Run("", [row("data"), row("arm", speed_px=(NAN, NAN))])
    assert not tiny_verdict.meets("arm", bound, [one])


def test_unequal_numbers_of_clips_are_refused():
    """Catches KL of 96 clips held against KL of 256, which is lower by itself."""
    rows = [row("data"), row("control", **USUAL), row("arm", n=96, **USUAL)]
    with pytest.raises(ReportError, match=r"unequal numbers of clips .*arm 96"):
        TINY.findings(rows)
    with pytest.raises(ReportError, match=r"one report.clips for all"):
        TINY.verdict([Run("", rows)])


def test_without_control_rows_are_described_against_the_data():
    """Catches a verdict on a teacher or a lone student that has nothing to be judged by."""
    described = TINY.findings([row("data"), row("teacher")])
    assert described[0].text == (
        "teacher cannot be told from the data: every interval touches the data's."
    )
    rows = [row("data"), row("teacher"), row("student", saturation=(0.3, 0.02))]
    assert TINY.findings(rows)[0].text == (
        "student differs from the data: saturation 0.30 (data 0.50)."
    )
    assert TINY.verdict([Run("", rows)] * 2) == []
