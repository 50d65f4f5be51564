"""One feature vector for each clip, of a few of its frames, into a file that grows row by row."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from selfforcing_dfd.common import UserError, atomic_file, sha256_of, sync
from selfforcing_dfd.config import ranged
from selfforcing_dfd.curate.folder import (
    CLIPS,
    EMBED,
    FEATURES,
    Embedded,
    read_embedded,
    write_json,
)
from selfforcing_dfd.curate.intake import FrameReader, Intake, Looks, by_file
from selfforcing_dfd.curate.progress import ProgressFile, batches, names_hash
from selfforcing_dfd.data.source import ClipError
from selfforcing_dfd.data.sources.listing import Clip
from selfforcing_dfd.data.sources.video import rate_of
from selfforcing_dfd.metrics.feature_files import encoder_of
from selfforcing_dfd.metrics.features import Encoder, Sampled, SamplePlan, unit
from selfforcing_dfd.processes.engine import HERE, Engine

FILES_AT_ONCE = 32  # between two entries in the progress file, each of which waits for the disk
BLACK = 64  # pixels, of the frames that tell how long a vector is

Rows = np.memmap[Any, Any]


@dataclass(frozen=True, slots=True)
class EmbedSettings:
    """features: encoder, as `evaluate --features` names it. pictures: frames of each clip."""

    features: str = "pixels+motion"
    pictures: int = ranged(3, 1, 64)


def key_frames(num_frames: int, pictures: int) -> list[int]:
    """The middle frames of equal parts of a clip, which has at least as many frames."""
    return [(2 * part + 1) * num_frames // (2 * pictures) for part in range(pictures)]


@cache
def loaded_encoder(features: str, device: str) -> Encoder:
    """Once in each process."""
    return encoder_of(features, device)


@dataclass(frozen=True)
class FileEmbedder:
    """Embeds the clips of one file. It can be sent to another process, which loads the encoder."""

    settings: EmbedSettings
    looks: Looks
    device: str

    def __call__(self, clips: Sequence[Clip]) -> list[np.ndarray | str]:
        """For each clip its unit vector [D] float32, or why there is none."""
        encoder = loaded_encoder(self.settings.features, self.device)
        at = key_frames(self.looks.num_frames, self.settings.pictures)
        found: list[np.ndarray | str] = []
        reader: FrameReader | None = None
        for clip in clips:
            try:
                plan = SamplePlan(at, self.looks.num_frames, self._rate(clip))
                reader = reader or FrameReader(self.looks, plan.wanted)
                frames = dict(zip(plan.wanted, reader.read(clip), strict=True))
                found.append(vector_of(encoder, clip.name, plan.take(frames)))
            except ClipError as error:
                found.append(error.reason)
        return found

    def _rate(self, clip: Clip) -> float:
        rate = self.looks.fps or rate_of(clip.path)
        if not rate:
            raise ClipError(clip.name, "states no frames a second; give --fps")
        return float(rate)


def vector_of(encoder: Encoder, name: str, clip: Sampled) -> np.ndarray:
    """[D] float32: the mean of the frames' features, as they are, brought to length 1.

    ClipError for a clip that the encoder cannot take, such as one that is too small.
    """
    try:
        vector = unit(encoder(clip).float().mean(dim=0))
    except ValueError as error:
        raise ClipError(name, f"{error}; leave it out") from error
    if not vector.isfinite().all():
        raise ClipError(name, "its features are not finite; ask for more --frames or leave it out")
    return np.asarray(vector.numpy(), dtype=np.float32)


def dim_of(encoder: Encoder) -> int:
    """The length of an encoder's vectors, by a look at a black clip."""
    black = torch.zeros(1, BLACK, BLACK, 3, dtype=torch.uint8)
    return int(encoder(Sampled(black, black, black, 1.0)).shape[1])


def embed_clips(
    intake: Intake,
    clips: Sequence[Clip],
    folder: Path,
    settings: EmbedSettings,
    *,
    device: str = "cpu",
    engine: Engine = HERE,
    overwrite: bool = False,
) -> Embedded:
    """Write features of all clips into a curation folder.

    Rows are on disk as they come, and the same call goes on after a kill. Neither that nor the
    engine changes a byte. Raises UserError for a folder with features, and for one
    that was begun with other settings.
    """
    unfinished = Unfinished(folder)
    unfinished.begin(overwrite)
    encoder = loaded_encoder(settings.features, device)
    dim = dim_of(encoder)
    about = {
        "encoder": encoder.described(),
        "features": settings.features,
        "pictures": settings.pictures,
        "intake": intake.to_fields(),
        "dim": dim,
        "clips": names_hash(clip.name for clip in clips),
    }
    progress = ProgressFile(unfinished.journal, about)
    rows = unfinished.open_rows((len(clips), dim), new=not progress.done)
    files = by_file(clips)[sum(line["files"] for line in progress.done) :]
    make = FileEmbedder(settings, Looks(intake.num_frames, intake.fps, 0), device)
    fill(rows, progress, engine.each_in_order(make, files))
    problems = {int(row): text for line in progress.done for row, text in line["problems"].items()}
    if len(problems) == len(clips):
        raise UserError(f"no clip of {intake.source} can be used; the first: {problems[0]}")
    about["source"] = os.path.relpath(intake.source.resolve(), folder.resolve())
    unfinished.end(about, clips, problems)
    return read_embedded(folder)


def fill(rows: Rows, progress: ProgressFile, results: Iterator[list[np.ndarray | str]]) -> None:
    """Write what each file gave to the next rows, and enter it once it is on disk."""
    first = sum(line["clips"] for line in progress.done)
    with tqdm(total=len(rows), initial=first, desc="features", unit="clip", disable=None) as bar:
        for some in batches(results, FILES_AT_ONCE):
            found = [one for of_file in some for one in of_file]
            problems = store(rows, first, found)
            progress.add({"files": len(some), "clips": len(found), "problems": problems})
            first += len(found)
            bar.update(len(found))


def store(rows: Rows, first: int, found: Sequence[np.ndarray | str]) -> dict[int, str]:
    """Write vectors to their rows, from `first` on; the problems by row. They are then on disk."""
    problems = {}
    for row, one in enumerate(found, first):
        if isinstance(one, str):
            problems[row] = one
        else:
            rows[row] = one
    rows.flush()
    return problems


@dataclass(frozen=True)
class Unfinished:
    """The files of features that are being made; `embed.json` comes last and says all is there."""

    folder: Path

    @property
    def journal(self) -> Path:
        return self.folder / f"{EMBED}.partial"

    @property
    def rows(self) -> Path:
        return self.folder / f"{FEATURES}.partial"

    def begin(self, overwrite: bool) -> None:
        """UserError if there are features already, unless they are to be replaced."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for path in (self.folder / EMBED, self.rows, self.journal):
                path.unlink(missing_ok=True)
        elif (self.folder / EMBED).exists():
            raise UserError(
                f"{self.folder} holds features; choose another --out, or replace them with "
                "--overwrite"
            )

    def open_rows(self, shape: tuple[int, int], new: bool) -> Rows:
        """Zeros, or the rows of a run that goes on, renamed or not."""
        if new:
            return np.lib.format.open_memmap(self.rows, "w+", np.float32, shape)
        path = self.rows if self.rows.exists() else self.folder / FEATURES
        if not path.exists():
            raise UserError(f"{self.rows} is gone; start again with --overwrite")
        return np.lib.format.open_memmap(path, "r+")

    def end(
        self, about: Mapping[str, Any], clips: Sequence[Clip], problems: dict[int, str]
    ) -> None:
        """Give the rows their name, and write what they are."""
        with atomic_file(self.folder / CLIPS) as file:
            lines = []
            for row, clip in enumerate(clips):
                problem = {"problem": problems[row]} if row in problems else {}
                lines.append(json.dumps({"video": clip.name, **problem}, ensure_ascii=False))
            file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        if self.rows.exists():
            sync(self.rows)
            self.rows.replace(self.folder / FEATURES)
            sync(self.folder)
        write_json(
            self.folder / EMBED, {**about, "sha256_of_rows": sha256_of(self.folder / FEATURES)}
        )
        self.journal.unlink()
