"""Rows as text and JSON, on made-up rows."""

from __future__ import annotations

import json
import math

import pytest
from tiny_rows import NAN, USUAL, row

from selfforcing_dfd.evaluation import tables
from selfforcing_dfd.evaluation.tables import ReportError
from selfforcing_dfd.evaluation.tiny_world import METRICS
from selfforcing_dfd.tiny.bootstrap import Score


def test_distance_to_the_data_is_two_sided():
    """Catches a report in which less saturated is always better."""
    data = Score(0.5, 0.48, 0.52, 9)
    assert tables.against(Score(0.6, 0.58, 0.62, 9), data) == "↑"
    assert tables.against(Score(0.4, 0.38, 0.42, 9), data) == "↓"
    assert tables.against(Score(0.55, 0.51, 0.59, 9), data) == "="
    assert tables.against(Score(NAN, NAN, NAN, 0), data) == ""


def test_scores_from_few_clips_are_not_stated():
    """Catches the interval [.47, .47] of one valid clip, and the small KL of very few clips."""
    thin = tables.stated(row("arm", n=3).scores, METRICS)
    assert math.isnan(thin["saturation"].value)
    assert thin["valid"].value == 1.0
    some = tables.stated(row("arm", n=tables.FEWEST).scores, METRICS)
    assert some["saturation"].value == 0.5
    assert math.isnan(some["kl_prior_sample"].value)


def test_tables_show_value_interval_and_mark():
    """Catches columns that are shifted against their heads, and numbers without their interval."""
    rows = [row("data"), row("arm", saturation=(0.3, 0.02), contrast=(NAN, NAN))]
    head, _, *lines = tables.plain_table(rows, METRICS).splitlines()
    saturation = next(line for line in lines if line.startswith("saturation"))
    assert saturation[head.index("arm") :].strip() == "0.30 [0.28 0.32] ↓"
    assert saturation[head.index("data") :].startswith("0.50 [0.49 0.51] ")
    contrast = next(line for line in lines if line.startswith("contrast"))
    assert contrast[head.index("arm") :].strip() == "-"
    markdown = tables.markdown_table(rows, METRICS)
    assert "| saturation | 0.50 [0.49 0.51] | 0.30 [0.28 0.32] ↓ |" in markdown
    assert {line.count("|") for line in markdown.splitlines()} == {4}


def test_table_of_many_rows_fits_a_terminal():
    """Catches the table of the demo, 165 columns wide with intervals, which any terminal wraps."""
    names = ("data", "teacher", "start", "control", "caption", "prefix")
    text = tables.plain_table([row(name, **USUAL) for name in names], METRICS)
    assert max(map(len, text.splitlines())) <= 100
    assert "2.50" in text
    assert "[" not in text


def test_numbers_have_no_negative_zero_and_counts_no_fraction():
    """Catches `-0.00` and `20.00 modes`."""
    assert tables.number(-0.001, 2) == "0.00"
    assert tables.number(20.0, 0) == "20"
    assert tables.number(20.5, 0) == "20.5"


def test_rows_survive_json():
    """Catches NaN in report.json, which is not JSON, and scores that change on the way."""
    before = row("arm", contrast=(NAN, NAN))
    text = json.dumps(tables.to_json(before), allow_nan=False)
    after = tables.from_json(json.loads(text))
    assert math.isnan(after.scores["contrast"].value)
    for key in ("valid", "kl_prior_sample", "saturation"):
        assert after.scores[key] == before.scores[key]
    assert after.modes == before.modes
    with pytest.raises(ReportError, match="write the report again"):
        tables.from_json({"name": "arm"})
