"""Videos of any container, whole and cut into clips, and an account of every one of them."""

from __future__ import annotations

import itertools
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import pytest
import torch
from imported_data import sample, write_tars
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.cli.main import main
from selfforcing_dfd.data.format import PackError
from selfforcing_dfd.data.journal import Job, Journal, Refusal
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.source import ClipError, DamagedClipError
from selfforcing_dfd.data.sources.fastgen import FastGenSource
from selfforcing_dfd.data.sources.files import FileSource
from selfforcing_dfd.data.sources.video import count_frames, decoded_frames, read_video
from selfforcing_dfd.data.sources.windows import even_windows
from selfforcing_dfd.data.write import check_account
from selfforcing_dfd.metrics.scenes import cuts, one_scene, scenes_in

FPS = Fraction(16)
CONTAINERS = {
    "a.mov": ("mov", "libx264", "yuv420p"),
    "b.webm": ("webm", "libvpx", "yuv420p"),
    "c.mkv": ("matroska", "libx264", "yuv420p"),
    "d.avi": ("avi", "mpeg4", "yuv420p"),
    "e.gif": ("gif", "gif", "rgb8"),
    "f.MP4": ("mp4", "libx264", "yuv420p"),
    "g.ts": ("mpegts", "mpeg2video", "yuv420p"),
}


def write_video(path: Path, frames: Tensor, rate: int = 16, kind: str = "c.mkv") -> Path:
    """uint8 [T, H, W, 3] in a container of CONTAINERS, and a caption beside it."""
    form, codec, pixels = CONTAINERS[kind]
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        for picture in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    path.with_suffix(".txt").write_text("a disc moves")
    return path


def scenes(*lengths: int) -> Tensor:
    """uint8 [T, 64, 64, 3]: for each length a picture of its own that moves slowly."""
    parts = []
    for number, length in enumerate(lengths):
        field = rng.uniform((1, 3, 4, 4), 0, "scene", number).float()
        picture = torch.nn.functional.interpolate(field, size=(64, 64), mode="bicubic")[0]
        parts += [picture.roll(shift, -1) for shift in range(length)]
    return (torch.stack(parts).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).contiguous()


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 16 fps with scenes of 14, 5 and 23 frames."""
    return write_video(tmp_path_factory.mktemp("long") / "film.mkv", scenes(14, 5, 23))


def test_any_container_is_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches films that are no .mp4 and are skipped: telephones and browsers make others."""
    for kind in CONTAINERS:
        # players hold frames of a GIF for hundredths of a second
        write_video(tmp_path / kind, scenes(30), 20 if kind == "e.gif" else 16, kind)
    command = ["pack", str(tmp_path), "--codec", "tiny", "--frames", "9"]
    assert main([*command, "--out", f"{tmp_path}-shards"]) == 0
    said = capsys.readouterr().out
    assert "7 offered = 7 packed + 0 refused + 0 damaged" in said
    keys = [entry.key for entry in ShardReader(f"{tmp_path}-shards").index.samples]
    assert keys == ["a", "b", "c", "d", "e", "f", "g"]


def test_every_clip_is_packed_refused_or_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches clips that are in no list, and damage that is told as a matter of taste."""
    for number in range(5):
        write_video(tmp_path / f"{number}.mkv", scenes(9 if number != 1 else 7))
    (tmp_path / "2.txt").unlink()
    data = (tmp_path / "3.mkv").read_bytes()
    (tmp_path / "3.mkv").write_bytes(data[: len(data) // 2])
    (tmp_path / "4.mkv").write_bytes(b"no video")
    command = ["pack", str(tmp_path), "--codec", "tiny", "--frames", "9"]
    assert main([*command, "--out", f"{tmp_path}-shards"]) == 0
    said = capsys.readouterr().out
    left_out = ShardReader(f"{tmp_path}-shards").index.refused
    damaged = [refusal["file"] for refusal in left_out if refusal.get("damaged")]
    assert [refusal["file"] for refusal in left_out] == ["1.mkv", "2.mkv", "3.mkv", "4.mkv"]
    assert damaged in (["3.mkv", "4.mkv"], ["4.mkv"])  # a cut may fall between two frames
    refused = 4 - len(damaged)
    assert f"5 offered = 1 packed + {refused} refused + {len(damaged)} damaged" in said


def test_an_account_that_does_not_add_up_is_an_error(tmp_path: Path) -> None:
    """Catches a packer that loses an item: the index would not tell."""
    job = Job("clips", 3, (1, 1, 1, 1), (1, 1), {}, {}, 1)
    journal = Journal(tmp_path, job)
    journal.refused = [Refusal("a", "short")] * 3
    check_account(job, journal)
    journal.refused.pop()
    with pytest.raises(PackError, match="3 items were offered, 0 packed and 2 left out"):
        check_account(job, journal)


def test_frames_that_are_not_used_are_spoken_of(
    long: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Catches a film of 25 seconds that gives one clip of 5 without a word."""
    out = tmp_path / "out"
    command = ["pack", str(long.parent), "--codec", "tiny", "--frames", "9", "--out", str(out)]
    clip = write_video(tmp_path / "film.mov", scenes(42), kind="a.mov")
    command[1] = str(clip.parent)
    assert main(command) == 0
    assert "1 files are long enough for more samples; 33 of their" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cut", "starts", "left"), [("windows", [0, 9, 18, 27], 6), ("scenes", [0, 19, 28], 15)]
)
def test_a_long_video_becomes_many_clips(
    long: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    cut: str,
    starts: list[int],
    left: int,
) -> None:
    """Catches windows that overlap, leave gaps or cross a cut, and frames nobody counts."""
    out = tmp_path / "out"
    command = ["pack", str(long.parent), "--codec", "tiny", "--frames", "9", "--cut", cut]
    assert main([*command, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    used = 9 * len(starts)
    account = f"1 files with 42 frames = {used} in {len(starts)} windows + {left} left over"
    assert account in said
    assert f"{len(starts)} offered = {len(starts)} packed" in said
    reader = ShardReader(out)
    assert [entry.key for entry in reader.index.samples] == [f"film_{n:06d}" for n in starts]
    assert reader.index.about["source"]["frames"] == {"offered": 42, "in_windows": used}
    about = json.loads(reader.members(1)["json"])
    assert about["source"] == f"film.mkv#{starts[1]}"


def test_windows_hold_the_frames_of_the_whole(long: Path) -> None:
    """Catches frames that are lost or come twice where windows meet, whatever order they are in."""
    whole = read_video(long, 42, fps=FPS)
    source = FileSource(
        long.parent, 9, (64, 64), fps=FPS, cut=partial(one_scene, fps=FPS), cut_name="windows"
    )
    for order in ([0, 1, 2, 3], [3, 0, 2, 1], [1, 0, 3, 3]):
        for number in order:
            assert torch.equal(source.read_video(number), whole[9 * number : 9 * number + 9])
    with ThreadPoolExecutor(3) as pool:
        read = list(pool.map(source.read_video, range(4)))
    assert torch.equal(torch.cat(read), whole[:36])


def test_windows_are_decoded_once(long: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a long film that is decoded from its beginning for each of its clips."""
    from selfforcing_dfd.data.sources import files

    decoded: list[Path] = []

    def counting(path: Path, fps: Fraction | None) -> object:
        for frame in decoded_frames(path, fps):
            decoded.append(path)
            yield frame

    monkeypatch.setattr(files, "decoded_frames", counting)
    source = FileSource(long.parent, 9, (64, 64), cut=partial(one_scene, fps=None), cut_name="w")
    for number in (1, 0, 2, 3):  # as threads may ask
        source.read(number)
    assert len(decoded) == 36


def test_damage_ends_the_windows_after_it_by_name(long: Path, tmp_path: Path) -> None:
    """Catches windows before the damage that are lost, and later ones that are made up."""
    data = bytearray(long.read_bytes())
    place = len(data) * 3 // 4
    data[place : place + 64] = bytes(64)
    (tmp_path / "film.mkv").write_bytes(data)
    (tmp_path / "film.txt").write_text("a disc moves")
    source = FileSource(tmp_path, 9, (64, 64), cut=lambda path: [(0, 42)], cut_name="windows")
    whole = read_video(long, 42)
    ends = []
    for number in range(4):
        try:
            got = source.read(number).video
        except ClipError:
            ends.append("left out")
            continue
        assert got is not None and torch.equal(got, whole[9 * number : 9 * number + 9])
        ends.append("whole")
    assert ends[0] == "whole" and ends[3] == "left out"
    assert ends == sorted(ends, reverse=True)


def test_a_video_that_gives_no_clip_is_named(long: Path, tmp_path: Path) -> None:
    """Catches a film without a scene of the needed length that vanishes from the account."""
    (tmp_path / "bad.mkv").write_bytes(b"no video")
    (tmp_path / "bad.txt").write_text("a disc")
    write_video(tmp_path / "film.mkv", scenes(14, 5, 23))
    source = FileSource(
        tmp_path, 25, (64, 64), cut=partial(scenes_in, fps=FPS), cut_name="scenes", num_workers=2
    )
    assert source.names == ["bad.mkv", "film.mkv"]
    with pytest.raises(DamagedClipError, match=r"bad\.mkv: cannot be read as video"):
        source.read(0)
    with pytest.raises(ClipError, match="no part of it has 25 video frames, the longest has 23"):
        source.read(1)


def test_scenes_are_found_and_motion_is_none(tmp_path: Path) -> None:
    """Catches cuts that are missed, and fast motion or noise that is taken for one."""
    film = write_video(tmp_path / "film.mkv", scenes(14, 5, 23))
    assert scenes_in(film, FPS) == [(0, 14), (14, 19), (19, 42)]
    fast = scenes(1).repeat(40, 1, 1, 1)
    moving = torch.stack([frame.roll(6 * n, 1) for n, frame in enumerate(fast)])
    assert scenes_in(write_video(tmp_path / "fast.mkv", moving), FPS) == [(0, 40)]
    noise = [float(20 * (1 + rng.uniform((), 0, "noise", n))) for n in range(60)]
    assert cuts(noise) == []
    assert cuts([*noise[:30], 400.0, *noise[30:]]) == [31]
    assert cuts([0.0] * 10 + [5.0] + [0.0] * 10) == []


def test_frames_are_counted_without_decoding(long: Path) -> None:
    """Catches a count at another rate than that of reading."""
    for fps in (None, FPS, Fraction(8), Fraction(5)):
        assert count_frames(long, fps) == sum(1 for _ in decoded_frames(long, fps))


def test_even_windows_fill_scenes() -> None:
    """Catches a window that is one frame too long or too short to be taken."""
    assert even_windows([(0, 9), (9, 17), (17, 35)], 9) == [0, 17, 26]
    for length in range(30):
        starts = even_windows([(3, 3 + length)], 5)
        assert len(starts) == length // 5
        assert all(b - a == 5 for a, b in itertools.pairwise(starts))


def test_samples_after_a_block_of_zeros_are_not_lost(tmp_path: Path) -> None:
    """Catches 10 samples that became 3: tarfile takes a zeroed header for the archive's end."""
    folder = write_tars(tmp_path / "tars", [sample(number) for number in range(10)], 10)
    (tar,) = folder.glob("*.tar")
    with tarfile.open(tar) as members:
        place = next(info.offset for info in members if info.name.startswith("00003"))
    data = bytearray(tar.read_bytes())
    data[place : place + 512] = bytes(512)
    tar.write_bytes(data)
    with pytest.raises(PackError, match=rf"damaged or cut off at byte {place} of .* 3 samples"):
        FastGenSource(folder)


def test_two_samples_of_one_name_are_not_one(tmp_path: Path) -> None:
    """Catches the second sample of a name in the place of the first, without a word."""
    folder = write_tars(tmp_path / "tars", [sample(0), sample(1), sample(0)], 3)
    with pytest.raises(PackError, match=r"holds 00000\.\S+ twice"):
        FastGenSource(folder)
