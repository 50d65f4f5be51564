"""The command `vbench`: videos for VBench's official tool, and its numbers back."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

from selfforcing_dfd.cli.options import Run
from selfforcing_dfd.common import UserError

IMAGE = "vbench:0.1.5"  # as docs/vbench/Dockerfile is built


def vbench(parser: argparse.ArgumentParser) -> Run:
    """Measure videos by VBench's official tool, which runs in an environment of its own.

    Writes a folder for its mode custom_input, with the program that calls it. With --docker or
    --python the tool is run; else run it yourself, and give the same command again. Its numbers
    are added to the file that `evaluate` wrote for the same videos.
    """
    parser.add_argument("videos", nargs="+", type=Path, metavar="PATH", help="videos, or folders")
    parser.add_argument(
        "--out", type=Path, default=Path("vbench"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument(
        "--into",
        type=Path,
        default=Path("evaluation.json"),
        metavar="FILE",
        help="what `evaluate` wrote for these videos (default: %(default)s)",
    )
    parser.add_argument(
        "--dimensions",
        metavar="NAME,...",
        help="default: the seven that need no prompt, with --images also the two of pictures",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="pictures that the videos begin with, each called as its video",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--docker",
        nargs="?",
        const=IMAGE,
        metavar="IMAGE",
        help=f"run the tool in this image (default: {IMAGE}, built from docs/vbench)",
    )
    where.add_argument(
        "--python", type=Path, metavar="FILE", help="run the tool with this Python, which has it"
    )

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.metrics.vbench import has_results

        if not is_written(args):
            write(args)
        command = command_of(args)
        if command:
            finished = subprocess.run(command, cwd=args.out, check=False)
            if finished.returncode:
                raise UserError(
                    f"VBench ended with {finished.returncode}; its own words are above. The same "
                    "command tries again"
                )
        if not has_results(args.out):
            print(f"wrote {args.out}; next, with VBench's own Python:")
            print(f"  cd {args.out} && python run_vbench.py")
            print("and this command again; or --docker, or --python FILE")
            return
        read(args)

    return run


def is_written(args: argparse.Namespace) -> bool:
    """Whether the folder is of these videos and dimensions, so that its results are too.

    UserError for results of other videos.
    """
    from selfforcing_dfd.common import sha256_of
    from selfforcing_dfd.metrics.files import find_videos
    from selfforcing_dfd.metrics.vbench import LAYOUT_FILE, has_results, read_layout

    if not (args.out / LAYOUT_FILE).is_file():
        return False
    layout = read_layout(args.out)
    hashes = [sha256_of(path) for path in find_videos(args.videos)]
    same = hashes == [entry["sha256"] for entry in layout["videos"]]
    same = same and layout["dimensions"] == dimensions_of(args)
    if not same and has_results(args.out):
        raise UserError(
            f"{args.out} has results of other videos or dimensions; remove it, or use another --out"
        )
    return same


def write(args: argparse.Namespace) -> None:
    from selfforcing_dfd.metrics.feature_files import prompts_of
    from selfforcing_dfd.metrics.files import find_videos
    from selfforcing_dfd.metrics.vbench import write_layout

    files = find_videos(args.videos)
    prompts, _ = prompts_of(files)
    write_layout(args.out, files, prompts, dimensions_of(args), args.images)


def dimensions_of(args: argparse.Namespace) -> list[str]:
    from selfforcing_dfd.metrics.vbench import OF_PICTURES, USUAL

    if args.dimensions:
        return [name.strip() for name in args.dimensions.split(",")]
    return list(USUAL + OF_PICTURES) if args.images else list(USUAL)


def command_of(args: argparse.Namespace) -> list[str]:
    """What runs the tool; nothing where nobody asked for it."""
    from selfforcing_dfd.metrics.vbench import PROGRAM_FILE

    if args.python:
        return [str(args.python.absolute()), PROGRAM_FILE]
    if not args.docker:
        return []
    place = f"{args.out.resolve()}:/data"
    own = ["--gpus", "all", "--volume", place, "--volume", "vbench-cache:/cache"]
    return ["docker", "run", "--rm", *own, args.docker]


def read(args: argparse.Namespace) -> None:
    """Add what the tool found to the evaluation's file, and print it."""
    import json

    from selfforcing_dfd.metrics.files import write_evaluation
    from selfforcing_dfd.metrics.vbench import add_results, read_layout, read_results

    if not args.into.is_file():
        raise UserError(
            f"{args.into} does not exist; measure the same videos first: selfforcing-dfd evaluate "
            f"... --out {args.into}"
        )
    results = read_results(args.out)
    content = json.loads(args.into.read_text(encoding="utf-8"))
    add_results(content, read_layout(args.out), results)
    write_evaluation(args.into, content)
    for name, value in results.values.items():
        print(f"{name:24}{value:>10.4f}")
    print(args.into)
