"""What a run achieved: its students beside data, teacher and control, in numbers and clips."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from selfforcing_dfd.common import UserError, find_device
from selfforcing_dfd.config import Config, as_dict
from selfforcing_dfd.evaluation import curves
from selfforcing_dfd.evaluation.combine import combine
from selfforcing_dfd.evaluation.document import environment, notes_on, printed, save
from selfforcing_dfd.evaluation.generate import Decode, EvaluationSet, Videos
from selfforcing_dfd.evaluation.headline import shown_first
from selfforcing_dfd.evaluation.page import Page, Sheet, colours
from selfforcing_dfd.evaluation.pictures import (
    contact_sheet,
    enlarged,
    shrunk,
    side_by_side,
    tiled,
    to_uint8,
    write_mp4,
)
from selfforcing_dfd.evaluation.scores import SCORES, read_scores, score_panels
from selfforcing_dfd.evaluation.small_decode import SmallDecode
from selfforcing_dfd.evaluation.sources import Source, run_source, runs_of, sources
from selfforcing_dfd.evaluation.tables import Row
from selfforcing_dfd.evaluation.world import World
from selfforcing_dfd.evaluation.worlds import world_of
from selfforcing_dfd.stages import arms_of, load_config, stage_of
from selfforcing_dfd.stages.config_files import to_yaml
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.training.identity import proof_of
from selfforcing_dfd.training.tracking import METRICS_FILE, read_metrics
from selfforcing_dfd.weights.runs import CONFIG_FILE, config_of, student_of

__all__ = ["combine", "sample_videos", "write_report"]

STRIP = "samples/side_by_side.mp4"


def write_report(config: Config) -> str:
    """Generate config.report.clips clips for every row and write the report beside the run.

    Rows: data; the teacher; the student that training began from; every arm, or the run itself.
    Files: report.json, .md and .html, and samples/. Returns the table with the verdict. Raises
    ConfigError for weights that are not there, and RunError for runs whose records do not prove
    what the report would say of them, before anything is generated.
    """
    started = time.perf_counter()
    folder = run_folder(config)
    world = world_of(config)
    found = sources(config, world)
    trained = {name: proof_of(run) for name, run in runs_of(config).items()}
    evaluation = world.draw(config, config.report.clips)
    decode = world.decoder(config)
    rows = []
    sheets = {}
    strip = {}
    layout = world.layout
    for source in found:
        row, first = measure(config, world, source, evaluation, decode)
        rows.append(row)
        video = f"samples/{source.name}.mp4"
        grid = tiled(first, layout.sample_columns)
        write_mp4(folder / video, enlarged(grid, layout.scale), layout.fps)
        sheet = contact_sheet(first[: layout.sheet_clips], layout.max_width)
        sheets[source.name] = Sheet(sheet, video)
        strip[source.name] = shrunk(first[: layout.compared_clips], layout.max_width)
    shown = {name: strip[name] for name in shown_first(list(strip))}
    together = side_by_side(shown, layout.compared_columns, layout.scale)
    write_mp4(folder / STRIP, together, layout.fps)
    if config.arms or not (folder / CONFIG_FILE).exists():
        (folder / CONFIG_FILE).write_text(to_yaml(config))
    device = str(find_device(config.run.device, "run.device"))
    page = Page(
        title=config.run.name,
        subtitle=_subtitle(config, world, len(evaluation)),
        tried=_tried(config),
        headline=world.headline(rows, len(evaluation)),
        background=world.background(config),
        world=world,
        findings=world.findings(rows),
        rows=rows,
        notes=[*notes_on(world, rows, len(evaluation), [config.report.seed]), *left_out(trained)],
        sheets=sheets,
        strip=STRIP,
        captions=evaluation.captions[: layout.compared_clips],
        panels=all_panels(config, world, rows),
        commands=_commands(folder, config.run.name),
        environment=environment(device, time.perf_counter() - started),
        settings=to_yaml(config),
        links={},
    )
    save(folder, page, described_run(config) | {"trained": trained})
    return printed(page, folder)


def left_out(trained: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A note for each run that left samples out because their values were not finite."""
    return [
        f"{name} left out {len(run['aside'])} samples whose values or losses were not finite."
        for name, run in trained.items()
        if run["aside"]
    ]


def described_run(config: Config) -> dict[str, Any]:
    """What report.json says of the run, for reports over several runs."""
    return {
        "seed": config.run.seed,
        "start": config.weights.student,
        "evaluation_seed": config.report.seed,
        "config": as_dict(config),
    }


def _subtitle(config: Config, world: World, num_clips: int) -> str:
    run = config.run
    return f"{world.title}, stage {run.stage}, seed {run.seed}, {num_clips} clips a row"


def _tried(config: Config) -> str:
    """One or two sentences on what was compared."""
    same = "All rows show the same captions, from the same noise."
    if not config.arms:
        return f"One run of stage {config.run.stage}, held against the data. {same}"
    updates = {arm.run.student_updates for arm in arms_of(config)}
    each = f" of {updates.pop()} student updates" if len(updates) == 1 else ""
    return f"{len(config.arms)} runs{each} from one start, held against the data. {same}"


def measure(
    config: Config, world: World, source: Source, evaluation: EvaluationSet, decode: Decode
) -> tuple[Row, torch.Tensor]:
    """A source's row, and its first clips, uint8 [n, T, H, W, 3]."""
    started = time.perf_counter()
    first: list[torch.Tensor] = []

    def watched() -> Videos:
        for videos in source.clips(evaluation, decode):
            missing = world.layout.sample_clips - sum(len(part) for part in first)
            first.append(to_uint8(videos[:missing]))
            yield videos

    measured = world.measure(watched(), evaluation.captions, config.rollout.chunk_frames)
    scores = dict(measured.scores)
    if source.go_on is not None and config.report.follow_clips:
        scores |= world.follow(config, evaluation, decode, source.go_on)
    seconds = time.perf_counter() - started
    row = Row(source.name, source.about, scores, measured.modes, seconds)
    return row, torch.cat(first)


def all_panels(config: Config, world: World, rows: Sequence[Row]) -> list[curves.Panel]:
    """What was logged and, where samples were made while training, their scores."""
    shown = colours(rows)
    files = {name: run_folder(run) / SCORES for name, run in runs_of(config).items()}
    scores = {name: read_scores(path) for name, path in files.items()}
    sampled = score_panels(scores, world.metrics, shown)
    return [*curves.panels(run_metrics(config), shown), *sampled]


def run_metrics(config: Config) -> dict[str, list[dict[str, Any]]]:
    """Lines of the metrics file of each run behind a row, where there is one."""
    files = {name: run_folder(run) / METRICS_FILE for name, run in runs_of(config).items()}
    return {name: read_metrics(path) for name, path in files.items() if path.exists()}


def sample_videos(
    run: Path,
    prompts: Sequence[str] = (),
    out: Path | None = None,
    small: SmallDecode | None = None,
) -> Path:
    """Write an mp4 with a grid of clips by a run's student, and its captions as .txt beside it.

    With arms, the last one's student. Each prompt has a line of clips; without prompts, captions
    are drawn from the data. small: decodes in place of the codec. Returns the mp4's path. Raises
    WeightsError for a folder without a run, UserError for a run that trained no transformer and for
    a prompt that the run's world has no text for.
    """
    weights = student_of(run)
    config = load_config(str(config_of(weights.parent)))
    stage = stage_of(config)
    if not stage.trains_transformers:
        raise UserError(
            f"{run} is a run of stage {stage.name}, which makes no clips by itself; name a "
            f"student's run, and this one by --decoder-weights {run}"
        )
    world = world_of(config)
    layout = world.layout
    if prompts:
        each = layout.sample_columns if len(prompts) > 1 else layout.sample_clips
        evaluation = world.ask(config, [prompt for prompt in prompts for _ in range(each)])
    else:
        evaluation = world.draw(config, layout.sample_clips)
    source = run_source("sample", config, weights)
    decode = world.decoder(config)
    decode = decode if small is None else small.beside(decode)
    parts = [to_uint8(videos) for videos in source.clips(evaluation, decode)]
    path = out or run / "sample.mp4"
    grid = tiled(torch.cat(parts), layout.sample_columns)
    write_mp4(path, enlarged(grid, layout.scale), layout.fps)
    captions = evaluation.captions
    starts = range(0, len(captions), layout.sample_columns)
    lines = [" | ".join(captions[start : start + layout.sample_columns]) for start in starts]
    path.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _commands(folder: Path, name: str) -> list[str]:
    return [
        f"python train.py --config {folder / CONFIG_FILE} run.name={name}_again",
        f"selfforcing-dfd sample --run {folder}",
    ]
