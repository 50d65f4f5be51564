"""What a whole journey costs, said before it begins: GPU-hours, time here, memory and disk.

Arithmetic from sizes, as `train --dry-run` does it (training/estimate.py, training/memory.py), for
every step: packing and measuring included. Nothing is decoded or loaded for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from selfforcing_dfd.codecs.wan_vae import WanCodec
from selfforcing_dfd.config import Config, NetworkConfig
from selfforcing_dfd.cost import decode_flops, encode_flops
from selfforcing_dfd.data.source import ClipError
from selfforcing_dfd.data.sources.files import FileSource
from selfforcing_dfd.data.sources.video import count_frames
from selfforcing_dfd.journey.recipes import Plan
from selfforcing_dfd.journey.request import Request
from selfforcing_dfd.stages import stage_of
from selfforcing_dfd.stages.base import Start
from selfforcing_dfd.tiny.text import TinyText
from selfforcing_dfd.training.estimate import (
    GPUS,
    UTILISATION,
    Estimate,
    clip_flops,
    clip_of,
    gpu_hours,
    num_parameters,
)
from selfforcing_dfd.training.folders import run_folder
from selfforcing_dfd.training.memory import Memory, fewest_gpus, memory_of
from selfforcing_dfd.training.plan import VAE_STRIDE, measured_flops_per_second
from selfforcing_dfd.training.sizes import size_of

GIGA = 1e9
STORED_BYTES = 2  # of a value in shards
UMT5_TOKENS = 512
EXPORT_BYTES = 4  # of a weight in an export, float32
VIDEO_BYTES = 0.1  # of a pixel in a sample's mp4, a rough bound
SOON_HOURS = 2  # shorter times are told in minutes
LONG_HOURS = 24 * 30  # longer ones are not told
CAPTION_TOKENS = 128  # of a usual long caption; its padding is not stored


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one step. memory: bytes of a GPU at its peak; None where nothing counts it."""

    flops: int = 0
    memory: int | None = None
    disk: int = 0


@dataclass(frozen=True, slots=True)
class Intake:
    """What the videos offer: files, frames at the models' rate, and at most so many clips."""

    files: int
    frames: int
    clips: int
    unusable: int


@dataclass(frozen=True, slots=True)
class Budget:
    """A whole journey. flops_per_second: of this machine, in matrix products."""

    intake: Intake
    costs: Mapping[str, Cost]
    flops_per_second: float
    fits: tuple[str, ...]

    @property
    def total(self) -> Cost:
        memory = [cost.memory for cost in self.costs.values() if cost.memory is not None]
        flops = sum(cost.flops for cost in self.costs.values())
        return Cost(flops, max(memory, default=None), sum(c.disk for c in self.costs.values()))


def budget_of(request: Request, plan: Plan, source: FileSource) -> Budget:
    """What every step of the journey costs. source: the videos, not cut."""
    intake = take_in(source, plan.num_video_frames)
    estimates = {name: estimate_of(plan, config) for name, config in plan.runs.items()}
    costs = {"pack": pack_cost(request, plan, intake)}
    for name, estimate in estimates.items():
        costs[name] = run_cost(estimate, request.gpus)
    last = estimates["student"]
    costs["evaluate"] = evaluation_cost(request, plan, last)
    costs["export"] = export_cost(request, last)
    heaviest = max(estimates.values(), key=lambda each: memory_of(each, request.gpus).total)
    return Budget(intake, costs, measured_flops_per_second(last), tuple(fits(heaviest)))


def take_in(source: FileSource, num_frames: int) -> Intake:
    """Count frames by their time stamps, without decoding; scenes may give fewer clips."""
    frames = 0
    clips = 0
    unusable = 0
    for clip in source.clips:
        if clip.problem:
            unusable += 1
            continue
        try:
            found = count_frames(clip.path, source.fps)
        except ClipError:
            unusable += 1
            continue
        frames += found
        clips += found // num_frames
    return Intake(len(source.clips), frames, clips, unusable)


def estimate_of(plan: Plan, config: Config) -> Estimate:
    """A run's operations and memory, though shards and some weights are still to be made."""
    starts = stage_of(config).starts(config)
    sizes = {role: start_size(plan, config, start) for role, start in starts.items()}
    height, width = plan.size
    latent_size = (height // VAE_STRIDE, width // VAE_STRIDE)
    return Estimate(config, clip_of(config, latent_size, text_tokens(plan)), sizes)


def start_size(plan: Plan, config: Config, start: Start) -> NetworkConfig:
    """Of weights that are there, else of what the journey makes them from."""
    for made in plan.runs.values():
        if made is not config and Path(start.path).parent == run_folder(made):
            role = "fake" if Path(start.path).name.startswith("fake") else "student"
            return start_size(plan, made, stage_of(made).starts(made)[role])
    return size_of(config, start) or plan.checkpoint.size


def text_tokens(plan: Plan) -> int:
    return TinyText().length if plan.checkpoint.world == "tiny" else UMT5_TOKENS


def run_cost(estimate: Estimate, gpus: int) -> Cost:
    """Of a training run. Its checkpoints hold the trained networks' masters, moments and average.

    One more checkpoint than is kept lies there while it is written.
    """
    memory = memory_of(estimate, gpus)
    whole = memory_of(estimate, 1)
    checkpoints = (estimate.config.checkpoint.keep + 1) * trained_bytes(whole)
    exported = sum(num_parameters(estimate.sizes[role]) for role in estimate.trained)
    disk = checkpoints + EXPORT_BYTES * exported
    return Cost(estimate.run_flops(), memory.total, disk)


def trained_bytes(memory: Memory) -> int:
    """Of what is trained, in a checkpoint: all that lasts but frozen networks."""
    kept = ("weights of", "adapters of", "optimizers", "average")
    return sum(size for name, size in memory.lasting.items() if name.startswith(kept))


def pack_cost(request: Request, plan: Plan, intake: Intake) -> Cost:
    """Of the VAE and the text encoder, and of the shards with the cache of captions."""
    clip = estimate_of(plan, plan.student).clip
    size = plan.checkpoint.size
    latent = sum(clip.chunks) * size.channels * clip.latent_size[0] * clip.latent_size[1]
    text = min(clip.text_tokens, CAPTION_TOKENS) * size.text_dim
    disk = STORED_BYTES * intake.clips * (latent + text)
    if request.model is None:
        return Cost(disk=disk)
    encoded = encode_flops(meta_codec(request.model), plan.size) * sum(clip.chunks) * intake.clips
    texts = text_flops(request.model) * intake.files
    return Cost(encoded + texts, disk=disk + STORED_BYTES * intake.files * text)


def evaluation_cost(request: Request, plan: Plan, estimate: Estimate) -> Cost:
    """Of the samples: the student's, the checkpoint's own where it is a student, and the data's."""
    clip = estimate.clip
    made = 2 if plan.checkpoint.recipe is not None else 1
    steps = len(plan.student.rollout.ladder)
    size = estimate.sizes["student"]
    each = steps * clip_flops(size, clip, False, False)
    if plan.student.rollout.context == "clean":
        each += clip_flops(size, clip.over("committed"), False, False)
    flops = made * request.samples * each
    if request.model is not None:
        decoded = decode_flops(meta_codec(request.model), clip.latent_size)
        flops += (made + 1) * request.samples * sum(clip.chunks) * decoded
    height, width = plan.size
    pixels = plan.num_video_frames * height * width
    return Cost(flops, disk=int((made + 1) * request.samples * pixels * VIDEO_BYTES))


def export_cost(request: Request, estimate: Estimate) -> Cost:
    """Of the exported folder: the student, and copies of VAE and text encoder."""
    disk = EXPORT_BYTES * num_parameters(estimate.sizes["student"])
    if request.model is not None:
        parts = (request.model / part for part in ("vae", "text_encoder", "tokenizer"))
        disk += sum(file.stat().st_size for part in parts for file in part.glob("*"))
    return Cost(disk=disk)


def meta_codec(model: Path) -> WanCodec:
    """The folder's VAE without its weights."""
    config: Any = AutoencoderKLWan.load_config(model / "vae")
    with torch.device("meta"):
        return WanCodec(AutoencoderKLWan.from_config(config))


def text_flops(model: Path) -> int:
    """Of the text encoder for one caption: two for each weight of its layers and token."""
    config = json.loads((model / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    width = config["d_model"]
    attention = 4 * width * config["num_heads"] * config["d_kv"]
    weights = config["num_layers"] * (attention + 3 * width * config["d_ff"])
    return int(2 * weights * CAPTION_TOKENS)


def fits(estimate: Estimate) -> list[str]:
    """On how many of which GPU the heaviest run fits."""
    lines = []
    for gpu in GPUS:
        count = fewest_gpus(estimate, gpu)
        fit = f"fits {count} of them" if count else "does not fit, nor any number up to 512"
        lines.append(f"{gpu.name}, {gpu.gigabytes} GB: {fit}")
    return lines


def table(budget: Budget, gpus: int) -> list[str]:
    """The budget as lines of text."""
    lines = [f"{'':12}{'H100-hours':>12}{'time here':>12}{'GB memory':>12}{'GB disk':>12}"]
    rows = {**budget.costs, "in all": budget.total}
    lines += [row_of(name, cost, budget.flops_per_second) for name, cost in rows.items()]
    wall = ""
    if gpus > 1:
        trained = sum(cost.flops for cost in budget.costs.values() if cost.memory is not None)
        wall = f"; training takes {amount(gpu_hours(trained, GPUS[0]) / gpus)} h on {gpus}"
    lines += [
        f"hours at {UTILISATION:.0%} of the bf16 peak, as in Self-Forcing{wall}",
        "time here by a short timing of matrix products; decoding videos comes on top",
        "memory of a GPU while training, estimated; packing and export are not counted",
        *budget.fits,
    ]
    return lines


def row_of(name: str, cost: Cost, flops_per_second: float) -> str:
    hours = amount(gpu_hours(cost.flops, GPUS[0])) if cost.flops else "-"
    here = time_here(cost.flops / flops_per_second / 3600) if cost.flops else "-"
    memory = "-" if cost.memory is None else amount(cost.memory / GIGA)
    return f"{name:12}{hours:>12}{here:>12}{memory:>12}{amount(cost.disk / GIGA):>12}"


def time_here(hours: float) -> str:
    if hours >= LONG_HOURS:
        return "> 30 days"
    return f"{hours:,.1f} h" if hours >= SOON_HOURS else f"{60 * hours:,.1f} min"


def amount(value: float) -> str:
    """With two digits behind the point; what is less is called so."""
    return f"{value:,.2f}" if value >= 0.01 or value == 0 else "< 0.01"
