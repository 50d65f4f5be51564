"""The command `vbench`: videos for VBench's official tool, and its numbers back."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from selfforcing_dfd.cli.options import Run
from selfforcing_dfd.common import UserError

if TYPE_CHECKING:
    from selfforcing_dfd.protocol.prepared import Prepared

IMAGE = "vbench:0.1.5"  # as docs/vbench/Dockerfile is built


def vbench(parser: argparse.ArgumentParser) -> Run:
    """Measure videos by VBench's official tool, which runs in an environment of its own.

    Writes a folder for its mode custom_input, with the program that calls it. With --docker or
    --python the tool is run; else run it yourself, and give the same command again. Its numbers
    are added to the file that `evaluate` wrote for the same videos. With --protocol the videos are
    those of all its methods, and its report has the numbers.
    """
    parser.add_argument("videos", nargs="*", type=Path, metavar="PATH", help="videos, or folders")
    parser.add_argument(
        "--protocol", metavar="NAME", help="in place of videos: those that this protocol has made"
    )
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
    parser.set_defaults(prompts=[])  # of --protocol; other videos have theirs beside them
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
        if bool(args.videos) == bool(args.protocol):
            raise UserError("want videos or --protocol, and not both")
        if args.protocol:
            run_for_protocol(args)
        elif has_run(args):
            read(args)

    return run


def has_run(args: argparse.Namespace) -> bool:
    """Write what the tool reads, and run it where that is asked for; whether it has results."""
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
    if has_results(args.out):
        return True
    print(f"wrote {args.out}; next, with VBench's own Python:")
    print(f"  cd {args.out} && python run_vbench.py")
    print("and this command again; or --docker, or --python FILE")
    return False


def run_for_protocol(args: argparse.Namespace) -> None:
    """The tool for every method whose videos are complete. UserError where none is."""
    from selfforcing_dfd.metrics.vbench import read_results
    from selfforcing_dfd.protocol.prepared import prepare

    prepared = prepare(args.protocol)
    done = 0
    for method in prepared.protocol.methods:
        cells = prepared.cells(method)
        files = [prepared.video(cell) for cell in cells]
        absent = [file for file in files if not file.exists()]
        if absent or not files:
            why = f"{absent[0]} is not there" if absent else prepared.not_run.get(method, "")
            print(f"{method}: left out, {why}")
            continue
        own = argparse.Namespace(**vars(args))
        own.videos = files
        own.prompts = [cell.prompt.text for cell in cells]
        own.out = prepared.folder.vbench(method)
        own.images = args.images or given_pictures(prepared, method)
        if has_run(own):
            read_results(own.out)
        done += 1
    if not done:
        raise UserError(
            f"no method of {args.protocol} has all its videos; make them first: selfforcing-dfd "
            f"protocol {args.protocol}"
        )
    print(f"selfforcing-dfd protocol {args.protocol}   # reports what the tool has found")


def given_pictures(prepared: Prepared, method: str) -> Path | None:
    """A folder of the pictures that videos begin with, each called as its video; None for none."""
    from selfforcing_dfd.common import find_file
    from selfforcing_dfd.metrics.vbench import copy

    cells = prepared.cells(method)
    if not all(cell.prompt.image for cell in cells):
        return None
    folder = prepared.folder.vbench(method) / "given"
    for cell in cells:
        picture = find_file(cell.prompt.image)
        copy(picture, folder / f"{prepared.video(cell).stem}{picture.suffix}")
    return folder


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
    prompts = args.prompts or prompts_of(files)[0]
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
