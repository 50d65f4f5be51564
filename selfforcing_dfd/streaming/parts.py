"""The parts of a Wan folder that streaming needs: what is missing, and what does not fit."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfforcing_dfd.common import UserError
from selfforcing_dfd.models.identity import TrainingData, role_of
from selfforcing_dfd.weights.sources import read_config

PARTS = {
    "vae": ("config.json",),
    "text_encoder": ("config.json",),
    "tokenizer": ("tokenizer.json",),
}
"""Parts of a Wan folder beside the transformer, and the files of each beside its weights."""
PUBLISHED_REPOSITORY = "gdhe17/Self-Forcing"
PUBLISHED_STUDENT = "checkpoints/self_forcing_dmd.pt"


class LoadError(UserError):
    """A model that cannot be loaded for streaming; the message says what to do."""


def check_parts(folder: Path, student: Path | None = None) -> None:
    """Raise LoadError with all that a folder lacks for streaming, and the commands that fetch it.

    student: weights from elsewhere; None for the folder's own transformer.
    """
    missing = []
    for part in PARTS:
        files = missing_files(folder, part)
        if files:
            missing.append((f"{part}: {', '.join(files)}", fetch_part(folder, part)))
    missing += _missing_student(folder, student)
    if missing:
        lines = [f"  {what}\n    {cure}" for what, cure in missing]
        raise LoadError("\n".join([f"{folder} cannot be streamed from yet; it lacks", *lines]))


def _missing_student(folder: Path, student: Path | None) -> list[tuple[str, str]]:
    """What is missing of the student, and its cure; empty if nothing is."""
    if student is not None:
        if student.exists():
            return []
        return [(f"student: {student} does not exist", fetch_student(folder))]
    config = read_config(folder / "transformer")
    if not config:
        return [("student: there is no transformer", fetch_student(folder))]
    if role_of(config) != "causal_student":
        what = "student: Wan's own transformer is bidirectional, not a causal student"
        return [(what, fetch_student(folder))]
    files = missing_files(folder, "transformer")
    return [(f"transformer: {', '.join(files)}", "fetch or export it again")] if files else []


def missing_files(folder: Path, part: str) -> list[str]:
    """Names of the files that a part of a folder lacks, its weights included."""
    where = folder / part
    names = [*PARTS.get(part, ("config.json",))]
    missing = [name for name in names if not (where / name).is_file()]
    if part == "tokenizer":
        return missing
    indices = sorted(where.glob("*.safetensors.index.json"))
    if indices:
        shards = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
        return missing + [name for name in shards if not (where / name).is_file()]
    return missing if any(where.glob("*.safetensors")) else [*missing, "*.safetensors"]


def fetch_part(folder: Path, part: str) -> str:
    """The command that downloads a part; VAE and text encoder are the same in 1.3B and 14B."""
    size = "14B" if "14b" in folder.name.lower() else "1.3B"
    return (
        f"hf download Wan-AI/Wan2.1-T2V-{size}-Diffusers --include '{part}/*' "
        f"--local-dir {shlex.quote(str(folder))}"
    )


def fetch_student(folder: Path) -> str:
    """The command that downloads the published student, and how to name it."""
    quoted = shlex.quote(str(folder))
    return (
        f"hf download {PUBLISHED_REPOSITORY} {PUBLISHED_STUDENT} --local-dir {quoted}\n"
        f"    and name it: --weights {shlex.quote(str(folder / PUBLISHED_STUDENT))}"
    )


def check_fit(sizes: Mapping[str, Any], data: TrainingData | None, folder: Path) -> None:
    """Raise LoadError for a student that a folder's VAE and text encoder do not fit.

    sizes: WanTransformer's arguments. data: what the student was trained on, if it is known.
    """
    if data is not None and data.codec.startswith("tiny-codec"):
        raise LoadError(
            f"the student was trained on latents of the tiny world ({data.codec}), which "
            f"{folder}/vae cannot decode; stream it without --model, or export a student of Wan"
        )
    for part, key, own in (
        ("vae", "z_dim", "out_channels"),
        ("text_encoder", "d_model", "text_dim"),
    ):
        width = json.loads((folder / part / "config.json").read_text()).get(key)
        if width not in (None, sizes[own]):
            raise LoadError(
                f"{folder}/{part} has {key} {width}, the student wants {sizes[own]}; they are not "
                "of one model: name a student of Wan2.1 text-to-video, or the folder that belongs "
                "to it"
            )
