"""From a finished run to a folder that others can use: a diffusers pipeline with its model card."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from selfforcing_dfd.streaming.load import (
    CODEC_FILE,
    check_tiny,
    load_student,
    student_recipe,
    tiny_codec_file,
)
from selfforcing_dfd.streaming.open_export import open_tiny_to_diffusers
from selfforcing_dfd.streaming.parts import LoadError, check_parts
from selfforcing_dfd.streaming.pipeline import CausalWanPipeline
from selfforcing_dfd.streaming.tiny_codec_for_diffusers import TinyWorldCodec
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.world import SIDE
from selfforcing_dfd.weights.card import AS_PUBLISHED, TINY_USAGE, ModelFacts, write_model_card
from selfforcing_dfd.weights.read import describe
from selfforcing_dfd.weights.run_record import read_record, require_result
from selfforcing_dfd.weights.runs import STUDENT_FILE, read_settings
from selfforcing_dfd.weights.sources import read_weights

REPORT_FILE = "report.json"
DATA_ROW = "data"
STUDENT_ROW = "student"
"""Rows of a report: the data itself, and the student of a run without arms."""


def export_run(
    run: Path,
    wan: Path | None,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    base_model: str = "",
    overwrite: bool = False,
    measured: Mapping[str, str] | None = None,
    name: str = "",
) -> None:
    """Write the student of `run` with VAE and text encoder of `wan` to `folder`, as a pipeline.

    The student has its averaged weights. wan: a diffusers folder of Wan2.1, whose own transformer
    is left out; None for a student of the tiny world. base_model: the origin that the card names.
    dtype: in bfloat16 most of what a short distillation changed is smaller than a rounding step,
    and is lost. measured: results for the card, in place of those of the run's report. name: of
    the student, by default the run's. Raises UserError for a run that is not finished, has several
    arms, or whose student was changed, for parts that do not fit the student, and for a folder that
    is not empty.
    """
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise LoadError(
            f"{folder} is not empty; choose another folder, or replace it with --overwrite"
        )
    run = the_only_arm(run)
    weights = run / STUDENT_FILE
    if not weights.is_file():
        raise LoadError(
            f"{weights} does not exist: the run is not finished; continue it with train.py --resume"
        )
    require_result(run, STUDENT_FILE)
    facts = ModelFacts(
        name or run.resolve().name,
        training=read_settings(run),
        published=read_weights(weights).about.get(AS_PUBLISHED, ""),
        measured=measured_results(run) if measured is None else measured,
    )
    if wan is None:
        save_tiny(weights, folder, dtype, dataclasses.replace(facts, base_model=base_model))
        return
    if wan.is_absolute():  # else it may be a repository on the Hub
        check_parts(wan, weights)
    pipeline = CausalWanPipeline.from_pretrained(wan, student=weights, dtype=dtype)
    pipeline.save_pretrained(
        folder, dataclasses.replace(facts, base_model=base_model or facts.base_model)
    )


def save_tiny(weights: Path, folder: Path, dtype: torch.dtype, facts: ModelFacts) -> None:
    """A student of the tiny world with its codec. LoadError for a student of another world."""
    codec = TinyCodec.load(tiny_codec_file(weights))
    check_tiny(describe(weights), codec)
    student = load_student(weights, "cpu", dtype)
    student.save_pretrained(folder / "transformer")
    codec.save(folder / "transformer" / CODEC_FILE)  # for streams, which look beside the weights
    TinyWorldCodec.of(codec).save_pretrained(folder / "codec")
    open_tiny_to_diffusers(folder)
    known = dataclasses.replace(
        facts,
        recipe=student_recipe(student),
        num_parameters=sum(map(torch.numel, student.parameters())),
        size=(SIDE, SIDE),
        usage=TINY_USAGE,
        limits=(*facts.limits, "The tiny world is one moving shape; nothing else can be shown."),
    )
    write_model_card(folder, known)


def the_only_arm(run: Path) -> Path:
    """The run's folder, or that of its one arm. Raises LoadError for a comparison of several."""
    arms = list(read_settings(run).get("arms") or {})
    if len(arms) > 1:
        raise LoadError(f"{run} compares {', '.join(arms)}; name the folder of one of them")
    return run / arms[0] if arms else run


def measured_results(run: Path) -> dict[str, str]:
    """Results of a run's student in its report, beside those of the data; empty without a report.

    A report of another student than the run has now counts as none. An arm's results are in the
    report of the comparison, one folder above.
    """
    for report, name in (
        (run / REPORT_FILE, STUDENT_ROW),
        (run.resolve().parent / REPORT_FILE, run.resolve().name),
    ):
        if not report.is_file():
            continue
        document = json.loads(report.read_text(encoding="utf-8"))
        rows = {row["name"]: row["scores"] for row in document["rows"]}
        student = document.get("trained", {}).get(name, {}).get("student")
        if student is not None and student != student_hash(run):
            continue
        if name in rows:
            clips = {"clips measured": f"{document['num_clips']}"}
            return clips | _in_words(rows[name], rows.get(DATA_ROW, {}))
    return {}


def student_hash(run: Path) -> str:
    """SHA-256 of the student that a run exported; empty without a record of it."""
    record = read_record(run)
    result = {} if record is None else record.results.get(STUDENT_FILE, {})
    return str(result.get("sha256", ""))


def _in_words(scores: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, str]:
    """Each score with its interval and the data's value; those without a number are left out."""
    words = {}
    for key, score in scores.items():
        if score["value"] is None:
            continue
        text = f"{score['value']:.3g}"
        if score["low"] is not None and score["high"] is not None:
            text += f" ({score['low']:.3g} to {score['high']:.3g})"
        of_data = data.get(key, {}).get("value")
        if of_data is not None:
            text += f"; data {of_data:.3g}"
        words[key.replace("_", " ")] = text
    return words
