"""What a config would do, without doing it: `train.py --dry-run`."""

from __future__ import annotations

from pathlib import Path

import torch

from selfforcing_dfd.build import arms, build_chunks, build_device, build_ladder, build_network, run_folder
from selfforcing_dfd.config import Config, find_file, to_yaml

BYTES = 4  # of a float32


def plan(config: Config) -> str:
    """The resolved settings and, for every run they stand for, what is trained on what, how often and with what memory."""
    runs = list(arms(config))
    return "\n".join([to_yaml(config), f"{len(runs)} run{'s' * (len(runs) > 1)}:", *(plan_run(run) for run in runs)])


def plan_run(config: Config) -> str:
    matching = config.run.stage in ("dmd", "dfd")
    updates, batch = config.run.student_updates, config.batch
    fake_updates = updates * config.score.fake_per_student if matching else 0
    num_parameters = count_parameters(config)
    lines = [
        f"\n{run_folder(config)}: stage {config.run.stage} on {build_device(config.run.device)}, seed {config.run.seed}",
        f"  networks    {'student, fake score, teacher' if matching else 'student'}, {num_parameters:,} parameters each",
        f"  start       {describe_start(config)}",
        f"  latents     [{batch.micro}, {config.rollout.frames}, {config.model.channels}, H, W] in "
        f"{len(build_chunks(config))} chunks of {config.rollout.chunk_frames} latent frames",
        f"  data        {describe_data(config)}",
        f"  updates     {updates} of the student, {fake_updates} of the fake score, "
        f"{batch.size} samples each in {batch.size // batch.micro} passes",
        f"  memory      {memory_bytes(num_parameters, matching) / 1e6:,.0f} MB of weights, gradients, optimizer and EMA",
        f"  checkpoints every {config.checkpoint.every} student updates, the newest {config.checkpoint.keep} kept",
    ]
    if matching:
        ladder = ", ".join(f"{sigma:.4g}" for sigma in build_ladder(config))
        lines.insert(4, f"  ladder      sigma {ladder}; teacher guided by {config.score.guidance:g}")
    if config.run.stage == "dfd":
        dfd = config.dfd
        lines.insert(
            5, f"  data rows   p {dfd.p:g} a {dfd.granularity}, pairing {dfd.pairing}, sigma {dfd.sigma_range}"
        )
    return "\n".join(lines)


def count_parameters(config: Config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_network(config.model, "meta").parameters())


def memory_bytes(num_parameters: int, matching: bool) -> int:
    """Static float32 tensors: weights, Adam's two moments and gradients of what is trained, the teacher, the EMA."""
    trained = 2 if matching else 1
    copies = trained * 3 + 1 + 1 + (1 if matching else 0)  # gradients of one model at a time, EMA, teacher
    return copies * num_parameters * BYTES


def describe_start(config: Config) -> str:
    given = {role: name for role, name in vars_of(config).items() if name}
    states = [f"{role} {name}{'' if find_file(name).exists() else ' (MISSING)'}" for role, name in given.items()]
    return ", ".join(states) or "nothing: fresh weights from run.seed"


def vars_of(config: Config) -> dict[str, str]:
    weights = config.weights
    return {"student": weights.student, "teacher": weights.teacher, "fake score": weights.fake}


def describe_data(config: Config) -> str:
    folder, tiny = Path(config.data.shards), config.data.tiny
    if folder.exists():
        return str(folder)
    if tiny.clips:
        return f"{folder}, to be made from {tiny.clips} tiny-world clips with {tiny.level} captions"
    return f"{folder} (MISSING): write it with `python -m selfforcing_dfd pack`"
