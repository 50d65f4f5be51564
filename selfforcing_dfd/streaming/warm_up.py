"""Plays a stream through every shape that it can meet, so that nothing is planned in mid-stream.

A GPU's libraries plan, measure or compile a kernel when they first meet a shape, which stops a
stream for up to seconds. What a chunk sees grows while the window fills: chunks of 3 latent frames
with K = 12 see 3, 6, 9 and 12. A clip to begin with may be shorter than a chunk, and then all of
these lengths are others. A new prompt runs further passes.
"""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from selfforcing_dfd.streaming.session import PromptMode, StreamSession


def warm_up(session: StreamSession, context: Tensor | None = None) -> None:
    """Make chunks and throw them away; then the session is as new.

    context: what the stream begins with, as the session got it.
    """
    prompt = session.prompt
    if context is not None:
        play_through(session)
    if context is None or not session.model.num_given_video_frames:
        session.reset()  # what a reset in mid-stream does: without the context
        play_through(session)
    session.reset(prompt, context=context)


def play_through(session: StreamSession) -> None:
    """Until the window is full and the sink moves, with each kind of prompt change."""
    ramp = session.visible_frames // session.model.chunk_frames
    for _ in range(ramp + 2):
        session.next_chunk()
    for mode in get_args(PromptMode):
        session.set_prompt(session.prompt, mode)
        session.next_chunk()
    session.set_prompt(session.prompt, "flush")
    for _ in range(ramp):
        session.next_chunk()
