"""Commands around streaming: stream, benchmark."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from selfforcing_dfd.cli.options import (
    ATTENTION_NAMES,
    DEVICE_HELP,
    DTYPE_NAMES,
    Run,
    add_decoder_options,
    add_fp8_option,
    add_memory_options,
    add_offload_option,
    add_pass_options,
    add_past_options,
    named_file,
    num_chunks,
    positive,
    size,
)
from selfforcing_dfd.cli.results import check_result_file, write_result
from selfforcing_dfd.common import UserError

MODEL_SIZES = ("tiny", "wan-tiny", "wan1.3b", "wan14b")
TEXT_ENCODERS = ("umt5", "umt5-small")
NOT_WITH_SERVE = ("prompt", "prompts", "chunks", "image", "video", "out", "overwrite")
ONLY_WITH_SERVE = ("host", "port", "token_file", "beside")
STREAM_DEFAULTS = {"chunks": 20, "out": "stream.mp4", "host": "127.0.0.1", "port": 8000}


def stream(parser: argparse.ArgumentParser) -> Run:
    """Generate video chunk by chunk, in bounded memory, for as long as asked.

    Without --model, --run or --weights it shows the tiny world, whose students are shipped.
    """
    _add_content_options(parser.add_argument_group("what to show"))
    _add_model_options(parser.add_argument_group("with which model"))
    add_memory_options(parser.add_argument_group("how it saves memory"))
    past = parser.add_argument_group("how far it looks back (latent frames)")
    add_past_options(past, "default: tiny, or default with --model")
    past.add_argument(
        "--on-prompt",
        metavar="MODE",
        help="what a new prompt does to the past: recache, flush or keep",
    )
    _add_target_options(parser.add_argument_group("where it goes"))

    def run(args: argparse.Namespace) -> None:
        if args.dry_run:
            from selfforcing_dfd.live.dry_run import dry_run

            print(dry_run(args))
            return
        check_targets(args)
        from selfforcing_dfd.live.play import serve, stream

        if args.serve:
            serve(args)
        else:
            stream(args)

    return run


def check_targets(args: argparse.Namespace) -> None:
    """Refuse options that would have no effect, and fill in the others' defaults."""
    given = vars(args)
    idle = NOT_WITH_SERVE if args.serve else ONLY_WITH_SERVE
    useless = [f"--{name.replace('_', '-')}" for name in idle if given[name]]
    if useless and args.serve:
        raise UserError(
            f"--serve shows a page where every viewer has a stream; "
            f"{', '.join(useless)} would have no effect: drop it, or drop --serve"
        )
    if useless:
        raise UserError(
            f"{', '.join(useless)} would have no effect without the web page; "
            "add --serve, or drop it"
        )
    for name, value in STREAM_DEFAULTS.items():
        if given[name] is None:
            setattr(args, name, value)
    # Also checked where the file is opened; here it costs no time to load a model.
    if not args.serve and not args.overwrite and args.out != "-" and Path(args.out).exists():
        raise UserError(f"{args.out} exists; choose another name, or replace it with --overwrite")


def _add_content_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompt",
        metavar="TEXT",
        help="caption of the stream (tiny world: 'a disc moves', square, cross)",
    )
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="schedule, lines `at: prompt`; at: a chunk or seconds (3.5s)",
    )
    group.add_argument("--chunks", type=num_chunks, metavar="N|inf", help="how many (default: 20)")
    group.add_argument(
        "--seed", type=int, default=0, help="another seed, another video (default: %(default)s)"
    )
    group.add_argument("--image", type=Path, metavar="FILE", help="begin with this picture")
    group.add_argument("--video", type=Path, metavar="FILE", help="continue this clip")


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="Wan2.1 as a diffusers folder, or an export of ours",
    )
    _add_student_options(group)
    group.add_argument(
        "--beside",
        type=named_file,
        action="append",
        metavar="NAME=FILE",
        help="with --serve: another student's weights, which the page can switch to by that name; "
        "may be given several times (default: the tiny world's DMD student, beside `stable`)",
    )
    _add_recipe_options(group)
    group.add_argument("--device", default="auto", help=DEVICE_HELP)
    group.add_argument(
        "--dtype",
        choices=DTYPE_NAMES,
        help="with --model: what it computes in (default: bfloat16 on a GPU)",
    )
    group.add_argument(
        "--vae-device", metavar="DEVICE", help="with --model: decode here (default: as --device)"
    )
    group.add_argument(
        "--size",
        type=size,
        metavar="HxW",
        help="with --model: height x width of the video (default: the student's, else 480x832)",
    )
    add_decoder_options(group)
    _add_kernel_options(group)


def _add_recipe_options(group: argparse._ArgumentGroup) -> None:
    """How the student runs, in place of what its file states."""
    group.add_argument(
        "--ladder",
        metavar="T,T,...",
        help="the student's timesteps before the shift (default: as its file states)",
    )
    add_pass_options(group)
    group.add_argument("--shift", type=float, metavar="S", help="of the ladder (likewise)")
    group.add_argument(
        "--chunk-frames", type=positive, metavar="N", help="latent frames of a chunk (likewise)"
    )


def _add_student_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--run", type=Path, metavar="DIR", help="finished run, or one of its arms")
    group.add_argument(
        "--weights",
        default="",
        metavar="FILE",
        help="a student's weights; with --model any format that `convert` reads",
    )


def _add_kernel_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--attention",
        choices=ATTENTION_NAMES,
        default="auto",
        help="the kernel; auto measures those that fit the GPU; fa3-fp8 rounds to 8 bits "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the blocks and Wan's VAE decoder: slow to start, faster afterwards",
    )
    group.add_argument(
        "--cuda-graph",
        action="store_true",
        help="capture the student's calls as CUDA graphs and replay them; on a GPU only",
    )


def _add_target_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--out", metavar="FILE|-", help=".mp4 or .y4m; - is y4m on stdout (default: stream.mp4)"
    )
    group.add_argument("--overwrite", action="store_true", help="replace an existing file")
    group.add_argument("--fps", type=float, default=16, help="of the video (default: %(default)s)")
    group.add_argument("--serve", action="store_true", help="a web page instead of a file")
    group.add_argument(
        "--host",
        metavar="ADDRESS",
        help="where the web page listens, such as 0.0.0.0 for all networks; others than this "
        "machine need a token, which stands in the printed link (default: 127.0.0.1)",
    )
    group.add_argument("--port", type=positive, metavar="N", help="of the web page (default: 8000)")
    group.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="the web page's token, made if the file does not exist; links then outlive a restart "
        "(default: a new one for each start)",
    )


def benchmark(parser: argparse.ArgumentParser) -> Run:
    """Measure latency, pace, memory and FLOPs of a stream, chunk by chunk.

    Five lines say what was found. --out writes all of it as JSON and as a page with bars. Where
    stdout is no terminal, its last line is the whole result as JSON.
    """
    model = parser.add_argument_group("the model")
    _add_student_options(model)
    model.add_argument(
        "--random-weights",
        choices=MODEL_SIZES,
        metavar="MODEL",
        help=f"a model of this size instead: {', '.join(MODEL_SIZES)}; real speed, no picture",
    )
    _add_recipe_options(model)
    model.add_argument("--device", default="auto", help=DEVICE_HELP)
    model.add_argument(
        "--dtype",
        choices=DTYPE_NAMES,
        help="what it computes in (default: bfloat16 on a GPU for random weights)",
    )
    model.add_argument(
        "--size",
        type=size,
        metavar="HxW",
        help="height x width of the video (default: the model's, 480x832 for Wan)",
    )
    add_decoder_options(model)
    _add_kernel_options(model)
    add_fp8_option(model)
    add_offload_option(model)
    model.add_argument(
        "--vae-device", metavar="DEVICE", help="decode there, such as cuda:1 (default: as --device)"
    )
    model.add_argument(
        "--text-encoder",
        choices=TEXT_ENCODERS,
        help="a random one of this shape before the first frame: umt5 is Wan's, 11.4 GB "
        "(default: the tiny world's words)",
    )
    model.add_argument(
        "--threads", type=positive, metavar="N", help="CPU threads (default: what torch takes)"
    )
    past = parser.add_argument_group("how far it looks back (latent frames)")
    add_past_options(past, "default: default")
    past.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    _add_measure_options(parser.add_argument_group("what is measured"))
    _add_result_options(parser.add_argument_group("the result"))

    def run(args: argparse.Namespace) -> None:
        if args.out:
            check_result_file(args.out)
        is_timed = not (args.compare or args.count_decoder or args.count_memory or args.precision)
        text, result = timed(args) if is_timed else untimed(args)
        line = json.dumps(result, allow_nan=False)
        written = write_result(args.out, line, result if is_timed else None) if args.out else []
        print(text)
        for path in written:
            print(f"wrote {path}")
        # without a stdout there is nobody to tell
        if sys.stdout is not None and not sys.stdout.isatty():
            print(line)

    return run


def timed(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """What is printed, and the result, of a benchmark."""
    from selfforcing_dfd.benchmark.run import benchmark

    return benchmark(args)


def untimed(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The same of what is computed or counted without a clock."""
    if args.precision:
        from selfforcing_dfd.evaluation.precision import precision

        return precision(args.precision)
    if args.count_memory:
        from selfforcing_dfd.benchmark.memory import count_memory

        return count_memory(args)
    from selfforcing_dfd.benchmark.run import compare, count_decoder

    return count_decoder(args) if args.count_decoder else compare(*args.compare)


def _add_result_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--out", type=Path, metavar="FILE", help="write the JSON there, and beside it FILE.html"
    )
    group.add_argument("--full", action="store_true", help="print all figures")
    group.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("A", "B"),
        help="measure nothing; compare two results, with a verdict",
    )
    group.add_argument(
        "--count-decoder",
        action="store_true",
        help="measure nothing; count operators and bytes of Wan's VAE decoder and of small ones at "
        "--size and --dtype, without a GPU",
    )
    group.add_argument(
        "--count-memory",
        action="store_true",
        help="measure nothing; count a stream's memory by what of it is saved, of Wan at --size, "
        "--dtype and the past's options, without a GPU",
    )
    group.add_argument(
        "--precision",
        type=positive,
        nargs="?",
        const=256,
        metavar="N",
        help="measure no time; score N clips (default: 256) of each shipped student in each number "
        "format, 8 bits emulated",
    )


def _add_measure_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--chunks",
        type=positive,
        metavar="N",
        help="of the steady state (default: 300, with --quick 6)",
    )
    group.add_argument(
        "--warmup",
        type=int,
        default=10,
        metavar="N",
        help="chunks before it (default: %(default)s)",
    )
    group.add_argument(
        "--prompt-trials",
        type=int,
        metavar="N",
        help="prompt changes (default: 20, with --quick 2)",
    )
    group.add_argument(
        "--fps",
        type=float,
        default=16,
        help="of playback, for rtf and deadlines (default: %(default)s)",
    )
    group.add_argument(
        "--peak-tflops",
        type=float,
        metavar="X",
        help="for MFU (default: the GPU's dense bf16 peak)",
    )
    group.add_argument("--dit-only", action="store_true", help="also a stream that decodes nothing")
    group.add_argument(
        "--baseline",
        action="store_true",
        help="also a clip by diffusers' own Wan pipeline (with --random-weights wan...)",
    )
    group.add_argument("--quick", action="store_true", help="a few chunks: does it run?")
