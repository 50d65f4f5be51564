"""Options that several commands around data share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from selfforcing_dfd.cli.options import DTYPE_NAMES, MODEL_FPS, levels, positive, rate_or_all, size
from selfforcing_dfd.common import UserError, shipped

if TYPE_CHECKING:
    from selfforcing_dfd.data.pack import PackOptions
    from selfforcing_dfd.processes.engine import Engine

CODEC_FILE = "codec.safetensors"
PACK_HERE = "in this process, with all its threads"


def add_intake_options(
    parser: argparse.ArgumentParser, default_frames: int | None = None, default_cut: str = ""
) -> None:
    """Which clips are taken, and which of their frames.

    default_frames: None is the codec's. default_cut: empty for the first frames of each file.
    """
    default = "tiny 33, wan 81" if default_frames is None else "%(default)s"
    parser.add_argument(
        "--recursive", action="store_true", help="also clips in folders below SOURCE"
    )
    parser.add_argument(
        "--frames",
        type=positive,
        default=default_frames,
        metavar="N",
        help=f"video frames of each clip, as `pack` takes them (default: {default})",
    )
    parser.add_argument(
        "--fps",
        type=rate_or_all,
        default=MODEL_FPS,
        metavar="RATE",
        help="take the frames nearest to this rate by their time stamps; clips with fewer are left "
        "out; all: frames as they come (default: %(default)s, the models' own)",
    )
    parser.add_argument(
        "--cut",
        choices=("windows", "scenes"),
        default=default_cut,
        help="take every window of that many frames, one after the other; scenes: and none across "
        f"a cut (default: {default_cut or 'the first frames of each file'})",
    )


def add_caption_options(parser: argparse.ArgumentParser) -> None:
    """Where captions are."""
    parser.add_argument(
        "--captions",
        default=".txt",
        metavar="FILE|ENDING",
        help="a .csv or .jsonl with `video` and `caption`, a .txt with a line per clip, or the "
        "ending of the files beside the clips (default: %(default)s)",
    )
    parser.add_argument(
        "--levels",
        type=levels,
        default=(),
        metavar="LEVELS",
        help="several captions for each clip: short,medium,long or two of them, as columns of a "
        "list or in NAME.short.txt and so on; training chooses with data.captions",
    )


def add_form_options(parser: argparse.ArgumentParser) -> None:
    """To which form all clips are brought."""
    parser.add_argument(
        "--size",
        type=size,
        metavar="HxW",
        help="height x width of all clips (default: tiny 64x64, wan 480x832)",
    )
    parser.add_argument(
        "--resize",
        choices=("none", "cover", "stretch"),
        default="none",
        help="clips of another size: left out (none), scaled and cropped evenly (cover), "
        "stretched (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        metavar="N",
        help="threads that decode (default: %(default)s)",
    )


def add_engine_options(parser: argparse.ArgumentParser, processes: str) -> None:
    """Where the work on single clips is done. processes: what is so without --processes."""
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="local: processes of this machine; ray: a Ray cluster, pip install '.[ray]' (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--processes",
        type=positive,
        metavar="N",
        help="of the engine, of one thread each; the result does not depend on it (default: "
        f"{processes}; with ray as many as the cluster has room for)",
    )
    parser.add_argument(
        "--address",
        default="",
        metavar="HOST:PORT",
        help="with --engine ray: of a running cluster, or auto (default: one of this machine)",
    )


def engine_of(args: argparse.Namespace, processes: int) -> Engine:
    """The engine that options name. processes: of this machine, without --processes."""
    from selfforcing_dfd.processes.engine import Engine

    device = vars(args).get("device", "cpu")
    if args.engine == "local":
        if args.address:
            raise UserError("--address is of a Ray cluster; add --engine ray, or drop it")
        return Engine("local", args.processes or processes)
    if device.startswith("cuda:"):
        raise UserError(f"--device is {device}; each process of a cluster gets a GPU: use cuda")
    gpus = 1.0 if device == "cuda" else 0.0
    return Engine("ray", args.processes, args.address, gpus)


def add_codec_options(parser: argparse.ArgumentParser) -> None:
    """What turns video into latents."""
    parser.add_argument(
        "--codec", choices=("tiny", "wan"), required=True, help="what turns video into latents"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPE_NAMES,
        default="float32",
        help="in which the VAE computes (default: %(default)s)",
    )
    basis = parser.add_mutually_exclusive_group()
    basis.add_argument(
        "--fit", action="store_true", help="fit the tiny codec's basis to these clips"
    )
    basis.add_argument(
        "--basis",
        type=Path,
        default=shipped("assets/tiny") / CODEC_FILE,
        metavar="FILE",
        help="the tiny codec's basis (default: the shipped one)",
    )


def add_text_options(parser: argparse.ArgumentParser, default: str) -> None:
    """How captions become embeddings. default: the encoder that is taken unasked, in words."""
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
        "--device",
        default="cpu",
        help="cpu or cuda, where VAE and text encoder run (default: %(default)s)",
    )


def add_output_options(parser: argparse.ArgumentParser, resumes: bool = False) -> None:
    """How shards are written. resumes: an interrupted run is continued without being asked."""
    parser.add_argument(
        "--shard-size",
        type=positive,
        metavar="N",
        help="samples in each (default: 128, tiny 512, prompts 4096)",
    )
    parser.add_argument("--float32", action="store_true", help="store float32 instead of float16")
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first clip or prompt that cannot be used"
    )
    if not resumes:
        parser.add_argument(
            "--resume", action="store_true", help="continue an interrupted run after its last shard"
        )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace earlier shards in the same place"
    )


def pack_options(args: argparse.Namespace, shard_size: int = 0) -> PackOptions:
    """What `add_text_options` and `add_output_options` asked for.

    shard_size: samples in each shard where --shard-size is not given.
    """
    from selfforcing_dfd.data.encoders import default_negative_prompt
    from selfforcing_dfd.data.pack import PackOptions

    prompt = args.negative_prompt
    if prompt is None and args.text:
        prompt = default_negative_prompt(args.text)
    stored = "float32" if args.float32 else "float16"
    return PackOptions(
        shard_size=args.shard_size or shard_size,
        dtype=stored,
        negative_prompt=prompt,
        device=args.device,
        strict=args.strict,
        overwrite=args.overwrite,
        unfinished="resume" if args.resume else "keep",
    )
