"""How a student's rollouts run in training: its ladders, its past, and what its passes cost.

A student without commit pass sees its chunks as they were at their last denoising step. Where a
chunk of its past was not made so, because the rollout stopped at an earlier step or because a real
clip stands for it, one more pass at that step's noise level makes its keys and values.
"""

from __future__ import annotations

from torch import Tensor

from selfforcing_dfd.config import Config, require
from selfforcing_dfd.flow import add_noise, few_step_ladder, sigma_by_frame
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.stages.base import Pass, ladder_of


def first_ladder_of(config: Config) -> tuple[float, ...] | None:
    """The sigmas of the first chunk's ladder; None where it is that of all chunks."""
    first = tuple(config.rollout.first_ladder)
    return few_step_ladder(first, config.rollout.shift) if first else None


def commits(config: Config) -> bool:
    """Whether a finished chunk is run once more, clean, to become context."""
    return config.rollout.context == "clean"


def context_sigma(config: Config) -> float:
    """The noise level of a student's context: 0, or that of its ladder's last step."""
    return 0.0 if commits(config) else ladder_of(config)[-1]


def real_past(
    latents: Tensor, draw: Draw, sigma: float, given: int = 0
) -> tuple[Tensor, Tensor | None]:
    """A real clip [B, F, C, H, W] as a student's context, and its noise levels [B, F].

    sigma: of `context_sigma`; at 0 the clip is clean, and the levels are None.
    """
    if not sigma:
        return latents, None
    level = sigma_by_frame(sigma, latents, given)
    noise = draw.normal("past", latents.shape[1:], latents)
    return add_noise(latents, noise, level), level


def require_one_ladder(config: Config) -> None:
    """ConfigError for a first chunk with a ladder of its own, which not all stages train."""
    require(
        not config.rollout.first_ladder,
        f"rollout.first_ladder is {list(config.rollout.first_ladder)}, which stages dmd and dfd "
        "alone train, and without regression; leave it empty",
    )


def require_commits(config: Config) -> None:
    """ConfigError for a context of noisy chunks where all chunks before one are clean."""
    require(
        commits(config),
        f"rollout.context is {config.rollout.context}, which is for few-step students; stage "
        f"{config.run.stage} sees clean chunks: use rollout.context=clean",
    )


def rollout_passes(config: Config, first_exit: int = 0, after_real: bool = False) -> list[Pass]:
    """The calls of one rollout, whose exit steps are drawn evenly from `first_exit` on.

    after_real: real clips stand for chunks of the past.
    """
    later = len(config.rollout.ladder)
    steps = (first_exit + later + 1) / 2
    first = len(config.rollout.first_ladder)
    passes = [Pass("rollout", "student", "later" if first else "chunks", steps)]
    if first:
        passes.insert(0, Pass("rollout, first chunk", "student", "first", (first + 1) / 2))
    if commits(config):
        return [*passes, Pass("commits", "student", "committed")]
    name = "past at the last step"
    share = 1.0 if after_real else 1 - 1 / (later - first_exit)
    if not first:
        again = [Pass(name, "student", "committed", share)]
    else:
        of_first = 1.0 if after_real else 1 - 1 / first
        again = [
            Pass(f"{name}, first chunk", "student", "first committed", of_first),
            Pass(name, "student", "later committed", share),
        ]
    return passes + [each for each in again if each.times]
