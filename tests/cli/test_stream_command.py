"""The command `stream` and `inference/stream.py` as users start them, on the tiny assets."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clip_files import write_clip
from forked import Script
from y4m import y4m

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.streaming.load import load_settings, load_stream_model
from selfforcing_dfd.streaming.session import StreamSession

SCRIPT = Path(__file__).parents[2] / "inference" / "stream.py"


def stream(*arguments: str) -> int:
    """The exit code of the command, run in this process."""
    return main(["stream", *arguments])


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_file_holds_what_the_session_makes(tmp_path):
    """Catches frames that are lost, repeated or changed on their way to the file."""
    assert (
        stream(
            "--prompt",
            "a cross moves",
            "--chunks",
            "3",
            "--seed",
            "5",
            "--out",
            str(tmp_path / "s.y4m"),
        )
        == 0
    )
    session = StreamSession(load_stream_model(), "a cross moves", load_settings("tiny", seed=5))
    wanted = torch.cat([session.next_chunk().frames for _ in range(3)])
    assert (tmp_path / "s.y4m").read_bytes() == y4m(wanted)
    assert len(wanted) == 9 + 12 + 12


def test_mp4_has_every_frame(tmp_path, capsys):
    """Catches frames that stay in the encoder, and a run that is silent about its past."""
    assert stream("--chunks", "4", "--out", str(tmp_path / "s.mp4")) == 0
    assert frames_of(tmp_path / "s.mp4").shape == (9 + 3 * 12, 64, 64, 3)
    assert "K = 9 latent frames (sink 3 + window 6, sink_relative)" in capsys.readouterr().err


def test_schedule_changes_the_running_stream(tmp_path):
    """Catches a prompt that comes a chunk early or late, and a restart in place of a change."""
    (tmp_path / "p.txt").write_text("0: a disc moves\n3: a cross moves\n")
    for name, prompts in (
        ("one", ["--prompt", "a disc moves"]),
        ("two", ["--prompts", str(tmp_path / "p.txt")]),
    ):
        assert stream(*prompts, "--chunks", "5", "--out", str(tmp_path / f"{name}.y4m")) == 0
    one = frames_of(tmp_path / "one.y4m")
    two = frames_of(tmp_path / "two.y4m")
    before = 9 + 12 + 12
    assert np.array_equal(one[:before], two[:before])
    assert not np.array_equal(one[before:], two[before:])


def test_a_clip_and_a_picture_come_first(tmp_path):
    """Catches a stream that ignores what it was given, or shows it twice."""
    assert stream("--chunks", "2", "--out", str(tmp_path / "a.y4m")) == 0
    clip = torch.from_numpy(frames_of(tmp_path / "a.y4m"))
    write_clip(tmp_path / "a.mp4", clip, 16)
    for option, num_given in (("--video", 21), ("--image", 1)):
        source = tmp_path / "a.mp4"
        out = tmp_path / f"{option[2:]}.y4m"
        assert stream(option, str(source), "--chunks", "2", "--out", str(out)) == 0
        frames = frames_of(out)
        assert len(frames) == num_given + 24
        distance = np.abs(frames[:num_given].astype(float) - clip[21 - num_given :].numpy()).mean()
        assert distance < 4, "of 255: the codec's and x264's error on clips that both have seen"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "hello"], "names nothing of the tiny world; try 'a disc moves'"),
        (["--prompt", "a disc moves", "--prompts", "x.txt"], "both --prompt and --prompts"),
        (["--image", "a.png", "--video", "b.mp4"], "both --image and --video"),
        (["--image", "nowhere.png"], "nowhere.png: cannot be read"),
        (["--run", "nowhere"], "nowhere has no config.yaml"),
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
        (
            ["--window", "7"],
            "--window is 7; slots hold whole chunks of 3 latent frames: use 6 or 9",
        ),
        (["--positions", "relative"], "use one of absolute, sink_relative, window_relative"),
        (
            ["--settings", "none"],
            "no stream settings 'none'; use one of default, fast, parity, tiny",
        ),
        (["--on-prompt", "forget"], "use one of recache, flush, keep"),
        (["--out", "x.avi"], "output 'x.avi' is not known"),
    ],
)
def test_mistakes_are_explained_and_write_nothing(
    tmp_path, monkeypatch, capsys, arguments, message
):
    """Catches a traceback, and an output file started before the mistake was found."""
    monkeypatch.chdir(tmp_path)
    assert stream("--chunks", "1", *arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept(tmp_path, capsys):
    """Catches an evening's stream that a second start overwrites."""
    (tmp_path / "s.mp4").write_bytes(b"precious")
    assert stream("--chunks", "1", "--out", str(tmp_path / "s.mp4")) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "s.mp4").read_bytes() == b"precious"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_complete_file(tmp_path, number):
    """Catches a file without an end, and a traceback as goodbye."""
    out = tmp_path / "s.mp4"
    process = Script(tmp_path, "inference/stream.py", "--chunks", "inf", "--out", str(out))
    wait_for(lambda: out.exists() and out.stat().st_size > 20_000)
    process.send_signal(number)
    end = process.end()
    assert end.code == 0
    assert "wrote" in end.errors and "Traceback" not in end.errors
    assert len(frames_of(out)) % 12 == 9


def test_a_reader_that_leaves_ends_the_stream(tmp_path):
    """Catches an endless stream without a reader, and BrokenPipeError on the screen."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--chunks", "inf", "--out", "-"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(9) == b"YUV4MPEG2"
    process.stdout.close()
    printed = process.stderr.read().decode()
    assert process.wait(timeout=60) == 0
    assert "the reader has gone" in printed and "Traceback" not in printed


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing happened within {seconds} s"
        time.sleep(0.05)
