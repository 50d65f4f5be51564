"""What metrics are worth, tried on sets of known faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import EXIT_USER_ERROR
from selfforcing_dfd.metrics import calibration
from selfforcing_dfd.metrics.calibration import (
    FRESH,
    LADDER,
    TRAINING_SEED,
    TRUTH,
    copies,
    correlation,
    data,
    factors_of,
    frozen,
    ghosts,
    grey,
    judge,
    jumpy,
    noisy,
    verdict,
    vivid,
)
from selfforcing_dfd.metrics.calibration_tables import tables, truth_table, verdict_table
from selfforcing_dfd.tiny.readout import read
from selfforcing_dfd.tiny.world import MODE_PRIOR, mode

HARMS = ("1 modes", "frozen", "copies")
ROOT = Path(__file__).parents[2]


def test_fewer_modes_are_the_likeliest_ones():
    """Catches modes whose hue, direction and speed are taken apart in another order."""
    for left in (1, 4, 72):
        factors = factors_of(400, 0, left)
        found = set(mode(factors.hue, factors.direction, factors.speed).tolist())
        likeliest = MODE_PRIOR.argsort(descending=True)[:left].tolist()
        assert found <= set(likeliest)
        assert len(found) >= min(left, 40)


def test_each_harm_is_the_one_that_is_meant():
    """Catches a set that is harmed in another way than its name says."""
    count = 6
    usual = read(data(count, 3).float() / 255)
    found = {make: read(make(count, 3).float() / 255) for make in (grey, vivid, noisy, jumpy)}
    assert usual.valid.all()
    torch.testing.assert_close(found[grey].contrast, usual.contrast / 2, atol=0.02, rtol=0)
    assert (found[vivid].saturation > 1.2 * usual.saturation).all()
    assert (found[noisy].psnr < usual.psnr - 5).all()
    assert found[jumpy].jitter.mean() > usual.jitter.mean() + 1
    assert read(frozen(count, 3).float() / 255).speed_px.max() < 0.01
    blended = read(ghosts(count, 3).float() / 255)
    assert blended.explained.mean() < usual.explained.mean() - 0.1
    half = copies(count, 3)
    assert torch.equal(half[: count // 2], data(count, TRAINING_SEED)[: count // 2])
    assert torch.equal(half[count // 2 :], data(count - count // 2, 3))


def test_chance_goes_as_far_as_fresh_sets_lie_apart():
    """Catches a verdict that any two sets of the data would get."""
    fresh = [1.0, 1.2, 1.1]
    assert verdict(0.85, fresh) == verdict(1.35, fresh) == "same"
    assert verdict(0.75, fresh) == "worse"
    assert verdict(1.45, fresh) == "better"
    assert verdict(None, fresh) == "none"
    assert correlation([3.0, 2.0, 1.0], [30, 20, 10]) == pytest.approx(1)
    assert correlation([1.0, 1.0], [3, 2]) == 0


def made_up(**metrics: list[float]) -> dict[str, Any]:
    """As `calibrate` returns it: two fresh sets and those of the ladder, then copies."""
    names = ["data 1", "data 2", *(f"{left} modes" for left in LADDER), "copies"]
    modes = [40, 42, *LADDER, 41]
    rows = []
    for number, name in enumerate(names):
        truth = {each: float(modes[number]) for each in TRUTH}
        values = {metric: found[number] for metric, found in metrics.items()}
        rows.append({"set": name, "what": "clips", "truth": truth, "metrics": values})
    return {"fresh": 2, "sets": rows}


def test_metrics_are_judged_by_the_truth():
    """Catches a rank over harmed sets of other kinds, and fooled metrics that count as right."""
    found = made_up(
        blind=[1.0, 1.1, 1.0, 1.0, 1.0, 1.0, 1.1, 1.05],
        good=[9.0, 9.1, 8.0, 7.0, 6.0, 5.0, 4.0, 9.05],
        turned=[1.0, 1.1, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0],
    )
    good, turned, blind = judge(found)
    assert [good.metric, turned.metric, blind.metric] == ["good", "turned", "blind"]
    assert good.rank == pytest.approx(1)
    assert turned.rank == pytest.approx(-1)
    assert list(good.verdicts.values()) == ["worse"] * 5 + ["same"]
    assert list(turned.verdicts.values()) == ["better"] * 5 + ["worse"]
    lines = tables(found).splitlines()
    assert "| data | clips | 41.00 | 41 |" in lines[2]
    assert lines[-2].startswith("| turned | -1.00 | **fooled** |")
    assert lines[-2].endswith("| + | 1 of 6 |")


def test_the_command_tries_every_metric_on_every_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Catches metrics whose sign is turned, and a table that is not of the numbers in the file."""
    monkeypatch.setattr(calibration, "MEASURED", 2)
    monkeypatch.setattr(calibration, "PLACES", 2)
    some = [kind for kind in calibration.kinds() if kind.name in HARMS]
    monkeypatch.setattr(calibration, "kinds", lambda: some)
    monkeypatch.setattr(calibration, "LADDER", (1,))
    monkeypatch.setattr(calibration, "FRESH", 2)
    out = tmp_path / "c.json"
    assert main(["evaluate", "--calibrate", "--clips", "12", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [row["set"] for row in found["sets"]] == ["data 1", "data 2", *HARMS]
    first, second, one, still, copied = (row["metrics"] for row in found["sets"])
    assert still["residual_share"] is None, "nothing over nothing"
    for fresh in (first, second):
        assert one["vendi, pixels+motion"] < fresh["vendi, pixels+motion"] - 1
        assert one["mmd, motion"] < fresh["mmd, motion"]
        assert copied["memory_nearer, pixels+motion"] < fresh["memory_nearer, pixels+motion"]
    assert copied["memory_copies, pixels"] <= -0.5
    assert found["sets"][2]["truth"]["modes"] == 1
    assert tables(found) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no video is named"),
        (["--calibrate", "--clips", "3"], "compared from 6 clips on"),
        (["--calibrate", "."], "makes its own clips"),
    ],
)
def test_the_command_says_what_it_wants(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    """Catches a calibration of nothing."""
    assert main(["evaluate", *options]) == EXIT_USER_ERROR
    assert message in capsys.readouterr().err


def test_the_document_shows_the_measured_tables():
    """Catches a table that was edited by hand, or is of another calibration."""
    found = json.loads((ROOT / "docs" / "metrics" / "calibration.json").read_text())
    assert found["fresh"] == FRESH
    document = (ROOT / "docs" / "metrics.md").read_text()
    assert truth_table(found) in document
    assert verdict_table(found) in document
