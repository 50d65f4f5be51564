"""Sample clips of the new student, of the checkpoint and of the data, and their numbers.

All go to one file, evaluation.json. The model card is made from it and from nothing else.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from selfforcing_dfd.config import Config
from selfforcing_dfd.evaluation.generate import Decode, EvaluationSet, Videos
from selfforcing_dfd.evaluation.pictures import to_uint8, write_mp4
from selfforcing_dfd.evaluation.sources import Source, data_source, run_source, student_source
from selfforcing_dfd.evaluation.world import World
from selfforcing_dfd.evaluation.worlds import world_of
from selfforcing_dfd.journey.recipes import Plan, as_given
from selfforcing_dfd.journey.record import text_hash
from selfforcing_dfd.journey.request import Request
from selfforcing_dfd.metrics.feature_files import (
    FEWEST,
    Encoded,
    encode_files,
    encoder_of,
    scores_as_json,
    set_scores,
)
from selfforcing_dfd.metrics.files import (
    Measured,
    evaluation,
    mean_of,
    measure_file,
    stated,
    write_evaluation,
)
from selfforcing_dfd.stages.base import Start
from selfforcing_dfd.tiny.bootstrap import Score
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.weights.runs import STUDENT_FILE

STUDENT = "student"
BEFORE = "before"
DATA = "data"
ABOUT_BEFORE = "the checkpoint that the journey began with"
FEATURES = "pixels+motion"
ENCODER = "libx264, crf 18"  # of `write_mp4`
SHOWN = (
    "saturation",
    "contrast",
    "laplacian",
    "difference_by_contrast",
    "flow_top",
    "temporal_flicker",
    "seam_excess",
    "drift_saturation",
    "drift_contrast",
)
"""Of all numbers those that a model card shows."""
EXACT_WORLD = "tiny"
SHOWN_SCORES = ("valid", "moving", "coverage", "kl_prior_sample", "contrast", "speed_px")
"""Of what the tiny world counts, those that a model card shows."""


@dataclass(frozen=True, slots=True)
class Row:
    """The clips of one source. scores: what its world counts exactly, if anything."""

    files: Sequence[Path]
    measured: Sequence[Measured]
    scores: Mapping[str, Score]

    @property
    def means(self) -> dict[str, float | None]:
        """Of every number over the clips."""
        names = self.measured[0].numbers
        found = {name: mean_of([each.numbers[name] for each in self.measured]) for name in names}
        return {name: stated(value) for name, value in found.items()}


def evaluate(request: Request, plan: Plan, student_hash: str) -> Path:
    """Generate and measure the samples of every source; the path of evaluation.json.

    All sources show the same captions, from the same noise.
    """
    config = plan.student
    world = world_of(config)
    drawn = world.draw(config, request.samples)
    decode = world.decoder(config)
    rows = {
        source.name: measure(request, config, world, source, drawn, decode)
        for source in sources(plan, world)
    }
    content = evaluation(rows[STUDENT].measured, settings_of(plan, drawn, student_hash))
    content["world"] = world.name
    content["scores"] = scores_as_json(rows[STUDENT].scores)
    content["beside"] = {
        name: {"means": row.means, "scores": scores_as_json(row.scores)}
        for name, row in rows.items()
        if name != STUDENT
    }
    content["features"] = features_of(rows)
    write_evaluation(request.evaluation, content)
    return request.evaluation


def sources(plan: Plan, world: World) -> list[Source]:
    """What is measured: real clips, the checkpoint where it is a student, and the new student."""
    config = plan.student
    found = [data_source(config, world)]
    given = as_given(plan)
    if given is not None:
        start = Start(plan.checkpoint.path, plan.checkpoint.entry)
        found.append(student_source(BEFORE, ABOUT_BEFORE, given, start))
    found.append(run_source(STUDENT, config, run_folder(config) / STUDENT_FILE))
    return found


def settings_of(plan: Plan, drawn: EvaluationSet, student_hash: str) -> dict[str, Any]:
    """What has to be known to repeat the numbers."""
    config = plan.student
    return {
        "recipe": plan.recipe,
        "student_sha256": student_hash,
        "prompts": {
            "count": len(drawn),
            "sha256": text_hash("\n".join(drawn.captions)),
            "extended": False,
        },
        "seed": config.report.seed,
        "stage": config.run.stage,
        "ladder": list(config.rollout.ladder),
        "shift": config.rollout.shift,
        "noise": config.rollout.noise,
        "chunk_frames": config.rollout.chunk_frames,
        "encoder": ENCODER,
    }


def measure(
    request: Request,
    config: Config,
    world: World,
    source: Source,
    drawn: EvaluationSet,
    decode: Decode,
) -> Row:
    """Write a source's clips with their captions, and measure the files."""
    folder = request.samples_folder / source.name
    shutil.rmtree(folder, ignore_errors=True)
    files: list[Path] = []

    def written() -> Videos:
        for videos in source.clips(drawn, decode):
            for video in to_uint8(videos):
                caption = drawn.captions[len(files)]
                files.append(write_clip(folder, len(files), video, caption, world.layout.fps))
            yield videos

    chunk_frames = config.rollout.chunk_frames
    scores = world.measure(written(), drawn.captions, chunk_frames).scores
    chunk = 4 * chunk_frames
    measured = [measure_file(path, None, chunk, chunk - 3) for path in files]
    return Row(files, measured, scores)


def write_clip(folder: Path, number: int, video: Tensor, caption: str, fps: int) -> Path:
    """A clip uint8 [T, H, W, 3] as mp4, with its caption beside it."""
    path = folder / f"{number:04d}.mp4"
    write_mp4(path, video, fps)
    path.with_suffix(".txt").write_text(f"{caption}\n", encoding="utf-8")
    return path


def features_of(rows: Mapping[str, Row]) -> dict[str, Any]:
    """Diversity, and the student's clips against the data's; nothing for too few clips."""
    if len(rows[STUDENT].files) < FEWEST:
        return {}
    encoder = encoder_of(FEATURES)
    found: dict[str, Encoded] = {}
    for name in (STUDENT, DATA):
        (found[name],) = encode_files(rows[name].files, [encoder], both=True)
    prompts = [path.with_suffix(".txt").read_text() for path in rows[STUDENT].files]
    scores, _ = set_scores(found[STUDENT], prompts, found[DATA])
    described = {"encoder": encoder.described(), "scores": scores_as_json(scores)}
    return {encoder.name: described}


def card_rows(content: Mapping[str, Any]) -> dict[str, str]:
    """What a model card says was measured, from the content of evaluation.json alone."""
    settings = content["settings"]
    beside: Mapping[str, Any] = content["beside"]
    rows = {
        "clips measured": f"{settings['prompts']['count']}, seed {settings['seed']}, "
        f"metrics version {content['metrics']}"
    }
    for name in SHOWN:
        others = {key: row["means"].get(name) for key, row in beside.items()}
        rows |= row_of(name, content["means"].get(name), others)
    if content["world"] != EXACT_WORLD:
        return rows
    for name in SHOWN_SCORES:
        score = content["scores"].get(name, {})
        others = {key: row["scores"].get(name, {}).get("value") for key, row in beside.items()}
        rows |= row_of(f"counted exactly: {name}", score.get("value"), others)
    return rows


def row_of(name: str, value: float | None, others: Mapping[str, float | None]) -> dict[str, str]:
    """One number with those of the other sources; nothing where there is none."""
    if value is None:
        return {}
    known = [f"{key} {other:.3g}" for key, other in others.items() if other is not None]
    return {name.replace("_", " "): "; ".join([f"{value:.3g}", *known])}
