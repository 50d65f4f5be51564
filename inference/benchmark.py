"""Times a stream: `python inference/benchmark.py`, or `--compare A.json B.json` for two results.

A table for people comes first; the last line on stdout is the whole result as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Latency, pace, memory and FLOPs of a stream, chunk by chunk."
    )
    model = parser.add_argument_group("the model")
    model.add_argument(
        "--size", default="tiny", help="tiny, wan1.3b or wan14b; all but tiny have random weights"
    )
    model.add_argument(
        "--random-weights", action="store_true", help="tiny too: real speed, no picture"
    )
    model.add_argument(
        "--run", type=Path, metavar="DIR", help="tiny: the student of a finished run"
    )
    model.add_argument(
        "--checkpoint", default="", metavar="FILE", help="tiny: a student's safetensors file"
    )
    model.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)"
    )
    model.add_argument(
        "--dtype",
        help="float32, bfloat16 or float16 (default: bfloat16 on a GPU for random weights)",
    )
    model.add_argument("--height", type=int, help="video rows (default: the size's, 480 for Wan)")
    model.add_argument("--width", type=int, help="video columns (default: the size's, 832 for Wan)")
    model.add_argument(
        "--attention",
        default="auto",
        help="auto, or force sdpa, fa2, fa3 or fa4 (default: %(default)s)",
    )
    model.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    model.add_argument(
        "--fp8",
        action="store_true",
        help="the blocks' linear layers in 8-bit floats (with --compile)",
    )
    model.add_argument(
        "--vae-device", metavar="DEVICE", help="decode there, such as cuda:1 (default: as --device)"
    )
    model.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: what torch takes)"
    )

    past = parser.add_argument_group("how far it looks back (latent frames)")
    past.add_argument(
        "--stream", default="default", metavar="CONFIG", help="file in configs/stream (%(default)s)"
    )
    past.add_argument(
        "--window", type=int, metavar="N", help="history and current chunk, the sink not counted"
    )
    past.add_argument(
        "--sink", type=int, metavar="N", help="first latent frames that are never forgotten"
    )
    past.add_argument("--positions", help="absolute, sink_relative or window_relative")
    past.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")

    how = parser.add_argument_group("what is measured")
    how.add_argument(
        "--chunks", type=int, metavar="N", help="of the steady state (default: 300, with --quick 6)"
    )
    how.add_argument(
        "--warmup",
        type=int,
        default=10,
        metavar="N",
        help="chunks before it (default: %(default)s)",
    )
    how.add_argument(
        "--prompt-trials",
        type=int,
        metavar="N",
        help="prompt changes (default: 20, with --quick 2)",
    )
    how.add_argument(
        "--fps",
        type=float,
        default=16,
        help="of playback, for rtf and deadlines (default: %(default)s)",
    )
    how.add_argument(
        "--peak-tflops",
        type=float,
        metavar="X",
        help="for MFU (default: the GPU's dense bf16 peak)",
    )
    how.add_argument("--dit-only", action="store_true", help="also a stream that decodes nothing")
    how.add_argument("--quick", action="store_true", help="a few chunks: does it run?")

    out = parser.add_argument_group("the result")
    out.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    out.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("A", "B"),
        help="measure nothing; compare two results",
    )
    options = parser.parse_args(arguments)
    options.random_weights |= options.size != "tiny"
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    from selfforcing_dfd.common import tune_allocator

    tune_allocator()
    from selfforcing_dfd.benchmark.run import benchmark, compare

    try:
        text, result = compare(*options.compare) if options.compare else benchmark(options)
        line = json.dumps(result, allow_nan=False)
        if options.out:
            options.out.write_text(line + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{text}\n{line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
