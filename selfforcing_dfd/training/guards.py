"""Two-sided guards: how the student's pixels compare with the data's while it trains.

Distillation can over-saturate (DMD) and data forcing can turn grey (arXiv 2606.18478 and its
published clips), so neither more nor less is better: each number is compared with the same number
of real clips of the same captions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from selfforcing_dfd.common import UserError

logger = logging.getLogger(__name__)


class GuardError(UserError):
    """A guard was told to stop the run and did; the message says what left its range."""


def pixel_statistics(videos: Tensor) -> dict[str, float]:
    """Weight-free numbers of videos [B, T, H, W, 3] in [0, 1].

    saturation: mean of max - min over colours; contrast: standard deviation of luma in a frame;
    sharpness: mean absolute spatial difference; motion: mean absolute difference of video frames
    four apart; spread: standard deviation over clips.
    """
    videos = videos[:, ::4].clamp(0, 1)  # one video frame of each latent frame
    luma = videos @ torch.tensor([0.299, 0.587, 0.114]).to(videos)
    return {
        "saturation": float((videos.amax(-1) - videos.amin(-1)).mean()),
        "contrast": float(luma.flatten(2).std(dim=2).mean()),
        "sharpness": float((luma.diff(dim=2).abs().mean() + luma.diff(dim=3).abs().mean()) / 2),
        "motion": float(videos.diff(dim=1).abs().mean()),
        "spread": float(videos.std(dim=0, correction=0).mean()),
    }


def latent_statistics(latents: Tensor) -> dict[str, float]:
    """The same of latents [B, F, C, H, W], where decoding costs too much; spread needs two clips
    and is left out of one.

    saturation: standard deviation over channels at a place; contrast: over places in a latent frame
    and channel.
    """
    values = latents.float()
    numbers = {
        "saturation": float(values.std(dim=2).mean()),
        "contrast": float(values.flatten(3).std(dim=3).mean()),
        "sharpness": float((values.diff(dim=3).abs().mean() + values.diff(dim=4).abs().mean()) / 2),
        "motion": float(values.diff(dim=1).abs().mean()),
    }
    return (
        numbers
        if len(values) == 1
        else numbers | {"spread": float(values.std(dim=0, correction=0).mean())}
    )


@dataclass(slots=True)
class Guards:
    """Watches a run: logs every statistic of student and data, warns when one leaves 1 / (1 + t) ..
    1 + t of the data's.

    decode: latents [B, F, C, H, W] -> what is measured, videos [B, T, H, W, 3] unless `measure`
    wants something else; tolerance t; stop turns a warning into GuardError.
    """

    decode: Callable[[Tensor], Tensor]
    tolerance: float
    stop: bool = False
    measure: Callable[[Tensor], dict[str, float]] = pixel_statistics
    warned: set[str] = field(default_factory=set)

    def __call__(self, generated: Tensor, real: Tensor) -> dict[str, float]:
        ours, data = self.measure(self.decode(generated)), self.measure(self.decode(real))
        outside = {
            n
            for n in ours
            if not 1 / (1 + self.tolerance) <= ours[n] / max(data[n], 1e-9) <= 1 + self.tolerance
        }
        if outside - self.warned:
            numbers = ", ".join(
                f"{name} {ours[name]:.3g} (data {data[name]:.3g})" for name in sorted(outside)
            )
            message = f"the student's samples leave the data's range: {numbers}"
            if self.stop:
                raise GuardError(
                    f"{message}; guards.stop is on. The last checkpoint is from before"
                )
            logger.warning(message)
        self.warned = outside
        ratios = {f"{name}_ratio": ours[name] / max(data[name], 1e-9) for name in ours}
        return ours | ratios | {"guards_outside": float(len(outside))}
