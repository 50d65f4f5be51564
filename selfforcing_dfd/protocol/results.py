"""What was measured in a protocol, method by method, and the scores that follow from it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from selfforcing_dfd.common import UserError
from selfforcing_dfd.metrics import vbench
from selfforcing_dfd.metrics.camera import (
    PoseError,
    aligned,
    find_pose_files,
    magnitudes,
    read_poses,
    spreads,
)
from selfforcing_dfd.metrics.diversity import diversity
from selfforcing_dfd.metrics.feature_files import FEWEST, Encoded, set_scores
from selfforcing_dfd.metrics.features import pooled
from selfforcing_dfd.protocol import exact
from selfforcing_dfd.protocol.measure import (
    read_alignment,
    read_encoder,
    read_features,
    read_numbers,
)
from selfforcing_dfd.protocol.plan import Cell
from selfforcing_dfd.protocol.prepared import Prepared
from selfforcing_dfd.tiny.bootstrap import Resamples, Score

CHANGE = "change."  # the last stretch of a video less its first
Unit = tuple[int, ...]
"""(prompt,) or (prompt, seed): what has one value of a score."""


@dataclass(slots=True)
class Result:
    """What is known of one method.

    cells: videos that are measured. values: score -> unit -> value, for scores that can be compared
    in pairs. sets: scores of all videos together. encoders: what made the features.
    """

    method: str
    cells: list[Cell] = field(default_factory=list)
    numbers: list[dict[str, Any]] = field(default_factory=list)
    values: dict[str, dict[Unit, float]] = field(default_factory=dict)
    sets: dict[str, Score | float] = field(default_factory=dict)
    encoders: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def score(self, name: str) -> Score:
        """Its mean over units, or its value over the whole set; NaN where it is not known.

        Intervals resample prompts with all their seeds.
        """
        if name in self.sets:
            found = self.sets[name]
            if isinstance(found, Score):
                return found
            return Score(found, math.nan, math.nan, len(self.cells))
        groups = list(by_unit(self.values.get(name, {}), "prompt").values())
        if not groups:
            return Score(math.nan, math.nan, math.nan, 0)
        every = Resamples.draw(len(groups), seed=0)
        return every.score(every.mean(torch.tensor(groups, dtype=torch.float64)))

    @property
    def names(self) -> list[str]:
        return [*self.values, *self.sets]

    def add(self, name: str, unit: Unit, value: float) -> None:
        """Note the value of a score that can be compared in pairs."""
        self.values.setdefault(name, {})[unit] = value


def by_number(cells: list[Cell]) -> dict[int, list[int]]:
    """The places of each prompt's videos, for prompts that have at least two."""
    groups: dict[int, list[int]] = defaultdict(list)
    for place, cell in enumerate(cells):
        groups[cell.prompt.number].append(place)
    return {prompt: places for prompt, places in groups.items() if len(places) > 1}


def by_unit(values: Mapping[Unit, float], unit: str) -> dict[Unit, float]:
    """One value for each unit: with `prompt` the mean over its seeds."""
    if unit == "pair":
        return dict(values)
    groups: dict[Unit, list[float]] = defaultdict(list)
    for key, value in values.items():
        groups[key[:1]].append(value)
    return {key: sum(group) / len(group) for key, group in groups.items()}


def gather(prepared: Prepared) -> dict[str, Result]:
    """All that is measured so far. Raises UserError for videos that changed since.

    The data come first: sets of features are compared with theirs.
    """
    found: dict[str, Result] = {}
    features: dict[str, dict[str, Encoded]] = {}
    names = [prepared.protocol.data, *prepared.protocol.methods]
    for name in dict.fromkeys(names):
        result = numbers_of(prepared, name)
        if result.cells:
            add_exact(result)
            add_cameras(prepared, result)
            add_vbench(prepared, result)
            features[name] = features_of(prepared, result)
            reference = features[prepared.protocol.data] if name != prepared.protocol.data else {}
            add_features(result, features[name], reference)
        else:
            features[name] = {}
        found[name] = result
    refuse_two_versions(found)
    return {name: found[name] for name in prepared.protocol.methods}


def numbers_of(prepared: Prepared, method: str) -> Result:
    """The numbers of every video of a method that is measured."""
    result = Result(method)
    values: dict[str, dict[Unit, float]] = defaultdict(dict)
    for cell in prepared.cells(method):
        path = prepared.folder.numbers(cell)
        video = prepared.video(cell)
        if not path.exists() or not video.exists():
            continue
        numbers = read_numbers(path, video)
        result.cells.append(cell)
        result.numbers.append(numbers)
        for name, value in numbers["numbers"].items():
            if value is not None:
                values[name][cell.key] = value
    result.values = dict(values)
    return result


def add_exact(result: Result) -> None:
    """The tiny world's counts, where videos were read."""
    stretches = [[exact.from_json(each) for each in found["exact"]] for found in result.numbers]
    if not all(stretches):
        return
    captions = [cell.prompt.text for cell in result.cells]
    for cell, readings in zip(result.cells, stretches, strict=True):
        for name, value in exact.of_video(readings, cell.prompt.text).items():
            result.add(name, cell.key, value)
        for name, value in exact.change_of_video(readings, cell.prompt.text).items():
            result.add(f"{CHANGE}{name}", cell.key, value)
    result.sets |= exact.counts([readings[0] for readings in stretches], captions)


def add_cameras(prepared: Prepared, result: Result) -> None:
    """Numbers between the seeds of a prompt: of the picture and, where there are some, of poses."""
    tracks = [torch.tensor(each["track"]) for each in result.numbers]
    add_spreads(result, "camera", tracks, result.cells)
    folder = prepared.protocol.methods[result.method].poses
    if not folder:
        return
    files = find_pose_files(Path(folder), [prepared.video(cell) for cell in result.cells])
    paths = []
    cells = []
    for cell, file in zip(result.cells, files, strict=True):
        try:
            poses = read_poses(file)
        except PoseError as error:
            result.failures.append(str(error))
            continue
        for name, value in magnitudes(poses).items():
            result.add(f"poses.{name}", cell.key, value)
        paths.append(aligned(poses)[:, :3, 3])
        cells.append(cell)
    add_spreads(result, "poses", paths, cells)
    result.sets["poses.failure_rate"] = 1 - len(cells) / len(files)


def add_vbench(prepared: Prepared, result: Result) -> None:
    """The numbers of VBench's tool, where it has run. UserError for results of other videos."""
    folder = prepared.folder.vbench(result.method)
    if not vbench.has_results(folder):
        return
    found = vbench.read_results(folder)
    numbers = vbench.as_shares(found)
    entries = vbench.read_layout(folder)["videos"]
    places = {entry["sha256"]: place for place, entry in enumerate(entries)}
    for cell, measured in zip(result.cells, result.numbers, strict=True):
        if measured["video"] not in places:
            raise UserError(
                f"{folder} has no results of {prepared.video(cell)} as it is now; remove it and "
                f"run selfforcing-dfd vbench --protocol {prepared.name} again"
            )
        for dimension, value in numbers[places[measured["video"]]].items():
            result.add(f"vbench.{dimension}", cell.key, value)
    result.encoders["vbench"] = {"tool": vbench.TOOL}


def add_spreads(result: Result, name: str, tracks: list[torch.Tensor], cells: list[Cell]) -> None:
    """How unlike the paths of a prompt's videos are, for prompts whose paths have one length."""
    for prompt, places in by_number(cells).items():
        group = [tracks[place] for place in places]
        if len({len(track) for track in group}) > 1:
            continue
        for score, value in spreads(torch.stack(group)).items():
            result.add(f"{name}.{score}", (prompt,), value)


def features_of(prepared: Prepared, result: Result) -> dict[str, Encoded]:
    """Features by encoder, for encoders that have seen all videos which are measured."""
    found = {}
    for text in prepared.encoders:
        files = [prepared.folder.features(cell, text) for cell in result.cells]
        if not all(file.exists() for file in files):
            continue
        name, described = read_encoder(files)
        result.encoders[name] = described
        videos = [prepared.video(cell) for cell in result.cells]
        found[name] = read_features(files, videos, [each["video"] for each in result.numbers])
        for cell, file in zip(result.cells, files, strict=True):
            alignment = read_alignment(file)
            if alignment is not None:
                result.add(f"{name}.text_alignment", cell.key, alignment)
    return found


def add_features(
    result: Result, features: Mapping[str, Encoded], reference: Mapping[str, Encoded]
) -> None:
    """Diversity of each prompt, and scores of all videos against those of the data."""
    texts = [cell.prompt.text for cell in result.cells]
    for name, encoded in features.items():
        add_diversity(result, name, encoded.frames, "")
        add_diversity(result, name, encoded.standardised, "_standardised")
        other = reference.get(name)
        enough = other is not None and min(len(encoded.files), len(other.files)) >= FEWEST
        scores, _ = set_scores(encoded, texts, other if enough else None)
        for score, value in scores.items():
            # diversity is known by prompt, and the data's own Vendi score stands in their column
            if not score.startswith("diversity") and score != "vendi_reference":
                result.sets[f"{name}.{score}"] = value


def add_diversity(result: Result, name: str, frames: torch.Tensor, ending: str) -> None:
    """How unlike the videos of each prompt are; frames: unit vectors [N, K, D] of all videos."""
    for prompt, places in by_number(result.cells).items():
        own = frames[places]
        mean = float(diversity(pooled(own)))
        result.add(f"{name}.diversity_mean{ending}", (prompt,), mean)
        result.add(f"{name}.diversity_frames{ending}", (prompt,), float(diversity(own)))


def refuse_two_versions(results: Mapping[str, Result]) -> None:
    """Raise UserError where an encoder has seen two methods' videos in two versions of it."""
    seen: dict[str, tuple[str, dict[str, Any]]] = {}
    for result in results.values():
        for name, described in result.encoders.items():
            method, before = seen.setdefault(name, (result.method, described))
            if described != before:
                raise UserError(
                    f"features {name} of {method} are by {before}, those of {result.method} by "
                    f"{described}; delete those of one method and run the protocol again"
                )
