"""What commands do to a stream between two chunks."""

from __future__ import annotations

import io
from typing import TextIO

import numpy as np
import torch

from selfforcing_dfd.live.play import Player
from selfforcing_dfd.live.prompts import PromptSchedule
from selfforcing_dfd.live.status import StatusLine
from selfforcing_dfd.live.writers import Frames, Writer
from selfforcing_dfd.streaming.load import load_settings, load_stream_model
from selfforcing_dfd.streaming.session import StreamSession


class Obeying(Writer):
    """Keeps the chunks, and gives commands after some of them."""

    def __init__(self, commands: dict[int, str]) -> None:
        self.commands = commands
        self.chunks = list[Frames]()
        self.player = None

    def write(self, frames: Frames) -> None:
        self.chunks.append(frames)
        line = self.commands.get(len(self.chunks))
        if line:
            assert self.player is not None
            assert not self.player.control.submit(line).startswith("error")


def play(
    schedule: str, commands: dict[int, str], num_chunks: int, said: TextIO | None = None
) -> list[Frames]:
    """The chunks of a stream; commands: line to give after so many chunks; said: for replies."""
    writer = Obeying(commands)
    prompts = PromptSchedule.parse(schedule, 16)
    session = StreamSession(load_stream_model(), prompts.first, load_settings("tiny"))
    status = StatusLine(said or io.StringIO(), 16, every_s=1e9)
    writer.player = Player(session, prompts, [writer], status)
    writer.player.play(num_chunks)
    return writer.chunks


def same(one: list[Frames], other: list[Frames]) -> bool:
    return all(
        np.array_equal(torch.as_tensor(a), torch.as_tensor(b))
        for a, b in zip(one, other, strict=True)
    )


def test_reset_starts_the_schedule_again():
    """Catches a second round that begins under the prompt at which the first one was left."""
    chunks = play("0: a disc moves\n2: a cross moves\n", {3: "/reset"}, 6)
    assert same(chunks[:3], chunks[3:])


def test_reset_keeps_a_prompt_that_was_asked_for():
    """Catches a reset that forgets the one prompt that someone typed."""
    chunks = play("0: a disc moves\n", {1: "a cross moves", 2: "/reset"}, 4)
    assert same(chunks[2:], play("0: a cross moves\n", {}, 2))


def test_a_prompt_is_answered_by_the_model():
    """Catches `ok` for a prompt that the model refuses, and a refusal that changes the video."""
    said = io.StringIO()
    chunks = play("0: a disc moves\n", {1: "a lion"}, 3, said)
    assert said.getvalue().count("error") == 1
    assert "'a lion' names nothing of the tiny world" in said.getvalue()
    assert "ok" not in said.getvalue()
    assert same(chunks, play("0: a disc moves\n", {}, 3))
    play("0: a disc moves\n", {1: "a cross moves"}, 2, said)
    assert "ok prompt\n" in said.getvalue()


def test_the_stream_ends_when_it_is_told():
    """Catches a quit that waits for the last chunk."""
    assert len(play("0: a disc moves\n", {2: "/quit"}, 100)) == 2
