"""What options of several commands have in common: their values' form, and groups of options."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

Run = Callable[[argparse.Namespace], None]
Command = Callable[[argparse.ArgumentParser], Run]

DTYPE_NAMES = ("float32", "bfloat16", "float16")
MODEL_FPS = Fraction(16)  # of Wan and of the tiny world
LEVEL_NAMES = ("short", "medium", "long")
TEXT_MEMORY = ("keep", "cpu", "free")
ATTENTION_NAMES = ("auto", "sdpa", "sdpa-flash", "fa2", "fa3", "fa4", "fa3-fp8")
DEVICE_HELP = "auto, cpu, cuda or cuda:N (default: %(default)s)"


def size(text: str) -> tuple[int, int]:
    """Height and width in pixels, of `480x832`."""
    if not re.fullmatch(r"\d+x\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r}, want HEIGHTxWIDTH such as 480x832")
    height, width = text.split("x")
    return int(height), int(width)


def shape(text: str) -> tuple[int, ...]:
    """Four or five sizes, of `21x16x60x104`."""
    if not re.fullmatch(r"\d+(x\d+){3,4}", text):
        raise argparse.ArgumentTypeError(f"{text!r}, want [S x] F x C x H x W such as 21x16x60x104")
    return tuple(map(int, text.split("x")))


def part(text: str) -> tuple[int, int]:
    """The number of a part and how many there are, of `1/4`."""
    if not re.fullmatch(r"\d+/\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r}, want I/N such as 1/4")
    number, count = text.split("/")
    return int(number), int(count)


def rate(text: str) -> Fraction:
    """Frames a second, of `16` or `24000/1001`."""
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}, want frames a second such as 16 or 24000/1001"
        ) from error
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}, want more than 0 frames a second")
    return value


def levels(text: str) -> tuple[str, ...]:
    """Levels of captions, of `short,medium,long`, in that order."""
    named = [name.strip() for name in text.split(",")]
    if not named or set(named) - set(LEVEL_NAMES):
        raise argparse.ArgumentTypeError(f"{text!r}, want some of {','.join(LEVEL_NAMES)}")
    return tuple(name for name in LEVEL_NAMES if name in named)


def rate_or_all(text: str) -> Fraction | None:
    """Frames a second, or None of `all`: every frame, whatever the rate."""
    return None if text == "all" else rate(text)


def named_file(text: str) -> tuple[str, str]:
    """A name and a file, of `DMD=assets/tiny/student.safetensors`."""
    name, _, file = text.partition("=")
    if not name.strip() or not file.strip():
        raise argparse.ArgumentTypeError(
            f"{text!r}, want NAME=FILE such as DMD=assets/tiny/student.safetensors"
        )
    return name.strip(), file.strip()


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}, want a whole number of at least 1")
    return int(text)


def num_chunks(text: str) -> float:
    """A positive number of chunks, or `inf`."""
    if text == "inf":
        return math.inf
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a positive number nor inf")
    return int(text)


def add_pass_options(group: argparse._ArgumentGroup) -> None:
    """What else decides how often a student is called, beside --ladder and --chunk-frames."""
    group.add_argument(
        "--first-ladder", metavar="T,T,...", help="the timesteps of the first chunk, if others"
    )
    group.add_argument(
        "--context",
        choices=("clean", "last_step"),
        help="what later chunks see of one: a clean commit pass, or its last denoising step",
    )


def add_past_options(group: argparse._ArgumentGroup, preset: str) -> None:
    """What a stream remembers, for `stream` and `benchmark`. preset: the default, in words."""
    group.add_argument(
        "--settings", metavar="NAME", help=f"preset in configs/stream, or a YAML file ({preset})"
    )
    group.add_argument(
        "--window", type=int, metavar="N", help="history and current chunk; the sink comes on top"
    )
    group.add_argument(
        "--sink", type=int, metavar="N", help="first latent frames, which are never forgotten"
    )
    group.add_argument("--positions", help="absolute, sink_relative or window_relative")


def add_decoder_options(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """Which decoder makes the pictures, for `stream`, `benchmark` and `sample`."""
    group.add_argument(
        "--decoder",
        choices=("small", "wan", "tiny"),
        help="what makes pictures of latents: a small decoder, or the codec itself: Wan's VAE, or "
        "the tiny world's (default: the codec)",
    )
    group.add_argument(
        "--decoder-weights",
        type=Path,
        metavar="PATH",
        help="of the small decoder: a run of stage decoder, its weights, or taew2_1.safetensors "
        "(default: the tiny world's, which is shipped)",
    )


def add_memory_options(group: argparse._ArgumentGroup) -> None:
    """What of a student, and of what belongs to it, is not on the GPU as a whole."""
    add_fp8_option(group)
    add_offload_option(group)
    group.add_argument(
        "--text-memory",
        choices=TEXT_MEMORY,
        help="with --model: keep the text encoder on the GPU, run it on the cpu, or free the GPU "
        "of it after each new prompt (default: keep)",
    )
    group.add_argument(
        "--lean-vae",
        action="store_true",
        help="with --model: the VAE's decoder in half the memory, with a sixth more to move",
    )
    group.add_argument(
        "--dry-run", action="store_true", help="with --model: say what memory it takes, and stop"
    )


def add_offload_option(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--offload",
        type=positive,
        nargs="?",
        const=1,
        metavar="N",
        help="blocks stay in the host's memory and visit the GPU in groups of N (default: 1), the "
        "next group while one runs",
    )


def add_fp8_option(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--fp8",
        action="store_true",
        help="the blocks' linear layers in 8-bit floats (with --compile)",
    )


SETTING_OPTIONS = {
    "device": "--device",
    "dtype": "--dtype",
    "height": "--size: the height",
    "width": "--size: the width",
    "on_prompt": "--on-prompt",
    "positions": "--positions",
    "sink_frames": "--sink",
    "vae_device": "--vae-device",
    "window_frames": "--window",
}
"""Settings by which messages begin, and the options that the user typed for them."""


def as_typed(message: str, options: argparse.Namespace) -> str:
    """A message about a setting, with the name of the option that set it in place of its own."""
    setting, _, rest = message.partition(" ")
    option = SETTING_OPTIONS.get(setting)
    if option is None:
        return message
    typed = option.split(":")[0].removeprefix("--").replace("-", "_")
    return f"{option} {rest}" if vars(options).get(typed) is not None else message
