"""What a protocol's report says: means, differences, intervals, power, and the paper's numbers."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from selfforcing_dfd.common import shipped
from selfforcing_dfd.metrics.diversity import diversity
from selfforcing_dfd.metrics.feature_files import sample_file
from selfforcing_dfd.metrics.features import PixelEncoder, pooled, unit
from selfforcing_dfd.protocol.compare import all_compared, compared, pairs_of, power_note
from selfforcing_dfd.protocol.horizon import add_changes, all_curves
from selfforcing_dfd.protocol.plan import AVERAGE, PROTOCOL_CONFIGS, load_protocol
from selfforcing_dfd.protocol.prepared import prepare
from selfforcing_dfd.protocol.report import write_report
from selfforcing_dfd.protocol.results import Result, by_unit, gather
from selfforcing_dfd.protocol.tables import as_text, means_table, ours, paper_table

TABLES = [f"paper/table{number}" for number in (1, 2, 3, 5, 6, 7)]


def result(name: str, values: dict[tuple[int, int], float]) -> Result:
    return Result(name, values={"score": dict(values)})


def test_pairs_are_of_equal_prompt_and_seed():
    """Catches videos that are compared with those of another prompt or seed."""
    one = result("one", {(0, 1): 5.0, (0, 2): 7.0, (1, 1): 1.0, (2, 1): 9.0})
    other = result("other", {(1, 1): 3.0, (0, 2): 6.0, (0, 1): 1.0, (3, 1): 0.0})
    found = compared("score", one, other, "pair")
    assert found is not None
    assert found.difference.n == 3, "what one method alone has is left out"
    assert found.difference.value == pytest.approx((4 + 1 - 2) / 3)
    assert (found.mean, found.other_mean) == (pytest.approx(13 / 3), pytest.approx(10 / 3))
    assert (found.signs.lower, found.signs.higher) == (1, 2)
    by_prompts = compared("score", one, other, "prompt")
    assert by_prompts is not None
    assert by_prompts.difference.n == 2, "the mean over seeds counts once"
    assert by_prompts.difference.value == pytest.approx((6 - 3.5 + 1 - 3) / 2)
    half = compared("score", one, result("half", {(0, 1): 2.0}), "prompt")
    assert half is not None
    assert half.difference.value == 3, "the seed that both have, and not the mean of two"
    assert compared("score", one, result("none", {}), "pair") is None
    assert by_unit({(0, 1): 1.0, (0, 2): 3.0}, "prompt") == {(0,): 2.0}


def test_a_difference_is_shown_by_sign_test_and_interval_together():
    """Catches a star for one outlier, or for five prompts."""
    calm = {(prompt, 1): 0.0 for prompt in range(8)}
    shifted = {key: 1 + 0.1 * key[0] for key in calm}
    outlier = {key: 100.0 if key == (0, 1) else 0.1 * (-1) ** key[0] for key in calm}
    for values, shown in ((shifted, True), (outlier, False)):
        found = compared("score", result("one", values), result("other", calm), "prompt")
        assert found is not None
        assert found.is_shown is shown
    few = {key: shifted[key] for key in list(calm)[:5]}
    found = compared("score", result("one", few), result("other", calm), "prompt")
    assert found is not None
    assert found.difference.low > 0
    assert not found.is_shown, "five signs alone have p = .06"


def test_power_note_says_what_cannot_be_shown(finished: tuple[Path, str]):
    """Catches a table of three prompts without a word on what three prompts can show."""
    plan, printed = finished
    prepared = prepare(str(plan))
    results = gather(prepared)
    notes = " ".join(power_note(prepared.protocol, all_compared(prepared.protocol, results)))
    assert "A test counts 3 prompts (the mean over their seeds)." in notes
    assert "With fewer than 6 a sign test cannot fall below 0.05" in notes
    assert re.search(r"\d+ differences are tested; about \d+ would have p < 0.05 by chance", notes)
    assert notes.split(".")[0] in printed
    assert "intervals of fewer than 20 units are too narrow" in notes
    assert power_note(prepared.protocol, []) == []


def test_references_are_always_compared(finished: tuple[Path, str]):
    """Catches a method that is held against its control alone, or a reference against itself."""
    protocol = load_protocol(str(finished[0]))
    assert pairs_of(protocol) == [
        ("two", "one"),
        ("absent", "one"),
        *[(method, other) for method in ("one", "two", "absent") for other in ("teacher", "data")],
    ]


def test_scores_are_those_of_the_videos(finished: tuple[Path, str]):
    """Catches features or numbers of another video, and a diversity over all prompts at once."""
    prepared = prepare(str(finished[0]))
    results = gather(prepared)
    one = results["one"]
    encoder = PixelEncoder()
    cells = [cell for cell in prepared.cells("one") if cell.prompt.number == 1]
    clips = [sample_file(prepared.video(cell)) for cell in cells]
    frames = unit(torch.stack([encoder(clip).float() for clip in clips]))
    wanted = float(diversity(pooled(frames)))
    assert one.values["pixels.diversity_mean"][(1,)] == pytest.approx(wanted)
    assert set(one.values["pixels.diversity_mean"]) == {(0,), (1,), (2,)}
    assert one.score("pixels.coverage").n > 0
    assert "pixels.coverage" not in results["data"].sets, "the data are not compared with itself"
    mean = sum(one.values["contrast"].values()) / 6
    assert one.score("contrast").value == pytest.approx(mean)


def test_curves_have_a_point_for_each_stretch(finished: tuple[Path, str]):
    """Catches curves of the first video alone, and changes that are first less last."""
    prepared = prepare(str(finished[0]))
    results = gather(prepared)
    curves = {(curve.method, curve.score): curve for curve in all_curves(results)}
    points = curves["one", "contrast"].points
    assert [seconds for seconds, _ in points] == [0.125, 0.375]
    windows = [numbers["windows"] for numbers in results["one"].numbers]
    last = [window[1]["numbers"]["contrast"] for window in windows]
    assert points[1][1].value == pytest.approx(sum(last) / 6)
    add_changes(results["one"])
    first = windows[0][0]["numbers"]["contrast"]
    assert results["one"].values["change.contrast"][(0, 1)] == pytest.approx(last[0] - first)


def test_the_page_shows_what_was_not_run_and_needs_nothing_else(finished: tuple[Path, str]):
    """Catches a page that hides a method, fetches from elsewhere, or names videos wrongly."""
    plan, printed = finished
    out = plan.parent / "out"
    page = (out / "report.html").read_text()
    assert "absent: not run, no weights at" in page
    assert "no folder" in page
    assert "(reference)" in page
    assert not re.findall(r'(?:src|href)="https?:', page)
    videos = re.findall(r'<video src="([^"]+)"', page)
    assert len(videos) == 3 * 2 * 4
    assert all((out / video).is_file() for video in videos)
    assert page.count("data:image/svg+xml") >= 5
    assert "Over time" in page
    assert "not run" in printed
    assert str(out / "report.html") in printed


def test_a_part_is_reported_as_a_part(plan: Path):
    """Catches means over half of the videos that look like means over all."""
    from selfforcing_dfd.protocol.work import Worker, run_tasks

    prepared = prepare(str(plan))
    tasks = Worker(prepared, "cpu").tasks("all", ["data"])
    assert run_tasks([tasks[0], tasks[6]]) == []
    printed = write_report(prepared)
    assert "data: 1 of 6 videos are measured so far." in printed
    assert "one: 0 of 6 videos are measured so far." in printed
    found = json.loads((plan.parent / "out/evaluation.json").read_text())
    assert found["methods"]["data"]["wanted"] == 6
    assert len(found["methods"]["data"]["videos"]) == 1


def test_a_published_number_stands_beside_ours_and_no_other(finished: tuple[Path, str]):
    """Catches our number under another definition's column, and a mean of a part of columns."""
    prepared = prepare(str(finished[0]))
    results = gather(prepared)
    paper = prepared.protocol.paper
    assert paper is not None
    flicker, consistency, average = ours(paper, results["two"])
    assert flicker == pytest.approx(results["two"].score("temporal_flicker").value)
    assert math.isnan(consistency)
    assert math.isnan(average), "one of its columns was not run"
    rows = {row[0]: row[1:] for row in paper_table(paper, results, prepared.not_run).rows}
    assert rows["two, paper"] == ["0.75", "0.5", "0.625"]
    assert rows["two, here"] == [f"{flicker:.4g}", "not run", "not run"]
    assert rows["absent, paper"] == ["0.25", "-", "-"]
    assert rows["absent, here"] == ["not run"] * 3


def test_shipped_protocols_can_be_read():
    """Catches a protocol that was written and never loaded."""
    folder = shipped(PROTOCOL_CONFIGS)
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]
    shipped_here = {"tiny", "tiny_modes", "long", "wan_ar", "wan_i2v", "wan_long"}
    assert set(names) == {*TABLES, *shipped_here}
    for name in names:
        protocol = load_protocol(name)
        assert protocol.out == f"runs/protocol/{name}"
    assert prepare("tiny").not_run == {}
    assert prepare("long").not_run == {}


@pytest.mark.parametrize("name", TABLES)
def test_published_averages_are_means_of_their_columns(name: str):
    """Catches a number that was copied wrongly: the paper's averages agree to rounding."""
    paper = load_protocol(name).paper
    assert paper is not None
    assert name[-1] in paper.source
    for numbers in paper.rows.values():
        assert set(numbers) == set(paper.columns)
        before = []
        for column, score in paper.columns.items():
            if score == AVERAGE:
                assert sum(before) / len(before) == pytest.approx(numbers[column], abs=6.5e-4)
            before.append(numbers[column])


def test_copies_in_the_published_tables_are_what_the_notes_say():
    """Catches a note on equal rows that the numbers do not bear out."""
    rows = {name: OmegaConf.load(shipped(f"{PROTOCOL_CONFIGS}/{name}.yaml")) for name in TABLES}
    six = rows["paper/table6"].paper.rows
    seven = rows["paper/table7"].paper.rows
    assert six.with_gan == seven.one
    assert six.without_gan != seven.half
    for row in [*six.values(), *seven.values()]:
        assert (16 * row.DD) % 1 == 0
    assert rows["paper/table3"].paper.rows.dfd_16 == rows["paper/table2"].paper.rows.dfd


def test_tables_are_aligned():
    """Catches a table whose columns slip when a name is long."""
    text = as_text(means_table("Means", {"m": result("m", {(0, 1): 1.0})}, ["score"], {}))
    lines = text.splitlines()
    assert lines[2].endswith(" 0")
    assert len({len(line) for line in lines[1:4]}) == 1
