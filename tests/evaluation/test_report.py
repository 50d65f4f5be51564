"""The report: its tables on made-up rows, its files, and one real report of untrained students."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from tiny_models import fill_weights
from tiny_rows import NAN, USUAL, row

from selfforcing_dfd.config import Config, ConfigError, change, load_config
from selfforcing_dfd.evaluation import tables
from selfforcing_dfd.evaluation.curves import MAX_POINTS, Axis, curve, histogram, panels
from selfforcing_dfd.evaluation.page import Page, Sheet, colours, render_page
from selfforcing_dfd.evaluation.pictures import contact_sheet
from selfforcing_dfd.evaluation.report import sample_videos, sources, write_report
from selfforcing_dfd.evaluation.tables import ReportError, Row
from selfforcing_dfd.tiny.metrics import Score
from selfforcing_dfd.training.build import build_network
from selfforcing_dfd.weights.tensors import save_weights


def test_distance_to_the_data_is_two_sided():
    """Catches a report in which less saturated is always better."""
    data = Score(0.5, 0.48, 0.52, 9)
    assert tables.against(Score(0.6, 0.58, 0.62, 9), data) == "↑"
    assert tables.against(Score(0.4, 0.38, 0.42, 9), data) == "↓"
    assert tables.against(Score(0.55, 0.51, 0.59, 9), data) == "="
    assert tables.against(Score(NAN, NAN, NAN, 0), data) == ""


def test_scores_from_few_clips_are_not_stated():
    """Catches the interval [.47, .47] of one valid clip, and the small KL that smoothing gives to
    very few.
    """
    thin = tables.stated(row("arm", n=3).scores)
    assert math.isnan(thin["saturation"].value)
    assert thin["valid"].value == 1.0
    some = tables.stated(row("arm", n=tables.FEWEST).scores)
    assert some["saturation"].value == 0.5
    assert math.isnan(some["kl_prior_sample"].value)


def test_tables_show_value_interval_and_mark():
    """Catches columns that are shifted against their heads, and numbers without their interval."""
    rows = [row("data"), row("arm", saturation=(0.3, 0.02), contrast=(NAN, NAN))]
    head, _, *lines = tables.plain_table(rows).splitlines()
    saturation = next(line for line in lines if line.startswith("saturation"))
    assert saturation[head.index("arm") :].strip() == "0.30 [0.28 0.32] ↓"
    assert saturation[head.index("data") :].startswith("0.50 [0.49 0.51] ")
    contrast = next(line for line in lines if line.startswith("contrast"))
    assert contrast[head.index("arm") :].strip() == "-"
    markdown = tables.markdown_table(rows)
    assert "| saturation | 0.50 [0.49 0.51] | 0.30 [0.28 0.32] ↓ |" in markdown
    assert {line.count("|") for line in markdown.splitlines()} == {4}


def test_numbers_have_no_negative_zero_and_counts_no_fraction():
    """Catches `-0.00` and `20.00 modes`."""
    assert tables.number(-0.001, 2) == "0.00"
    assert tables.number(20.0, 0) == "20"
    assert tables.number(20.5, 0) == "20.5"


def test_rows_survive_json():
    """Catches NaN in report.json, which is not JSON, and scores that come back as something else."""
    before = row("arm", contrast=(NAN, NAN))
    text = json.dumps(tables.to_json(before), allow_nan=False)
    after = tables.from_json(json.loads(text))
    assert math.isnan(after.scores["contrast"].value)
    for key in ("valid", "kl_prior_sample", "saturation"):
        assert after.scores[key] == before.scores[key]
    assert after.modes == before.modes
    with pytest.raises(ReportError, match="write the report again"):
        tables.from_json({"name": "arm"})


def test_curves_average_the_turns_of_an_update_and_long_runs():
    """Catches five fake-score turns drawn as a zigzag at one update, and pages of megabytes for
    long runs.
    """
    lines = [
        {"kind": "fake", "student_update": u, "loss": u + turn}
        for u in (1, 2)
        for turn in (0.0, 1.0)
    ]
    lines += [
        {"kind": "student", "student_update": 1, "loss": 9.0},
        {"kind": "fake", "student_update": 3, "loss": None},
    ]
    assert curve(lines, "fake", "loss") == ((1, 1.5), (2, 2.5))
    long = [{"kind": "student", "student_update": u, "loss": float(u)} for u in range(1, 1001)]
    points = curve(long, "student", "loss")
    assert len(points) <= MAX_POINTS
    assert all(x == y for x, y in points)


def test_axis_shows_all_values_between_its_ends():
    """Catches curves that leave the plot, and a flat curve that divides by nothing."""
    for values in ([0.2, 7.0], [3.0, 3.0], [0.0, 0.0], [-2.0, -1.0]):
        axis = Axis.over(values, 100, 0)
        assert all(0 <= axis.at(value) <= 100 for value in values)
        assert axis.shown()
    assert Axis.over([0.01, 10.0], 100, 0, logarithmic=True).shown() == pytest.approx(
        [0.01, 0.1, 1.0, 10.0]
    )


class Tags(HTMLParser):
    """Checks that tags are closed in order, and keeps the text."""

    void = {"meta", "img"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass  # SVG's own way to close a tag at once

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    tags.close()
    assert tags.open == []
    return tags


def page(rows: Sequence[Row], **fields: Any) -> Page:
    usual = {
        "title": "run",
        "subtitle": "a test",
        "findings": tables.findings(rows),
        "rows": rows,
        "notes": ["note"],
        "sheets": {},
        "captions": (),
        "panels": (),
        "commands": ["python train.py"],
        "environment": {"python": "3"},
        "settings": "run: {}",
        "links": {},
    }
    return Page(**(usual | fields))


def test_page_is_one_well_formed_file_with_every_row():
    """Catches unclosed or unescaped markup, rows left out, and anything fetched from elsewhere."""
    rows = [row("data"), row("control", **USUAL), row("a<b & co", **USUAL)]
    lines = [
        {"kind": "student", "student_update": u, "loss": 1.0 / u, "discrepancy/dfd": 0.1}
        for u in (1, 2, 3)
    ]
    sheets = {one.name: Sheet(b"png", f"samples/{index}.mp4") for index, one in enumerate(rows)}
    palette = colours([one.name for one in rows])
    drawn = panels({"a<b & co": lines}, palette)
    html = render_page(page(rows, sheets=sheets, captions=("a disc moves",), panels=drawn))
    tags = parsed(html)
    for one in rows:
        assert tags.text.count(one.name) >= 3  # table, clips and modes
    assert [
        a for a in tags.addresses if not a.startswith(("data:image/png;base64,", "samples/"))
    ] == []
    assert "<script" not in html
    assert "@import" not in html
    assert "url(" not in html


def test_histogram_cuts_tall_bars_and_says_how_tall():
    """Catches a collapsed row whose one bar leaves the plot, or shrinks the others to nothing by
    rescaling.
    """
    prior = [1 / 24] * 24
    collapsed = histogram([10] + [0] * 23, prior)
    assert ">100%<" in collapsed
    assert "red right: 10 of 10" in collapsed
    assert all(float(top) >= 0 for top in re.findall(r'<rect[^>]* y="([^"]*)"', collapsed))
    assert ">100%<" not in histogram([1] * 24, prior)
    parsed(histogram([0] * 24, prior))  # no valid clip at all


def test_contact_sheet_holds_the_same_clips_and_times_for_every_row():
    """Catches sheets whose columns cannot be compared, because they are laid out by what is shown."""
    videos = torch.zeros(9, 21, 8, 8, 3, dtype=torch.uint8)
    sheet = contact_sheet(videos)
    assert sheet.startswith(b"\x89PNG")
    assert contact_sheet(videos[:8]) == sheet  # a ninth clip does not fit


SIZES = "{num_heads: 2, head_dim: 16, num_layers: 2, ffn_dim: 48, freq_dim: 32}"


def config_of(folder: Path, *overrides: str) -> Config:
    """A run whose student, teacher and arms exist, untrained: `caption` has other weights than the
    others.
    """
    text = f"""
    run: {{name: demo, stage: dfd, out: {folder}/runs, device: cpu}}
    model: {SIZES}
    rollout: {{frames: 6, ladder: [1000, 500]}}
    weights: {{student: {folder}/student.safetensors, teacher: {folder}/teacher.safetensors}}
    data: {{shards: {folder}/none}}
    report: {{clips: 8, teacher_steps: 1}}
    arms: {{control: [run.stage=dmd], twin: [dfd.p=0.3], caption: [dfd.pairing=caption]}}
    """
    (folder / "demo.yaml").write_text(text)
    config = load_config(str(folder / "demo.yaml"), overrides)
    arms = folder / "runs" / "demo"
    files = [folder / f"{role}.safetensors" for role in ("student", "teacher")]
    files += [arms / name / "student.safetensors" for name in ("control", "twin", "caption")]
    network = build_network(config.model)
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        fill_weights(network, seed=1 if "caption" in path.parts[-2] else 0)
        save_weights(path, network, {})
    line = {"kind": "student", "student_update": 1, "loss": 0.5, "contrast_ratio": 0.9}
    (arms / "twin" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return config


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, str]:
    """A config and the table that its report returned."""
    config = config_of(tmp_path_factory.mktemp("report"))
    return config, write_report(config)


ROWS = ["data", "teacher", "start", "control", "twin", "caption"]


def test_report_has_every_row_in_every_file(reported: tuple[Config, str]):
    """Catches an arm that trains and is left out of what a person reads."""
    config, table = reported
    folder = Path(config.run.out) / "demo"
    saved = json.loads((folder / "report.json").read_text())
    assert [one["name"] for one in saved["rows"]] == ROWS
    assert table.splitlines()[3].split() == ROWS
    assert saved["verdict"] in " ".join(table.split())
    markdown, tags = (
        (folder / "report.md").read_text(),
        parsed((folder / "report.html").read_text()),
    )
    for name in ROWS:
        assert name in markdown
        assert name in tags.text
        with av.open(str(folder / "samples" / f"{name}.mp4")) as video:
            assert sum(1 for _ in video.decode(video=0)) == 21
        assert f"samples/{name}.mp4" in tags.addresses
    assert saved["config"]["report"]["clips"] == saved["num_clips"] == 8


def test_equal_weights_have_equal_rows(reported: tuple[Config, str]):
    """Catches noise or captions that differ between rows: the control would differ from itself."""
    config, _ = reported
    saved = json.loads((Path(config.run.out) / "demo" / "report.json").read_text())
    rows = {one["name"]: one for one in saved["rows"]}
    assert rows["twin"]["scores"] == rows["control"]["scores"]
    assert rows["twin"]["scores"]["contrast"] != rows["caption"]["scores"]["contrast"]
    outcomes = {finding["name"]: finding["outcome"] for finding in saved["findings"]}
    assert outcomes["twin"] == "no clear difference"


def test_report_can_be_reproduced_from_its_folder(reported: tuple[Config, str]):
    """Catches a saved config that lacks the arms, or that cannot be loaded again."""
    config, _ = reported
    again = load_config(str(Path(config.run.out) / "demo" / "config.yaml"))
    assert again.arms == config.arms
    assert dataclasses.replace(again, base=config.base) == config


def test_missing_arm_is_named_before_anything_is_generated(tmp_path: Path):
    """Catches minutes of sampling that end in an error about the last row."""
    config = config_of(tmp_path)
    (tmp_path / "runs/demo/caption/student.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"caption/student.safetensors; train them first"):
        write_report(config)
    assert not (tmp_path / "runs/demo/samples").exists()


def test_arm_may_not_take_the_name_of_another_row(tmp_path: Path):
    """Catches an arm `data` that would overwrite the reference and be judged against itself."""
    config = dataclasses.replace(config_of(tmp_path), arms={"data": []})
    with pytest.raises(ConfigError, match="an arm is called data"):
        sources(config)


def test_rows_fit_the_stage(tmp_path: Path):
    """Catches a teacher sampled as a student, and a start row where there is no start."""
    config = dataclasses.replace(config_of(tmp_path), arms={})
    own = tmp_path / "runs" / "demo" / "student.safetensors"
    (tmp_path / "student.safetensors").rename(own)
    start = f"weights.student={own}"
    wanted = {
        "teacher": ["data", "teacher"],
        "init": ["data", "teacher", "student"],
        "dmd": ["data", "teacher", "student"],
        "dfd": ["data", "teacher", "start", "student"],
    }
    for stage, names in wanted.items():
        assert [
            source.name for source in sources(change(config, [f"run.stage={stage}", start]))
        ] == names


def test_sample_writes_a_grid_with_a_line_for_each_prompt(
    reported: tuple[Config, str], tmp_path: Path
):
    """Catches prompts that do not reach the clips beside which their captions are written."""
    run = Path(reported[0].run.out) / "demo"
    path = sample_videos(run, ["a disc moves", "a cross moves"], tmp_path / "two.mp4")
    assert path == tmp_path / "two.mp4"
    captions = path.with_suffix(".txt").read_text().splitlines()
    assert captions == [" | ".join([f"a {shape} moves"] * 4) for shape in ("disc", "cross")]
    with av.open(str(path)) as video:
        stream = video.streams.video[0]
        assert (stream.width, stream.height) == (2 * (4 * 64 + 3 * 4), 2 * (2 * 64 + 4))
    assert sample_videos(run).exists()


def test_sample_explains_what_it_cannot_do(reported: tuple[Config, str], tmp_path: Path):
    """Catches a grid of nonsense for a prompt that no clip of the world could show."""
    run = Path(reported[0].run.out) / "demo"
    with pytest.raises(ValueError, match="names nothing of the tiny world"):
        sample_videos(run, ["a horse runs"])
    with pytest.raises(ConfigError, match=r"has no config.yaml"):
        sample_videos(tmp_path)
