"""Scores of samples while training, as plots."""

from __future__ import annotations

from selfforcing_dfd.evaluation.curves import Series
from selfforcing_dfd.evaluation.scores import score_panels
from selfforcing_dfd.evaluation.tables import Metric

METRICS = [
    Metric("contrast", "contrast", 2, 0.2, "spread of luma"),
    Metric("modes", "modes", 0, 10, "of 72"),
]


def test_runs_of_a_comparison_share_a_plot():
    """Catches a control that is not beside its arm, and a plot of a score that nobody has."""
    lines = {
        "control": [
            {"student_update": 2, "scores": {"contrast": 0.7, "modes": None}},
            {"student_update": 4, "scores": {"contrast": 0.8}},
        ],
        "arm": [{"student_update": 4, "scores": {"contrast": 0.6}}],
        "late": [],
    }
    (panel,) = score_panels(lines, METRICS, {"control": 1, "arm": 2, "late": 3})
    assert panel.title == "Samples: contrast"
    assert panel.series == (
        Series("control", ((2, 0.7), (4, 0.8)), 1),
        Series("arm", ((4, 0.6),), 2),
    )
