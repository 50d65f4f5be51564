"""Commands on a stdin that is no terminal."""

from __future__ import annotations

import io
import os
import sys
import threading
import time

from selfforcing_dfd.cli.main import main

PATIENCE_S = 60.0


def test_piped_lines_change_and_end_the_stream(tmp_path, monkeypatch):
    """Catches lines of a pipe that are not read, and `ok` to a prompt that the model refuses."""
    read_end, write_end = os.pipe()
    said = io.StringIO()
    monkeypatch.setattr(sys, "stdin", os.fdopen(read_end))
    monkeypatch.setattr(sys, "stderr", said)
    replies = []

    def give(line: str, awaited: str) -> None:
        os.write(write_end, line.encode())
        deadline = time.monotonic() + PATIENCE_S
        while awaited not in said.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        replies.append(awaited in said.getvalue())

    def talk() -> None:
        give("a lion\n", "error prompt 'a lion' names nothing of the tiny world")
        give("a cross moves\n", "ok prompt")
        give("/quit\n", "ok quit")
        os.close(write_end)

    speaker = threading.Thread(target=talk)
    speaker.start()
    assert (
        main(["stream", "--chunks", "inf", "--device", "cpu", "--out", str(tmp_path / "s.y4m")])
        == 0
    )
    speaker.join(PATIENCE_S)
    assert replies == [True, True, True]
    assert said.getvalue().endswith("s.y4m\n")
    assert said.getvalue().count("ok prompt") == 1


def test_a_stdin_that_is_closed_is_left_alone(tmp_path, monkeypatch):
    """Catches a stream started by a service, without stdin, that ends in a traceback."""
    for stdin in (None, io.StringIO("a cross moves")):
        monkeypatch.setattr(sys, "stdin", stdin)
        out = ["--overwrite", "--out", str(tmp_path / "s.y4m")]
        assert main(["stream", "--chunks", "1", "--device", "cpu", *out]) == 0
