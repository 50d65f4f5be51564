"""Cameras from files of poses, on paths whose numbers are known by hand."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_files import write_clip
from scipy.spatial.transform import Rotation
from torch import Tensor

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import EXIT_USER_ERROR, UserError
from selfforcing_dfd.metrics.camera import (
    PoseError,
    Summary,
    aligned,
    angles,
    find_pose_files,
    from_poses,
    from_tracks,
    magnitudes,
    read_poses,
    spreads,
)
from selfforcing_dfd.rng import normal
from selfforcing_dfd.tiny.world import clip_number, render

FRAMES = 9


def poses(places: Tensor, turns: list[float] | None = None) -> Tensor:
    """[N, 4, 4] at places [N, 3], turned about the vertical axis by degrees."""
    found = torch.eye(4, dtype=torch.float64).repeat(len(places), 1, 1)
    found[:, :3, 3] = places
    if turns is not None:
        rotations = Rotation.from_euler("y", np.array(turns)[:, None], degrees=True).as_matrix()
        found[:, :3, :3] = torch.from_numpy(rotations)
    return found


def somewhere(seed: int) -> Tensor:
    """An arbitrary pose of the world."""
    pose = torch.eye(4, dtype=torch.float64)
    axis = normal((3,), seed, "world").double().numpy()
    pose[:3, :3] = torch.from_numpy(Rotation.from_rotvec(axis).as_matrix())
    pose[:3, 3] = 10 * normal((3,), seed, "origin").double()
    return pose


def line(length: float, frames: int = FRAMES, direction: int = 2) -> Tensor:
    places = torch.zeros(frames, 3, dtype=torch.float64)
    places[:, direction] = torch.linspace(0, length, frames, dtype=torch.float64)
    return places


def save(path: Path, data: Tensor, numbers: list[int] | None = None) -> Path:
    """As ViPE writes it: float32 and the numbers of the frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, data=data.numpy().astype(np.float32), inds=np.array(numbers or range(len(data))))
    return path


def test_there_and_back_turning_round():
    """Catches a path that is a distance, and angles that are not between neighbours."""
    places = torch.cat([line(4.0), line(4.0).flip(0)[1:]])
    turns = [*np.linspace(0, 30, 9), *np.linspace(30, 0, 9)[1:]]
    for world in (torch.eye(4, dtype=torch.float64), somewhere(0)):
        found = magnitudes(world @ poses(places, turns))
        wanted = {"path": 8, "farthest": 4, "farthest_by_path": 0.5, "turned": 60}
        assert found == pytest.approx({**wanted, "most_turned": 30}, rel=1e-9)


@pytest.mark.parametrize("degrees", [1e-5, 1.0, 90.0, 179.9])
def test_angles_are_exact_for_small_and_large_turns(degrees: float):
    """Catches arccos near 1, which cannot tell small turns from none."""
    turn = torch.from_numpy(Rotation.from_euler("xyz", [0, degrees, 0], degrees=True).as_matrix())
    assert float(angles(turn)) == pytest.approx(degrees, rel=1e-7)


def test_the_world_in_which_a_camera_stands_does_not_matter():
    """Catches paths that are compared in the frames of unrelated reconstructions."""
    path = poses(line(3.0), list(np.linspace(0, 20, FRAMES)))
    torch.testing.assert_close(aligned(somewhere(1) @ path), aligned(path))
    turned = somewhere(2)
    torch.testing.assert_close(aligned(turned @ path)[0], torch.eye(4, dtype=torch.float64))


def test_spreads_equal_loops_over_pairs():
    """Catches pairs counted twice, a standard deviation of L - 1, and mixed axes."""
    tracks = normal((4, 5, 3), 0, "tracks").double().cumsum(1)
    pairs = list(combinations(range(4), 2))
    ends = [float((tracks[i, -1] - tracks[j, -1]).norm()) for i, j in pairs]
    ways = [
        sum(float((tracks[i, t] - tracks[j, t]).norm()) for t in range(5)) / 5 for i, j in pairs
    ]
    spread = math.hypot(*np.std(tracks[:, -1].numpy(), axis=0))
    found = spreads(tracks)
    assert found["endpoint_spread"] == pytest.approx(spread)
    assert found["endpoint_distance"] == pytest.approx(sum(ends) / 6)
    assert found["trajectory_distance"] == pytest.approx(sum(ways) / 6)
    assert found["endpoint_distance_median"] == sorted(ends)[2]
    scaled = tracks * torch.tensor([1.0, 2, 3, 40], dtype=torch.float64)[:, None, None]
    for name in ("endpoint_distance_by_path", "trajectory_distance_by_path"):
        assert spreads(scaled)[name] == pytest.approx(found[name]), "each has a unit of its own"


def test_straight_paths_have_half_the_distance_on_the_way():
    """Catches a mean over time that leaves out the end: the paper's own rows obey .5."""
    tracks = torch.stack([line(2.0, 81), line(2.0, 81, direction=0)])
    found = spreads(tracks)
    assert found["endpoint_distance"] == pytest.approx(2 * math.sqrt(2))
    assert found["trajectory_distance"] / found["endpoint_distance"] == pytest.approx(0.5)
    still = spreads(torch.zeros(2, 5, 3, dtype=torch.float64))
    assert set(still.values()) == {0.0}


def test_one_wrong_scale_does_not_move_median_and_trimmed_mean():
    """Catches a summary that one bad reconstruction decides."""
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 1000.0]
    found = Summary.of(values)
    assert found.mean.value == pytest.approx(104.5)
    assert (found.median, found.trimmed) == (5.5, 5.5)


def test_files_of_vipe_are_read_and_failures_counted(tmp_path: Path):
    """Catches a failed reconstruction that vanishes from the mean without a word."""
    files = []
    for seed in range(4):
        world = somewhere(seed)
        path = tmp_path / f"{seed}.npz"
        files.append(save(path, world @ poses(line(1.0 + seed, direction=seed % 3))))
    files.append(tmp_path / "absent.npz")
    files.append(save(tmp_path / "short.npz", poses(line(1.0, 5))))
    prompts = ["one", "one", "two", "two", "two", "two"]
    found = from_poses(files, prompts)
    assert found.videos == 6
    assert found.failure_rate == pytest.approx(1 / 3)
    assert "absent.npz does not exist" in found.failures[0]
    assert "5 poses, most files 9" in found.failures[1]
    assert found.own["path"].mean.value == pytest.approx(2.5, rel=1e-5)
    assert found.prompts == 2
    wanted = (math.hypot(1, 2) + math.hypot(3, 4)) / 2
    assert found.between["endpoint_distance"].mean.value == pytest.approx(wanted, rel=1e-5)
    assert found.between["trajectory_distance"].median == pytest.approx(wanted / 2, rel=1e-5)


def test_files_that_are_no_poses_are_refused(tmp_path: Path):
    """Catches numbers made of a camera that was lost."""
    skewed = poses(line(1.0))
    skewed[3, :3, :3] *= 1.1
    mirrored = poses(line(1.0))
    mirrored[:, 0, 0] = -1
    lost = poses(line(1.0))
    lost[5] = math.nan
    for name, data in (("skewed", skewed), ("mirrored", mirrored), ("lost", lost)):
        with pytest.raises(PoseError, match="no camera poses"):
            read_poses(save(tmp_path / f"{name}.npz", data))
    with pytest.raises(PoseError, match="lacks poses"):
        read_poses(save(tmp_path / "gap.npz", poses(line(1.0, 3)), [0, 1, 3]))
    with pytest.raises(PoseError, match=r"want \[N, 4, 4\]"):
        read_poses(save(tmp_path / "flat.npz", torch.zeros(5, 4)))
    (tmp_path / "text.npz").write_text("no poses")
    np.savez(tmp_path / "other.npz", poses=np.zeros(3))
    for name in ("text", "other"):
        with pytest.raises(PoseError, match="is no file of poses"):
            read_poses(tmp_path / f"{name}.npz")
    with pytest.raises(PoseError, match="none of 1 videos"):
        from_poses([tmp_path / "text.npz"], ["one"])


def test_poses_are_found_by_the_names_of_videos(tmp_path: Path):
    """Catches ViPE's folder that must be named to its last part, and poses of another video."""
    videos = [Path("a/one.mp4"), Path("b/two.mp4")]
    assert find_pose_files(tmp_path, videos)[0] == tmp_path / "one.npz"
    (tmp_path / "pose").mkdir()
    assert find_pose_files(tmp_path, videos)[1] == tmp_path / "pose" / "two.npz"
    with pytest.raises(UserError, match="two videos are called one"):
        find_pose_files(tmp_path, [*videos, Path("c/one.mp4")])


def test_the_picture_stands_in_for_poses():
    """Catches tracks of unequal length that are compared at unequal times."""
    tracks = [line(0.2), line(0.1), line(0.3), line(1.0, 4)]
    found = from_tracks(tracks, ["one"] * 4)
    assert found.failure_rate == 0.25
    ends = [0.1, 0.1, 0.2]
    assert found.between["endpoint_distance"].mean.value == pytest.approx(sum(ends) / 3)
    assert found.own == {}


def test_cameras_are_in_the_file_of_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Catches poses that are read and not reported."""
    videos = tmp_path / "prompt"
    videos.mkdir()
    for number in range(2):
        factors, _ = clip_number(number, 0, "short")
        write_clip(
            videos / f"{number}.mp4", (255 * render(factors, FRAMES)[0]).round().to(torch.uint8)
        )
        save(tmp_path / "vipe" / "pose" / f"{number}.npz", poses(line(1.0 + number)))
    out = tmp_path / "e.json"
    command = ["evaluate", str(videos), "--out", str(out), "--poses"]
    assert main([*command, str(tmp_path / "vipe")]) == 0
    found = json.loads(out.read_text())["camera"]
    assert found["poses"]["failure_rate"] == 0
    assert found["poses"]["videos"]["path"]["mean"]["value"] == pytest.approx(1.5)
    distance = found["poses"]["prompts"]["endpoint_distance"]
    assert distance["mean"]["value"] == distance["median"] == pytest.approx(1.0)
    assert found["picture"]["prompts"]["endpoint_spread"]["mean"]["n"] == 1
    assert "endpoint_distance" in capsys.readouterr().out
    assert main([*command, str(tmp_path / "nowhere")]) == EXIT_USER_ERROR
    assert "none of 2 videos has poses" in capsys.readouterr().err
