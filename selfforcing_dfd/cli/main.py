"""`python -m selfforcing_dfd COMMAND`: make, pack, merge, import and verify data, and more.

A command is one function: it adds its arguments to a parser and returns what to run. Heavy imports
belong into the latter, so that --help is immediate.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from selfforcing_dfd.cli import run_commands as commands

if TYPE_CHECKING:
    from selfforcing_dfd.data.encoders import TextEncoder, VideoCodec
    from selfforcing_dfd.data.pack import PackOptions, PackSummary
    from selfforcing_dfd.data.source import Source

Run = Callable[[argparse.Namespace], None]

CODEC_FILE = "codec.safetensors"
TINY_BASIS = Path(__file__).parents[2] / "assets" / "tiny" / CODEC_FILE
DTYPES = ("float32", "bfloat16", "float16")
NUM_PRINTED = 20


def clips(parser: argparse.ArgumentParser) -> Run:
    """Write clips of the tiny world, as .mp4 files with a caption beside each."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to write them")
    parser.add_argument(
        "--num", type=int, default=256, help="number of clips (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which clips (default: %(default)s)")
    parser.add_argument(
        "--level",
        choices=("short", "medium", "long"),
        default="short",
        help="how much a caption says",
    )

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.tiny import world

        world.write_clips(args.folder, args.num, args.seed, args.level)
        print(
            f"{args.folder}: {args.num} clips. Next: python -m selfforcing_dfd pack {args.folder} --codec tiny"
        )

    return run


def pack(parser: argparse.ArgumentParser) -> Run:
    """Encode videos with captions into webdataset shards; an interrupted run goes on with --resume."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="folder of .mp4 clips, or a list: .csv, .jsonl, .txt",
    )
    parser.add_argument(
        "--codec", choices=("tiny", "wan"), required=True, help="what turns video into latents"
    )
    _add_clip_arguments(parser)
    _add_text_arguments(parser, "default: umt5 with --codec wan, tiny with tiny")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="in which the VAE computes"
    )
    basis = parser.add_mutually_exclusive_group()
    basis.add_argument(
        "--fit", action="store_true", help="fit the tiny codec's basis to these clips"
    )
    basis.add_argument(
        "--basis",
        type=Path,
        default=TINY_BASIS,
        help="the tiny codec's basis (default: assets/tiny)",
    )
    _add_output_arguments(parser)
    parser.add_argument("--out", type=Path, help="where the shards go (default: SOURCE-shards)")
    parser.add_argument(
        "--part",
        type=_part,
        default=(1, 1),
        metavar="I/N",
        help="pack share I of N into OUT.part-I-of-N",
    )

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.data.pack import check_early, pack
        from selfforcing_dfd.data.sources.files import FileSource

        if args.size and (args.height or args.width):
            raise ValueError("--size says height and width already; leave out --height and --width")
        is_tiny = args.codec == "tiny"
        height, width = args.size or ((64, 64) if is_tiny else (480, 832))
        suffix = _caption_suffix(args.captions)
        source = FileSource(
            args.source.resolve(),
            args.frames or (33 if is_tiny else 81),
            (args.height or height, args.width or width),
            resize=args.resize,
            fps=args.fps,
            caption_suffix=suffix or ".txt",
            captions=None if suffix else Path(args.captions),
            recursive=args.recursive,
        )
        args.text = args.text or ("tiny" if is_tiny else "umt5")
        out = _out_folder(args, source.path)
        options = replace(
            _pack_options(args, 512 if is_tiny else 128),
            num_workers=args.workers,
            part=args.part,
            settings={"codec_dtype": args.dtype},
        )
        check_early(source, out, options)
        codec, attach = _load_codec(args, source)
        summary = pack(source, out, codec, _load_text(args), replace(options, attach=attach))
        _print_summary(summary, f", {CODEC_FILE}" if is_tiny else "")

    return run


def prompts(parser: argparse.ArgumentParser) -> Run:
    """Encode prompts without clips into shards, for Self-Forcing with DMD and for the teacher's
    trajectories.
    """
    parser.add_argument(
        "source", type=Path, metavar="FILE", help="text file, a prompt on each line"
    )
    _add_text_arguments(parser, "default: umt5")
    _add_output_arguments(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the shards go"
    )
    parser.add_argument(
        "--frames", type=int, default=81, metavar="N", help="video frames to generate (default: 81)"
    )
    parser.add_argument(
        "--size",
        type=_size,
        default=(480, 832),
        metavar="HxW",
        help="of the video (default: 480x832)",
    )

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.data.encoders import latent_shape
        from selfforcing_dfd.data.pack import check_early, pack
        from selfforcing_dfd.data.sources.prompts import PromptSource

        args.text = args.text or "umt5"
        source = PromptSource(args.source, latent_shape(args.frames, args.size))
        options = _pack_options(args, 4096)
        check_early(source, args.out, options)
        _print_summary(pack(source, args.out, None, _load_text(args), options))

    return run


def merge(parser: argparse.ArgumentParser) -> Run:
    """Put the folders that `pack --part` wrote together; shards are hard links where the file
    system can.
    """
    parser.add_argument(
        "parts", nargs="+", type=Path, metavar="PART", help="all N folders OUT.part-I-of-N"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace earlier shards in the same place"
    )

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.data.merge import merge

        _print_summary(merge(args.parts, args.out, args.overwrite))

    return run


def import_(parser: argparse.ArgumentParser) -> Run:
    """Turn latents of Self-Forcing, DFD or CausVid (LMDB) or of FastGen (webdataset) into shards."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="LMDB folder, folder of them, or folder of .tar files",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the shards go"
    )
    parser.add_argument(
        "--kind",
        choices=("auto", "lmdb", "fastgen"),
        default="auto",
        help="(default: what is there)",
    )
    parser.add_argument(
        "--step",
        type=int,
        default=-1,
        help="LMDB: which latent of a trajectory (default: the clean last)",
    )
    parser.add_argument(
        "--row-shape",
        type=_shape,
        metavar="FxCxHxW",
        help="LMDB: of a row, where latents_shape lacks it",
    )
    parser.add_argument(
        "--layout", choices=("cfhw", "fchw"), default="cfhw", help="FastGen: (default: %(default)s)"
    )
    parser.add_argument(
        "--negative-file", type=Path, metavar="FILE", help="FastGen: negative prompt's embedding"
    )
    _add_text_arguments(parser, "default: umt5 for LMDB, the stored embeddings for FastGen")
    _add_output_arguments(parser)

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.data.pack import check_early, pack
        from selfforcing_dfd.data.sources.imported import open_import

        source = open_import(
            args.source,
            args.kind,
            step=args.step,
            row_shape=args.row_shape,
            layout=args.layout,
            negative=args.negative_file,
        )
        args.text = args.text or (None if source.text_shape else "umt5")
        options = _pack_options(args, 128)
        check_early(source, args.out, options)
        text = _load_text(args) if args.text else None
        _print_summary(pack(source, args.out, None, text, options))

    return run


def verify(parser: argparse.ArgumentParser) -> Run:
    """Recompute the checksums of a shard folder and read every sample."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="shards with their index.json")

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.data.shards import ShardReader

        reader = ShardReader(args.folder)
        reader.verify()
        print(
            f"{args.folder}: {len(reader)} samples in {len(reader.index.shards)} shards, as packed"
        )

    return run


import_.__name__ = "import"  # which a def cannot be called
COMMANDS = (clips, pack, prompts, merge, import_, verify, *commands.COMMANDS)


def _add_clip_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recursive", action="store_true", help="also clips in folders below SOURCE"
    )
    parser.add_argument(
        "--captions",
        default=".txt",
        metavar="FILE|ENDING",
        help="a .csv or .jsonl with `video` and `caption`, a .txt with a line per clip, or the ending of the files "
        "beside the clips (default: .txt)",
    )
    parser.add_argument(
        "--frames",
        type=int,
        metavar="N",
        help="video frames of each clip (default: tiny 33, wan 81)",
    )
    parser.add_argument(
        "--size", type=_size, metavar="HxW", help="of all clips (default: tiny 64x64, wan 480x832)"
    )
    parser.add_argument("--height", type=int, metavar="H", help="of all clips, in place of --size")
    parser.add_argument("--width", type=int, metavar="W", help="of all clips, in place of --size")
    parser.add_argument(
        "--resize",
        choices=("none", "cover", "stretch"),
        default="none",
        help="clips of another size: left out (none), scaled and cropped evenly (cover), stretched (default: %(default)s)",
    )
    parser.add_argument(
        "--fps",
        type=_rate,
        help="take frames at this rate by time stamps, each the nearest; clips with fewer are left out (default: all frames)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        metavar="N",
        help="threads that decode (default: %(default)s)",
    )


def _add_text_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--text", choices=("tiny", "umt5"), help=f"what encodes captions ({default})"
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="diffusers folder of Wan2.1 with VAE and text encoder",
    )
    parser.add_argument(
        "--text-cache",
        type=Path,
        metavar="DIR",
        help="keeps umt5 embeddings here, for further runs",
    )
    parser.add_argument(
        "--negative-prompt",
        metavar="TEXT",
        help="also encoded (default: Wan's with umt5, none with tiny)",
    )
    parser.add_argument(
        "--device", default="cpu", help="cpu or cuda, where VAE and text encoder run (default: cpu)"
    )


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard-size",
        type=int,
        metavar="N",
        help="samples in each (default: 128, tiny 512, prompts 4096)",
    )
    parser.add_argument("--float32", action="store_true", help="store float32 instead of float16")
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first clip or prompt that cannot be used"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on where an interrupted run has complete shards"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace earlier shards in the same place"
    )


def _size(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+x\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r}, want HEIGHTxWIDTH such as 64x64")
    height, width = text.split("x")
    return int(height), int(width)


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(x\d+){3,4}", text):
        raise argparse.ArgumentTypeError(f"{text!r}, want [S x] F x C x H x W such as 21x16x60x104")
    return tuple(map(int, text.split("x")))


def _part(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+/\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r}, want I/N such as 1/4")
    number, count = text.split("/")
    return int(number), int(count)


def _rate(text: str) -> Fraction:
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}, want frames a second such as 16 or 24000/1001"
        ) from error
    if rate <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}, want more than 0 frames a second")
    return rate


def _caption_suffix(captions: str) -> str | None:
    """`--captions` as the ending of files beside the clips; None if it names a file."""
    is_file = Path(captions).suffix in (".csv", ".jsonl", ".txt") and not captions.startswith(".")
    return None if is_file or Path(captions).is_file() else captions


def _out_folder(args: argparse.Namespace, source: Path) -> Path:
    out = args.out or source.with_name(
        (source.name if source.is_dir() else source.stem) + "-shards"
    )
    number, count = args.part
    return out if count == 1 else out.with_name(f"{out.name}.part-{number}-of-{count}")


def _pack_options(args: argparse.Namespace, shard_size: int) -> PackOptions:
    """What `_add_text_arguments` and `_add_output_arguments` asked for."""
    from selfforcing_dfd.data.encoders import default_negative_prompt
    from selfforcing_dfd.data.pack import PackOptions

    prompt = args.negative_prompt
    if prompt is None and args.text:
        prompt = default_negative_prompt(args.text)
    return PackOptions(
        shard_size=args.shard_size or shard_size,
        dtype="float32" if args.float32 else "float16",
        negative_prompt=prompt,
        device=args.device,
        strict=args.strict,
        overwrite=args.overwrite,
        unfinished="resume" if args.resume else "keep",
    )


def _load_codec(
    args: argparse.Namespace, source: Source
) -> tuple[VideoCodec, Callable[[Path], None] | None]:
    """The codec, and what writes its basis beside the shards."""
    from selfforcing_dfd.data import encoders

    if args.codec == "wan":
        return encoders.load_wan_codec(args.model, args.device, args.dtype), None
    if args.fit:
        codec = encoders.fit_tiny_codec(source)
    else:
        codec = encoders.load_tiny_codec(args.basis)
    return codec.to(args.device), lambda out: codec.save(out / CODEC_FILE)


def _load_text(args: argparse.Namespace) -> TextEncoder:
    from selfforcing_dfd.data.encoders import load_text

    return load_text(args.text, args.model, args.device, args.text_cache)


def _print_summary(summary: PackSummary, more: str = "") -> None:
    for refusal in summary.refused[:NUM_PRINTED]:
        print(f"left out {refusal.file}: {refusal.reason}")
    if (rest := len(summary.refused) - NUM_PRINTED) > 0:
        print(
            f"left out {rest} more; all of them are in {summary.folder / 'index.json'}, under refused"
        )
    if summary.skipped:
        print(
            f"skipped {len(summary.skipped)} files that are not .mp4: "
            f"{', '.join(summary.skipped[:NUM_PRINTED])}; videos in other formats can be named in "
            "a list (.txt or .csv)"
        )
    left_out = f", {len(summary.refused)} clips left out" if summary.refused else ""
    print(
        f"{summary.folder}: {summary.num_samples} samples, {summary.num_shards} shards{more}{left_out}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m selfforcing_dfd", description=__doc__.split("\n")[0]
    )
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
    except KeyboardInterrupt:
        again = (
            "; the same command with --resume goes on with the shards that are complete"
            if "resume" in args
            else ""
        )
        print(f"interrupted{again}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
