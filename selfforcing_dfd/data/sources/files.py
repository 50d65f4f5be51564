"""Clips with captions, from a folder or a list file, in a fixed order."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from selfforcing_dfd.data.format import PackError
from selfforcing_dfd.data.source import ClipError, Item, Source, Video, keys_of, one_line
from selfforcing_dfd.data.sources.video import Resize, rate_of, read_video

CLIP = ".mp4"
TABLES = (".csv", ".jsonl")
TEXTS = (".txt", ".json", *TABLES)  # captions and lists; no clips that were forgotten


@dataclass(frozen=True, slots=True)
class Clip:
    """A video file with its caption.

    name: within the source, as the index gives it. caption: one line. problem: why the clip cannot
    be used; empty if it can.
    """

    path: Path
    name: str
    key: str
    caption: str
    problem: str = ""


class FileSource(Source):
    """Video files, of each its first frames. See `list_clips` for where clips and captions lie."""

    def __init__(
        self,
        path: Path | str,
        num_video_frames: int,
        video_size: tuple[int, int],
        *,
        resize: Resize = "none",
        fps: Fraction | None = None,
        caption_suffix: str = ".txt",
        captions: Path | None = None,
        recursive: bool = False,
    ) -> None:
        """video_size: height and width. resize, fps: see `read_video`. PackError: no clips."""
        self.path = Path(path)
        self.num_video_frames = num_video_frames
        self.video_size = video_size
        self.resize = resize
        self.fps = fps
        self.recursive = recursive
        self.clips = list_clips(path, caption_suffix, captions, recursive)

    @property
    def title(self) -> str:
        return str(self.path)

    @cached_property
    def names(self) -> list[str]:
        return [clip.name for clip in self.clips]

    @property
    def keys(self) -> list[str]:
        return [clip.key for clip in self.clips]

    @cached_property
    def about(self) -> dict[str, Any]:
        return {"num_clips": len(self.clips), "sha256": list_hash(self.clips)}

    @property
    def settings(self) -> dict[str, Any]:
        height, width = self.video_size
        return {
            "num_video_frames": self.num_video_frames,
            "height": height,
            "width": width,
            "fps": None if self.fps is None else str(self.fps),
            "resize": self.resize,
        }

    @property
    def holds(self) -> Video:
        return Video((self.num_video_frames, *self.video_size))

    @cached_property
    def skipped(self) -> list[str]:
        """Files of a folder that are neither clips nor text, such as videos in other formats."""
        if not self.path.is_dir():
            return []
        return sorted(
            path.relative_to(self.path).as_posix()
            for path in _files_in(self.path, self.recursive)
            if path.suffix.lower() not in (CLIP, *TEXTS)
        )

    def other_rate(self, fps: int) -> str:
        """A warning if frames are taken as they come, and the first clip's rate is not `fps`."""
        rate = None if self.fps is not None else rate_of(self.clips[0].path)
        if rate is None or abs(rate - fps) < 1:
            return ""
        return (
            f"{self.clips[0].name} has {float(rate):g} frames a second, and models {fps}: motion "
            f"would be {float(rate / fps):.2g} times as fast. --fps {fps} takes frames by their "
            "time stamps"
        )

    def read(self, number: int) -> Item:
        clip = self.clips[number]
        if clip.problem:
            raise ClipError(clip.name, clip.problem)
        return Item(clip.caption, self.read_video(number))

    def read_video(self, number: int) -> Tensor:
        """uint8 [T, H, W, 3], whether the clip has a caption or not. Raises ClipError."""
        path = self.clips[number].path
        return read_video(path, self.num_video_frames, self.video_size, self.resize, self.fps)


def find_clips(folder: Path | str, recursive: bool = False) -> list[Path]:
    """The `.mp4` files of a folder, and below it if `recursive`, by name. PackError: no clips."""
    folder = Path(folder)
    if not folder.is_dir():
        raise PackError(
            f"{folder}: no such folder; want one with .mp4 clips and a caption file beside each"
        )
    clips = sorted(path for path in _files_in(folder, recursive) if path.suffix.lower() == CLIP)
    if not clips:
        deeper = "" if recursive else ", or --recursive if they lie in folders below"
        raise PackError(
            f"{folder}: no .mp4 files in it; want clips with a caption file beside each{deeper}"
        )
    return clips


def _files_in(folder: Path, recursive: bool) -> Iterator[Path]:
    """All files but hidden ones."""
    found = folder.rglob("*") if recursive else folder.iterdir()
    return (path for path in found if path.is_file() and not path.name.startswith("."))


def list_clips(
    source: Path | str,
    caption_suffix: str = ".txt",
    captions: Path | None = None,
    recursive: bool = False,
) -> list[Clip]:
    """All clips of a source with their captions; those without one have a `problem`.

    source: a folder (see `find_clips`), or a list: a .csv or .jsonl file with columns or keys
    `video` and, if wanted, `caption`, or a .txt file with one video per line. Paths in it are
    relative to the list's folder, and any file that PyAV reads will do.

    Captions come from the list, else from `captions`, else from NAME + caption_suffix beside each.
    captions: a .csv or .jsonl file as above, matched by the clips' names within the source, or a
    .txt file with one caption per line in the order of the clips.

    Raises PackError for a list that cannot be read, is empty or fits no clip.
    """
    source = Path(source)
    rows = _rows(source, recursive)
    if captions is not None:
        rows = _with_captions(rows, captions)
    found = [_captioned(source, name, caption, caption_suffix) for name, caption in rows]
    keys = keys_of(name for name, _ in rows)
    return [
        Clip(path, name, key, caption, problem)
        for (name, _), key, (path, caption, problem) in zip(rows, keys, found, strict=True)
    ]


def list_hash(clips: Sequence[Clip]) -> str:
    """SHA-256 of names, captions, problems and file sizes, which a resumed run must find again."""
    digest = hashlib.sha256()
    for clip in clips:
        size = clip.path.stat().st_size if clip.path.is_file() else -1
        digest.update(json.dumps([clip.name, clip.caption, clip.problem, size]).encode() + b"\n")
    return digest.hexdigest()


def _rows(source: Path, recursive: bool) -> list[tuple[str, str | None]]:
    """Name and caption, if the source has it, of every clip."""
    if source.suffix.lower() in TABLES and source.is_file():
        rows = [(row.get("video") or "", row.get("caption")) for row in read_table(source, "video")]
        blank = [number for number, (name, _) in enumerate(rows, 1) if not name]
        if blank:
            raise PackError(f"{source}: row {blank[0]} names no video")
        return rows
    if source.suffix.lower() == ".txt" and source.is_file():
        return [(line.strip(), None) for line in _lines(source) if line.strip()]
    if source.is_file():
        raise PackError(
            f"{source}: want a folder of .mp4 clips, or a list of videos as .csv, .jsonl or .txt"
        )
    return [(path.relative_to(source).as_posix(), None) for path in find_clips(source, recursive)]


def _with_captions(
    rows: list[tuple[str, str | None]], captions: Path
) -> list[tuple[str, str | None]]:
    names = [name for name, _ in rows]
    if captions.suffix.lower() in TABLES:
        table = {
            row["video"]: row.get("caption") or ""
            for row in read_table(captions, "video", "caption")
        }
        if not set(names) & set(table):
            raise PackError(
                f"{captions}: names none of the clips; "
                f"it begins with {next(iter(table))}, they {names[0]}"
            )
        return [(name, table.get(name, "")) for name in names]
    lines = _lines(captions)
    if len(lines) != len(rows):
        raise PackError(
            f"{captions}: {len(lines)} lines for {len(rows)} clips; "
            "want one caption per clip, in order"
        )
    return list(zip(names, lines, strict=True))


def _captioned(source: Path, name: str, caption: str | None, suffix: str) -> tuple[Path, str, str]:
    """Path, caption in one line, and the problem with it, or an empty string."""
    path = (source if source.is_dir() else source.parent) / name
    if not path.is_file():
        return path, "", "no such file"
    if caption is not None:
        caption = one_line(caption)
        return path, caption, "" if caption else "no caption in the list; write one"
    beside = path.with_name(path.stem + suffix)
    try:
        caption = one_line(beside.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return path, "", f"no caption; write one into {beside.name} beside it"
    except UnicodeDecodeError as error:
        return path, "", f"{beside.name} is not UTF-8 ({error.reason}); save it as UTF-8"
    except OSError as error:
        return path, "", f"its caption {beside.name} cannot be read ({error.strerror})"
    return path, caption, "" if caption else f"the caption in {beside.name} is empty; write one"


def read_table(path: Path, *wanted: str) -> list[dict[str, str]]:
    """Rows of a .csv file with a header, or of a .jsonl file of objects.

    PackError: no rows, or one of the wanted columns is missing.
    """
    rows: list[dict[str, str]]
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
        try:
            rows = list(reader)
        except csv.Error as error:
            raise PackError(f"{path}: row {reader.line_num} is no CSV ({error})") from error
    else:
        rows = [
            _object(path, number, line)
            for number, line in enumerate(_lines(path), 1)
            if line.strip()
        ]
    if not rows:
        raise PackError(
            f"{path}: no rows; want a column or key {' and '.join(wanted)} and a row for each clip"
        )
    for number, row in enumerate(rows, 1):
        missing = [name for name in wanted if row.get(name) is None]
        if missing:
            found = ", ".join(str(name) for name in row)
            raise PackError(f"{path}: row {number} has no {' and '.join(missing)}; it has {found}")
    return rows


def _object(path: Path, number: int, line: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise PackError(f"{path}: line {number} is no JSON ({error})") from error
    if not isinstance(row, dict):
        raise PackError(
            f"{path}: line {number} is {line[:40]}, "
            'want an object such as {"video": ..., "caption": ...}'
        )
    return {name: value for name, value in row.items() if isinstance(value, str)}


def _lines(path: Path) -> list[str]:
    """Lines without their ends. Only line feeds end one: captions may hold other separators."""
    lines = [line.removesuffix("\r") for line in _text(path).split("\n")]
    return lines if lines[-1] else lines[:-1]


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise PackError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from error
    except FileNotFoundError as error:
        raise PackError(f"{path}: no such file") from error
