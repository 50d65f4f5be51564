"""Sources of clips and captions: folders, lists, caption files; sizes and frame rates."""

from __future__ import annotations

import json
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import pytest
import torch
from clip_files import write_clip
from tiny_pack import pack_tiny
from torch import Tensor

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.data.encoders import fit_tiny_codec
from selfforcing_dfd.data.format import PackError
from selfforcing_dfd.data.pack import share_of
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.source import ClipError, keys_of
from selfforcing_dfd.data.sources.files import FileSource
from selfforcing_dfd.data.sources.listing import list_clips, list_hash
from selfforcing_dfd.data.sources.video import read_video
from selfforcing_dfd.tiny.codec import TinyCodec


def write_list(path: Path, rows: list[tuple[str, str]]) -> Path:
    """As the ending says: .csv, .jsonl, or .txt with the videos only."""
    match path.suffix:
        case ".csv":
            lines = ["video,caption", *(f'{video},"{caption}"' for video, caption in rows)]
        case ".jsonl":
            lines = [json.dumps({"caption": caption, "video": video}) for video, caption in rows]
        case _:
            lines = [video for video, _ in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


ROWS = [
    ("000002.mp4", "größer, als\nzuvor"),
    ("000000.mp4", "a disc"),
    ("000002.mp4", "a second caption"),
]


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_a_list_gives_clips_captions_and_order(
    own_clips: Path, codec: TinyCodec, tmp_path: Path, ending: str
) -> None:
    """Catches a sorted list, one caption per video only, and quoted line ends that split a row."""
    pack_tiny(write_list(own_clips / f"list{ending}", ROWS), tmp_path / "shards", codec)
    reader = ShardReader(tmp_path / "shards")
    assert reader.captions == ["größer, als zuvor", "a disc", "a second caption"]
    assert [entry.key for entry in reader.index.samples] == ["000002", "000000", "000002_2"]
    assert torch.equal(reader[0].latents, reader[2].latents)


def test_a_list_without_captions_finds_them_beside_the_clips(
    own_clips: Path, tmp_path: Path
) -> None:
    """Catches paths relative to the working folder.

    Paths are relative to the list, wherever the program runs.
    """
    beside = [(own_clips / name).with_suffix(".txt").read_text().strip() for name, _ in ROWS]
    rows = [(f"clips/{name}", "") for name, _ in ROWS]
    assert [clip.caption for clip in list_clips(write_list(tmp_path / "list.txt", rows))] == beside
    (tmp_path / "list.csv").write_text("video\n" + "".join(f"{name}\n" for name, _ in rows))
    assert [clip.caption for clip in list_clips(tmp_path / "list.csv")] == beside


def test_captions_of_a_folder_in_one_file(own_clips: Path, tmp_path: Path) -> None:
    """Catches rows matched by order, and another's caption for a clip that the file lacks."""
    captions = write_list(tmp_path / "captions.csv", ROWS[:2])
    found = [(clip.caption, clip.problem) for clip in list_clips(own_clips, captions=captions)]
    missing = ("", "no caption in the list; write one")
    assert found == [("a disc", ""), missing, ("größer, als zuvor", ""), missing]
    (tmp_path / "captions.txt").write_text("one\ntwo\u2028words\nthree\r\nfour")
    by_line = list_clips(own_clips, captions=tmp_path / "captions.txt")
    assert [clip.caption for clip in by_line] == ["one", "two words", "three", "four"]


def test_folders_below_are_searched_on_request(
    own_clips: Path, codec: TinyCodec, tmp_path: Path
) -> None:
    """Catches two clips of the same name in two folders that become one sample."""
    shutil.copytree(own_clips, tmp_path / "all" / "a")
    shutil.copytree(own_clips, tmp_path / "all" / "b.c")
    with pytest.raises(
        PackError, match=r"no videos in it; .* or --recursive if they lie in folders below"
    ):
        list_clips(tmp_path / "all")
    pack_tiny(tmp_path / "all", tmp_path / "shards", codec, recursive=True)
    keys = [entry.key for entry in ShardReader(tmp_path / "shards").index.samples]
    assert keys == [f"{folder}_00000{number}" for folder in ("a", "b_c") for number in range(4)]


def test_keys_are_unique_and_keep_the_end_of_long_names() -> None:
    """Catches numbers cut off the end of long names, and a key met twice."""
    names = [f"{'folder/' * 12}{number}.mp4" for number in range(3)]
    assert [key[-9:] for key in keys_of(names)] == [
        "r_folder_0"[-9:],
        "r_folder_1"[-9:],
        "r_folder_2"[-9:],
    ]
    assert all(len(key) == 64 for key in keys_of(names))
    assert keys_of(["a 1.mp4", "a_1_2.mp4", "a.1.mp4", "a:1.mp4"]) == [
        "a_1",
        "a_1_2",
        "a_1_3",
        "a_1_4",
    ]


def test_parts_of_a_list_are_all_of_it_in_order(own_clips: Path) -> None:
    """Catches a clip in two parts or in none, where clips do not divide evenly."""
    clips = list_clips(own_clips) * 5
    for count in (1, 3, 7, 40):
        parts = [share_of(clips, (number, count)) for number in range(1, count + 1)]
        assert [clip for part in parts for clip in part] == clips
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_hash_of_a_list_sees_names_captions_sizes_and_order(own_clips: Path) -> None:
    """Catches a change in the clips that a resumed run does not notice."""
    hashes = {list_hash(list_clips(own_clips)), list_hash(list_clips(own_clips)[::-1])}
    (own_clips / "000000.txt").write_text("another")
    hashes.add(list_hash(list_clips(own_clips)))
    with (own_clips / "000001.mp4").open("ab") as clip:
        clip.write(b" ")
    hashes.add(list_hash(list_clips(own_clips)))
    (own_clips / "000002.mp4").rename(own_clips / "000004.mp4")
    hashes.add(list_hash(list_clips(own_clips)))
    assert len(hashes) == 5
    assert list_hash(list_clips(own_clips)) in hashes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.csv", "file,caption\na.mp4,x\n", "row 1 has no video; it has file, caption"),
        ("list.csv", "video,caption\n", "no rows; want a column or key video"),
        ("list.csv", 'video,caption\na.mp4,"x\n', r"is no CSV \(unexpected end of data\)"),
        ("list.csv", "video,caption\n,x\n", "row 1 names no video"),
        ("list.jsonl", '{"video": "a.mp4"}\n{"vid', r"line 2 is no JSON"),
        ("list.jsonl", '"a.mp4"\n', r'line 1 is "a\.mp4", want an object such as'),
        ("list.jsonl", '{"video": 3}\n', "row 1 has no video"),
        (
            "list.xml",
            "<a/>",
            r"want a folder of videos, or a list of them as \.csv, \.jsonl or \.txt",
        ),
    ],
)
def test_a_list_that_cannot_be_read_is_explained(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    """Catches a KeyError for a column of another name."""
    (tmp_path / name).write_text(content)
    with pytest.raises(PackError, match=message):
        list_clips(tmp_path / name)


def test_caption_files_that_fit_no_clip_are_refused(own_clips: Path, tmp_path: Path) -> None:
    """Catches captions shifted by one line, and a file of another folder, which fits no clip."""
    (tmp_path / "captions.txt").write_text("one\ntwo\n")
    with pytest.raises(PackError, match="2 lines for 4 clips; want one caption per clip, in order"):
        list_clips(own_clips, captions=tmp_path / "captions.txt")
    with pytest.raises(
        PackError, match=r"names none of the clips; it begins with a\.mp4, they 000000\.mp4"
    ):
        list_clips(own_clips, captions=write_list(tmp_path / "captions.jsonl", [("a.mp4", "x")]))
    with pytest.raises(PackError, match=r"gone\.csv: no such file"):
        list_clips(own_clips, captions=tmp_path / "gone.csv")


def test_a_missing_video_of_a_list_is_left_out_by_name(
    own_clips: Path, codec: TinyCodec, tmp_path: Path
) -> None:
    """Catches a FileNotFoundError after hours of encoding."""
    rows = [*ROWS, ("sub/gone.mp4", "a caption")]
    summary = pack_tiny(write_list(own_clips / "list.csv", rows), tmp_path / "shards", codec)
    assert [(refusal.file, refusal.reason) for refusal in summary.refused] == [
        ("sub/gone.mp4", "no such file")
    ]


def test_the_command_takes_lists_and_caption_files(
    own_clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches `--captions FILE` taken for a suffix, and a list's output in the wrong place."""
    rows = [(f"00000{number}.mp4", f"caption {'abcd'[number]}") for number in range(4)]
    captions = write_list(tmp_path / "captions.jsonl", rows)
    listed = write_list(own_clips / "list.txt", rows)
    small = ["--codec", "tiny", "--frames", "9", "--size", "48x32", "--resize", "cover"]
    assert (
        main(
            ["pack", str(listed), *small, "--captions", str(captions), "--negative-prompt", "grey"]
        )
        == 0
    )
    reader = ShardReader(own_clips / "list-shards")
    assert reader.captions == [caption for _, caption in rows]
    assert reader.index.latent_shape == (3, 16, 6, 4)
    assert reader.index.about["negative"]["prompt"] == "grey"
    for part in ("1/2", "2/2"):
        out = ["--out", str(tmp_path / "parts"), "--captions", str(captions), "--part", part]
        assert main(["pack", str(own_clips), *small, *out]) == 0
    folders = [str(tmp_path / f"parts.part-{number}-of-2") for number in (1, 2)]
    assert main(["merge", *folders, "--out", str(tmp_path / "merged")]) == 0
    assert ShardReader(tmp_path / "merged").captions == reader.captions


def write_times(path: Path, times: list[int], rate: int) -> None:
    """A clip whose frame n is grey 5 n and shown from times[n] / rate seconds on."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "4"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(
                torch.full((32, 32, 3), 5 * number).byte().numpy(), format="rgb24"
            )
            frame.pts = time
            frame.time_base = Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def numbers(video: Tensor) -> list[int]:
    return [round(float(frame.float().mean()) / 5) for frame in video]


def test_a_rate_takes_the_nearest_frames_in_time(tmp_path: Path) -> None:
    """Catches a rate taken for a stride: with gaps in time, equal strides make motion jump."""
    write_times(tmp_path / "even.mp4", list(range(24)), 24)
    assert numbers(read_video(tmp_path / "even.mp4", 8, fps=Fraction(12))) == [
        0,
        2,
        4,
        6,
        8,
        10,
        12,
        14,
    ]
    assert numbers(read_video(tmp_path / "even.mp4", 6, fps=Fraction(16))) == [0, 1, 3, 4, 6, 7]
    assert numbers(read_video(tmp_path / "even.mp4", 24, fps=Fraction(24))) == list(range(24))
    write_times(tmp_path / "uneven.mp4", [0, 1, 2, 3, 8, 12, 13, 14, 16, 20], 32)
    assert numbers(read_video(tmp_path / "uneven.mp4", 6, fps=Fraction(8))) == [0, 3, 4, 5, 8, 9]
    assert numbers(read_video(tmp_path / "uneven.mp4", 6)) == [0, 1, 2, 3, 4, 5]


def test_a_rate_that_the_clip_does_not_have_is_refused(tmp_path: Path) -> None:
    """Catches repeated frames, which teach motion that stutters, and a clip that is too short."""
    write_times(tmp_path / "clip.mp4", list(range(16)), 16)
    with pytest.raises(
        ClipError,
        match=r"^clip\.mp4: has fewer than 24 frames a second at 0\.\d+ s, and frames are not",
    ):
        read_video(tmp_path / "clip.mp4", 9, fps=Fraction(24))
    with pytest.raises(ClipError, match=r"^clip\.mp4: has 8 video frames at 8 fps, want 9"):
        read_video(tmp_path / "clip.mp4", 9, fps=Fraction(8))


def test_cover_keeps_proportions_and_the_middle(tmp_path: Path) -> None:
    """Catches a crop of the top left corner, and faces made wide.

    The clip is black but for a white square in the middle; at half the size it must be square and
    in the middle still. Tolerance: half of white, far from what scaling and chroma leave at an
    edge.
    """
    frames = torch.zeros(1, 64, 128, 3, dtype=torch.uint8)
    frames[:, 24:40, 56:72] = 255
    write_clip(tmp_path / "clip.mp4", frames, fps=16)
    bright = read_video(tmp_path / "clip.mp4", 1, (32, 32), "cover")[0].float().mean(-1) > 127
    rows = bright.any(1).nonzero().flatten()
    columns = bright.any(0).nonzero().flatten()
    assert (int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])) == (12, 19, 12, 19)
    stretched = read_video(tmp_path / "clip.mp4", 1, (32, 32), "stretch")[0].float().mean(-1) > 127
    assert (int(stretched.any(1).sum()), int(stretched.any(0).sum())) == (8, 4)
    with pytest.raises(
        ClipError, match=r"is 64x128 \(height x width\), want 32x32; .* or pack with --resize cover"
    ):
        read_video(tmp_path / "clip.mp4", 1, (32, 32))


def test_a_clip_turned_by_its_metadata_is_named(tmp_path: Path, frames: Tensor) -> None:
    """Catches upright films packed lying on their side.

    Telephones store upright films lying down, with a note.
    """
    write_clip(tmp_path / "lying.mp4", frames, fps=16)
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    turn = [ffmpeg, "-display_rotation", "90", "-i", "lying.mp4", "-c", "copy", "turned.mp4"]
    subprocess.run(turn, cwd=tmp_path, check=True, capture_output=True)
    with pytest.raises(
        ClipError,
        match=r"^turned\.mp4: is turned by 90 degrees in its metadata.*ffmpeg -i turned\.mp4",
    ):
        read_video(tmp_path / "turned.mp4", 9)


def test_the_tiny_codec_is_fitted_to_clips_that_can_be_read(own_clips: Path) -> None:
    """Catches one damaged clip that stops the fit, and a fit to nothing."""
    (own_clips / "000000.mp4").write_bytes(b"no video")
    source = FileSource(own_clips, 9, (64, 64))
    videos = torch.stack([source.read_video(number) for number in (1, 2, 3)])
    fitted = fit_tiny_codec(source.read_video, 4)
    assert fitted.fingerprint == TinyCodec.fit(videos.float() / 255).fingerprint
    with pytest.raises(PackError, match=r"no clip to fit .*\n  000000\.mp4: cannot be read"):
        fit_tiny_codec(source.read_video, 1)
