"""What fewer bits cost in picture: the shipped students in several number formats, measured.

Clips of one student differ in nothing but arithmetic: captions, noise and weights are the same.
8-bit floats are emulated, see `models.fp8_emulated`, so that neither a GPU nor torchao is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfforcing_dfd.config import Config
from selfforcing_dfd.evaluation.generate import (
    Decode,
    EvaluationSet,
    FewSteps,
    Videos,
    causal_clips,
)
from selfforcing_dfd.evaluation.tables import number
from selfforcing_dfd.evaluation.worlds import TINY
from selfforcing_dfd.models.fp8_emulated import emulate_fp8
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.rollout import plan_chunks
from selfforcing_dfd.stages import load_config
from selfforcing_dfd.streaming.load import (
    TINY_DMD_STUDENT,
    TINY_STUDENT,
    load_student,
    student_recipe,
)
from selfforcing_dfd.tiny.bootstrap import Score

STUDENTS = {"stable": TINY_STUDENT, "DMD": TINY_DMD_STUDENT}
CONFIG = "tiny/dmd.yaml"
"""Whose captions and noise are taken: those of the tiny world's report, with short captions."""
SHOWN = {
    "valid": "valid",
    "modes": "modes of 72",
    "kl_prior_sample": "KL",
    "saturation": "saturation",
    "contrast": "contrast",
    "speed_px": "speed",
    "saturation_drift": "drift",
    "seam_excess_px": "seam",
    "follow": "goes on",
}
"""Scores in the table, by their key, and how the table calls them."""


@dataclass(frozen=True, slots=True)
class Format:
    """A number format. linears, attention: which of the two rounds to e4m3."""

    dtype: torch.dtype = torch.bfloat16
    linears: bool = False
    attention: bool = False

    def of(self, weights: Path, text_tokens: int) -> WanTransformer:
        """A student that computes in this format."""
        student = load_student(weights)
        nn.Module.to(student, self.dtype)
        emulate_fp8(student, self.linears, self.attention, text_tokens)
        return student


FORMATS = {
    "float32": Format(torch.float32),
    "bfloat16": Format(),
    "8-bit linear layers": Format(linears=True),
    "8-bit attention": Format(attention=True),
    "8-bit, both": Format(linears=True, attention=True),
}
"""The first one is what the pictures of all others are held against."""


@dataclass(frozen=True, slots=True)
class Precision:
    """A student in one format. psnr_db: of the first chunk and of whole clips, against float32."""

    student: str
    format: str
    scores: dict[str, Score]
    psnr_db: tuple[float, float] | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no word for what is not a number."""
        values = asdict(self)
        for score in values["scores"].values():
            score.update({k: None for k, v in score.items() if not math.isfinite(v)})
        return values


def precision(num_clips: int) -> tuple[str, dict[str, Any]]:
    """A table in Markdown, and all scores."""
    rows = list(measure_precision(num_clips))
    return precision_table(rows), {"num_clips": num_clips, "rows": [row.as_dict() for row in rows]}


def measure_precision(num_clips: int) -> Iterator[Precision]:
    """Each shipped student in each format, on the same captions and noise."""
    config = load_config(CONFIG, ["data.shards=none"])
    follow_clips = min(config.report.follow_clips, num_clips)
    config = replace(config, report=replace(config.report, follow_clips=follow_clips))
    evaluation = TINY.draw(config, num_clips)
    for student, weights in STUDENTS.items():
        reference: list[Tensor] = []
        for name, numbers in FORMATS.items():
            network = numbers.of(weights, evaluation.text.shape[1])
            videos = list(clips_of(network, evaluation, TINY.decoder(config), name))
            reference = reference or videos
            scores = dict(scores_of(config, network, evaluation, videos))
            first = 1 + 4 * (student_recipe(network).chunk_frames - 1)
            psnr = None if videos is reference else against(reference, videos, first)
            yield Precision(student, name, scores, psnr)


def clips_of(
    network: WanTransformer,
    evaluation: EvaluationSet,
    decode: Decode,
    name: str,
    begun: Tensor | None = None,
) -> Videos:
    """Clips by the student's own recipe."""
    recipe = student_recipe(network)
    return causal_clips(
        network,
        evaluation,
        decode,
        make_chunk=FewSteps(recipe.sigmas, recipe.keeps_noise),
        chunks=plan_chunks(recipe.frames, recipe.chunk_frames),
        sink=recipe.sink,
        window=recipe.window or None,
        begun=begun,
        description=name,
    )


def scores_of(
    config: Config, network: WanTransformer, evaluation: EvaluationSet, videos: list[Tensor]
) -> Iterator[tuple[str, Score]]:
    """The tiny world's exact scores, and those of its follow test."""
    chunk_frames = student_recipe(network).chunk_frames
    measured = TINY.measure(iter(videos), evaluation.captions, chunk_frames)
    yield from measured.scores.items()

    def go_on(some: EvaluationSet, real: Tensor, decode: Decode) -> Videos:
        return clips_of(network, some, decode, "follow test", real[:, :chunk_frames])

    yield from TINY.follow(config, evaluation, TINY.decoder(config), go_on).items()


def against(reference: list[Tensor], videos: list[Tensor], first: int) -> tuple[float, float]:
    """PSNR in dB of the first video frames, and of all, of the same clips."""
    squares = [(a - b).square() for a, b in zip(reference, videos, strict=True)]
    of_first = torch.cat([part[:, :first].flatten() for part in squares])
    of_all = torch.cat([part.flatten() for part in squares])
    return -10 * float(of_first.mean().log10()), -10 * float(of_all.mean().log10())


def precision_table(rows: list[Precision]) -> str:
    """The rows as a table in Markdown."""
    heads = ["student", "numbers", *SHOWN.values(), "dB, first chunk", "dB, all"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        values = [number(row.scores[key].value, 2 if key != "modes" else 0) for key in SHOWN]
        psnr = ["", ""] if row.psnr_db is None else [f"{value:.1f}" for value in row.psnr_db]
        lines.append(f"| {' | '.join([row.student, row.format, *values, *psnr])} |")
    return "\n".join(lines)
