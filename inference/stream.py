"""Stream video without end: `python inference/stream.py --prompt "a disc moves"`.

Without a model, a run or a checkpoint it shows the tiny world, whose student comes with the
repository. Real Wan2.1:

    hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir wan
    hf download gdhe17/Self-Forcing checkpoints/self_forcing_dmd.pt --local-dir wan
    python inference/stream.py --model wan --checkpoint wan/checkpoints/self_forcing_dmd.pt --prompt
      "a red fox ..."
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Generate video chunk by chunk, in bounded memory, for as long as asked."
    )
    what = parser.add_argument_group("what to show")
    what.add_argument(
        "--prompt", help="caption of the stream (tiny world: 'a disc moves', square, cross)"
    )
    what.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="schedule, lines `at: prompt`; at: a chunk or seconds (3.5s)",
    )
    what.add_argument(
        "--chunks",
        type=count_of_chunks,
        default=20,
        metavar="N|inf",
        help="how many (default: %(default)s)",
    )
    what.add_argument(
        "--seed", type=int, default=0, help="another seed, another video (default: %(default)s)"
    )
    what.add_argument("--image", type=Path, metavar="FILE", help="begin with this picture")
    what.add_argument("--video", type=Path, metavar="FILE", help="go on from this clip")

    model = parser.add_argument_group("with which model")
    model.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="Wan2.1 as a diffusers folder, or an export of ours",
    )
    model.add_argument(
        "--run", type=Path, metavar="DIR", help="folder of a finished run, or of one of its arms"
    )
    model.add_argument(
        "--checkpoint",
        default="",
        metavar="FILE",
        help="a student's weights; any format with --model",
    )
    model.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)"
    )
    model.add_argument(
        "--dtype", help="with --model: float32, bfloat16, float16 (default: bfloat16 on a GPU)"
    )
    model.add_argument(
        "--vae-device", metavar="DEVICE", help="with --model: decode here (default: as --device)"
    )
    model.add_argument("--height", type=int, metavar="PIXELS", help="with --model (default: 480)")
    model.add_argument("--width", type=int, metavar="PIXELS", help="with --model (default: 832)")
    model.add_argument(
        "--attention",
        default="auto",
        help="auto, or force sdpa, fa2, fa3 or fa4 (default: %(default)s)",
    )
    model.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the blocks: slow to start, faster afterwards",
    )

    past = parser.add_argument_group("how far it looks back (latent frames)")
    past.add_argument(
        "--settings",
        metavar="NAME",
        help="file in configs/stream (default: tiny, or default for other models)",
    )
    past.add_argument(
        "--window", type=int, metavar="N", help="history and current chunk, the sink not counted"
    )
    past.add_argument(
        "--sink", type=int, metavar="N", help="first latent frames that are never forgotten"
    )
    past.add_argument("--positions", help="absolute, sink_relative or window_relative")
    past.add_argument(
        "--on-prompt",
        metavar="MODE",
        help="what a new prompt does to the past: recache, flush or keep",
    )

    out = parser.add_argument_group("where it goes")
    out.add_argument(
        "--out",
        default="stream.mp4",
        metavar="FILE|-",
        help=".mp4, .y4m; - is y4m on stdout (default: %(default)s)",
    )
    out.add_argument("--overwrite", action="store_true", help="replace an existing file")
    out.add_argument("--fps", type=float, default=16, help="of the video (default: %(default)s)")
    out.add_argument("--serve", action="store_true", help="a web page instead of a file")
    out.add_argument(
        "--port", type=int, default=8000, help="of the web page (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def count_of_chunks(text: str) -> float:
    """A positive number of chunks, or `inf`."""
    if text == "inf":
        return math.inf
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a positive number nor inf")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    from selfforcing_dfd.common import tune_allocator

    tune_allocator()
    from selfforcing_dfd.live.play import USER_ERRORS, serve, stream

    try:
        serve(options) if options.serve else stream(options)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
