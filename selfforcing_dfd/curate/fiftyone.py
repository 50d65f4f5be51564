"""Candidates as a dataset for FiftyOne, which is not needed for it.

The layout is the plain one of `fiftyone.types.FiftyOneDataset`: `metadata.json` without a version,
and `samples.json` with one object for each video.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from selfforcing_dfd.common import atomic_folder
from selfforcing_dfd.curate.folder import Embedded
from selfforcing_dfd.curate.picks import Sheet
from selfforcing_dfd.data.sources.listing import Clip

FRAMES = "frames.json"  # labels of frames, of which there are none


def write_dataset(
    folder: Path,
    embedded: Embedded,
    sheets: Sequence[Sheet],
    picks: Mapping[int, Sequence[int]] = MappingProxyType({}),
) -> None:
    """Write the candidates of all clusters; those that are picked have the tag `picked`.

    Paths of videos are relative to the folder. An earlier dataset in its place is replaced.
    """
    clips = embedded.clips()
    samples = [sample for sheet in sheets for sample in samples_of(folder, clips, sheet, picks)]
    files = {
        "metadata.json": {"media_type": "video", "info": {"curation": embedded.seal}},
        "samples.json": {"samples": samples},
        FRAMES: {"frames": {}},
    }
    with atomic_folder(folder) as partial:
        for name, content in files.items():
            text = json.dumps(content, indent=1, ensure_ascii=False)
            (partial / name).write_text(text + "\n", encoding="utf-8")


def samples_of(
    folder: Path, clips: Sequence[Clip], sheet: Sheet, picks: Mapping[int, Sequence[int]]
) -> list[dict[str, Any]]:
    """The candidates of a cluster that can be read, as FiftyOne's samples."""
    readable = [one for one in sheet.candidates if not one.problem]
    picked = picks.get(sheet.cluster, ())
    samples = []
    for one in readable:
        clip = clips[one.row]
        tags = ["picked"] if one.number in picked else []
        sample = {
            "filepath": os.path.relpath(clip.path, folder.resolve()),
            "tags": tags,
            "frames": FRAMES,
            "cluster": sheet.cluster,
            "candidate": one.number,
            "distance": one.distance,
            "clip": one.clip,
            "first_frame": clip.first or 0,
            "fault": one.fault or None,
        }
        samples.append(sample)
    return samples
