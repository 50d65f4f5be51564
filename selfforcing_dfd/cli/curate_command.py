"""The command `curate`: steps from a folder of videos to training data, a function each."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from selfforcing_dfd.cli.curate_options import intake_of
from selfforcing_dfd.cli.curate_steps import MODEL_FRAMES, SET_STEPS
from selfforcing_dfd.cli.data_options import add_engine_options, add_intake_options, engine_of
from selfforcing_dfd.cli.options import Command, Run, positive
from selfforcing_dfd.common import UserError

if TYPE_CHECKING:
    from selfforcing_dfd.curate.caption import CaptionSummary
    from selfforcing_dfd.curate.captioners import Captioner

NUM_PRINTED = 20


def curate(parser: argparse.ArgumentParser) -> Run:
    """Prepare training data from videos, in steps: caption, embed, cluster, pick, pack.

    Each step has options of its own: selfforcing-dfd curate STEP --help. Killed at any moment, the
    same command goes on.
    """
    parser.add_argument("step", choices=tuple(STEPS), help="what to do")

    def run(args: argparse.Namespace) -> None:
        raise UserError(f"name the step first: selfforcing-dfd curate {args.step} ...")

    return run


def caption(parser: argparse.ArgumentParser) -> Run:
    """Write a short, a medium and a long caption for each clip, by a model behind HTTP.

    The model sees frames of the clip and writes all three in one reply. Any server with OpenAI's
    chat completions will do, such as vLLM. The table is for `pack --captions`. Killed at any
    moment, the same command goes on.
    """
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="folder of videos, or a list as for `pack`"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the table (default: SOURCE-captions.jsonl)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the table, and what a stop left of it"
    )
    add_model_options(parser)
    add_picture_options(parser)
    add_engine_options(parser, "1; a server's answer is waited for by --workers threads of each")

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.curate.caption import caption_clips
        from selfforcing_dfd.curate.intake import Looks

        source = args.source.resolve()
        name = source.name if source.is_dir() else source.stem
        out = args.out or source.with_name(f"{name}-captions.jsonl")
        summary = caption_clips(
            intake_of(args).clips(args.workers),
            _captioner(args),
            out,
            Looks(args.frames, args.fps, args.longest),
            seed=args.seed,
            num_workers=args.workers,
            engine=engine_of(args, 1),
            overwrite=args.overwrite,
        )
        _print_captions(summary)

    return run


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Who describes the clips."""
    parser.add_argument(
        "--url",
        default="http://localhost:8000/v1",
        help="the server, up to /v1 (default: %(default)s); a key is read from OPENAI_API_KEY",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="the model as the server calls it; `tiny` reads clips of the tiny world by itself",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the model (default: %(default)s)")
    parser.add_argument(
        "--workers",
        type=positive,
        default=16,
        metavar="N",
        help="clips that each process describes at once (default: %(default)s)",
    )


def add_picture_options(parser: argparse.ArgumentParser) -> None:
    """Which clips, and which of their frames are shown."""
    add_intake_options(parser, MODEL_FRAMES)
    parser.add_argument(
        "--pictures",
        type=positive,
        default=8,
        metavar="N",
        help="frames that the model sees, evenly spaced (default: %(default)s)",
    )
    parser.add_argument(
        "--longest",
        type=positive,
        default=512,
        metavar="PIXELS",
        help="longest side of these pictures (default: %(default)s)",
    )


STEPS: dict[str, Command] = {"caption": caption, **{step.__name__: step for step in SET_STEPS}}
"""Each has its own options, and its work in a module of `selfforcing_dfd.curate`."""


def _captioner(args: argparse.Namespace) -> Captioner:
    from selfforcing_dfd.curate.captioners import HttpCaptioner, TinyCaptioner

    if args.model is None:
        raise UserError(
            f"--model is not given; name a model of the server at {args.url}, or `tiny` for clips "
            "of the tiny world"
        )
    if args.model == "tiny":
        return TinyCaptioner()
    return HttpCaptioner(args.url, args.model, args.pictures)


def _print_captions(summary: CaptionSummary) -> None:
    from selfforcing_dfd.curate.caption import MOST_MADE_UP

    for name, reason in summary.left_out[:NUM_PRINTED]:
        print(f"left out {name}: {reason}")
    rest = len(summary.left_out) - NUM_PRINTED
    if rest > 0:
        print(f"left out {rest} more; {summary.table} states a `problem` for each")
    captioned = summary.num_captioned
    left_out = len(summary.left_out)
    print(f"{captioned + left_out} offered = {captioned} captioned + {left_out} left out")
    shares = [f"{level} {summary.share(level):.1%}" for level in summary.made_up]
    print(f"made up from another length: {', '.join(shares)}")
    if any(summary.share(level) > MOST_MADE_UP for level in summary.made_up):
        print(
            f"warning: more than {MOST_MADE_UP:.0%} of a length were not written by the model; "
            "look at some of its replies",
            file=sys.stderr,
        )
    print(f"{summary.table}: next, selfforcing-dfd pack SOURCE --captions {summary.table} ...")
