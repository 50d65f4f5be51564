"""What a run achieved: its students beside data, teacher and control, in numbers with intervals,
clips and curves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfforcing_dfd.common import find_device
from selfforcing_dfd.config import Config, as_dict, find_file, require, to_yaml
from selfforcing_dfd.evaluation import curves, tables
from selfforcing_dfd.evaluation.combine import combine
from selfforcing_dfd.evaluation.document import environment, notes_on, printed, save
from selfforcing_dfd.evaluation.generate import (
    EvaluationSet,
    Videos,
    data_clips,
    student_clips,
    teacher_clips,
)
from selfforcing_dfd.evaluation.page import Page, Sheet, colours
from selfforcing_dfd.evaluation.pictures import (
    GRID_CLIPS,
    GRID_COLUMNS,
    SHEET_CLIPS,
    contact_sheet,
    to_uint8,
    write_grid,
)
from selfforcing_dfd.evaluation.tables import DATA, REFERENCES, START, TEACHER, Row
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.metrics import summarise
from selfforcing_dfd.tiny.readout import Reading, read
from selfforcing_dfd.tiny.world import MODE_PRIOR, parse_caption
from selfforcing_dfd.training.build import (
    STUDENT_FILE,
    arms,
    build_chunks,
    build_ladder,
    load_network,
    run_folder,
    student_of,
)
from selfforcing_dfd.training.build_data import codec_file
from selfforcing_dfd.training.tracking import METRICS_FILE, read_metrics

__all__ = ["combine", "sample_videos", "write_report"]


@dataclass(frozen=True, slots=True)
class Source:
    """Something that makes clips: a row of the report to be."""

    name: str
    about: str
    clips: Callable[[EvaluationSet, TinyCodec], Videos]


def write_report(config: Config) -> str:
    """Generate config.report.clips clips for every row, and write report.json, .md, .html and
    samples/ beside the run.

    Rows: data; the teacher; the student that training began from; every arm, or the run itself.
    Returns the table with the verdict. Raises ConfigError for weights that are not there, before
    anything is generated.
    """
    started = time.perf_counter()
    found, folder = sources(config), run_folder(config)
    level, frames = config.data.tiny.level, config.rollout.frames
    evaluation = EvaluationSet.draw(config.report.clips, level, frames, config.model.text_dim)
    codec = TinyCodec.load(codec_file(config))
    rows, sheets = [], {}
    for source in found:
        row, first = measure(source, evaluation, codec, config.rollout.chunk_frames)
        video = f"samples/{source.name}.mp4"
        write_grid(folder / video, first, GRID_COLUMNS)
        rows.append(row)
        sheets[source.name] = Sheet(contact_sheet(first), video)
    if config.arms or not (folder / "config.yaml").exists():
        (folder / "config.yaml").write_text(to_yaml(config))
    metrics = run_metrics(config)
    page = Page(
        title=config.run.name,
        subtitle=f"Tiny world, stage {config.run.stage}, seed {config.run.seed}, {len(evaluation)} clips a row",
        findings=tables.findings(rows),
        rows=rows,
        notes=notes_on(rows, len(evaluation)),
        sheets=sheets,
        captions=evaluation.captions[:SHEET_CLIPS],
        panels=curves.panels(metrics, colours([row.name for row in rows])),
        commands=_commands(folder, config.run.name),
        environment=environment(
            str(find_device(config.run.device, "run.device")), time.perf_counter() - started
        ),
        settings=to_yaml(config),
        links={},
    )
    save(folder, page, {"seed": config.run.seed, "config": as_dict(config)})
    return printed(page, folder)


def sources(config: Config) -> list[Source]:
    """The rows of this config's report, with their networks loaded."""
    runs = {
        config_of_arm.run.name.rpartition("/")[2]: config_of_arm for config_of_arm in arms(config)
    }
    taken = [name for name in config.arms if name in REFERENCES or "/" in name]
    require(
        not taken,
        f"an arm is called {taken and taken[0]}, which the report needs for another row; rename it",
    )
    found = [Source(DATA, "rendered clips, once through the codec", data_clips)]
    if config.run.stage == "teacher":
        return [*found, teacher_source(config, str(run_folder(config) / STUDENT_FILE))]
    if config.weights.teacher:
        found.append(teacher_source(config, config.weights.teacher))
    if config.weights.student and (config.arms or config.run.stage == "dfd"):
        found.append(
            student_source(
                START, "the student that training began from", config, config.weights.student
            )
        )
    if not config.arms:
        about = f"stage {config.run.stage}, {config.run.student_updates} student updates"
        return [
            *found,
            student_source("student", about, config, str(run_folder(config) / STUDENT_FILE)),
        ]
    for name, arm in runs.items():
        about = f"{', '.join(config.arms[name]) or 'as configured'}; {arm.run.student_updates} student updates"
        found.append(student_source(name, about, arm, str(run_folder(arm) / STUDENT_FILE)))
    return found


def teacher_source(config: Config, weights: str) -> Source:
    """Many-step samples of the network in a weights file."""
    network = _frozen(config, weights)
    steps, guidance = config.report.teacher_steps, config.report.teacher_guidance

    def clips(evaluation: EvaluationSet, codec: TinyCodec) -> Videos:
        return teacher_clips(
            network,
            evaluation,
            codec,
            num_steps=steps,
            shift=config.flow.shift,
            guidance=guidance,
            description=TEACHER,
        )

    return Source(TEACHER, f"{steps} ODE steps, guidance {guidance:g}", clips)


def student_source(name: str, about: str, config: Config, weights: str) -> Source:
    """Rollouts of the network in a weights file, with the ladder, chunks and window of its config."""
    network = _frozen(config, weights)

    def clips(evaluation: EvaluationSet, codec: TinyCodec) -> Videos:
        return student_clips(
            network,
            evaluation,
            codec,
            ladder=build_ladder(config),
            chunks=build_chunks(config),
            sink=config.rollout.sink,
            window=config.rollout.window or None,
            description=name,
        )

    return Source(name, about, clips)


def _frozen(config: Config, weights: str) -> WanTransformer:
    require(
        find_file(weights).is_file(),
        f"no weights at {weights}; train them first, or correct the path",
    )
    return load_network(
        config.model, weights, find_device(config.run.device, "run.device")
    ).requires_grad_(False)


def measure(
    source: Source, evaluation: EvaluationSet, codec: TinyCodec, chunk_frames: int
) -> tuple[Row, Tensor]:
    """A source's row, and its first clips, uint8 [16, T, 64, 64, 3]."""
    started, readings, first = time.perf_counter(), [], torch.empty(0, dtype=torch.uint8)
    for videos in source.clips(evaluation, codec):
        readings.append(read(videos, chunk_frames))
        first = torch.cat([first, to_uint8(videos)])[:GRID_CLIPS]
    reading = Reading(
        *(torch.cat([getattr(part, f.name) for part in readings]) for f in fields(Reading))
    )
    scores = tables.stated(summarise(reading, evaluation.captions))
    modes = torch.bincount(reading.mode[reading.valid], minlength=len(MODE_PRIOR)).tolist()
    return Row(
        source.name, source.about, scores, tuple(modes), time.perf_counter() - started
    ), first


def run_metrics(config: Config) -> dict[str, list[dict[str, Any]]]:
    """Lines of the metrics file of each run behind a row, where there is one."""
    alone = TEACHER if config.run.stage == "teacher" else "student"
    named = {name: config.run.name + "/" + name for name in config.arms} or {alone: config.run.name}
    files = {name: Path(config.run.out) / run / METRICS_FILE for name, run in named.items()}
    return {name: read_metrics(path) for name, path in files.items() if path.exists()}


def sample_videos(run: Path, prompts: Sequence[str] = (), out: Path | None = None) -> Path:
    """Write one mp4 with a grid of clips by a run's student, and their captions in a .txt beside
    it; the mp4's path.

    With arms, the last one's student. Each prompt has a line of clips; without prompts, captions
    are drawn from the data law. Raises ConfigError for a folder without a run, ValueError for a
    prompt that names nothing of the world.
    """
    config, weights = student_of(run)
    for prompt in prompts:
        if not parse_caption(prompt):
            raise ValueError(
                f"prompt {prompt!r} names nothing of the tiny world; try 'a disc moves', or square or cross"
            )
    frames, width = config.rollout.frames, config.model.text_dim
    if prompts:
        each = GRID_COLUMNS if len(prompts) > 1 else GRID_CLIPS
        asked = [prompt for prompt in prompts for _ in range(each)]
        evaluation = EvaluationSet.of_captions(asked, frames, width)
    else:
        evaluation = EvaluationSet.draw(GRID_CLIPS, config.data.tiny.level, frames, width)
    if config.run.stage == "teacher":
        source = teacher_source(config, str(weights))
    else:
        source = student_source("sample", "", config, str(weights))
    videos = torch.cat(
        [to_uint8(part) for part in source.clips(evaluation, TinyCodec.load(codec_file(config)))]
    )
    path = out or run / "sample.mp4"
    write_grid(path, videos, GRID_COLUMNS)
    lines = list(_lines_of(evaluation.captions, GRID_COLUMNS))
    path.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _lines_of(captions: Iterable[str], columns: int) -> Iterable[str]:
    """The captions of each line of the grid, from left to right."""
    left = iter(captions)
    while line := list(islice(left, columns)):
        yield " | ".join(line)


def _commands(folder: Path, name: str) -> list[str]:
    return [
        f"python train.py --config {folder / 'config.yaml'} run.name={name}_again",
        f"python -m selfforcing_dfd sample --run {folder}",
    ]
