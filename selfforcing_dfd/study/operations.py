"""What runs of a study cost in counted operations. Unlike a clock's time these are the same on a
busy machine.

Counted are the networks' matrix products and attention, as in `training.estimate`, and not the
optimizer's own work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from selfforcing_dfd.common import UserError
from selfforcing_dfd.config import Config
from selfforcing_dfd.stages.config_files import change
from selfforcing_dfd.training.build import build_reader
from selfforcing_dfd.training.estimate import Clip, Estimate, clip_flops
from selfforcing_dfd.training.inversion import kind_of_noise
from selfforcing_dfd.training.needs import describe_starts
from selfforcing_dfd.training.plan import estimate_of

GIGA = 1e9


def training_gflop(config: Config, updates: Sequence[int]) -> list[float]:
    """Operations of training up to each of these student updates, in units of 10^9.

    Means over exit steps and coins. Raises UserError while weights that it starts from are missing.
    """
    changed = [change(config, [f"run.student_updates={update}"]) for update in updates]
    return [known_estimate(each).run_flops() / GIGA for each in changed]


def noise_gflop(config: Config) -> float:
    """Operations of finding the noise of all clips, in the chunks that a run starts from it.

    Shards may hold the noise of further chunks, for other runs. Raises UserError likewise.
    """
    estimate = known_estimate(config)
    calls = 2 * config.data.tiny.noise_steps  # of Heun's method
    clip = estimate.clip
    parts: list[tuple[int, Clip]]
    if kind_of_noise(config) == "first":
        parts = [(calls, replace(clip, chunks=clip.chunks[:1], past=clip.past[:1]))]
    elif config.weights.causal:
        parts = [(calls, clip), (1, clip.over("committed"))]
    else:
        parts = [(calls, clip.over("clip"))]
    size = estimate.sizes["teacher"]
    one = sum(times * clip_flops(size, part, False, False) for times, part in parts)
    return len(build_reader(config)) * one / GIGA


def known_estimate(config: Config) -> Estimate:
    """The estimate of a run whose weights are there, or else a UserError."""
    estimate = estimate_of(config)
    if estimate is None:
        lines = describe_starts(config)
        raise UserError("\n".join(["what a run costs depends on its networks:", *lines]))
    return estimate
