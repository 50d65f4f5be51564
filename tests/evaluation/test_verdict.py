"""The report's verdict on made-up rows: what counts as help, what as harm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from tiny_rows import NAN, USUAL, row

from selfforcing_dfd.evaluation.tables import Row
from selfforcing_dfd.evaluation.worlds import TINY


def verdict(rows: Sequence[Row]) -> str:
    return " ".join(finding.text for finding in TINY.findings(rows))


def judged(
    arm: Mapping[str, tuple[float, float]], control: Mapping[str, tuple[float, float]]
) -> str:
    rows = [row("data"), row("control", **control), row("arm", **arm)]
    (finding,) = TINY.findings(rows)
    return finding.outcome


@pytest.mark.parametrize(
    ("change_of_arm", "outcome"),
    [
        ({"kl_prior_sample": (1.0, 0.1)}, "helped"),
        # .04 less validity is within the margin
        ({"kl_prior_sample": (1.0, 0.1), "valid": (0.86, 0.02)}, "helped"),
        ({"kl_prior_sample": (1.35, 0.1)}, "no clear difference"),  # the intervals touch
        (
            {"kl_prior_sample": (2.0, 0.1)},
            "no clear difference",
        ),  # worse coverage alone is not what the rule calls harm
        # the price is too high to call it help
        ({"kl_prior_sample": (1.0, 0.1), "valid": (0.8, 0.02)}, "harmed"),
        ({"contrast": (0.4, 0.02)}, "harmed"),
        ({"kl_prior_sample": (1.0, 0.1), "contrast": (0.4, 0.02)}, "mixed"),
        # covers the modes, but hardly moves
        ({"kl_prior_sample": (1.0, 0.1), "speed_px": (0.5, 0.05)}, "mixed"),
        ({"kl_prior_sample": (1.0, 0.1), "speed_px": (1.4, 0.05)}, "helped"),
        # nothing to compare decides nothing
        ({"kl_prior_sample": (NAN, NAN)}, "no clear difference"),
        ({"kl_prior_sample": (NAN, NAN), "valid": (0.0, 0.0)}, "harmed"),
    ],
)
def test_verdict_follows_its_rule(change_of_arm: dict[str, tuple[float, float]], outcome: str):
    """Catches a verdict that calls a change by chance a success, or a success at any price."""
    assert judged(USUAL | change_of_arm, USUAL) == outcome


def test_contrast_that_falls_to_the_datas_is_no_harm():
    """Catches a one-sided rule: with an over-saturated control, every cure would look like harm."""
    control = USUAL | {"contrast": (0.9, 0.01)}
    assert judged(USUAL | {"contrast": (0.66, 0.01)}, control) == "no clear difference"
    assert judged(USUAL | {"contrast": (0.5, 0.01)}, control) == "harmed"


def test_one_invalid_clip_is_no_harm_where_the_interval_has_no_width():
    """Catches a verdict by one clip in 256: a share of 100 % has an interval without width."""
    control = USUAL | {"valid": (1.0, 0.0)}
    assert (
        judged(USUAL | {"kl_prior_sample": (1.0, 0.1), "valid": (0.996, 0.002)}, control)
        == "helped"
    )


def test_an_arm_is_held_to_no_more_motion_than_its_teacher_has():
    """Catches harm that the teacher did: a student of a slow teacher cannot be as fast as data."""
    rows = [
        row("data"),
        row("teacher", speed_px=(0.5, 0.1)),
        row("control", **USUAL),
        row("arm", **USUAL, speed_px=(0.5, 0.1)),
    ]
    assert TINY.findings(rows)[0].outcome == "no clear difference"
    rows[1] = row("teacher")
    assert TINY.findings(rows)[0].outcome == "harmed"


def test_verdict_says_one_sentence_for_each_arm_with_its_numbers():
    """Catches arms that are passed over, and references that are judged as if they were arms."""
    names = ("data", "teacher", "start", "control", "one", "two")
    rows = [row(name, **(USUAL if name in names[2:] else {})) for name in names]
    rows[4] = row("one", **USUAL | {"kl_prior_sample": (1.0, 0.1)})
    text = verdict(rows)
    assert "one helped: it covers the modes better, KL(prior || sample) 1.00 (control 1.50)" in text
    assert "two made no clear difference" in text
    assert len(TINY.findings(rows)) == 2


def test_without_control_rows_are_described_against_the_data():
    """Catches a verdict on a teacher or a lone student that has nothing to be judged by."""
    assert verdict([row("data"), row("teacher")]) == (
        "teacher cannot be told from the data: every interval touches the data's."
    )
    grey = verdict([row("data"), row("teacher"), row("student", saturation=(0.3, 0.02))])
    assert grey == "student differs from the data: saturation 0.30 (data 0.50)."
