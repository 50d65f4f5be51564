"""What is measured of a run: every kept student in free rollouts, what was logged, and streams."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from selfforcing_dfd.benchmark.table import git_commit
from selfforcing_dfd.common import atomic_file, find_file
from selfforcing_dfd.config import Config, as_dict
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.evaluation import tables
from selfforcing_dfd.evaluation.generate import FewSteps, ODEAtEachStep, ODESteps
from selfforcing_dfd.evaluation.report import measure
from selfforcing_dfd.evaluation.sources import (
    Source,
    causal_source,
    data_source,
    student_source,
    teacher_source,
)
from selfforcing_dfd.evaluation.tables import DATA, START, TEACHER
from selfforcing_dfd.evaluation.worlds import world_of
from selfforcing_dfd.stages import stage_of
from selfforcing_dfd.stages.base import (
    FlowConfig,
    Start,
    causal_start,
    ladder_of,
    student_start,
    teacher_start,
)
from selfforcing_dfd.streaming.load import load_settings, load_stream_model
from selfforcing_dfd.streaming.session import StreamSession
from selfforcing_dfd.study.plan import (
    CAUSAL,
    CAUSAL_FEW,
    IDEAL_STEPS,
    IDEALS,
    Plan,
    StudyRun,
    is_bidirectional,
)
from selfforcing_dfd.tiny.codec import TIME
from selfforcing_dfd.tiny.metrics import summarise
from selfforcing_dfd.tiny.readout import read
from selfforcing_dfd.training.compare import differences
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.training.same_run import default_settings
from selfforcing_dfd.training.state import leaves
from selfforcing_dfd.training.tracking import METRICS_FILE, read_metrics
from selfforcing_dfd.weights.runs import STUDENT_FILE

POINTS = "points"  # folder of the kept students of a run
GAPS = ("gap", "error")  # E|anchor - G|^2: of Eq. 7, and as regression logs it
GUARDS = ("saturation_ratio", "contrast_ratio", "sharpness_ratio", "motion_ratio", "spread_ratio")
MAY_DIFFER = (
    "run.out",
    "run.device",
    "run.gpus",
    "run.retries",
    "run.timeout_s",
    "model.shard_ranks",
    "model.sequence_ranks",
    "model.activation_checkpointing",
    "model.gradient_checkpointing",  # what it was called before
    "data.workers",
    "checkpoint.keep",
    "checkpoint.background",
    "log.",
    "base",
)
# of weights their content is compared, not where they lie
WEIGHT_FILES = ("weights.student:", "weights.teacher:", "weights.fake:", "weights.causal:")
START_ROLES = ("student",)
STREAM_SCORES = ("valid", "saturation", "contrast", "speed_px", "jitter_px", "seam_excess_px")


def measure_run(plan: Plan, run: StudyRun) -> dict[str, Any]:
    """The result of a finished run, ready for JSON."""
    config = run.config
    folder = run_folder(config)
    lines = read_metrics(folder / METRICS_FILE)
    points = []
    for update in run.updates:
        name = f"{run.name} at {update}"
        start = Start(str(point_file(config, update)))
        row = measure_row(config, student_source(name, about_run(config), config, start))
        spent = sum(line["core_seconds"] for line in lines if line["student_update"] <= update)
        points.append({"student_update": update, "core_seconds": spent, "row": row})
    result = {
        "start": run.start,
        "draw": run.draw,
        "arm": run.arm,
        "about": about_run(config),
        **provenance(config),
        "needs_noise": bool(stage_of(config).needs_noise(config)),
        "points": points,
        "log": logged(lines),
    }
    if run.streams:
        result["stream"] = stream_scores(plan, config, folder / STUDENT_FILE)
    return result


def measure_row(config: Config, source: Source) -> dict[str, Any]:
    """All scores of a source's free rollouts, and of its follow test, as a report's row."""
    world = world_of(config)
    evaluation = world.draw(config, config.report.clips)
    row, _ = measure(config, world, source, evaluation, world.decoder(config))
    return tables.to_json(row)


def references(config: Config) -> dict[str, Source]:
    """The rows that are the same for all starts."""
    return {
        DATA: data_source(config, world_of(config)),
        TEACHER: teacher_source(TEACHER, config, teacher_start(config)),
    }


def causal_references(config: Config) -> dict[str, Source]:
    """The rows of a start's causal teacher; none where it has none."""
    found: dict[str, Source] = {}
    causal = causal_start(config)
    if is_bidirectional(config):
        return found
    if causal.path and find_file(causal.path).exists():
        steps = config.report.teacher_steps
        ode = ODESteps(steps, config.of(FlowConfig).shift)
        found[CAUSAL] = causal_source(CAUSAL, f"{steps} ODE steps", config, causal, ode)
        untrained = FewSteps(ladder_of(config), keeps_noise=True)
        about = "itself in the student's steps, untrained"
        found[CAUSAL_FEW] = causal_source(CAUSAL_FEW, about, config, causal, untrained)
        for name, keeps_noise in IDEALS.items():
            about = "its ODE at each step of the ladder"
            few_steps = FewSteps(ladder_of(config), keeps_noise)
            ideal = ODEAtEachStep(few_steps, IDEAL_STEPS, ode.shift)
            found[name] = causal_source(name, about, config, causal, ideal)
    return found


def measure_reference(config: Config, source: Source, roles: Sequence[str]) -> dict[str, Any]:
    return {**provenance(config, roles), "row": measure_row(config, source)}


def measure_start(plan: Plan, config: Config) -> dict[str, Any]:
    """The student that a start's runs begin from, and its free streams if it can go on."""
    start = student_start(config)
    source = student_source(START, "the student that training began from", config, start)
    result = measure_reference(config, source, START_ROLES)
    if is_bidirectional(config):
        return result | {"stream": []}
    return result | {"stream": stream_scores(plan, config, find_file(start.path))}


def point_file(config: Config, update: int) -> Path:
    """Where the averaged student after so many student updates is kept."""
    return run_folder(config) / POINTS / f"{update:06d}.safetensors"


def logged(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """The gap and the guards' ratios of each student update, by name."""
    by_name: dict[str, list[float | None]] = defaultdict(list)
    for line in lines:
        if line["kind"] == "student":
            gap = next((line[name] for name in GAPS if name in line), None)
            by_name["gap"].append(gap)
            for name in GUARDS:
                if name in line:
                    by_name[name].append(line[name])
    return dict(by_name)


def stream_scores(plan: Plan, config: Config, student: Path) -> list[dict[str, float | None]]:
    """Scores of free streams, one training length after the other.

    The student streams as the tiny world's preset says. With given frames, those of held-out real
    clips. A later length leaves out its first three video frames, so that each is read like a
    training clip.
    """
    model = load_stream_model(checkpoint=str(student))
    session_settings = load_settings(default="tiny")
    world = world_of(config)
    drawn = world.draw(config, plan.stream.prompts)
    captions = drawn.captions
    begun = [None] * len(captions) if drawn.given is None else world.decoder(config)(drawn.given)
    session = StreamSession(model, captions[0], session_settings, context=begun[0])
    chunk_frames = config.rollout.chunk_frames
    chunks = config.rollout.frames // chunk_frames
    windows: list[list[torch.Tensor]] = [[] for _ in range(plan.stream.windows)]
    for number, caption in enumerate(captions):
        session.reset(caption, seed=plan.evaluation_seed + number, context=begun[number])
        for window, videos in enumerate(windows):
            frames = torch.cat([session.next_chunk().frames for _ in range(chunks)])
            videos.append(frames[TIME - 1 :] if window else frames)
    found = []
    for videos in windows:
        reading = read(torch.stack(videos).float() / 255, chunk_frames)
        scores = summarise(reading, captions)
        values = {key: scores[key].value for key in STREAM_SCORES}
        found.append({key: each if math.isfinite(each) else None for key, each in values.items()})
    return found


def provenance(config: Config, roles: Sequence[str] | None = None) -> dict[str, Any]:
    """What a result was made with: settings, weights, data and code.

    roles: of the weights that matter; None for those that the stage starts from.
    """
    named = config.weights
    paths = {role: start.path for role, start in stage_of(config).starts(config).items()}
    if roles is not None:
        known = {"student": named.student, "teacher": named.teacher, "causal": named.causal}
        paths = {role: known[role] for role in roles}
    weights = {}
    for role, name in paths.items():
        if find_file(name).is_file():
            weights[role] = hashlib.sha256(find_file(name).read_bytes()).hexdigest()[:16]
    return {
        "settings": settings_of(config),
        "weights": weights,
        "data": clips_of(config),
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def clips_of(config: Config) -> str:
    """A fingerprint of the clips that a run sees, and of their noise if it starts from it.

    Noise may be added to shards later, for other runs.
    """
    needs_noise = bool(stage_of(config).needs_noise(config))
    digest = hashlib.sha256()
    for entry in ShardReader(config.data.shards).index.samples:
        for name, member in sorted(entry.members.items()):
            if needs_noise or not name.startswith("noise"):
                digest.update(f"{entry.key} {name} {member.crc32}\n".encode())
    return digest.hexdigest()[:16]


def settings_of(config: Config) -> dict[str, Any]:
    """All settings by dotted name, but for those that change nothing."""
    plain = json.loads(json.dumps(leaves(as_dict(config))))
    return {key: value for key, value in plain.items() if not key.startswith(MAY_DIFFER)}


def stale(
    result: Mapping[str, Any], config: Config, roles: Sequence[str] | None, ignored: tuple[str, ...]
) -> str:
    """The first difference between what made a result and what would make it now; empty if none.

    roles: see `provenance`. ignored: how settings begin that do not matter. A setting that came
    with a later version had its default before.
    """
    now = provenance(config, roles)
    later = default_settings().keys() & now["settings"].keys() - result["settings"].keys()
    before = {key: default_settings()[key] for key in later} | dict(result["settings"])
    ignored += (*WEIGHT_FILES, *MAY_DIFFER)
    for was, part in ((before, "settings"), (result["weights"], "weights")):
        lines = differences(was, now[part], "there")
        found = [line for line in lines if not line.startswith(ignored)]
        if found:
            return found[0]
    return "" if result["data"] == now["data"] else "the shards hold other clips"


def in_short(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a result was made with: settings that are not the defaults, weights, data and code."""
    defaults = default_settings()
    settings = result["settings"]
    own = {key: value for key, value in settings.items() if defaults.get(key, key) != value}
    return {"settings": own} | {key: result[key] for key in ("weights", "data", "commit")}


def about_run(config: Config) -> str:
    """How a run trained its student, in words."""
    return f"{stage_of(config).about(config)}; {config.run.student_updates} student updates"


@cache
def commit() -> str:
    """The commit of the running code; empty outside of a repository."""
    return git_commit() or ""


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(result, allow_nan=False) + "\n", encoding="utf-8")
