"""What is done before a stream begins, so that nothing of it is left for its middle."""

from __future__ import annotations

import argparse
import os
import stat
import sys
import time
from concurrent.futures import Executor
from dataclasses import replace
from typing import TextIO

import torch
from torch import Tensor

from selfforcing_dfd.codecs.text_ahead import LoadsLater, TextAhead
from selfforcing_dfd.common import UserError
from selfforcing_dfd.live.prompts import ChunkClock, PromptSchedule
from selfforcing_dfd.live.web.shared import Student
from selfforcing_dfd.streaming.model import StreamModel
from selfforcing_dfd.streaming.saving import Saving, TextPlace
from selfforcing_dfd.streaming.session import StreamSession
from selfforcing_dfd.streaming.warm_up import Run, at_once, warm_up


def ask_saving(options: argparse.Namespace) -> Saving:
    """What of its memory a stream is asked to save."""
    text: TextPlace = options.text_memory or "keep"
    return Saving(options.fp8, options.offload or 0, text, options.lean_vae)


def readable_stdin() -> TextIO | None:
    """stdin, be it a terminal, a pipe or a file; None where it is closed or replaced."""
    try:
        sys.stdin.fileno()
    except (AttributeError, OSError, ValueError):  # None, replaced, closed
        return None
    return sys.stdin


def can_be_told(stdin: TextIO | None) -> bool:
    """Whether prompts may come from there: from a terminal, pipe or file, and not from a device."""
    if stdin is None:
        return False
    return stdin.isatty() or not stat.S_ISCHR(os.fstat(stdin.fileno()).st_mode)


def load_text(model: StreamModel) -> None:
    """Read the text encoder now, for prompts that come later: never within a stream."""
    if isinstance(model.text, LoadsLater):
        model.text.load()


def is_warmed_up(options: argparse.Namespace, model: StreamModel) -> bool:
    """Whether a stream plans or compiles when it first meets a shape; else it starts at once."""
    return bool(options.compile) or model.device.type == "cuda"


def warm_up_aloud(
    session: StreamSession, context: Tensor | None = None, run: Run = at_once
) -> None:
    """`warm_up`, which may take minutes, with a line about it."""
    started = time.perf_counter()
    sys.stderr.write("warming up every shape of the stream ...")
    sys.stderr.flush()
    warm_up(session, context, run)
    sys.stderr.write(f" {time.perf_counter() - started:.0f} s\n")


def warm_up_page(student: Student, prompt: str, worker: Executor) -> None:
    """`warm_up` of a page's student, with a picture and without, on the thread that computes."""
    model = student.model
    grey = model.grey()
    if grey is None:  # viewers may send a picture
        grey = torch.full((1, *model.video_size, 3), 0.5)
    session = StreamSession(model, prompt, student.settings, grey)
    warm_up_aloud(session, grey, lambda work: worker.submit(work).result())


def plan_prompts(
    options: argparse.Namespace, model: StreamModel, example: str
) -> tuple[PromptSchedule, StreamModel]:
    """The schedule of a file, or one prompt, at worst the example; and the model, which knows all.

    Every prompt is encoded now: the stream does not wait for it, and no error comes hours later.
    """
    if options.prompt is not None and options.prompts is not None:
        raise UserError("both --prompt and --prompts are given; drop one of them")
    if options.prompts is None:
        prompt = options.prompt if options.prompt is not None else example
        schedule = PromptSchedule(((0, prompt),))
    else:
        # a student that is trained with a given picture shows it as a part of chunk 0
        goes_on = bool(options.video or (options.image and not model.num_given_video_frames))
        clock = ChunkClock(model.chunk_frames, model.codec.strides[0], after_context=goes_on)
        schedule = PromptSchedule.read(options.prompts, options.fps, clock)
    text = TextAhead(model.text)
    text.prefetch(prompt for _, prompt in schedule.prompts)
    return schedule, replace(model, text=text)
