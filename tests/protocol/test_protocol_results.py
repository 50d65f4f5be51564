"""Scores that need more than a video: camera poses, text, and one version of an encoder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from selfforcing_dfd.common import UserError
from selfforcing_dfd.protocol.measure import read_alignment, read_encoder
from selfforcing_dfd.protocol.prepared import prepare
from selfforcing_dfd.protocol.results import Result, by_number, gather, refuse_two_versions


def save_poses(path: Path, length: float) -> None:
    """A camera that goes straight on for nine frames."""
    poses = np.tile(np.eye(4, dtype=np.float32), (9, 1, 1))
    poses[:, 2, 3] = np.linspace(0, length, 9)
    np.savez(path, data=poses, inds=np.arange(9))


def test_camera_poses_are_those_of_the_video(finished: tuple[Path, str], tmp_path: Path):
    """Catches poses of another seed, and failures that nobody hears of."""
    poses = tmp_path / "vipe"
    poses.mkdir()
    for prompt in range(3):
        save_poses(poses / f"{prompt:03d}-1.npz", 1.0)
        save_poses(poses / f"{prompt:03d}-2.npz", 3.0)
    (poses / "002-2.npz").unlink()
    text = (
        finished[0]
        .read_text()
        .replace("one: {kind: student,", f"one: {{poses: {poses}, kind: student,")
    )
    (tmp_path / "plan.yaml").write_text(text)
    one = gather(prepare(str(tmp_path / "plan.yaml")))["one"]
    assert one.values["poses.path"][(0, 1)] == pytest.approx(1)
    assert one.values["poses.path"][(1, 2)] == pytest.approx(3)
    assert (2, 2) not in one.values["poses.path"]
    assert one.values["poses.endpoint_distance"] == pytest.approx({(0,): 2.0, (1,): 2.0})
    assert one.sets["poses.failure_rate"] == pytest.approx(1 / 6)
    assert len(one.failures) == 1
    assert "002-2.npz does not exist" in one.failures[0]


def test_alignment_is_the_mean_cosine_of_frames_and_prompt(tmp_path: Path):
    """Catches a score for encoders that know no text, and one of a single frame."""
    frames = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    save_file({"frames": frames}, tmp_path / "none.safetensors")
    assert read_alignment(tmp_path / "none.safetensors") is None
    save_file({"frames": frames, "text": torch.tensor([1.0, 0.0])}, tmp_path / "some.safetensors")
    assert read_alignment(tmp_path / "some.safetensors") == pytest.approx(0.8)


def test_features_of_two_versions_are_not_compared(finished: tuple[Path, str], tmp_path: Path):
    """Catches a difference of methods that is one of encoders."""
    prepared = prepare(str(finished[0]))
    files = [prepared.folder.features(cell, "pixels") for cell in prepared.cells("one")]
    name, described = read_encoder(files)
    other = tmp_path / "other.safetensors"
    about = {"name": name, "encoder": json.dumps({"backend": "another"}), "video": "x"}
    save_file(load_file(files[0]), other, about)
    with pytest.raises(UserError, match="are by two versions of an encoder"):
        read_encoder([*files, other])
    one = Result("one", encoders={name: described})
    two = Result("two", encoders={name: {"backend": "another"}})
    refuse_two_versions({"one": one})
    with pytest.raises(UserError, match=r"features pixels of one are by .*, those of two by"):
        refuse_two_versions({"one": one, "two": two})


def test_a_prompt_with_one_video_has_no_diversity(finished: tuple[Path, str]):
    """Catches a diversity of a single video, and videos of two prompts in one group."""
    cells = prepare(str(finished[0])).cells("one")
    assert by_number(cells) == {0: [0, 1], 1: [2, 3], 2: [4, 5]}
    assert by_number(cells[1:4]) == {1: [1, 2]}
