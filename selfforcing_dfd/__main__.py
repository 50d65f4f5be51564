"""`python -m selfforcing_dfd COMMAND`: make clips, pack them into shards, verify shards.

A command is one function: it adds its arguments to a parser and returns what to run. Heavy imports belong into the
latter, so that --help is immediate.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from selfforcing_dfd import commands

if TYPE_CHECKING:
    from selfforcing_dfd.tiny.codec import TinyCodec

Run = Callable[[argparse.Namespace], None]

CODEC_FILE = "codec.safetensors"
TINY_BASIS = Path(__file__).parents[1] / "assets" / "tiny" / CODEC_FILE
MAX_CLIPS_TO_FIT = 64  # 33,000 blocks of 4 x 8 x 8 pixels at the default size: plenty for a basis of 16


def clips(parser: argparse.ArgumentParser) -> Run:
    """Write clips of the tiny world, as .mp4 files with a caption beside each."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to write them")
    parser.add_argument("--num", type=int, default=256, help="number of clips (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which clips (default: %(default)s)")
    parser.add_argument("--level", choices=("short", "medium", "long"), default="short", help="how much a caption says")

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.tiny import world

        world.write_clips(args.folder, args.num, args.seed, args.level)
        print(f"{args.folder}: {args.num} clips. Next: python -m selfforcing_dfd pack {args.folder} --codec tiny")

    return run


def pack(parser: argparse.ArgumentParser) -> Run:
    """Encode a folder of .mp4 clips with captions beside them into webdataset shards."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="clips: NAME.mp4 with NAME.txt beside each")
    parser.add_argument("--codec", choices=("tiny",), required=True, help="what turns video into latents")
    basis = parser.add_mutually_exclusive_group()
    basis.add_argument("--fit", action="store_true", help="fit the codec's basis to these clips")
    basis.add_argument("--basis", type=Path, default=TINY_BASIS, help="the codec's basis (default: assets/tiny)")
    parser.add_argument("--out", type=Path, help="where the shards go (default: FOLDER-shards)")
    parser.add_argument("--frames", type=int, default=33, help="video frames of each clip (default: %(default)s)")
    parser.add_argument("--size", type=_size, default=(64, 64), metavar="HxW", help="of all clips (default: 64x64)")
    parser.add_argument("--captions", default=".txt", metavar="ENDING", help="of the caption files (default: .txt)")
    parser.add_argument("--shard-size", type=int, default=512, help="samples per shard (default: %(default)s)")
    parser.add_argument("--float32", action="store_true", help="store float32 instead of float16")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier shards in the same place")

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.data.pack import pack
        from selfforcing_dfd.tiny.text import TinyText

        folder = args.folder.resolve()
        codec = _fit_tiny_codec(folder, args.frames, args.size) if args.fit else _load_tiny_codec(args.basis)
        summary = pack(
            folder,
            args.out or folder.with_name(folder.name + "-shards"),
            codec,
            TinyText(),
            num_video_frames=args.frames,
            video_size=args.size,
            caption_suffix=args.captions,
            shard_size=args.shard_size,
            dtype="float32" if args.float32 else "float16",
            overwrite=args.overwrite,
            attach=lambda out: codec.save(out / CODEC_FILE),
        )
        for refusal in summary.refused:
            print(f"left out {refusal.file}: {refusal.reason}")
        print(f"{summary.folder}: {summary.num_samples} samples, {summary.num_shards} shards, {CODEC_FILE}")

    return run


def verify(parser: argparse.ArgumentParser) -> Run:
    """Recompute the checksums of a shard folder and read every sample."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="shards with their index.json")

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.data.shards import ShardReader

        reader = ShardReader(args.folder)
        reader.verify()
        print(f"{args.folder}: {len(reader)} samples in {len(reader.index.shards)} shards, as packed")

    return run


COMMANDS = (clips, pack, verify, *commands.COMMANDS)


def _size(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+x\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r}, want HEIGHTxWIDTH such as 64x64")
    height, width = text.split("x")
    return int(height), int(width)


def _load_tiny_codec(path: Path) -> TinyCodec:
    from selfforcing_dfd.tiny.codec import TinyCodec

    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no codec basis; name one with --basis FILE or fit one to the clips with --fit"
        )
    return TinyCodec.load(path)


def _fit_tiny_codec(folder: Path, num_video_frames: int, video_size: tuple[int, int]) -> TinyCodec:
    """Fit to at most MAX_CLIPS_TO_FIT clips, evenly chosen; the unusable ones are left to the packer to report."""
    import torch

    from selfforcing_dfd.data.pack import find_clips
    from selfforcing_dfd.data.video import ClipError, read_video
    from selfforcing_dfd.tiny.codec import TinyCodec

    paths = find_clips(folder)
    videos, problems = [], []
    for path in paths[:: math.ceil(len(paths) / MAX_CLIPS_TO_FIT)]:
        try:
            videos.append(read_video(path, num_video_frames, video_size))
        except ClipError as error:
            problems.append(f"\n  {error}")
    if not videos:
        raise ValueError(f"{folder}: no clip to fit the codec to; the first tried:{''.join(problems[:5])}")
    return TinyCodec.fit(torch.stack(videos).float() / 255)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m selfforcing_dfd", description=__doc__.split("\n")[0])
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        about = command.__doc__
        subparser = commands.add_parser(command.__name__, help=about, description=about)
        subparser.set_defaults(run=command(subparser))
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        if args.traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
