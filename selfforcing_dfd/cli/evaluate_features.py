"""Options of `evaluate` for features and other sets of clips, and what they add to its file."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfforcing_dfd.cli.options import DEVICE_HELP
from selfforcing_dfd.common import UserError, find_device

if TYPE_CHECKING:
    from selfforcing_dfd.metrics.camera import Cameras, Summary
    from selfforcing_dfd.metrics.distribution import Memory
    from selfforcing_dfd.metrics.feature_files import Encoded
    from selfforcing_dfd.metrics.features import Encoder
    from selfforcing_dfd.metrics.files import Measured

SETS = ("reference", "training", "held_out")


def add_feature_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("features and sets of clips (docs/evaluation.md)")
    group.add_argument(
        "--features",
        action="append",
        default=[],
        metavar="NAME",
        help="pixels, motion, clip=DIR, clip_projected=DIR, dino=DIR, or several joined by +; "
        "DIR is a local folder of transformers; may be given again",
    )
    sets = {
        "--reference": "clips of the data, for precision, recall, density, coverage and MMD",
        "--training": "clips that the model was trained on; with --held-out",
        "--held-out": "clips of the same source that it was not trained on, to see what it repeats",
    }
    for option, meaning in sets.items():
        group.add_argument(option, nargs="+", type=Path, default=[], metavar="PATH", help=meaning)
    group.add_argument(
        "--poses",
        type=Path,
        metavar="DIR",
        help="camera poses of the videos, as ViPE writes them: DIR/pose/NAME.npz",
    )
    group.add_argument("--device", default="cpu", help=f"of CLIP and DINO: {DEVICE_HELP}")


def check_feature_options(args: argparse.Namespace) -> None:
    """Raise UserError for options that mean nothing together."""
    given = [name for name in SETS if vars(args)[name]]
    if given and not args.features:
        raise UserError(
            f"--{given[0].replace('_', '-')} is compared by features; add --features pixels"
        )
    if bool(args.training) != bool(args.held_out):
        raise UserError(
            "--training and --held-out go together: how near a training clip is means something "
            "only beside how near a clip is that was never seen"
        )


def encoders_of(args: argparse.Namespace) -> list[Encoder]:
    from selfforcing_dfd.metrics.feature_files import encoder_of

    device = find_device(args.device, "--device")
    encoders = [encoder_of(text, device) for text in args.features]
    names = [encoder.name for encoder in encoders]
    if len(set(names)) < len(names):
        raise UserError(f"--features has {', '.join(names)}; name each encoder once")
    return encoders


def add_features(
    content: dict[str, Any],
    args: argparse.Namespace,
    files: Sequence[Path],
    encoders: list[Encoder],
) -> None:
    """Add `prompts`, `features` and, for each video, its own feature numbers to the file."""
    from selfforcing_dfd.metrics.feature_files import prompts_of, scores_as_json, set_scores

    prompts, where = prompts_of(files)
    sets = encode_sets(args, files, encoders)
    content["prompts"] = {
        "from": where,
        "different": len(set(prompts)),
        "sha256": hashlib.sha256("\n".join(sorted(set(prompts))).encode()).hexdigest(),
    }
    content["features"] = {}
    for number, encoder in enumerate(encoders):
        encoded = {name: found[number] for name, found in sets.items()}
        generated = encoded["videos"]
        scores, memory = set_scores(
            generated,
            prompts,
            encoded.get("reference"),
            encoded.get("training"),
            encoded.get("held_out"),
        )
        own = [{} for _ in files] if memory is None else nearest(memory, encoded["training"])
        if where == "text":
            scores |= add_alignment(encoder, generated, prompts, own)
        content["features"][encoder.name] = {
            "encoder": encoder.described(),
            "places": generated.frames.shape[1],
            "clips": {name: len(found[number].files) for name, found in sets.items()},
            "scores": scores_as_json(scores),
        }
        for video, row in zip(content["videos"], own, strict=True):
            video.setdefault("features", {})[encoder.name] = row


def nearest(memory: Memory, training: Encoded) -> list[dict[str, Any]]:
    """Each video's nearest training clip, and how far it is."""
    return [
        {"nearest_training": training.files[index].name, "distance": round(distance, 6)}
        for index, distance in zip(memory.nearest, memory.distance, strict=True)
    ]


def encode_sets(
    args: argparse.Namespace, files: Sequence[Path], encoders: list[Encoder]
) -> dict[str, list[Encoded]]:
    """Features of the videos and of every other set that was given, by each encoder."""
    from tqdm import tqdm

    from selfforcing_dfd.metrics.feature_files import encode_files
    from selfforcing_dfd.metrics.files import find_videos

    sets = {"videos": list(files)}
    for name in SETS:
        if vars(args)[name]:
            sets[name] = find_videos(vars(args)[name])
    count = sum(len(found) for found in sets.values())
    with tqdm(total=count, unit="clip", desc="features", dynamic_ncols=True) as bar:
        return {
            name: encode_files(
                found, encoders, args.fps, name == "videos", lambda path: bar.update()
            )
            for name, found in sets.items()
        }


def add_alignment(
    encoder: Encoder, generated: Encoded, prompts: list[str], own: list[dict[str, Any]]
) -> dict[str, Any]:
    """The agreement of frames with prompts, for the encoder that has both in one space."""
    from selfforcing_dfd.metrics.backbones import ClipEncoder
    from selfforcing_dfd.metrics.feature_files import text_alignment

    if not isinstance(encoder, ClipEncoder) or encoder.name != "clip_projected":
        return {}
    score, values = text_alignment(encoder, generated.frames, prompts)
    for row, value in zip(own, values, strict=True):
        row["text_alignment"] = round(value, 6)
    return {"text_alignment": score}


def add_cameras(content: dict[str, Any], poses: Path | None, measured: Sequence[Measured]) -> None:
    """Add `camera`: by poses where there are some, and by the picture."""
    from selfforcing_dfd.metrics.camera import find_pose_files, from_poses, from_tracks
    from selfforcing_dfd.metrics.feature_files import prompts_of

    files = [video.file for video in measured]
    prompts, _ = prompts_of(files)
    found = {"picture": from_tracks([video.track for video in measured], prompts)}
    if poses is not None:
        found["poses"] = from_poses(find_pose_files(poses, files), prompts)
    content["camera"] = {name: cameras_as_json(cameras) for name, cameras in found.items()}


def cameras_as_json(cameras: Cameras) -> dict[str, Any]:
    from selfforcing_dfd.metrics.feature_files import scores_as_json
    from selfforcing_dfd.metrics.files import stated

    def shown(found: Mapping[str, Summary]) -> dict[str, Any]:
        return {
            name: {
                **scores_as_json({"mean": summary.mean}),
                "median": stated(summary.median),
                "trimmed": stated(summary.trimmed),
            }
            for name, summary in found.items()
        }

    return {
        "failure_rate": cameras.failure_rate,
        "failures": cameras.failures,
        "videos": shown(cameras.own),
        "prompts": shown(cameras.between),
    }


def camera_table(camera: dict[str, Any]) -> str:
    """Mean, median and trimmed mean of each number, by poses or, without them, by the picture."""
    source = "poses" if "poses" in camera else "picture"
    found = camera[source]
    lines = [f"camera by {source}, {100 * found['failure_rate']:.0f} % failed"]
    lines.append(f"  {'':30}{'mean':>12}{'median':>12}{'trimmed':>12}")
    for name, row in [*found["videos"].items(), *found["prompts"].items()]:
        values = [row["mean"]["value"], row["median"], row["trimmed"]]
        cells = ["-" if value is None else f"{value:.4f}" for value in values]
        lines.append(f"  {name:30}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def feature_table(features: dict[str, Any]) -> str:
    """A line for each score of each encoder."""
    lines = []
    for name, found in features.items():
        lines.append(f"{name}, {found['clips']['videos']} videos")
        for metric, score in found["scores"].items():
            value = score["value"]
            shown = "-" if value is None else f"{value:.4f}"
            interval = ""
            if score.get("low") is not None:
                interval = f"   [{score['low']:.4f}, {score['high']:.4f}] of {score['n']}"
            lines.append(f"  {metric:30}{shown:>12}{interval}")
    return "\n".join(lines)
