"""The report's page, its plots and its pictures, on made-up rows and clips."""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import imageio.v2 as imageio
import torch
from tiny_rows import NAN, USUAL, row

from selfforcing_dfd.evaluation.curves import (
    MAX_POINTS,
    Group,
    Panel,
    Series,
    curve,
    panels,
    plot,
    share_chart,
)
from selfforcing_dfd.evaluation.page import Page, Sheet, colours, render_page
from selfforcing_dfd.evaluation.pictures import (
    contact_sheet,
    labelled,
    shrunk,
    side_by_side,
    write_moving_picture,
    write_mp4,
)
from selfforcing_dfd.evaluation.tables import Row
from selfforcing_dfd.evaluation.worlds import TINY
from selfforcing_dfd.tiny.world import DIRECTION_PRIOR, DIRECTIONS, HUE_PRIOR, HUES


class Tags(HTMLParser):
    """Checks that tags are closed in order, and keeps the text and all addresses."""

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
        "tried": "two arms",
        "headline": "Real clips show 54 kinds.",
        "background": "",
        "world": TINY,
        "findings": TINY.findings(rows),
        "rows": rows,
        "notes": ["note"],
        "sheets": {},
        "strip": "",
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
        {"kind": "student", "student_update": update, "loss": 1.0 / update, "discrepancy/dfd": 0.1}
        for update in (1, 2, 3)
    ]
    html = render_page(
        page(
            rows,
            sheets={one.name: Sheet(b"png", f"samples/{n}.mp4") for n, one in enumerate(rows)},
            strip="samples/side_by_side.mp4",
            captions=("a disc moves",),
            panels=panels({"a<b & co": lines}, colours(rows)),
        )
    )
    tags = parsed(html)
    for one in rows:
        assert tags.text.count(one.name) >= 4  # words, clips, table and modes
    own = ("data:image/png;base64,", "data:image/svg+xml;base64,", "samples/")
    assert [address for address in tags.addresses if not address.startswith(own)] == []
    for fetched in ("<script", "@import", "url("):
        assert fetched not in html
    assert "KL(prior ‖ sample)" in tags.text


def test_page_shows_and_explains_before_it_counts():
    """Catches a page that opens with a verdict or a table whose words a newcomer does not know."""
    rows = [row("data"), row("control", **USUAL), row("caption", **USUAL)]
    sheets = {one.name: Sheet(b"png", "samples/x.mp4") for one in rows}
    html = render_page(page(rows, sheets=sheets, strip="samples/side_by_side.mp4"))
    order = (
        "<h1>",
        "samples/side_by_side.mp4",
        "Real clips show 54 kinds.",
        "two arms",
        'class="verdict"',
        "</i>caption</dt><dd>about caption",
        "samples/x.mp4",
        "<table>",
    )
    places = [html.index(text) for text in order]
    assert places == sorted(places)


def test_strip_has_data_and_arms_by_name_and_plays_by_itself():
    """Catches names over the wrong clips, and a strip that stands still until it is clicked."""
    names = ("data", "teacher", "start", "control", "caption")
    rows = [row(name) for name in names]
    rows[-1] = dataclasses.replace(rows[-1], about="DFD, as in the paper: more; 24 updates")
    html = render_page(page(rows, strip="samples/side_by_side.mp4"))
    heads, _, rest = html.partition('<div class="heads">')[2].partition("<video")
    shown = re.findall(r"</i>([^<]*)<small>([^<]*)</small>", heads)
    assert shown == [
        ("data", "about data"),
        ("control", "about control"),
        ("caption", "DFD, as in the paper"),
    ]
    assert "--groups: 3" in html
    attributes = rest.partition(">")[0].split()
    assert {"autoplay", "loop", "muted", "playsinline"} <= set(attributes)


def test_page_without_a_strip_or_sentence_leaves_no_gap():
    """Catches an empty player over a report of several runs."""
    html = render_page(page([row("data"), row("student")], headline=""))
    assert "<video" not in html
    assert 'class="headline"' not in html


def test_same_report_gives_the_same_bytes():
    """Catches dates and random ids in the plots: two runs of one seed could not be compared."""
    series = (Series("arm", ((1, 2.0), (2, 3.0)), 4, dashed=True),)
    panel = Panel("Loss", "", series, reference=1.0)
    assert plot(panel) == plot(panel)
    assert share_chart(groups(0.2)) == share_chart(groups(0.2))


def test_curves_average_the_turns_of_an_update_and_long_runs():
    """Catches five fake-score turns drawn as a zigzag, and pages of megabytes for long runs."""
    lines = [
        {"kind": "fake", "student_update": update, "loss": update + turn}
        for update in (1, 2)
        for turn in (0.0, 1.0)
    ]
    lines += [
        {"kind": "student", "student_update": 1, "loss": 9.0},
        {"kind": "fake", "student_update": 3, "loss": None},
    ]
    assert curve(lines, "fake", "loss") == ((1, 1.5), (2, 2.5))
    long = [
        {"kind": "student", "student_update": update, "loss": float(update)}
        for update in range(1, 1001)
    ]
    points = curve(long, "student", "loss")
    assert len(points) <= MAX_POINTS
    assert all(x == y for x, y in points)


def test_plot_of_one_point_or_a_flat_curve_is_drawn():
    """Catches an axis without extent: a run of one update would have no report."""
    for points in (((1, 3.0),), ((1, 0.0), (2, 0.0)), ((1, 1e-9), (2, 1.0))):
        assert "<svg" in plot(Panel("Loss", "", (Series("arm", points, 0),)))


def groups(red: float) -> list[Group]:
    """Shares of hues and directions; not known for directions."""
    return [
        Group(HUES, [red] + [(1 - red) / 5] * 5, HUE_PRIOR.tolist()),
        Group(DIRECTIONS, [NAN] * 4, DIRECTION_PRIOR.tolist()),
    ]


def test_chart_cuts_tall_bars_and_says_how_tall():
    """Catches a collapsed row whose one bar leaves the plot, and one that shows nothing at all."""
    assert ">100%<" in share_chart(groups(1.0))
    modest = share_chart(groups(0.4))
    assert ">40%<" not in modest
    assert all(name in modest for name in ("magenta", "→"))
    assert "<svg" in share_chart(groups(NAN))


def test_contact_sheet_shows_one_clip_a_column_and_time_downwards():
    """Catches sheets that are laid out by what they show: their columns could not be compared."""
    videos = torch.zeros(3, 21, 8, 8, 3, dtype=torch.uint8)
    videos[1, -1] = 200
    sheet = contact_sheet(videos, max_width=64)
    assert sheet.startswith(b"\x89PNG")
    picture = imageio.imread(sheet)
    assert picture.shape == (6 * 9 - 1, 3 * 12 - 4, 4)
    lines, columns = (picture[..., 0] == 200).nonzero()
    assert (lines.min(), columns.min(), columns.max()) == (45, 12, 19)
    assert (picture[:, 8:12, 3] == 0).all()  # transparent between clips


def test_large_clips_are_shrunk_for_sheets():
    """Catches a contact sheet of 480p clips, which would make a page of many megabytes."""
    videos = torch.full((1, 2, 48, 84, 3), 9, dtype=torch.uint8)
    small = shrunk(videos, 42)
    assert small.shape == (1, 2, 24, 42, 3)
    assert (small == 9).all()
    assert shrunk(videos, 84) is videos


def test_rows_stand_side_by_side_in_step(tmp_path: Path):
    """Catches rows out of order or out of step, and labels over the wrong row."""
    rows = {}
    for value, name in enumerate(("data", "start"), start=1):
        times = torch.arange(5, dtype=torch.uint8)[None, :, None, None, None]
        rows[name] = (times + 100 * value).expand(2, -1, 8, 8, 3)
    frames = side_by_side(rows, columns=1, scale=8)
    assert frames.shape == (5, 132, 64 + 16 + 64, 3)
    for time in range(5):
        assert frames[time, 0, 0, 0] == 100 + time
        assert frames[time, 0, -1, 0] == 200 + time
    shown = labelled(frames, list(rows))
    head = shown[0, : shown.shape[1] - 132].float().mean(dim=-1)
    assert torch.equal(shown[:, -132:], frames)
    assert head[:, :64].min() < 128
    assert head[:, 64:80].min() > 200  # no label over the gap
    assert head[:, 80:].min() < 128
    write_moving_picture(tmp_path / "all.gif", shown, fps=20)
    assert len(imageio.mimread(tmp_path / "all.gif")) == 5


def test_sample_video_has_every_frame_and_repeats(tmp_path: Path):
    """Catches frames that the encoder drops, and files that differ from run to run."""
    frames = (torch.arange(7)[:, None, None, None] * 30).expand(-1, 24, 40, 3).byte()
    for name in ("one.mp4", "two.mp4"):
        write_mp4(tmp_path / name, frames, fps=16)
    with av.open(str(tmp_path / "one.mp4")) as video:
        shown = [frame.to_ndarray(format="rgb24").mean() for frame in video.decode(video=0)]
    assert len(shown) == 7
    assert max(abs(value - 30 * time) for time, value in enumerate(shown)) < 4
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()
    assert not list(tmp_path.glob(".tmp*"))


def test_svg_pictures_are_embedded_whole():
    """Catches plots that a page refers to but does not hold."""
    html = render_page(page([row("data"), row("student", **USUAL)]))
    found = re.findall(r'data:image/svg\+xml;base64,([^"]+)"', html)
    assert len(found) == 2
    assert all(base64.b64decode(text).startswith(b"<?xml") for text in found)
