"""Where teacher and fake score are compared, and what is logged of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from selfforcing_dfd.config import ranged, require
from selfforcing_dfd.flow import shift_sigma
from selfforcing_dfd.objectives import Matching


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConfig:
    """Where teacher and fake score are compared, and how often each network learns."""

    # uncond + w (cond - uncond); 1 is off. Self-Forcing's 3.0 is 4.0 here
    guidance: float = ranged(4.0, 0, 1000)
    shift: float = ranged(5.0, 0, 1000, above=True)
    sigma_min: float = ranged(0.02, 0, 1, above=True)
    sigma_max: float = ranged(0.98, 0, 1, above=True)
    min_normaliser: float = ranged(1e-3, 0, 1000, above=True)
    fake_per_student: int = ranged(5, 1, 10_000)  # fake-score updates for each student update
    # of the fake score: 1 is off, as in the papers; else it trains without caption at times
    fake_guidance: float = ranged(1.0, 0, 1000)
    fake_text_dropout: float = ranged(0.0, 0, 1)
    # what enters the step that is trained: what the student made in the steps before, or the real
    # clip, noised, in rows of DMD too, as FastGen trains students of whole clips
    student_input: Literal["rollout", "noised_real"] = "rollout"
    # subtract the difference on the real clip, which guidance leaves even where student is data
    control_variate: bool = False
    # updates on real clips before each student update, as section `regression` says
    regression_per_student: int = ranged(0, 0, 10_000)

    def __post_init__(self) -> None:
        require(
            self.sigma_min < self.sigma_max,
            f"score.sigma_min is {self.sigma_min} and score.sigma_max {self.sigma_max}; "
            "the first must be smaller",
        )


def score_sigma(u: Tensor, shift: float, low: float, high: float) -> Tensor:
    """Noise levels of the scores: uniform u in [0, 1) shifted, then clamped to [low, high]."""
    return shift_sigma(u, shift).clamp(low, high)


def values_to_log(
    matching: Matching, anchored: Tensor, with_loss: Tensor, sigma: Tensor
) -> dict[str, Tensor]:
    """Per sample [B]. dfd, dmd: 1 in rows trained so; rows without a loss have neither."""
    return {
        "loss": matching.loss.detach(),
        "discrepancy": matching.discrepancy,
        "normaliser": matching.normaliser,
        "dfd": anchored.float(),
        "dmd": (with_loss & ~anchored).float(),
        "sigma": sigma,
    }
