"""VBench's official tool, in an environment of its own: what it reads, and what it wrote.

Its package asks for libraries that no environment of this one can hold (docs/vbench/Dockerfile). So
nothing of it is computed here. `write_layout` writes a folder for its mode `custom_input`, with a
short program that calls it; `read_results` reads its file of results.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfforcing_dfd.common import UserError, atomic_file, sha256_of
from selfforcing_dfd.metrics.i2v_subject import picture_of

USUAL = (
    *("subject_consistency", "background_consistency", "temporal_flickering"),
    *("motion_smoothness", "dynamic_degree", "aesthetic_quality", "imaging_quality"),
)
OF_PROMPTS = ("temporal_style", "overall_consistency", "human_action")
DIMENSIONS = (*USUAL, *OF_PROMPTS)
"""What the tool measures of any video, and what it compares with the video's prompt."""
OF_PICTURES = ("i2v_subject", "i2v_background")
"""What it measures of a video that begins with a given picture."""
NOT_CUSTOM = (
    *("object_class", "multiple_objects", "scene", "appearance_style", "color"),
    "spatial_relationship",
)
"""What it measures of its own prompts only."""
LAYOUT_FILE = "layout.json"
PROGRAM_FILE = "run_vbench.py"
PROGRAM = Path(__file__).with_name("run_vbench_template.py")
RESULTS_ENDING = "_eval_results.json"
TOOL = "vbench 0.1.5, custom_input"
OF_A_HUNDRED = 100
PICTURE_PROBLEM = (
    "{names} compare a video with the picture that it begins with; name a folder of pictures, "
    "each called as its video, with --images DIR"
)


@dataclass(frozen=True, slots=True)
class Results:
    """What the tool found.

    values: its own score of each dimension. videos: by number, each its values by dimension.
    """

    file: str
    values: Mapping[str, float]
    videos: Mapping[int, Mapping[str, float]]


def check_dimensions(dimensions: Sequence[str], has_pictures: bool) -> None:
    """UserError for dimensions that the tool cannot measure of these videos."""
    known = (*DIMENSIONS, *OF_PICTURES)
    own = [name for name in dimensions if name in NOT_CUSTOM]
    if own:
        raise UserError(
            f"{', '.join(own)} are for VBench's own prompts, not for other videos; use some of "
            f"{', '.join(known)}"
        )
    unknown = [name for name in dimensions if name not in known]
    if unknown or not dimensions:
        raise UserError(f"no dimension {', '.join(unknown)}; use some of {', '.join(known)}")
    of_pictures = [name for name in dimensions if name in OF_PICTURES]
    if of_pictures and not has_pictures:
        raise UserError(PICTURE_PROBLEM.format(names=" and ".join(of_pictures)))


def write_layout(
    folder: Path,
    videos: Sequence[Path],
    prompts: Sequence[str],
    dimensions: Sequence[str],
    images: Path | None = None,
) -> Path:
    """Write what the tool's mode `custom_input` reads; the path of the program that calls it.

    Videos are copied as 000000.mp4 and so on, since the tool takes names for prompts; prompts are
    in prompts.json, pictures in images/. Raises UserError for videos that are no mp4, and for
    pictures that are missing.
    """
    check_dimensions(dimensions, images is not None)
    others = [path.name for path in videos if path.suffix.lower() != ".mp4"]
    if others:
        raise UserError(f"{others[0]} is no .mp4, and VBench reads no others; encode it as mp4")
    for name in ("videos", "images"):
        shutil.rmtree(folder / name, ignore_errors=True)
    entries = []
    for number, (video, prompt) in enumerate(zip(videos, prompts, strict=True)):
        name = f"{number:06d}"
        copy(video, folder / "videos" / f"{name}.mp4")
        if images is not None:
            picture = picture_of(video, images)
            copy(picture, folder / "images" / f"{name}{picture.suffix}")
        entries.append({"file": video.name, "sha256": sha256_of(video), "prompt": prompt})
    content = {"dimensions": list(dimensions), "videos": entries}
    with atomic_file(folder / LAYOUT_FILE) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    copy(PROGRAM, folder / PROGRAM_FILE)
    return folder / PROGRAM_FILE


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def read_layout(folder: Path) -> dict[str, Any]:
    """What `write_layout` wrote. UserError without it."""
    path = folder / LAYOUT_FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {LAYOUT_FILE}; write it with `selfforcing-dfd vbench`")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def has_results(folder: Path) -> bool:
    return any((folder / "results").glob(f"*{RESULTS_ENDING}"))


def read_results(folder: Path) -> Results:
    """The tool's results for the videos of a layout, from all files that it wrote.

    UserError for dimensions or videos that are missing, and for values that are no numbers.
    """
    layout = read_layout(folder)
    files = sorted((folder / "results").glob(f"*{RESULTS_ENDING}"))
    values: dict[str, float] = {}
    videos: dict[int, dict[str, float]] = {n: {} for n in range(len(layout["videos"]))}
    for path in files:
        for dimension, (value, rows) in results_in(path).items():
            values[dimension] = number_of(value, path, dimension)
            for row in rows:
                number = video_number(row, path, len(videos))
                videos[number][dimension] = number_of(row["video_results"], path, dimension)
    for dimension in layout["dimensions"]:
        check_complete(folder, dimension, values, videos)
    return Results(", ".join(path.name for path in files), values, videos)


def results_in(path: Path) -> dict[str, tuple[Any, list[dict[str, Any]]]]:
    """Dimension -> (score, rows of videos). UserError for a file of another form."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: (found[0], list(found[1])) for name, found in content.items()}
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        raise UserError(
            f"{path} is not what VBench 0.1.5 writes, dimension -> [score, [videos]] ({error!r}); "
            "run it again"
        ) from error


def video_number(row: Mapping[str, Any], path: Path, count: int) -> int:
    """The number of a row's video in the layout. UserError for another video."""
    stem = Path(str(row.get("video_path", ""))).stem
    if not stem.isdecimal() or int(stem) >= count or "video_results" not in row:
        raise UserError(
            f"{path.name} speaks of {row.get('video_path')}, which is no video of the layout; "
            "remove the results of other videos, and run it again"
        )
    return int(stem)


def number_of(value: Any, path: Path, dimension: str) -> float:
    """A score as a number; VBench says true and false of a video's dynamic degree."""
    if isinstance(value, (bool, int, float)) and math.isfinite(value):
        return float(value)
    raise UserError(f"{path.name}: {dimension} has a value {value!r}, which is no number")


def check_complete(
    folder: Path,
    dimension: str,
    values: Mapping[str, float],
    videos: Mapping[int, Mapping[str, float]],
) -> None:
    without = [number for number, found in videos.items() if dimension not in found]
    if dimension not in values or without:
        what = f"video {without[0]:06d}" if dimension in values else "any video"
        raise UserError(
            f"{folder / 'results'} has no {dimension} of {what}; run {PROGRAM_FILE} to its end"
        )


def as_shares(results: Results) -> list[dict[str, float]]:
    """The values of each video on the scale of the tool's own score of their dimension.

    Imaging quality is a share there, and a number of 0 to 100 for each video.
    """
    scale = {}
    for dimension, value in results.values.items():
        mean = sum(video[dimension] for video in results.videos.values()) / len(results.videos)
        is_percent = value and math.isclose(mean, OF_A_HUNDRED * value, rel_tol=0.01)
        scale[dimension] = OF_A_HUNDRED if is_percent else 1
    in_order = [results.videos[number] for number in sorted(results.videos)]
    return [{name: value / scale[name] for name, value in video.items()} for video in in_order]


def add_results(content: dict[str, Any], layout: Mapping[str, Any], results: Results) -> None:
    """Add the tool's scores to the content of evaluation.json, each video's by its hash.

    UserError for a file that lacks one of the videos.
    """
    by_hash = {video["sha256"]: video for video in content["videos"]}
    lost = [entry["file"] for entry in layout["videos"] if entry["sha256"] not in by_hash]
    if lost:
        raise UserError(
            f"evaluation.json has no {lost[0]} as VBench saw it; measure the same videos first: "
            "selfforcing-dfd evaluate VIDEOS"
        )
    content["vbench"] = {"tool": TOOL, "file": results.file, "values": dict(results.values)}
    for number, entry in enumerate(layout["videos"]):
        by_hash[entry["sha256"]]["vbench"] = dict(results.videos[number])
