"""Options of `evaluate` for videos that begin with a picture, and what they add to its file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfforcing_dfd.common import UserError, find_device


def add_picture_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("videos that begin with a picture (docs/evaluation.md)")
    group.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="the pictures, each called as its video: the score i2v_subject; with --dino",
    )
    group.add_argument(
        "--dino",
        type=Path,
        metavar="DIR",
        help="DINO ViT-B/16 as transformers has saved it, such as facebook/dino-vitb16",
    )


def check_picture_options(args: argparse.Namespace) -> None:
    """Raise UserError for one option without the other."""
    if bool(args.images) != bool(args.dino):
        raise UserError(
            "--images and --dino go together: i2v_subject compares a video with its picture, by "
            "DINO's features"
        )


def add_i2v_subject(
    content: dict[str, Any], args: argparse.Namespace, files: Sequence[Path]
) -> str:
    """Add `i2v_subject` to the file and to each of its videos; one line about it."""
    from PIL import Image

    from selfforcing_dfd.data.source import ClipError
    from selfforcing_dfd.metrics.backbones import DinoEncoder
    from selfforcing_dfd.metrics.files import frames_of
    from selfforcing_dfd.metrics.i2v_subject import i2v_subject, picture_of

    pictures = [picture_of(path, args.images) for path in files]
    encoder = DinoEncoder(args.dino, find_device(args.device, "--device"))
    values = []
    for path, picture in zip(files, pictures, strict=True):
        with Image.open(picture) as opened:
            try:
                values.append(i2v_subject(encoder.features, opened, frames_of(path)))
            except ValueError as error:
                raise ClipError(path.name, f"{error}; leave it out") from error
    for video, value in zip(content["videos"], values, strict=True):
        video["i2v_subject"] = round(value, 6)
    mean = sum(values) / len(values)
    content["i2v_subject"] = {"value": round(mean, 6), "encoder": encoder.described()}
    return f"{'i2v_subject':24}{mean:>16.3f}"
