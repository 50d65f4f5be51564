"""Number formats side by side differ in arithmetic and in nothing else."""

from __future__ import annotations

import json

import pytest

from selfforcing_dfd.evaluation import precision


def test_formats_differ_in_arithmetic_alone(monkeypatch):
    """Catches another noise for each format, an emulation without effect, and NaN in the JSON."""
    formats = {name: precision.FORMATS[name] for name in ("float32", "bfloat16", "8-bit, both")}
    monkeypatch.setattr(precision, "FORMATS", formats)
    monkeypatch.setattr(precision, "STUDENTS", {"stable": precision.STUDENTS["stable"]})
    text, result = precision.precision(1)
    _, half, eight = result["rows"]
    assert half["psnr_db"][0] > 40 > eight["psnr_db"][0] > 20
    assert half["psnr_db"][1] > eight["psnr_db"][1] > 15
    assert json.loads(json.dumps(result, allow_nan=False))["rows"][0]["psnr_db"] is None
    assert len(text.splitlines()) == 2 + 3
    assert eight["scores"]["valid"]["value"] == 1
    assert "follow" in eight["scores"]


@pytest.mark.soak
def test_what_the_documents_say_of_eight_bits():
    """Catches numbers in docs/numerics.md that the command no longer gives, within intervals."""
    rows = {
        (row.student, row.format): row.scores["kl_prior_sample"].value
        for row in precision.measure_precision(256)
    }
    assert rows["stable", "8-bit, both"] == pytest.approx(0.54, abs=0.25)
    assert rows["DMD", "8-bit linear layers"] == pytest.approx(3.47, abs=0.3)
