"""Commands around data: clips, pack, prompts, import, merge, invert."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from selfforcing_dfd.cli.data_options import (
    CODEC_FILE,
    PACK_HERE,
    add_caption_options,
    add_codec_options,
    add_engine_options,
    add_form_options,
    add_intake_options,
    add_output_options,
    add_text_options,
    engine_of,
    pack_options,
)
from selfforcing_dfd.cli.options import Run, part, positive, shape, size

if TYPE_CHECKING:
    from selfforcing_dfd.codecs.protocol import TextEncoder, VideoCodec
    from selfforcing_dfd.data.pack import PackSummary
    from selfforcing_dfd.data.sources.files import FileSource

NUM_PRINTED = 20
DEFAULTS: dict[str, dict[str, Any]] = {
    "tiny": {"size": (64, 64), "frames": 33, "text": "tiny", "shard_size": 512},
    "wan": {"size": (480, 832), "frames": 81, "text": "umt5", "shard_size": 128},
}
"""What `pack` takes for options that are not given, by its codec."""


def clips(parser: argparse.ArgumentParser) -> Run:
    """Write clips of the tiny world, as .mp4 files with a caption beside each."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to write them")
    parser.add_argument(
        "--num", type=positive, default=256, metavar="N", help="clips (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which clips (default: %(default)s)")
    parser.add_argument(
        "--level",
        choices=("short", "medium", "long", "mixed", "all"),
        default="short",
        help="how much a caption says; all: three captions for each clip (default: %(default)s)",
    )

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.tiny import world

        world.write_clips(args.folder, args.num, args.seed, args.level)
        levels = " --levels short,medium,long" if args.level == "all" else ""
        following = f"selfforcing-dfd pack {args.folder} --codec tiny{levels}"
        print(f"{args.folder}: {args.num} clips. Next: {following}")

    return run


def pack(parser: argparse.ArgumentParser) -> Run:
    """Encode videos with captions into webdataset shards."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="folder of videos, or a list: .csv, .jsonl, .txt",
    )
    add_codec_options(parser)
    add_intake_options(parser)
    add_caption_options(parser)
    add_form_options(parser)
    add_engine_options(parser, PACK_HERE)
    add_text_options(parser, "default: umt5 with --codec wan, tiny with tiny")
    add_output_options(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the shards go (default: SOURCE-shards)"
    )
    parser.add_argument(
        "--part",
        type=part,
        default=(1, 1),
        metavar="I/N",
        help="pack share I of N into OUT.part-I-of-N",
    )

    def run(args: argparse.Namespace) -> None:
        set_codec_defaults(args)
        source = file_source(args)
        summary = pack_files(args, source, _out_folder(args, source.path))
        if args.cut:
            _print_frames(source)
        print_summary(summary, f", {CODEC_FILE}" if args.codec == "tiny" else "")

    return run


def set_codec_defaults(args: argparse.Namespace) -> None:
    """Give options that are not given the values that fit the codec."""
    for name, value in DEFAULTS[args.codec].items():
        if vars(args)[name] is None:
            setattr(args, name, value)


def pack_files(
    args: argparse.Namespace,
    source: FileSource,
    out: Path,
    settings: Mapping[str, str] = MappingProxyType({}),
    more: Callable[[Path], None] | None = None,
) -> PackSummary:
    """Pack video files as the options say.

    settings: more that a resumed run must share. more: writes further files into the folder.
    """
    from selfforcing_dfd.data.elsewhere import Elsewhere
    from selfforcing_dfd.data.pack import check_early, pack

    options = replace(
        pack_options(args),
        num_workers=args.workers,
        part=args.part,
        settings={"codec_dtype": args.dtype, **settings},
    )
    check_early(source, out, options)
    codec, save_basis, load_again = _load_codec(args, source)
    writers = [each for each in (save_basis, more) if each is not None]

    def attach(folder: Path) -> None:
        for write in writers:
            write(folder)

    is_here = args.engine == "local" and args.processes is None
    elsewhere = None if is_here else Elsewhere(engine_of(args, 1), load_again)
    options = replace(options, attach=attach, elsewhere=elsewhere)
    return pack(source, out, codec, _load_text(args), options)


def prompts(parser: argparse.ArgumentParser) -> Run:
    """Encode prompts without clips into shards, which is all that DMD needs."""
    parser.add_argument(
        "source", type=Path, metavar="FILE", help="text file, a prompt on each line"
    )
    add_text_options(parser, "default: umt5")
    add_output_options(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the shards go"
    )
    parser.add_argument(
        "--frames",
        type=positive,
        default=81,
        metavar="N",
        help="video frames to generate (default: %(default)s)",
    )
    parser.add_argument(
        "--size",
        type=size,
        default=(480, 832),
        metavar="HxW",
        help="height x width of the video (default: 480x832)",
    )

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.data.encoders import latent_shape
        from selfforcing_dfd.data.pack import check_early, pack
        from selfforcing_dfd.data.sources.prompts import PromptSource

        args.text = args.text or "umt5"
        source = PromptSource(args.source, latent_shape(args.frames, args.size))
        options = pack_options(args, 4096)
        check_early(source, args.out, options)
        print_summary(pack(source, args.out, None, _load_text(args), options))

    return run


def import_(parser: argparse.ArgumentParser) -> Run:
    """Turn latents of Self-Forcing, DFD, CausVid (LMDB) or FastGen (webdataset) into shards."""
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
        help="what SOURCE is (default: what is found in it)",
    )
    parser.add_argument(
        "--step",
        type=int,
        default=-1,
        metavar="N",
        help="LMDB: which latent of a trajectory (default: the clean last one)",
    )
    parser.add_argument(
        "--row-shape",
        type=shape,
        metavar="FxCxHxW",
        help="LMDB: of a row, where latents_shape lacks it",
    )
    parser.add_argument(
        "--layout",
        choices=("cfhw", "fchw"),
        default="cfhw",
        help="FastGen: order of the axes (default: %(default)s)",
    )
    parser.add_argument(
        "--negative-file", type=Path, metavar="FILE", help="FastGen: negative prompt's embedding"
    )
    add_text_options(parser, "default: umt5 for LMDB, the stored embeddings for FastGen")
    add_output_options(parser)

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
        if args.text is None and not source.text_shape:
            args.text = "umt5"
        options = pack_options(args, 128)
        check_early(source, args.out, options)
        text = _load_text(args) if args.text else None
        print_summary(pack(source, args.out, None, text, options))

    return run


def merge(parser: argparse.ArgumentParser) -> Run:
    """Put the folders that `pack --part` wrote together."""
    parser.add_argument(
        "parts", nargs="+", type=Path, metavar="PART", help="all N folders OUT.part-I-of-N"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace earlier shards in the same place"
    )

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.data.merge import merge

        print_summary(merge(args.parts, args.out, args.overwrite))

    return run


def invert(parser: argparse.ArgumentParser) -> Run:
    """Store with every sample the noise to which the teacher's ODE maps it, for `inversion`."""
    parser.add_argument(
        "folder",
        type=Path,
        metavar="FOLDER",
        help="shards with their index.json; replaced as a whole",
    )
    parser.add_argument(
        "--config", required=True, help="names the teacher: its model section and weights.teacher"
    )
    parser.add_argument(
        "--steps",
        type=positive,
        default=12,
        metavar="N",
        help="of the ODE solver, two network calls each (default: %(default)s)",
    )

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.data.noise import store_noise
        from selfforcing_dfd.stages import load_config
        from selfforcing_dfd.training.inversion import build_inversion

        config = load_config(args.config)
        inversion = build_inversion(config, args.steps)
        summary = store_noise(
            args.folder,
            inversion.invert,
            noise_fingerprint=inversion.fingerprint,
            captions=config.data.captions,
        )
        print(f"{summary.folder}: {summary.num_samples} samples now have their noise")

    return run


def file_source(args: argparse.Namespace, chosen: Sequence[str] | None = None) -> FileSource:
    """The clips that options name. chosen: names of those that are taken; None for all."""
    from selfforcing_dfd.data.sources.files import FileSource
    from selfforcing_dfd.metrics.scenes import scene_finder

    suffix, captions = captions_named(args.captions)
    return FileSource(
        args.source.resolve(),
        args.frames,
        args.size,
        resize=args.resize,
        fps=args.fps,
        caption_suffix=suffix,
        captions=captions,
        recursive=args.recursive,
        levels=args.levels,
        cut=scene_finder(args.cut, args.fps),
        cut_name=args.cut,
        num_workers=args.workers,
        chosen=chosen,
    )


def captions_named(text: str) -> tuple[str, Path | None]:
    """Of --captions: the ending of files beside clips, and the file if it names one."""
    path = Path(text)
    is_ending = text.startswith(".") or path.suffix not in (".csv", ".jsonl", ".txt")
    if is_ending and not path.is_file():
        return text, None
    return ".txt", path


def _out_folder(args: argparse.Namespace, source: Path) -> Path:
    name = source.name if source.is_dir() else source.stem
    out: Path = args.out or source.with_name(f"{name}-shards")
    number, count = args.part
    return out if count == 1 else out.with_name(f"{out.name}.part-{number}-of-{count}")


def _load_codec(
    args: argparse.Namespace, source: FileSource
) -> tuple[VideoCodec, Callable[[Path], None] | None, Callable[[], VideoCodec]]:
    """The codec, what writes its basis beside the shards, and what loads it elsewhere."""
    from selfforcing_dfd.data import encoders

    if args.codec == "wan":
        load = partial(encoders.load_wan_codec, args.model, args.device, args.dtype)
        return load(), None, load
    if args.fit:
        codec = encoders.fit_tiny_codec(source.read_video, len(source.clips))
    else:
        codec = encoders.load_tiny_codec(args.basis)
    bases = (codec.first.numpy(), codec.rest.numpy(), codec.scale)
    load_again = partial(encoders.tiny_codec_of, *bases, args.device)
    return codec.to(args.device), lambda out: codec.save(out / CODEC_FILE), load_again


def _load_text(args: argparse.Namespace) -> TextEncoder:
    from selfforcing_dfd.data.encoders import load_text

    return load_text(args.text, args.model, args.device, args.text_cache)


def _print_frames(source: FileSource) -> None:
    """What became of the frames of files that were cut."""
    frames = source.about["frames"]
    offered = frames["offered"]
    used = frames["in_windows"]
    windows = used // source.num_video_frames
    print(
        f"{source.num_files} files with {offered} frames = {used} in {windows} windows + "
        f"{offered - used} left over at the ends of files and scenes"
    )


def print_summary(summary: PackSummary, more: str = "") -> None:
    """What was packed, and what was not."""
    for refusal in summary.refused[:NUM_PRINTED]:
        print(f"left out {refusal.file}: {refusal.reason}")
    rest = len(summary.refused) - NUM_PRINTED
    if rest > 0:
        print(f"left out {rest} more; {summary.folder / 'index.json'} lists all under `refused`")
    if summary.skipped:
        names = ", ".join(summary.skipped[:NUM_PRINTED])
        print(
            f"skipped {len(summary.skipped)} files that are no videos by their endings: {names}; a "
            "list (.txt or .csv) may name any file"
        )
    if summary.longer:
        print(
            f"{summary.longer} files are long enough for more samples; {summary.frames_left} of "
            "their frames are not used, and would be with --cut windows or --cut scenes"
        )
    print(summary.account)
    left_out = f", {len(summary.refused)} clips left out" if summary.refused else ""
    counts = f"{summary.num_samples} samples, {summary.num_shards} shards"
    print(f"{summary.folder}: {counts}{more}{left_out}")
