"""The way to VBench's tool and back. The tool itself is not here; a stand-in writes its files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_files import write_clip
from PIL import Image

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import EXIT_USER_ERROR, UserError
from selfforcing_dfd.metrics.vbench import NOT_CUSTOM, read_results, write_layout
from selfforcing_dfd.rng import uniform

STAND_IN = """
import json, sys, types
from pathlib import Path


class VBench:
    def __init__(self, device, info, results):
        self.results = Path(results)

    def evaluate(self, name, videos_path, dimension_list, mode, prompt_list=None, **more):
        assert mode == "custom_input" and more["imaging_quality_preprocessing_mode"] == "longer"
        files = sorted(Path(videos_path).glob("*.mp4"))
        if prompt_list is not None:
            assert sorted(prompt_list) == [str(path) for path in files], prompt_list
        else:
            names = {path.stem for path in Path(more["custom_image_folder"]).iterdir()}
            assert names == {path.stem for path in files}
        rows = [
            {"video_path": str(path), "video_results": n / 4} for n, path in enumerate(files)
        ]
        found = {name: [0.5, rows] for name in dimension_list}
        if "dynamic_degree" in found:
            found["dynamic_degree"] = [0.5, [{**row, "video_results": True} for row in rows]]
        self.results.mkdir(exist_ok=True)
        (self.results / f"{name}_eval_results.json").write_text(json.dumps(found))


tool = types.ModuleType("vbench")
tool.__file__ = "/nowhere/vbench/__init__.py"
tool.VBench = VBench
of_pictures = types.ModuleType("vbench2_beta_i2v")
of_pictures.VBenchI2V = VBench
fake_torch = types.ModuleType("torch")
fake_torch.device = str
sys.modules |= {"vbench": tool, "vbench2_beta_i2v": of_pictures, "torch": fake_torch}
sys.argv = sys.argv[1:]
exec(compile(Path(sys.argv[0]).read_text(), sys.argv[0], "exec"), {"__name__": "__main__"})
"""


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two videos with prompts, their pictures, and what `evaluate` says of them."""
    (tmp_path / "videos").mkdir()
    for number in range(2):
        video = (255 * uniform((3, 48, 64, 3), number, "video")).to(torch.uint8)
        write_clip(tmp_path / "videos" / f"v{number}.mp4", video, 16)
        (tmp_path / "videos" / f"v{number}.txt").write_text(f"prompt {number}\n")
        Image.fromarray(video[0].numpy()).save(tmp_path / "videos" / f"v{number}.png")
    assert main(["evaluate", str(tmp_path / "videos"), "--out", str(tmp_path / "e.json")]) == 0
    return tmp_path / "videos"


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A Python that has the stand-in for the tool."""
    program = tmp_path / "stand_in.py"
    program.write_text(STAND_IN)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n')
    python.chmod(0o755)
    return python


def vbench(videos: Path, *more: str) -> int:
    folder = videos.parent
    out = ("--out", str(folder / "vbench"), "--into", str(folder / "e.json"))
    return main(["vbench", str(videos), *out, *more])


def test_the_tool_is_called_and_its_numbers_come_back(videos, python, capsys):
    """Catches a score that is given to another video, and a prompt or picture that gets lost.

    The first call, without the tool, only writes what it needs.
    """
    more = ("--images", str(videos))
    assert vbench(videos, *more) == 0
    assert "python run_vbench.py" in capsys.readouterr().out
    assert vbench(videos, *more, "--python", str(python)) == 0
    content = json.loads((videos.parent / "e.json").read_text())
    assert content["vbench"]["values"]["subject_consistency"] == 0.5
    assert [video["vbench"]["subject_consistency"] for video in content["videos"]] == [0, 0.25]
    assert [video["vbench"]["dynamic_degree"] for video in content["videos"]] == [1, 1]
    assert set(content["vbench"]["values"]) >= {"i2v_subject", "i2v_background"}
    assert "numbers" in content["videos"][0], "what was there stays"
    assert vbench(videos, *more) == 0, "results that are there are read again"
    assert vbench(videos, *more, "--dimensions", "motion_smoothness") == EXIT_USER_ERROR
    assert "has results of other videos or dimensions" in capsys.readouterr().err


def test_a_tool_that_fails_is_told(videos, tmp_path, capsys):
    """Catches numbers of an earlier run after a failure."""
    (tmp_path / "broken").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "broken").chmod(0o755)
    assert vbench(videos, "--python", str(tmp_path / "broken")) == EXIT_USER_ERROR
    assert "VBench ended with 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dimensions", "told"),
    [
        ("color", "color are for VBench's own prompts"),
        ("beauty", "no dimension beauty; use some of subject_consistency"),
        ("i2v_subject", "i2v_subject compare a video with the picture"),
    ],
)
def test_what_the_tool_cannot_measure_is_refused(videos, dimensions, told, capsys):
    """Catches an assertion of the tool after an hour of loading."""
    assert vbench(videos, "--dimensions", dimensions) == EXIT_USER_ERROR
    assert told in capsys.readouterr().err
    assert "color" in NOT_CUSTOM


def results(folder: Path, content: Any) -> None:
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / "videos_eval_results.json").write_text(json.dumps(content))


def test_damaged_results_are_refused(videos, tmp_path):
    """Catches half of a run's numbers, and those of other videos."""
    files = sorted(videos.glob("*.mp4"))
    folder = tmp_path / "layout"
    write_layout(folder, files, ["a", "b"], ["motion_smoothness"])
    rows = [{"video_path": f"/data/videos/{n:06d}.mp4", "video_results": 0.5} for n in range(2)]
    results(folder, {"motion_smoothness": [0.5, rows]})
    assert read_results(folder).videos[1] == {"motion_smoothness": 0.5}
    for content, told in (
        ({"motion_smoothness": [0.5, rows[:1]]}, "no motion_smoothness of video 000001"),
        ({}, "no motion_smoothness of any video"),
        ({"motion_smoothness": [None, rows]}, "a value None, which is no number"),
        ({"motion_smoothness": 0.5}, "is not what VBench 0.1.5 writes"),
        (
            {"motion_smoothness": [0.5, [{"video_path": "x.mp4"}]]},
            "which is no video of the layout",
        ),
    ):
        results(folder, content)
        with pytest.raises(UserError, match=told):
            read_results(folder)
    with pytest.raises(UserError, match=r"is no \.mp4, and VBench reads no others"):
        write_layout(folder, [Path("a.mov")], ["a"], ["motion_smoothness"])
