"""Plays a stream through every shape that it can meet, so that nothing is planned in mid-stream.

A GPU's libraries plan, measure or compile a kernel when they first meet a shape, which stops a
stream for up to seconds. What a chunk sees grows while the window fills: chunks of 3 latent frames
with K = 12 see 3, 6, 9 and 12. A clip to begin with may be shorter than a chunk, and then all of
these lengths are others. A new prompt runs further passes.

cuDNN's plans belong to the thread that made them (torch keeps them in thread-local caches, since
they may not be shared). So the thread that will make the chunks has to be the one that warms up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import get_args

from torch import Tensor

from selfforcing_dfd.streaming.session import PromptMode, StreamSession

Run = Callable[[Callable[[], object]], object]
"""Carries out a piece of work: here, or on the thread that makes the chunks."""


def at_once(work: Callable[[], object]) -> object:
    """Carry it out here."""
    return work()


def warm_up(session: StreamSession, context: Tensor | None = None, run: Run = at_once) -> None:
    """Make chunks and throw them away; then the session is as new.

    context: what the stream begins with, as the session got it. run: where, chunk by chunk.
    """
    prompt = session.prompt
    if context is not None:
        play_through(session, run)
    # what a reset in mid-stream does: without the context, but for frames that have to be given
    if context is None or len(context) != session.model.num_given_video_frames:
        run(session.reset)
        play_through(session, run)
    run(partial(session.reset, prompt, context=context))


def play_through(session: StreamSession, run: Run = at_once) -> None:
    """Until the window is full and the sink moves, with each kind of prompt change."""
    ramp = session.visible_frames // session.model.chunk_frames
    for _ in range(ramp + 2):
        run(session.next_chunk)
    for mode in get_args(PromptMode):
        run(partial(session.set_prompt, session.prompt, mode))
        run(session.next_chunk)
    run(partial(session.set_prompt, session.prompt, "flush"))
    for _ in range(ramp):
        run(session.next_chunk)
