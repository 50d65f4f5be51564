"""What a protocol counts in the tiny world's video files, and VBench's numbers in its report."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import EXIT_USER_ERROR, UserError
from selfforcing_dfd.evaluation.pictures import to_uint8
from selfforcing_dfd.metrics.vbench import Results, as_shares
from selfforcing_dfd.protocol.exact import StretchReader
from selfforcing_dfd.protocol.folder import read_json
from selfforcing_dfd.protocol.measure import measure_numbers
from selfforcing_dfd.protocol.plan import Cell, Prompt
from selfforcing_dfd.protocol.prepared import prepare
from selfforcing_dfd.protocol.report import write_report
from selfforcing_dfd.protocol.results import Result, add_exact, gather
from selfforcing_dfd.protocol.videos import write_video
from selfforcing_dfd.rng import generator
from selfforcing_dfd.tiny.bootstrap import Resamples
from selfforcing_dfd.tiny.metrics import mode_laws, mode_scores
from selfforcing_dfd.tiny.readout import read
from selfforcing_dfd.tiny.world import CLIP_FRAMES, captions, draw_factors, render

SETTINGS = {"fps": 16, "window_s": 0.0, "chunk": 12, "first_chunk": 9, "exact": True}
CRF = 10  # as shipped protocols have it


def result_of(videos: list[Tensor], prompts: list[str], folder: Path) -> Result:
    """What a protocol knows of videos [T, H, W, 3] uint8, which went through files."""
    result = Result("one")
    for number, (video, prompt) in enumerate(zip(videos, prompts, strict=True)):
        path = folder / f"{number}.mp4"
        write_video(path, [video], 16, CRF)
        measure_numbers(path, folder / f"{number}.json", SETTINGS)
        result.cells.append(Cell("one", Prompt(number, prompt), 1))
        result.numbers.append(read_json(folder / f"{number}.json"))
    add_exact(result)
    return result


def test_counts_of_files_are_those_of_the_clips(tmp_path: Path):
    """Catches factors that the video's coding changes, and counts of other clips."""
    factors = draw_factors(12, generator(0, "protocol test"))
    texts = captions(factors, "long")
    clips = render(factors)
    result = result_of(list(to_uint8(clips)), texts, tmp_path)
    reading = read(clips)
    wanted = mode_scores(reading, mode_laws(texts), Resamples.draw(len(reading), 0))
    for name, score in wanted.items():
        assert result.sets[f"exact.{name}"] == pytest.approx(score.value), name
    assert result.sets["exact.modes"] == len(reading.mode.unique())
    for name in ("valid", "moving", "shape", "hue", "direction", "speed", "size"):
        assert set(result.values[f"exact.{name}"].values()) == {1.0}, name
    found = torch.tensor([result.values["exact.speed_px"][(n, 1)] for n in range(12)])
    # pixels a frame; coding at this loss moves the fitted centre by less
    torch.testing.assert_close(found, reading.speed_px, atol=0.01, rtol=0)


def test_a_clip_that_shows_something_else_than_its_caption_is_told(tmp_path: Path):
    """Catches agreement that counts what the caption does not name, and clips of no shape."""
    factors = draw_factors(2, generator(1, "protocol test"))
    factors.hue[:] = 4
    factors.shape[:] = 0
    clips = to_uint8(render(factors))
    clips[1] = 128
    result = result_of(list(clips), ["a red disc moves", "a red disc moves"], tmp_path)
    assert result.values["exact.valid"] == {(0, 1): 1.0, (1, 1): 0.0}
    assert result.values["exact.hue"] == {(0, 1): 0.0}, "of valid clips alone"
    assert result.values["exact.shape"] == {(0, 1): 1.0}
    assert "exact.direction" not in result.values


def test_a_long_video_is_read_in_stretches(tmp_path: Path):
    """Catches a stretch that is left out, and a stream that decays unseen behind its beginning."""
    factors = draw_factors(1, generator(2, "protocol test"))
    length = CLIP_FRAMES + 2 * (CLIP_FRAMES + 3)
    video = to_uint8(render(factors, length))[0]
    steady = result_of([video], ["a disc moves"], tmp_path)
    assert len(steady.numbers[0]["exact"]) == 3
    assert steady.values["change.exact.saturation"][(0, 1)] == pytest.approx(0, abs=0.01)
    video[CLIP_FRAMES + CLIP_FRAMES :] = 128
    decayed = result_of([video], ["a disc moves"], tmp_path)
    assert decayed.values["exact.valid"][(0, 1)] == pytest.approx(2 / 3)
    assert decayed.values["change.exact.valid"][(0, 1)] == -1
    assert "exact.valid" in decayed.names
    assert decayed.sets["exact.modes"] == steady.sets["exact.modes"], "modes are of the beginning"


def test_a_later_stretch_begins_as_a_clip_does():
    """Catches a stretch that begins with the other frames of a latent frame."""
    factors = draw_factors(1, generator(2, "protocol test"))
    video = to_uint8(render(factors, 2 * CLIP_FRAMES + 3))[0]
    found = []
    for value in (None, 128):
        if value is not None:
            video[CLIP_FRAMES : CLIP_FRAMES + 3] = value
        reader = StretchReader(3)
        for frame in video:
            reader.add(frame)
        found.append(reader.found())
    assert len(found[0]) == 2
    assert found[0] == found[1]


def test_videos_of_another_size_are_refused():
    """Catches counts of pictures that are no clips of the tiny world."""
    reader = StretchReader(3)
    with pytest.raises(UserError, match="a video is 96x64, and clips of the tiny world are 64x64"):
        reader.add(torch.zeros(64, 96, 3, dtype=torch.uint8))


def test_a_report_shows_counts_where_data_are_of_the_tiny_world(finished: tuple[Path, str]):
    """Catches a protocol of real videos that is read as shapes, and counts nobody sees."""
    plan, shown = finished
    assert "exact.modes" in shown
    prepared = prepare(str(plan))
    assert prepared.measuring()["exact"] is True
    assert prepare("wan_ar").measuring()["exact"] is False
    video = prepared.video(prepared.cells("one")[0])
    result = video.parents[2] / "not_exact.json"
    measure_numbers(video, result, SETTINGS | {"exact": False})
    assert read_json(result)["exact"] == []
    result.unlink()


STAND_IN = """
import json, sys
from pathlib import Path

here = Path.cwd()
layout = json.loads((here / "layout.json").read_text())
rows = [
    {"video_path": f"videos/{n:06d}.mp4", "video_results": 10.0 * n}
    for n in range(len(layout["videos"]))
]
mean = sum(row["video_results"] for row in rows) / len(rows)
found = {name: [mean / 100, rows] for name in layout["dimensions"]}
(here / "results").mkdir(exist_ok=True)
(here / "results" / "videos_eval_results.json").write_text(json.dumps(found))
"""


@pytest.fixture
def tool(tmp_path: Path) -> Path:
    """A Python that writes what VBench's tool would, with imaging quality of 0 to 100."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "stand_in.py"} "$@"\n')
    python.chmod(0o755)
    return python


@pytest.fixture
def copied(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """The plan of a finished protocol of its own folder, with a column of VBench."""
    shutil.copytree(finished[0].parent / "out", tmp_path / "out")
    text = finished[0].read_text().replace(f"out: {finished[0].parent}", f"out: {tmp_path}")
    text = text.replace('SC: ""', "SC: vbench.imaging_quality")
    (tmp_path / "plan.yaml").write_text(text)
    return tmp_path / "plan.yaml"


def test_vbench_runs_for_every_method_and_the_report_has_its_numbers(
    copied: Path, tool: Path, capsys: pytest.CaptureFixture[str]
):
    """Catches numbers of another method or video, and a column that stays 'not run'."""
    for cell in prepare(str(copied)).cells("two"):
        prepare(str(copied)).folder.prompt(cell).unlink()  # videos of others have none beside them
    command = ["vbench", "--protocol", str(copied), "--dimensions", "imaging_quality"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "python run_vbench.py" in told
    assert "absent: left out, no weights" in told
    assert main([*command, "--python", str(tool)]) == 0
    capsys.readouterr()
    prepared = prepare(str(copied))
    two = gather(prepared)["two"]
    # ten for each video in order, as a share
    by_key = {cell.key: n / 10 for n, cell in enumerate(prepared.cells("two"))}
    assert two.values["vbench.imaging_quality"] == pytest.approx(by_key)
    assert two.encoders["vbench"] == {"tool": "vbench 0.1.5, custom_input"}
    layout = json.loads((copied.parent / "out/vbench/two/layout.json").read_text())
    assert [entry["prompt"] for entry in layout["videos"]] == [
        cell.prompt.text for cell in prepared.cells("two")
    ]
    shown = write_report(prepared)
    (row,) = [line for line in shown.splitlines() if line.strip().startswith("two, here")]
    assert "0.25" in row.split(), "the mean of 0 to .5 in the paper's column"


def test_vbench_of_other_videos_is_refused(copied: Path, tool: Path):
    """Catches numbers of a video that has been made again since."""
    more = ["--dimensions", "motion_smoothness", "--python", str(tool)]
    assert main(["vbench", "--protocol", str(copied), *more]) == 0
    prepared = prepare(str(copied))
    layout = prepared.folder.vbench("two") / "layout.json"
    content = json.loads(layout.read_text())
    content["videos"][0]["sha256"] = "0"
    layout.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"has no results of .* as it is now; remove it and run"):
        gather(prepared)


def test_vbench_wants_videos_or_a_protocol(plan: Path, capsys: pytest.CaptureFixture[str]):
    """Catches a protocol whose videos nobody has made yet."""
    assert main(["vbench"]) == EXIT_USER_ERROR
    assert "want videos or --protocol, and not both" in capsys.readouterr().err
    assert main(["vbench", "--protocol", str(plan)]) == EXIT_USER_ERROR
    assert "no method of" in capsys.readouterr().err


def test_percent_are_told_from_shares_by_the_tools_own_mean():
    """Catches imaging quality of 70 beside shares, and shares divided by a hundred."""
    videos = {0: {"a": 60.0, "b": 0.6}, 1: {"a": 80.0, "b": 0.8}}
    found = as_shares(Results("x.json", {"a": 0.7, "b": 0.7}, videos))
    assert found == [{"a": 0.6, "b": 0.6}, {"a": 0.8, "b": 0.8}]
