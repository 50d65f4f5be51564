"""Which clips a folder or list holds, and what their captions are."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from selfforcing_dfd.data.format import PackError
from selfforcing_dfd.data.levels import Level, levels_of, main_caption
from selfforcing_dfd.data.source import keys_of, one_line
from selfforcing_dfd.data.sources.tables import TABLES, lines_of, read_table
from selfforcing_dfd.data.sources.video import VIDEOS

TEXTS = (".txt", ".json", *TABLES)  # captions and lists; no clips that were forgotten
ONLY_OF_WINDOWS = "its captions are those of windows; pack with --cut as they were made"


@dataclass(frozen=True, slots=True)
class Clip:
    """A video file with its caption.

    name: within the source, as the index gives it. caption: one line. problem: why the clip cannot
    be used; empty if it can. captions: by level; none where each clip has one. Else `caption` is
    the longest of them. first: video frame with which it begins; None for a whole file, of which
    the first frames are taken. damaged: the problem is that the file cannot be decoded. windows:
    captions of windows of the file, by their first frame, where a table states some.
    """

    path: Path
    name: str
    key: str
    caption: str
    problem: str = ""
    captions: Mapping[str, str] = field(default_factory=dict)
    first: int | None = None
    damaged: bool = False
    windows: Mapping[int, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """A clip as a folder or list names it.

    captions: by level, or an only one under an empty name; None where they lie beside the clip.
    windows: such captions by the first frame of a window, which a table names NAME#FRAME.
    """

    name: str
    captions: Mapping[str, str] | None = None
    windows: Mapping[int, Mapping[str, str]] = field(default_factory=dict)


def find_clips(folder: Path | str, recursive: bool = False) -> list[Path]:
    """The videos of a folder, and below it if `recursive`, by name. PackError: no clips."""
    folder = Path(folder)
    if not folder.is_dir():
        raise PackError(
            f"{folder}: no such folder; want one with videos and a caption file beside each"
        )
    clips = sorted(path for path in files_in(folder, recursive) if path.suffix.lower() in VIDEOS)
    if not clips:
        deeper = "" if recursive else ", or --recursive if they lie in folders below"
        raise PackError(
            f"{folder}: no videos in it; want clips with a caption file beside each{deeper}"
        )
    return clips


def files_in(folder: Path, recursive: bool) -> Iterator[Path]:
    """All files but hidden ones."""
    found = folder.rglob("*") if recursive else folder.iterdir()
    return (path for path in found if path.is_file() and not path.name.startswith("."))


def list_clips(
    source: Path | str,
    caption_suffix: str = ".txt",
    captions: Path | None = None,
    recursive: bool = False,
    levels: Sequence[Level] = (),
) -> list[Clip]:
    """All clips of a source with their captions; those without one have a `problem`.

    source: a folder (see `find_clips`), or a list: a .csv or .jsonl file with columns or keys
    `video` and, if wanted, `caption`, or a .txt file with one video per line. Paths in it are
    relative to the list's folder, and any file that PyAV reads will do.

    Captions come from the list, else from `captions`, else from NAME + caption_suffix beside each.
    captions: a .csv or .jsonl file as above, matched by the clips' names within the source, or a
    .txt file with one caption per line in the order of the clips.

    levels: of captions that each clip has, in columns `short`, `medium`, `long` or in files NAME +
    `.short` + caption_suffix and so on. A table with such columns and none named `caption` is read
    so unasked. A table may also name windows, as NAME#FRAME; see `window_of`.

    Raises PackError for a list that cannot be read, is empty or fits no clip.
    """
    source = Path(source)
    rows = _rows(source, recursive, levels)
    if captions is not None:
        rows = _with_captions(rows, captions, levels)
    keys = keys_of(row.name for row in rows)
    suffixes: dict[str, str] = {level: f".{level}{caption_suffix}" for level in levels}
    suffixes = suffixes or {"": caption_suffix}
    return [_clip(source, row, key, suffixes) for row, key in zip(rows, keys, strict=True)]


def list_hash(clips: Sequence[Clip]) -> str:
    """SHA-256 of names, captions, problems and file sizes, which a resumed run must find again."""
    digest = hashlib.sha256()
    for clip in clips:
        size = clip.path.stat().st_size if clip.path.is_file() else -1
        facts = [clip.name, clip.caption, clip.problem, size]
        more = [dict(clip.captions)] if clip.captions else []
        digest.update(json.dumps(facts + more).encode() + b"\n")
    return digest.hexdigest()


def window_of(clip: Clip, first: int) -> Clip:
    """The window of a file that begins with a frame, named NAME#FRAME.

    Its captions are its own where a table states captions of windows, else the file's.
    """
    window = replace(clip, name=f"{clip.name}#{first}", first=first, windows={})
    if not clip.windows:
        return window
    stated = clip.windows.get(first)
    if stated is None:
        return replace(window, problem="no caption in the list for this window; write one")
    return _captioned(replace(window, problem=""), stated)


def chosen_clips(clips: Sequence[Clip], names: Sequence[str]) -> list[Clip]:
    """The clips of these names, in this order; NAME#FRAME is a window of NAME.

    PackError for a name that is not there.
    """
    by_name = {clip.name: clip for clip in clips}
    found = []
    for name in names:
        file, _, first = name.rpartition("#")
        if name in by_name:
            found.append(by_name[name])
        elif file in by_name and first.isdecimal():
            found.append(window_of(by_name[file], int(first)))
        else:
            raise PackError(f"{name} is not among the clips any more; put it back or choose again")
    keys = keys_of(map(name_for_key, found))
    return [replace(clip, key=key) for clip, key in zip(found, keys, strict=True)]


def name_for_key(clip: Clip) -> str:
    """`film_000081.mp4` for the window at frame 81."""
    if clip.first is None:
        return clip.name
    path = PurePosixPath(clip.name.rpartition("#")[0])
    return str(path.with_name(f"{path.stem}_{clip.first:06d}{path.suffix}"))


def _rows(source: Path, recursive: bool, levels: Sequence[Level]) -> list[Row]:
    """Every clip of a folder or list, with the captions that the list states."""
    if source.suffix.lower() in TABLES and source.is_file():
        table = read_table(source, "video")
        blank = [number for number, row in enumerate(table, 1) if not row["video"]]
        if blank:
            raise PackError(f"{source}: row {blank[0]} names no video")
        columns = _caption_columns(source, table, levels, required=False)
        return [Row(row["video"], _captions_in(row, columns)) for row in table]
    if source.suffix.lower() == ".txt" and source.is_file():
        return [Row(line.strip()) for line in lines_of(source) if line.strip()]
    if source.is_file():
        raise PackError(
            f"{source}: want a folder of videos, or a list of them as .csv, .jsonl or .txt"
        )
    return [Row(path.relative_to(source).as_posix()) for path in find_clips(source, recursive)]


def _with_captions(rows: list[Row], captions: Path, levels: Sequence[Level]) -> list[Row]:
    """The same clips with the captions of a file."""
    names = [row.name for row in rows]
    if captions.suffix.lower() not in TABLES:
        lines = lines_of(captions)
        if levels:
            raise PackError(
                f"{captions}: one caption on each line, and --levels asks for several; want a "
                f".csv or .jsonl with columns video, {', '.join(levels)}"
            )
        if len(lines) != len(rows):
            raise PackError(
                f"{captions}: {len(lines)} lines for {len(rows)} clips; "
                "want one caption per clip, in order"
            )
        return [Row(name, {"": line}) for name, line in zip(names, lines, strict=True)]
    table = read_table(captions, "video")
    columns = _caption_columns(captions, table, levels, required=True)
    found = {row["video"]: _captions_in(row, columns) for row in table}
    windows = _by_window(found)
    if not set(names) & {*found, *windows}:
        raise PackError(
            f"{captions}: names none of the clips; "
            f"it begins with {next(iter(found))}, they {names[0]}"
        )
    missing = dict.fromkeys(columns, "")
    return [Row(name, found.get(name, missing), windows.get(name, {})) for name in names]


def _by_window(
    found: Mapping[str, Mapping[str, str] | None],
) -> dict[str, dict[int, Mapping[str, str]]]:
    """Captions that a table states for NAME#FRAME, by NAME and frame."""
    windows: dict[str, dict[int, Mapping[str, str]]] = defaultdict(dict)
    for name, captions in found.items():
        file, _, first = name.rpartition("#")
        if file and first.isdecimal() and captions is not None:
            windows[file][int(first)] = captions
    return windows


def _caption_columns(
    path: Path, table: list[dict[str, str]], levels: Sequence[Level], required: bool
) -> dict[str, str]:
    """Column by level, of an only caption by an empty name; none where a list has no captions.

    PackError for a column that is wanted and not there.
    """
    there = {name for row in table for name in row}
    if not levels and "caption" not in there:
        levels = levels_of(there)
    wanted: dict[str, str] = {level: level for level in levels} or {"": "caption"}
    lacking = [column for column in wanted.values() if column not in there]
    if not lacking:
        return wanted
    if required or levels:
        raise PackError(
            f"{path}: has no column or key {' and '.join(lacking)}; it has {', '.join(there)}"
        )
    return {}


def _captions_in(row: Mapping[str, str], columns: Mapping[str, str]) -> dict[str, str] | None:
    """The captions of a table's row; None where an only caption is not stated."""
    if not columns or (columns.get("") and row.get("caption") is None):
        return None
    return {level: row.get(column) or "" for level, column in columns.items()}


def _clip(source: Path, row: Row, key: str, suffixes: Mapping[str, str]) -> Clip:
    """A clip with its captions, each in one line, and the problem with them if there is one."""
    path = (source if source.is_dir() else source.parent) / row.name
    if not path.is_file():
        return Clip(path, row.name, key, "", "no such file")
    clip = Clip(path, row.name, key, "", windows=row.windows)
    if row.captions is not None:
        found = _captioned(clip, row.captions)
        only_windows = row.windows and not any(row.captions.values())
        return replace(found, problem=ONLY_OF_WINDOWS) if only_windows else found
    captions: dict[str, str] = {}
    problems = []
    for level, suffix in suffixes.items():
        captions[level], problem = _beside(path, suffix)
        problems.append(problem)
    return replace(_captioned(clip, captions), problem=next(filter(None, problems), ""))


def _captioned(clip: Clip, stated: Mapping[str, str]) -> Clip:
    """A clip with captions of a table, each in one line, and the problem with them."""
    captions = {level: one_line(text) for level, text in stated.items()}
    missing = [_missing(level) for level, caption in captions.items() if not caption]
    problem = next(iter(missing), "")
    if "" in captions:
        return replace(clip, caption=captions[""], problem=problem)
    caption = main_caption(captions)
    return replace(clip, caption=caption, problem=problem, captions=captions)


def _missing(level: str) -> str:
    kind = f"{level} caption" if level else "caption"
    return f"no {kind} in the list; write one"


def _beside(path: Path, suffix: str) -> tuple[str, str]:
    """The caption in a file beside a clip, in one line, and the problem with it."""
    beside = path.with_name(path.stem + suffix)
    try:
        caption = one_line(beside.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "", f"no caption; write one into {beside.name} beside it"
    except UnicodeDecodeError as error:
        return "", f"{beside.name} is not UTF-8 ({error.reason}); save it as UTF-8"
    except OSError as error:
        return "", f"its caption {beside.name} cannot be read ({error.strerror})"
    return caption, "" if caption else f"the caption in {beside.name} is empty; write one"
