"""A short, a medium and a long caption for each clip, as a table that `pack --captions` reads."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from selfforcing_dfd import rng
from selfforcing_dfd.common import UserError, atomic_file
from selfforcing_dfd.curate.captioners import Captioner, Reply
from selfforcing_dfd.curate.intake import FrameReader, Looks
from selfforcing_dfd.curate.progress import ProgressFile, batches, names_hash
from selfforcing_dfd.curate.replies import Parsed, parse
from selfforcing_dfd.data.ahead import in_order
from selfforcing_dfd.data.levels import LEVELS, Level
from selfforcing_dfd.data.source import ClipError
from selfforcing_dfd.data.sources.listing import Clip
from selfforcing_dfd.processes.engine import HERE, Engine

MOST_MADE_UP = 0.05  # share of captions of one level, beyond which something is wrong
ASKED = 2  # times, where a reply holds no text
PORTION = 2  # clips that another process gets at once, for each of its threads


@dataclass(frozen=True, slots=True)
class CaptionSummary:
    """left_out: file and reason. made_up: by level, how many captions the model did not write."""

    table: Path
    num_captioned: int
    left_out: tuple[tuple[str, str], ...]
    made_up: dict[Level, int]

    def share(self, level: Level) -> float:
        return self.made_up[level] / max(self.num_captioned, 1)


def caption_clips(
    clips: Sequence[Clip],
    captioner: Captioner,
    out: Path,
    looks: Looks,
    *,
    seed: int = 0,
    num_workers: int = 4,
    engine: Engine = HERE,
    overwrite: bool = False,
) -> CaptionSummary:
    """Write the table `out`: a row of `video`, `short`, `medium`, `long` for each clip.

    Rows are kept in OUT.partial as they come, and the same call goes on with them; a finished table
    of the same job is left as it is. num_workers: clips that each process of the engine describes
    at once. Neither changes a byte. Raises UserError for a table of another job, and if nothing can
    answer.
    """
    partial = out.with_name(f"{out.name}.partial")
    if overwrite:
        partial.unlink(missing_ok=True)
    elif out.exists():
        raise UserError(f"{out} exists; choose another --out, or replace it with --overwrite")
    progress = ProgressFile(partial, job_of(clips, captioner, looks, seed))
    first = len(progress.done)
    reader = FrameReader(looks, places_shown(looks, captioner.num_pictures))
    describer = Describer(captioner, reader, seed, num_workers)
    bar = tqdm(total=len(clips), initial=first, desc="captions", unit="clip", disable=None)
    with bar:
        for row in rows_of(describer, clips[first:], engine):
            progress.add(row)
            bar.update()
    with atomic_file(out) as file:
        rows = (json.dumps(row, ensure_ascii=False) for row in progress.done)
        file.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    partial.unlink()
    return summary_of(out, progress.done)


@dataclass(frozen=True)
class Describer:
    """Describes clips, some at once. It can be sent to another process, where it opens videos
    anew.
    """

    captioner: Captioner
    reader: FrameReader
    seed: int
    num_workers: int

    def __call__(self, clips: Sequence[Clip]) -> list[dict[str, Any]]:
        """The table's rows of the clips."""
        return list(in_order(self.row, clips, self.num_workers))

    def row(self, clip: Clip) -> dict[str, Any]:
        return row_of(clip, self.captioner, self.reader, self.seed)


def rows_of(
    describer: Describer, clips: Sequence[Clip], engine: Engine
) -> Iterator[dict[str, Any]]:
    """The table's rows in order: one by one where they are made here, else in portions."""
    if engine.is_here:
        yield from in_order(describer.row, clips, describer.num_workers)
        return
    size = PORTION * max(describer.num_workers, 1)
    for rows in engine.each_in_order(describer, batches(iter(clips), size)):
        yield from rows


def job_of(clips: Sequence[Clip], captioner: Captioner, looks: Looks, seed: int) -> dict[str, Any]:
    """All that decides the captions, except the clips' content and chance within the server."""
    return {
        "captioner": captioner.name,
        "num_pictures": captioner.num_pictures,
        "num_frames": looks.num_frames,
        "fps": str(looks.fps),
        "longest": looks.longest,
        "seed": seed,
        "clips": names_hash(clip.name for clip in clips),
    }


def row_of(clip: Clip, captioner: Captioner, reader: FrameReader, seed: int) -> dict[str, Any]:
    """The table's row of one clip; a clip that cannot be described has a `problem`."""
    try:
        pictures = list(reader.read(clip).numpy())
    except ClipError as error:
        return {"video": clip.name, **dict.fromkeys(LEVELS, ""), "problem": error.reason}
    parsed = ask(clip, captioner, pictures, seed)
    if parsed is None:
        problem = f"{captioner.name} wrote nothing about it"
        return {"video": clip.name, **dict.fromkeys(LEVELS, ""), "problem": problem}
    made_up = " ".join(parsed.made_up)
    return {"video": clip.name, **parsed.captions, "captioner": captioner.name, "made_up": made_up}


def ask(
    clip: Clip, captioner: Captioner, pictures: Sequence[np.ndarray], seed: int
) -> Parsed | None:
    """The captions of a clip; the seed of each request depends on the clip's name alone."""
    name = int.from_bytes(hashlib.sha256(clip.name.encode()).digest()[:7], "big")
    for attempt in range(ASKED):
        drawn = rng.stream_seed(seed, "caption", name, attempt) % 2**31
        reply: Reply = captioner.describe(pictures, drawn)
        parsed = parse(reply.text, reply.finished)
        if parsed is not None:
            return parsed
    return None


def places_shown(looks: Looks, num_pictures: int) -> list[int]:
    """The frames of a clip that are shown, evenly spaced; 0 pictures are all frames."""
    if not num_pictures:
        return list(range(looks.num_frames))
    even = torch.linspace(0, looks.num_frames - 1, num_pictures)
    return sorted({round(float(place)) for place in even})


def summary_of(table: Path, rows: Sequence[dict[str, Any]]) -> CaptionSummary:
    left_out = tuple((row["video"], row["problem"]) for row in rows if "problem" in row)
    count = Counter(level for row in rows for level in row.get("made_up", "").split())
    made_up = {level: count[level] for level in LEVELS}
    return CaptionSummary(table, len(rows) - len(left_out), left_out, made_up)
