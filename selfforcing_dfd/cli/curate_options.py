"""Options of the steps of `curate`, and the settings that they stand for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfforcing_dfd.cli.options import positive

if TYPE_CHECKING:
    from selfforcing_dfd.curate.intake import Intake


def add_feature_options(parser: argparse.ArgumentParser) -> None:
    """What makes the vectors."""
    parser.add_argument(
        "--features",
        metavar="NAME",
        help="pixels, motion, clip_projected=DIR, clip=DIR, dino=DIR, or several joined by +; DIR "
        "is a local folder of transformers (default: pixels+motion)",
    )
    parser.add_argument(
        "--pictures", type=positive, metavar="N", help="frames of each clip (default: 3)"
    )


def add_candidate_options(parser: argparse.ArgumentParser) -> None:
    """What a contact sheet shows, and what is picked unseen."""
    parser.add_argument(
        "--candidates", type=positive, metavar="N", help="of each cluster (default: 40)"
    )
    parser.add_argument(
        "--pictures", type=positive, metavar="N", help="of each candidate (default: 5)"
    )
    parser.add_argument(
        "--auto",
        type=positive,
        metavar="N",
        dest="picks",
        help="fill in N picks of each cluster that differ most, as a baseline without a person",
    )
    parser.add_argument(
        "--fiftyone",
        type=Path,
        metavar="DIR",
        help="also write the candidates as a dataset that FiftyOne opens",
    )


def add_gate_options(parser: argparse.ArgumentParser) -> None:
    """How large the set is, and what stays out of it."""
    parser.add_argument(
        "--quota", type=positive, metavar="N", help="clips of the set (default: the picks alone)"
    )
    parser.add_argument(
        "--duplicate",
        type=float,
        metavar="COSINE",
        help="pass over clips that are this similar to one of the set (default: 0.98)",
    )
    parser.add_argument(
        "--prompts",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="evaluation prompts, one on each line, that captions must not leak; may be repeated",
    )
    parser.add_argument(
        "--near",
        type=float,
        metavar="SHARE",
        help="of word sequences in common, from which a caption leaks a prompt (default: 0.6)",
    )
    parser.add_argument(
        "--held-out",
        type=Path,
        metavar="FILE",
        help="names of clips, one on each line, that are kept for evaluation",
    )


def add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="the curation folder that `curate embed` made"
    )


def add_set_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        default="",
        metavar="NAME",
        help="settings of a whole set: mix, animation, or a .yaml file; options come before them",
    )


def add_overwrite(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--overwrite", action="store_true", help=f"replace {what}, and what a stop left of it"
    )


def intake_of(args: argparse.Namespace) -> Intake:
    from selfforcing_dfd.curate.intake import Intake

    return Intake(args.source.resolve(), args.frames, args.fps, args.recursive, args.cut)


def section_of(args: argparse.Namespace, section: str, *names: str) -> Any:
    """The settings of a step: those of --set, with the options among `names` that were typed."""
    from selfforcing_dfd.curate.settings import changed, load_settings

    typed = {name: vars(args)[name] for name in names if vars(args)[name] is not None}
    return changed(vars(load_settings(args.set))[section], section, typed)
