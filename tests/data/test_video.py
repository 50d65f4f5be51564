"""Reading video files, and what is said of those that cannot be used."""

from __future__ import annotations

import shutil
import wave
from collections import Counter
from pathlib import Path

import av
import pytest
import torch
from clip_files import write_clip
from torch import Tensor

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.source import ClipError
from selfforcing_dfd.data.sources.video import read_video


def test_clips_come_back(tmp_path: Path, frames: Tensor) -> None:
    """Catches swapped channels, a wrong frame order and a last frame that is lost.

    Tolerance: chroma at half resolution costs these fields 2.2 of 255 levels; neighbouring frames
    differ by 60.
    """
    write_clip(tmp_path / "clip.mp4", frames)
    again = read_video(tmp_path / "clip.mp4", num_frames=9)
    assert (again.float() - frames.float()).abs().mean() < 4
    assert (again[1:].float() - frames[:-1].float()).abs().mean() > 30


def test_only_the_first_frames_are_read(tmp_path: Path, frames: Tensor) -> None:
    """Catches frames taken from all over the clip, which changes the speed of everything in it."""
    write_clip(tmp_path / "clip.mp4", frames, fps=16)
    whole = read_video(tmp_path / "clip.mp4", num_frames=9)
    assert torch.equal(read_video(tmp_path / "clip.mp4", num_frames=5), whole[:5])


def test_a_short_clip_is_named(tmp_path: Path, frames: Tensor) -> None:
    """Catches a clip that is silently padded or repeated."""
    write_clip(tmp_path / "brief.mp4", frames, fps=16)
    with pytest.raises(ClipError, match=r"^brief\.mp4: has 9 video frames, want 13; ask for fewer"):
        read_video(tmp_path / "brief.mp4", num_frames=13)


def test_a_clip_of_another_size_is_named_with_the_command_that_repairs_it(
    tmp_path: Path, frames: Tensor
) -> None:
    """Catches height and width exchanged in the check or in the message."""
    write_clip(tmp_path / "wide.mp4", frames[:, :48], fps=16)
    with pytest.raises(
        ClipError, match=r"^wide\.mp4: is 48x64 \(height x width\), want 64x48; ffmpeg .*crop=48:64"
    ):
        read_video(tmp_path / "wide.mp4", num_frames=9, size=(64, 48))


@pytest.mark.parametrize("content", [b"", b"this is no video" * 100])
def test_an_unreadable_clip_is_named(tmp_path: Path, content: bytes) -> None:
    """Catches a bare decoder error, which does not say which of ten thousand files it is about."""
    (tmp_path / "broken.mp4").write_bytes(content)
    with pytest.raises(
        ClipError, match=r"^broken\.mp4: cannot be read as video \(.+\); encode it again"
    ):
        read_video(tmp_path / "broken.mp4", num_frames=1)


def test_a_clip_cut_off_in_the_middle_is_named(clips: Path, tmp_path: Path) -> None:
    """Catches a broken download that becomes a sample with fewer frames."""
    data = (clips / "000000.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(ClipError, match=r"^cut\.mp4: "):
        read_video(tmp_path / "cut.mp4", num_frames=9)


def test_a_damaged_clip_is_never_taken_for_whole(clips: Path, tmp_path: Path) -> None:
    """Catches FFmpeg's made-up pictures: of 150 flipped bits, 45 gave a clip of wrong pixels."""
    path = clips / "000000.mp4"
    wanted = read_video(path, num_frames=9)
    data = path.read_bytes()
    begin = data.index(b"mdat") + 8
    ends = Counter[str]()
    for number in range(60):
        harmed = bytearray(data)
        harmed[begin + (len(data) - begin) * number // 60] ^= 1 << number % 8
        (tmp_path / "clip.mp4").write_bytes(harmed)
        try:
            got = read_video(tmp_path / "clip.mp4", num_frames=9)
        except ClipError:
            ends["refused"] += 1
        else:
            ends["unharmed" if torch.equal(got, wanted) else "wrong"] += 1
    assert ends["wrong"] == 0
    assert ends["refused"] > 10


def test_a_file_without_pictures_is_named(tmp_path: Path) -> None:
    """Catches an IndexError from the decoder for a sound file with the ending of a video."""
    with wave.open(str(tmp_path / "sound.mp4"), "wb") as sound:
        sound.setparams((1, 2, 16000, 0, "NONE", ""))
        sound.writeframes(bytes(32000))
    with pytest.raises(ClipError, match=r"^sound\.mp4: no video stream"):
        read_video(tmp_path / "sound.mp4", num_frames=1)


def test_a_clip_that_changes_its_size_is_named(tmp_path: Path, frames: Tensor) -> None:
    """Catches an error without the file's name for a screen recording that changes size.

    MPEG transport streams can be joined end to end, which is how such files come about.
    """
    with (tmp_path / "joined.ts").open("wb") as joined:
        for number, part in enumerate((frames, frames[:, :32, :32])):
            piece = tmp_path / f"{number}.ts"
            with av.open(str(piece), "w", format="mpegts") as container:
                stream = container.add_stream("libx264", rate=16)
                stream.height, stream.width = part.shape[1:3]
                stream.pix_fmt = "yuv420p"
                for picture in part.numpy():
                    container.mux(
                        stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24"))
                    )
                container.mux(stream.encode(None))
            shutil.copyfileobj(piece.open("rb"), joined)
    with pytest.raises(ClipError, match=r"^joined\.ts: the frame size changes within the clip"):
        read_video(tmp_path / "joined.ts", num_frames=14)


def test_clips_are_taken_at_the_rate_of_the_models(
    tmp_path: Path, frames: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches clips of 32 frames a second that are taken for 16: motion would be twice as fast."""
    write_clip(tmp_path / "clip.mp4", torch.cat([frames, frames]), fps=32)
    (tmp_path / "clip.txt").write_text("a disc")
    command = ["pack", str(tmp_path), "--codec", "tiny", "--frames"]
    assert main([*command, "13"]) == 2
    assert "clip.mp4: has 9 video frames at 16 fps, want 13" in capsys.readouterr().err
    assert main([*command, "13", "--fps", "all"]) == 0
    assert main([*command, "9", "--overwrite"]) == 0
    packed = ShardReader(f"{tmp_path}-shards").index.about["settings"]
    assert packed["fps"] == "16"
