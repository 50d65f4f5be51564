"""Methods with Wan's real classes at tiny size: sets, guidance, pictures, whole clips."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import imageio.v2 as imageio
import pytest
import torch
from tiny_pictures import save_picture_folder
from tiny_wan import HEIGHT, RECIPE, WIDTH, save_wan_folder, tiny_student
from torch import Tensor

from selfforcing_dfd.common import UserError, sha256_of
from selfforcing_dfd.models.identity import Identity, Recipe
from selfforcing_dfd.protocol.makers import CausalTeacher, Teacher
from selfforcing_dfd.protocol.prepared import Prepared, prepare
from selfforcing_dfd.weights.tensors import save_weights
from selfforcing_dfd.weights.write import file_metadata

PLAN = """
out: {folder}/out
prompts: {{first: {folder}/first.txt, second: {folder}/second.txt}}
seeds: [1]
latent_frames: 6
size: [{height}, {width}]
methods:
  data: {{kind: videos, files: "{folder}/{{set}}-{{number}}-{{seed}}.mp4"}}
  teacher: {{kind: teacher, weights: {folder}/wan, model: {folder}/wan, steps: 1, guidance: 2.0}}
  causal: {{kind: causal, weights: {folder}/first.safetensors, model: {folder}/wan, steps: 1}}
  student: {{kind: student, weights: "{folder}/{{set}}.safetensors", model: {folder}/wan}}
  whole: {{kind: student, weights: {folder}/whole.safetensors, model: {folder}/wan}}
teacher: teacher
data: data
control: student
"""
WHOLE = Recipe(ladder=(1000, 500), shift=3.0, chunk_frames=6, frames=6)


def save_student(path: Path, seed: int, recipe: Recipe) -> None:
    student = tiny_student(seed, recipe)
    identity = Identity("causal_student", recipe)
    save_weights(path, student, file_metadata(student.config, identity))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan_protocol")
    save_wan_folder(folder / "wan")
    save_student(folder / "first.safetensors", 1, RECIPE)
    save_student(folder / "second.safetensors", 2, RECIPE)
    save_student(folder / "whole.safetensors", 1, WHOLE)
    grey = torch.full((HEIGHT, WIDTH, 3), 128, dtype=torch.uint8)
    imageio.imwrite(folder / "grey.png", grey.numpy())
    plan = PLAN.format(folder=folder, height=HEIGHT, width=WIDTH)
    (folder / "plan.yaml").write_text(plan)
    return folder


@pytest.fixture
def prepared(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (folder / "first.txt").write_text("a red disc moves\n\n")
    (folder / "second.txt").write_text("a red disc moves left\n")
    return prepare(str(folder / "plan.yaml"))


MADE: dict[str, Tensor] = {}


def video(prepared: Prepared, method: str, place: int = 0) -> Tensor:
    """The video of one prompt [T, H, W, 3], as it is made; equal ones are made once."""
    cell = prepared._cells(method)[place]
    key = method + json.dumps(prepared.made(cell))
    if key not in MADE:
        make = prepared.method(method, cell.prompt.set).load("cpu")
        MADE[key] = torch.cat(list(make(cell)))
    return MADE[key]


def test_each_set_has_weights_of_its_own(prepared: Prepared, folder: Path):
    """Catches one network for all sets, and prompts that are counted from 0 in each."""
    assert [(p.number, p.set) for p in prepared.prompts] == [(0, "first"), (1, "second")]
    first, second = prepared.cells("student")
    assert prepared.made(first)["weights"] == sha256_of(folder / "first.safetensors")
    assert prepared.made(second)["weights"] == sha256_of(folder / "second.safetensors")
    assert prepared.made(first)["sampler"]["chunk_frames"] == 3
    assert "2 of 2 videos are not there" in prepared.not_run["data"]
    assert "first-000-1.mp4" in prepared.not_run["data"]


def test_wans_methods_make_videos_of_one_size(prepared: Prepared):
    """Catches a teacher of another size or length, and a whole clip that does not fit a window."""
    for method in ("teacher", "student", "whole"):
        found = video(prepared, method)
        assert found.shape == (21, HEIGHT, WIDTH, 3)
        assert found.dtype == torch.uint8
    made = prepared.made(prepared.cells("whole")[0])
    assert made["stream"]["window_frames"] == 6
    assert made["stream"]["sink_frames"] == 0


def test_a_teacher_is_guided_away_from_wans_negative_prompt(prepared: Prepared, folder: Path):
    """Catches guidance that is not applied, and one whose other half is an empty text."""
    guided = video(prepared, "teacher")
    made = prepared.made(prepared.cells("teacher")[0])["sampler"]
    assert made["guidance"] == 2
    assert made["negative"].startswith("色调艳丽")
    cell = prepared.cells("teacher")[0]
    make = prepared.method("teacher", "first").load("cpu")
    assert isinstance(make, Teacher)
    without = replace(make, sampler=replace(make.sampler, negative=""))
    assert not torch.equal(torch.cat(list(without(cell))), guided)
    text = (folder / "plan.yaml").read_text()
    plain = folder / "plain.yaml"
    plain.write_text(text.replace("guidance: 2.0", "guidance: 1.0"))
    other = prepare(str(plain))
    assert not torch.equal(video(other, "teacher"), guided)
    assert other.made(other.cells("teacher")[0])["sampler"]["negative"] == ""


def test_videos_begin_with_the_picture_of_their_prompt(prepared: Prepared, folder: Path):
    """Catches a picture that is read and not shown, or one that resuming does not ask for."""
    lines = "a red disc moves\n", f"a red disc moves\t{folder}/grey.png\n"
    (folder / "first.txt").write_text("".join(lines))
    with_picture = prepare(str(folder / "plan.yaml"))
    assert [bool(prompt.image) for prompt in with_picture.prompts] == [False, True, False]
    for method in ("teacher", "student"):
        plain = video(with_picture, method, 0)
        begun = video(with_picture, method, 1)
        assert begun.shape == plain.shape
        assert not torch.equal(begun[0], plain[0])
    cells = with_picture._cells("teacher")
    assert with_picture.made(cells[1])["image"] == sha256_of(folder / "grey.png")
    (folder / "grey.png").rename(folder / "other.png")
    missing = prepare(str(folder / "plan.yaml")).not_run["teacher"]
    (folder / "other.png").rename(folder / "grey.png")
    assert "1 of 1 pictures are not there" in missing


def test_a_causal_teacher_is_given_its_first_frame_once(prepared: Prepared, folder: Path):
    """Catches a picture that every chunk begins with."""
    (folder / "first.txt").write_text(f"a red disc moves\t{folder}/grey.png\n")
    given = prepare(str(folder / "plan.yaml"))
    make = given.method("causal", "first").load("cpu")
    assert isinstance(make, CausalTeacher)
    cell = given._cells("causal")[0]
    picture = make.parts.given(make.parts.picture(cell))
    first, second = make.latents(cell)
    assert picture is not None
    assert torch.equal(first[:, :1], picture)
    assert not torch.allclose(second[:, :1], picture, atol=0.01)


def test_a_first_frame_that_is_given_is_shown(prepared: Prepared, folder: Path):
    """Catches a student whose first frame is not the picture's own latent, decoded."""
    (folder / "first.txt").write_text(f"a red disc moves\t{folder}/grey.png\n")
    given = prepare(str(folder / "plan.yaml"))
    first = [video(given, method)[0].float() for method in ("teacher", "student")]
    assert (first[0] - first[1]).abs().max() <= 2, "both show what the codec makes of it"


def test_chunks_that_do_not_fill_a_clip_are_refused(prepared: Prepared, folder: Path):
    """Catches a teacher of fewer frames than its student."""
    other = folder / "seven.yaml"
    other.write_text((folder / "plan.yaml").read_text().replace("frames: 6", "frames: 7"))
    seven = prepare(str(other))
    with pytest.raises(UserError, match="latent_frames is 7, which chunks of 3 do not fill"):
        video(seven, "teacher")


def test_files_are_the_same_however_frames_come(prepared: Prepared, tmp_path: Path):
    """Catches a coder that puts a keyframe where a chunk begins, which metrics see as a seam."""
    from selfforcing_dfd.protocol.videos import write_video

    frames = video(prepared, "student")
    write_video(tmp_path / "whole.mp4", [frames], 16, 10)
    write_video(tmp_path / "parts.mp4", frames.split([9, 12]), 16, 10)
    assert (tmp_path / "whole.mp4").read_bytes() == (tmp_path / "parts.mp4").read_bytes()


def test_a_teacher_of_wan_i2v_sees_the_picture(prepared: Prepared, folder: Path):
    """Catches a picture that such a teacher is not shown, or one that it is given as a frame."""
    save_picture_folder(folder / "wan_i2v")
    (folder / "first.txt").write_text(
        f"a red disc moves\t{folder}/grey.png\na red disc moves\t{folder}/white.png\n"
    )
    imageio.imwrite(folder / "white.png", torch.full((8, 8, 3), 255, dtype=torch.uint8).numpy())
    text = (folder / "plan.yaml").read_text()
    (folder / "i2v.yaml").write_text(text.replace(f"{folder}/wan,", f"{folder}/wan_i2v,"))
    shown = prepare(str(folder / "i2v.yaml"))
    grey, white, nothing = shown._cells("teacher")
    make = shown.method("teacher", "first").load("cpu")
    assert isinstance(make, Teacher)
    first, second = (torch.cat(list(make(cell))) for cell in (grey, white))
    assert first.shape == (21, HEIGHT, WIDTH, 3)
    assert not torch.equal(first, second)
    assert make.parts.given(make.parts.picture(grey)) is None
    with pytest.raises(UserError, match=r"has no picture, without which Wan2\.1-I2V"):
        list(make(nothing))
