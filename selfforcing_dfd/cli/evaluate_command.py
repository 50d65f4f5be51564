"""The command `evaluate`."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from selfforcing_dfd.cli.evaluate_features import (
    add_cameras,
    add_feature_options,
    add_features,
    camera_table,
    check_feature_options,
    encoders_of,
    feature_table,
)
from selfforcing_dfd.cli.evaluate_i2v import (
    add_i2v_subject,
    add_picture_options,
    check_picture_options,
)
from selfforcing_dfd.cli.options import Run, positive, rate
from selfforcing_dfd.common import UserError

if TYPE_CHECKING:
    from selfforcing_dfd.metrics.files import Measured

CALIBRATION_CLIPS = 64
SHOWN = (
    "saturation",
    "contrast",
    "colorful",
    "laplacian",
    "difference_by_contrast",
    "residual_share",
    "flow_top",
    "seam_excess",
    "frozen",
    "drift_saturation",
    "drift_contrast",
)
"""Of all metrics those that the terminal shows."""


def evaluate(parser: argparse.ArgumentParser) -> Run:
    """Measure videos: colour, sharpness, flicker, motion, camera, drift. No weights are needed.

    With --features also diversity over the seeds of a prompt, and sets of clips against each other.
    Videos of one prompt have the same text in NAME.txt beside NAME.mp4, or lie in one folder.
    Every number goes to a JSON file with what it needs to be repeated. A damaged video ends the
    command unless --keep-going. Definitions: docs/evaluation.md.
    """
    parser.add_argument("videos", nargs="*", type=Path, metavar="PATH", help="videos, or folders")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where the numbers go (default: evaluation.json; calibration.json with --calibrate)",
    )
    parser.add_argument("--fps", type=rate, help="frames a second, in place of what the files say")
    parser.add_argument(
        "--chunk",
        type=positive,
        default=0,
        metavar="N",
        help="video frames generated together, for seams: 12 for chunks of 3 latent frames",
    )
    parser.add_argument(
        "--first-chunk",
        type=positive,
        default=0,
        metavar="N",
        help="video frames of the first chunk: 9 for 3 latent frames (default: as --chunk)",
    )
    parser.add_argument(
        "--keep-going", action="store_true", help="leave damaged videos out and name them"
    )
    add_feature_options(parser)
    add_picture_options(parser)
    add_calibration_options(parser)

    def run(args: argparse.Namespace) -> None:
        if args.calibrate:
            calibrate_metrics(args)
        elif args.videos:
            evaluate_videos(args)
        else:
            raise UserError("no video is named; name videos or folders, or use --calibrate")

    return run


def add_calibration_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="measure no videos, but what the metrics see in tiny-world clips of known faults",
    )
    parser.add_argument(
        "--clips",
        type=positive,
        default=CALIBRATION_CLIPS,
        metavar="N",
        help="of each set, with --calibrate (default: %(default)s, two minutes of one core)",
    )


def evaluate_videos(args: argparse.Namespace) -> None:
    """Measure the videos, write all numbers and print some."""
    from selfforcing_dfd.metrics.files import evaluation, find_videos, write_evaluation

    out = args.out or Path("evaluation.json")
    check_feature_options(args)
    check_picture_options(args)
    encoders = encoders_of(args)
    measured, refused = measure_all(args, find_videos(args.videos))
    if not measured:
        raise UserError("no video could be measured")
    settings = {
        "fps": str(args.fps) if args.fps else None,
        "chunk": args.chunk,
        "first_chunk": args.first_chunk,
        "refused": refused,
    }
    content = evaluation(measured, settings)
    if encoders:
        add_features(content, args, [video.file for video in measured], encoders)
    if encoders or args.poses:
        add_cameras(content, args.poses, measured)
    lines = [table(measured, content["means"])]
    if args.images:
        lines.append(add_i2v_subject(content, args, [video.file for video in measured]))
    write_evaluation(out, content)
    print("\n".join(lines))
    if encoders:
        print(feature_table(content["features"]))
    if "camera" in content:
        print(camera_table(content["camera"]))
    for line in refused:
        print(f"left out: {line}", file=sys.stderr)
    print(out)


def calibrate_metrics(args: argparse.Namespace) -> None:
    """Print the tables of docs/metrics.md, and write what they are made from."""
    from tqdm import tqdm

    from selfforcing_dfd.metrics.calibration import calibrate, num_sets
    from selfforcing_dfd.metrics.calibration_tables import tables
    from selfforcing_dfd.metrics.feature_files import FEWEST
    from selfforcing_dfd.metrics.files import write_evaluation

    if args.videos:
        raise UserError("--calibrate makes its own clips; leave the videos out")
    if args.clips < FEWEST:
        raise UserError(f"--clips is {args.clips}; sets are compared from {FEWEST} clips on")
    with tqdm(total=num_sets(), unit="set", dynamic_ncols=True) as bar:
        found = calibrate(args.clips, lambda name: bar.update())
    out = args.out or Path("calibration.json")
    write_evaluation(out, found)
    print(tables(found))
    print(out)


def measure_all(args: argparse.Namespace, files: list[Path]) -> tuple[list[Measured], list[str]]:
    """(the videos that were measured, why others were left out)."""
    from tqdm import tqdm

    from selfforcing_dfd.data.source import ClipError
    from selfforcing_dfd.metrics.files import measure_file

    measured = []
    refused = []
    fps = float(args.fps) if args.fps else None
    with tqdm(unit="frame", dynamic_ncols=True) as bar:
        for path in files:
            bar.set_description(path.name, refresh=False)
            try:
                found = measure_file(
                    path, fps, args.chunk, args.first_chunk, lambda frame: bar.update()
                )
                measured.append(found)
            except ClipError as error:
                if not args.keep_going:
                    raise
                refused.append(str(error))
    return measured, refused


def table(measured: list[Measured], means: dict[str, float | None]) -> str:
    """A line for each of a few metrics, a column for each of up to four videos, and the mean."""
    columns = measured[:4]
    names = [video.file.name[:14] for video in columns]
    lines = [line_of("", [*names, f"mean of {len(measured)}"])]
    for name in SHOWN:
        mean = means[name]
        values = [video.numbers[name] for video in columns]
        values.append(math.nan if mean is None else mean)
        lines.append(line_of(name, [shown(value) for value in values]))
    speed = sum(video.speed for video in measured) / len(measured)
    lines.append(f"measured at {speed:.1f} times the speed of playing")
    return "\n".join(lines)


def line_of(name: str, cells: list[str]) -> str:
    return f"{name:24}" + "".join(f"{cell:>16}" for cell in cells)


def shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
