"""Commands around weights: convert, export."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from selfforcing_dfd.cli.options import DTYPE_NAMES, Run, add_pass_options

if TYPE_CHECKING:
    from selfforcing_dfd.weights.write import Summary


def convert(parser: argparse.ArgumentParser) -> Run:
    """Turn a transformer's weights into another format, bit for bit."""
    _add_places(parser)
    _add_what_source_lacks(parser)
    parser.add_argument(
        "--drop-gan-heads", action="store_true", help="leave a Self-Forcing critic's GAN heads out"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier export in the same place"
    )

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.common import DTYPES
        from selfforcing_dfd.weights.recipes import asked_settings
        from selfforcing_dfd.weights.write import convert, parse_bytes

        done = convert(
            args.source,
            args.destination,
            args.to,
            entry=args.entry,
            dtype=DTYPES.get(args.dtype),
            max_shard_bytes=parse_bytes(args.max_shard_size),
            overwrite=args.overwrite,
            role=args.role,
            recipe=asked_settings(
                args.ladder,
                args.first_ladder,
                context=args.context,
                shift=args.shift,
                chunk_frames=args.chunk_frames,
                frames=args.frames,
                sink=args.sink,
                window=args.window,
            ),
            head_dim=args.head_dim,
            drop_gan_heads=args.drop_gan_heads,
            progress=True,
        )
        _print_converted(done)

    return run


def _add_places(parser: argparse.ArgumentParser) -> None:
    """Source, destination and what is written."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="diffusers or Wan folder, .pt or .safetensors file, or a training checkpoint",
    )
    parser.add_argument(
        "destination", type=Path, metavar="DST", help="folder (diffusers, wan) or file to write"
    )
    parser.add_argument(
        "--to",
        choices=("diffusers", "wan", "self-forcing", "single-file"),
        required=True,
        help="the format to write",
    )
    parser.add_argument(
        "--entry",
        default="",
        metavar="NAME",
        help="model of a file with several (default: the first of generator_ema, generator, model "
        "and ema that is there)",
    )
    parser.add_argument(
        "--dtype",
        choices=("keep", *DTYPE_NAMES),
        default="keep",
        help="of the tensors written (default: %(default)s)",
    )
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="BYTES",
        help="of each file in a folder (default: %(default)s)",
    )


def _add_what_source_lacks(parser: argparse.ArgumentParser) -> None:
    """Role, heads and recipe, for sources that do not state them."""
    parser.add_argument(
        "--role",
        choices=(
            "teacher",
            "causal_teacher",
            "bidirectional_student",
            "causal_student",
            "fake_score",
        ),
        help="what the weights are, where SRC does not state it",
    )
    parser.add_argument(
        "--head-dim",
        type=int,
        default=0,
        metavar="N",
        help="values of an attention head, where SRC does not state them (default: Wan's 128)",
    )
    _add_recipe_options(
        parser.add_argument_group(
            "recipe of a student, where SRC states none or another one (counts in latent frames)"
        )
    )


def _print_converted(done: Summary) -> None:
    others = f" (also there: {', '.join(done.entries[1:])})" if done.entries[1:] else ""
    counts = f"{done.num_tensors} tensors, {done.num_parameters:,} parameters"
    print(f"read {done.format} {done.source}{others}: {counts}")
    print(f"wrote {done.destination}: {done.num_bytes / 1e6:,.1f} MB in {done.num_files} files")
    if done.role is not None:
        return
    taken = "the export does not state it either"
    if done.destination.is_dir():
        taken = "readers take the export for a bidirectional teacher"
    print(f"the source does not state its role, and {taken}; --role ROLE notes it")


def _add_recipe_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--ladder", metavar="T,T,...", help="timesteps before the shift, from 1000")
    add_pass_options(group)
    group.add_argument("--shift", type=float, metavar="S", help="of the ladder")
    group.add_argument("--chunk-frames", type=int, metavar="N", help="of one chunk")
    group.add_argument("--frames", type=int, metavar="N", help="of a training clip")
    group.add_argument("--sink", type=int, metavar="N", help="at the start, always seen")
    group.add_argument(
        "--window", type=int, metavar="N", help="of history and current chunk; 0 is all of the clip"
    )


def export(parser: argparse.ArgumentParser) -> Run:
    """Write a run's student as a diffusers pipeline that others can use, with a model card."""
    parser.add_argument(
        "folder", type=Path, metavar="RUN", help="folder of a finished run, or of one of its arms"
    )
    parser.add_argument("destination", type=Path, metavar="DST", help="folder to write")
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="diffusers folder of Wan2.1: VAE, text encoder, tokenizer (default: the student is of "
        "the tiny world, whose codec comes with the run)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPE_NAMES,
        default="float32",
        help="of the weights (default: %(default)s)",
    )
    parser.add_argument(
        "--base-model", default="", metavar="NAME", help="what the model card names as the origin"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="write into a folder that is not empty"
    )

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.common import DTYPES
        from selfforcing_dfd.streaming.export import export_run

        export_run(
            args.folder,
            args.model,
            args.destination,
            DTYPES[args.dtype],
            args.base_model,
            args.overwrite,
        )
        following = f"selfforcing-dfd stream --model {args.destination} --prompt '...'"
        if args.model is None:
            weights = args.destination / "transformer" / "diffusion_pytorch_model.safetensors"
            following = f"selfforcing-dfd stream --weights {weights}"
        print(f"wrote {args.destination}; try it: {following}")

    return run
