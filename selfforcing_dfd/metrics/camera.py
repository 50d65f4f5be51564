"""How the camera moves, and how it differs between the videos of one prompt.

Poses are those of ViPE: camera to world, OpenCV axes. The formulas are the DFD paper's (arXiv
2606.18478, appendix B.3). Every path is first brought into the frame of its own first camera. The
paper does not say so, but without it the distance of two paths is that of two arbitrary origins.
ViPE's unit of length is a guess for each video: a few wrong ones decide a mean, so medians, trimmed
means and lengths in units of the path stand beside it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import trim_mean
from torch import Tensor

from selfforcing_dfd.common import UserError
from selfforcing_dfd.metrics.diversity import by_prompt
from selfforcing_dfd.tiny.bootstrap import Resamples, Score

SKEWED = 0.01  # how far from orthonormal a rotation may be
TRIMMED = 0.1  # share of values left out at each end
TINY = 1e-12


class PoseError(UserError):
    """A file of poses that cannot be used."""


def read_poses(path: Path) -> Tensor:
    """Camera-to-world matrices [N, 4, 4], float64, one for each frame, from ViPE's npz file.

    PoseError for one that is not there or damaged, lacks frames or has matrices that are no poses.
    """
    if not path.is_file():
        raise PoseError(f"{path} does not exist; run ViPE on the video")
    try:
        with np.load(path, allow_pickle=False) as file:
            data = torch.from_numpy(file["data"].astype(np.float64))
            numbers = file["inds"].tolist()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise PoseError(f"{path} is no file of poses ({error}); run ViPE again") from error
    if data.ndim != 3 or data.shape[1:] != (4, 4) or len(data) < 2:
        raise PoseError(f"{path} holds {list(data.shape)}; want [N, 4, 4] with N of at least 2")
    if numbers != list(range(len(data))):
        raise PoseError(f"{path} lacks poses of some frames; run ViPE on the whole video")
    turns = data[:, :3, :3]
    off = (turns @ turns.mT - torch.eye(3, dtype=torch.float64)).abs().amax((1, 2))
    proper = (off <= SKEWED) & (torch.linalg.det(turns) > 0)
    if not data.isfinite().all() or not proper.all():
        raise PoseError(f"{path} has matrices that are no camera poses; ViPE lost its track")
    return data


def aligned(poses: Tensor) -> Tensor:
    """The same path seen from its first camera, [N, 4, 4]: the first pose becomes the identity."""
    return torch.linalg.solve(poses[:1], poses)


def angles(turns: Tensor) -> Tensor:
    """Degrees by which rotations [..., 3, 3] turn, exact for small ones too."""
    skew = (turns - turns.mT).flatten(-2).norm(dim=-1) / 8**0.5
    cosine = (turns.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2
    return torch.rad2deg(torch.atan2(skew, cosine))


def magnitudes(poses: Tensor) -> dict[str, float]:
    """How much one camera moves.

    path: sum of its steps. farthest: greatest distance from where it began, also in units of the
    path. turned: sum of the angles between neighbouring frames, in degrees. most_turned: greatest
    angle from the first frame.
    """
    seen = aligned(poses)
    places = seen[:, :3, 3]
    turns = seen[:, :3, :3]
    path = float(places.diff(dim=0).norm(dim=1).sum())
    farthest = float(places.norm(dim=1).amax())
    return {
        "path": path,
        "farthest": farthest,
        "farthest_by_path": farthest / max(path, TINY),
        "turned": float(angles(turns[1:] @ turns[:-1].mT).sum()),
        "most_turned": float(angles(turns).amax()),
    }


def spreads(tracks: Tensor) -> dict[str, float]:
    """How unlike the paths [L, N, D] of the L videos of one prompt are, L >= 2.

    endpoint_spread: length of the standard deviations (of L) of the ends. endpoint_distance and
    trajectory_distance: means over pairs i < j of the distance at the end, and on average over
    time; `_median` takes the median pair. `_by_path` first divides each path by its own length.
    """
    steps = tracks.diff(dim=1).norm(dim=2).sum(dim=1)
    relative = tracks / steps.clamp_min(TINY)[:, None, None]
    ends = distances_of_pairs(tracks[:, -1:])
    ways = distances_of_pairs(tracks)
    return {
        "endpoint_spread": float(tracks[:, -1].std(dim=0, correction=0).norm()),
        "endpoint_distance": float(ends.mean()),
        "endpoint_distance_median": float(ends.median()),
        "endpoint_distance_by_path": float(distances_of_pairs(relative[:, -1:]).mean()),
        "trajectory_distance": float(ways.mean()),
        "trajectory_distance_median": float(ways.median()),
        "trajectory_distance_by_path": float(distances_of_pairs(relative).mean()),
    }


def distances_of_pairs(tracks: Tensor) -> Tensor:
    """[pairs]: mean distance over time of each two of the tracks [L, N, D]."""
    first, second = torch.triu_indices(len(tracks), len(tracks), offset=1)
    return (tracks[first] - tracks[second]).norm(dim=2).mean(dim=1)


@dataclass(frozen=True, slots=True)
class Summary:
    """A number of many videos or prompts: mean with interval, median, and mean of the middle."""

    mean: Score
    median: float
    trimmed: float

    @classmethod
    def of(cls, values: Sequence[float], seed: int = 0) -> Summary:
        every = Resamples.draw(len(values), seed)
        column = torch.tensor(values, dtype=torch.float64)
        return cls(
            every.score(every.mean(column)),
            float(np.median(values)),
            float(trim_mean(values, TRIMMED)),
        )


@dataclass(frozen=True, slots=True)
class Cameras:
    """What is known of the cameras of many videos.

    failures: why videos have no poses. own: numbers of single videos; between: numbers of prompts
    with at least two videos.
    """

    videos: int
    failures: list[str]
    prompts: int
    own: Mapping[str, Summary]
    between: Mapping[str, Summary]

    @property
    def failure_rate(self) -> float:
        return len(self.failures) / self.videos


def from_poses(files: Sequence[Path], prompts: Sequence[Hashable]) -> Cameras:
    """Cameras of videos by their files of poses, one for each.

    A file that cannot be used counts as a failure, and so does one with another number of frames
    than most. The paper reports no failures. Raises PoseError where all fail.
    """
    failures = []
    found: dict[int, Tensor] = {}
    for number, path in enumerate(files):
        try:
            found[number] = read_poses(path)
        except PoseError as error:
            failures.append(str(error))
    if not found:
        raise PoseError(f"none of {len(files)} videos has poses: {failures[0]}")
    lengths = [len(poses) for poses in found.values()]
    usual = max(set(lengths), key=lambda length: (lengths.count(length), length))
    for number, poses in list(found.items()):
        if len(poses) != usual:
            failures.append(f"{files[number]} has {len(poses)} poses, most files {usual}")
            del found[number]
    own = [magnitudes(poses) for poses in found.values()]
    tracks = [aligned(poses)[:, :3, 3] for poses in found.values()]
    groups = between_seeds(tracks, [prompts[number] for number in found])
    return Cameras(len(files), failures, len(groups), summaries(own), summaries(groups))


def from_tracks(tracks: Sequence[Tensor], prompts: Sequence[Hashable]) -> Cameras:
    """The stand-in without poses: tracks [N, 3] of x, y (in widths) and log zoom of the picture.

    Tracks of another length than most cannot be compared and count as failures.
    """
    lengths = [len(track) for track in tracks]
    usual = max(set(lengths), key=lambda length: (lengths.count(length), length))
    kept = [number for number, length in enumerate(lengths) if length == usual]
    failures = [
        f"video {number} has a track of {length}, most {usual}"
        for number, length in enumerate(lengths)
        if length != usual
    ]
    groups = between_seeds([tracks[n] for n in kept], [prompts[n] for n in kept])
    return Cameras(len(tracks), failures, len(groups), {}, summaries(groups))


def between_seeds(tracks: Sequence[Tensor], prompts: Sequence[Hashable]) -> list[dict[str, float]]:
    """`spreads` of every prompt that has at least two videos."""
    groups = by_prompt(prompts).values()
    return [spreads(torch.stack([tracks[number] for number in numbers])) for numbers in groups]


def summaries(rows: Sequence[Mapping[str, float]]) -> dict[str, Summary]:
    names = list(rows[0]) if rows else []
    return {name: Summary.of([row[name] for row in rows]) for name in names}


def find_pose_files(folder: Path, videos: Sequence[Path]) -> list[Path]:
    """`pose/NAME.npz` in ViPE's output folder, or NAME.npz in it, for each video.

    UserError for two videos of one name, whose poses cannot be told apart.
    """
    names = [video.stem for video in videos]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(
            f"two videos are called {twice[0]}; give them names of their own before ViPE runs"
        )
    inside = folder / "pose"
    return [(inside if inside.is_dir() else folder) / f"{name}.npz" for name in names]
