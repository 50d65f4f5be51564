"""The command `distil`: from a checkpoint and a folder of videos to an exported student."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from selfforcing_dfd.cli.data_commands import file_source
from selfforcing_dfd.cli.data_options import (
    add_caption_options,
    add_form_options,
    add_intake_options,
)
from selfforcing_dfd.cli.options import DEVICE_HELP, Run, positive
from selfforcing_dfd.common import UserError

if TYPE_CHECKING:
    from selfforcing_dfd.data.sources.files import FileSource
    from selfforcing_dfd.journey.request import Request

DEFAULT_OUT = Path("runs/distil")


def distil(parser: argparse.ArgumentParser) -> Run:
    """Make a few-step student from a checkpoint and a folder of videos, in one command.

    Finds out what the checkpoint is, prints the whole budget, cuts and packs the videos, trains by
    the recipe that the study found best, measures, and exports a diffusers pipeline with its card.
    The same command goes on after a stop, and skips what is done.
    """
    add_inputs(parser)
    add_recipe_options(parser)
    add_intake_options(parser, default_cut="scenes")
    add_caption_options(parser)
    add_form_options(parser)
    parser.set_defaults(resize="cover")
    add_end_options(parser)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.setting=value",
        help="settings of the last run; those of model, batch, data, checkpoint, log and rollout "
        "hold for every run",
    )

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.cli.launch import trainer_on
        from selfforcing_dfd.journey.checkpoint import inspect_checkpoint
        from selfforcing_dfd.journey.run import distil

        checkpoint = inspect_checkpoint(args.checkpoint, args.entry, args.role, args.model)
        name = args.source.resolve().stem
        args.out = args.out or DEFAULT_OUT / f"{checkpoint.name}-{name}"
        distil(request_of(args), checkpoint, trainer_on(args.gpus), print, args.dry_run)

    return run


def add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a few-step student, a causal teacher or a bidirectional teacher, in any format that "
        "`convert` reads",
    )
    parser.add_argument(
        "source", type=Path, metavar="VIDEOS", help="folder of videos, or a list, as for `pack`"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"where everything goes (default: {DEFAULT_OUT}/CHECKPOINT-VIDEOS)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan and the whole budget, and stop"
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="diffusers folder of Wan2.1 with VAE and text encoder; without it the tiny world",
    )
    parser.add_argument(
        "--entry", default="", metavar="NAME", help="network of a checkpoint that holds several"
    )
    parser.add_argument(
        "--role",
        choices=("causal_student", "causal_teacher", "teacher"),
        help="what the checkpoint is, where it does not state it",
    )
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("recipe")
    group.add_argument(
        "--recipe",
        choices=("stable", "noised_real"),
        default="stable",
        help="stable: the study's best, from a causal teacher, without a fake score; noised_real: "
        "data forcing that goes on from a student's own weights (default: %(default)s)",
    )
    group.add_argument(
        "--causal",
        default="",
        metavar="PATH",
        help="causal teacher (default: the checkpoint, the tiny world's, or one made first)",
    )
    group.add_argument(
        "--teacher",
        default="",
        metavar="PATH",
        help="bidirectional teacher (default: the checkpoint, or the transformer of --model)",
    )
    group.add_argument(
        "--fake",
        default="",
        metavar="PATH",
        help="fake score for noised_real (default: the teacher, warmed up on the student's clips)",
    )
    group.add_argument(
        "--causal-updates",
        type=positive,
        metavar="N",
        help="of the run that makes a causal teacher (default: its recipe's)",
    )
    group.add_argument(
        "--fake-updates",
        type=positive,
        default=100,
        metavar="N",
        help="of the fake score's warm-up (default: %(default)s)",
    )


def add_end_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measuring and export")
    group.add_argument(
        "--samples",
        type=positive,
        default=64,
        metavar="N",
        help="clips of each source that are generated and measured (default: %(default)s)",
    )
    group.add_argument(
        "--gpus",
        type=positive,
        default=1,
        metavar="N",
        help="processes that training is shared by, with a GPU each unless --device is cpu; with "
        "--dry-run GPUs that the budget is for (default: %(default)s)",
    )
    group.add_argument(
        "--push-to-hub", default="", metavar="REPOSITORY", help="also upload the export"
    )
    group.add_argument(
        "--private", action="store_true", help="with --push-to-hub: make a private repository"
    )


def request_of(args: argparse.Namespace) -> Request:
    from selfforcing_dfd.journey.request import Request

    def clips(frames: int, size: tuple[int, int], cut: bool) -> FileSource:
        asked = {**vars(args), "frames": frames, "size": size}
        if not cut:
            asked["cut"] = ""
        return file_source(argparse.Namespace(**asked))

    return Request(
        videos=args.source,
        out=args.out,
        clips=clips,
        model=args.model,
        method=args.recipe,
        causal=args.causal,
        teacher=args.teacher,
        fake=args.fake,
        causal_updates=args.causal_updates,
        fake_updates=args.fake_updates,
        samples=args.samples,
        size=args.size,
        device=args.device,
        workers=args.workers,
        gpus=args.gpus,
        push_to=args.push_to_hub,
        private=args.private,
        overrides=(*frames_setting(args.frames), *args.overrides),
    )


def frames_setting(frames: int | None) -> tuple[str, ...]:
    """The clips' length as a setting of the runs. UserError for one that no clip has."""
    if frames is None:
        return ()
    if frames < 1 or (frames - 1) % 4:
        lower = max(frames - 1, 0) // 4 * 4 + 1
        raise UserError(f"--frames is {frames}; want 1 + 4 n, such as {lower} or {lower + 4}")
    return (f"rollout.frames={1 + (frames - 1) // 4}",)
