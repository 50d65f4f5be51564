"""Two-sided guards: the student's pixels compared with the data's while it trains.

Distillation can over-saturate (DMD) and data forcing can turn grey (arXiv 2606.18478 and its
published clips). So neither more nor less is better: each number is compared with the same number
of real clips of the same captions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from selfforcing_dfd.common import UserError
from selfforcing_dfd.metrics.appearance import luma

logger = logging.getLogger(__name__)

NUM_PICTURES = 4  # clips, and video frames of each side by side
SMALLEST = 1e-9  # keeps ratios finite where the data has a statistic of zero


class GuardError(UserError):
    """A statistic left its range and guards.stop is on; the message says which."""


def pixel_statistics(videos: Tensor) -> dict[str, float]:
    """Weight-free numbers of videos [B, T, H, W, 3] in [0, 1].

    saturation: mean of max - min over colours; contrast: standard deviation of luma in a frame;
    sharpness: see `fine_share`, of luma; motion: mean absolute difference of video frames four
    apart; spread: standard deviation over clips.
    """
    videos = videos[:, ::4].clamp(0, 1)  # one video frame of each latent frame
    grey = luma(videos)
    return {
        "saturation": float((videos.amax(-1) - videos.amin(-1)).mean()),
        "contrast": float(grey.flatten(2).std(dim=2).mean()),
        "sharpness": fine_share(grey.flatten(0, 1)),
        "motion": float(videos.diff(dim=1).abs().mean()),
        "spread": float(videos.std(dim=0, correction=0).mean()),
    }


def latent_statistics(latents: Tensor) -> dict[str, float]:
    """The same of latents [B, F, C, H, W], where decoding costs too much.

    saturation: standard deviation over channels at a place; contrast: over places in a latent frame
    and channel. Spread is left out for a single clip, which has none.
    """
    values = latents.float()
    numbers = {
        "saturation": float(values.std(dim=2).mean()),
        "contrast": float(values.flatten(3).std(dim=3).mean()),
        "sharpness": fine_share(values.flatten(0, 2)),
        "motion": float(values.diff(dim=1).abs().mean()),
    }
    if len(values) > 1:
        numbers["spread"] = float(values.std(dim=0, correction=0).mean())
    return numbers


def fine_share(pictures: Tensor) -> float:
    """Energy of pictures [N, H, W] that a 3 x 3 mean takes away, as a share of their variance.

    Blur lowers it, noise raises it, and less contrast leaves it as it is. (The mean absolute
    difference of neighbours does not notice blur: a wide edge has as much of it as a narrow one.)
    """
    smooth = avg_pool2d(pictures[:, None], 3, stride=1, padding=1, count_include_pad=False)[:, 0]
    fine = (pictures - smooth).square().mean()
    whole = (pictures - pictures.mean(dim=(1, 2), keepdim=True)).square().mean()
    return float(fine / whole.clamp_min(SMALLEST))


@dataclass(slots=True)
class Guards:
    """Gives every statistic of the student to be logged, beside its ratio to the data's.

    Warns when a ratio leaves 1 / (1 + tolerance) .. 1 + tolerance; with stop, raises GuardError
    instead. decode: latents [B, F, C, H, W] -> what is measured, videos [B, T, H, W, 3] in [0, 1]
    unless `measure` is another one.
    """

    decode: Callable[[Tensor], Tensor]
    tolerance: float
    stop: bool = False
    measure: Callable[[Tensor], dict[str, float]] = pixel_statistics
    warned: set[str] = field(default_factory=set)

    def __call__(self, generated: Tensor, real: Tensor) -> dict[str, float]:
        ours = self.measure(self.decode(generated))
        data = self.measure(self.decode(real))
        ratios = {name: value / max(data[name], SMALLEST) for name, value in ours.items()}
        widest = 1 + self.tolerance
        outside = {name for name, ratio in ratios.items() if not 1 / widest <= ratio <= widest}
        if outside - self.warned:
            self.warn(outside, ours, data)
        self.warned = outside
        named = {f"{name}_ratio": ratio for name, ratio in ratios.items()}
        return ours | named | {"guards_outside": float(len(outside))}

    def warn(self, outside: set[str], ours: dict[str, float], data: dict[str, float]) -> None:
        """Log a warning, or raise GuardError, with the numbers that are outside."""
        numbers = [f"{name} {ours[name]:.3g} (data {data[name]:.3g})" for name in sorted(outside)]
        message = f"the student's samples leave the data's range: {', '.join(numbers)}"
        if self.stop:
            raise GuardError(f"{message}; guards.stop is on. The last checkpoint is from before")
        logger.warning(message)

    def pictures(self, generated: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Video frames of a few clips side by side, [N, H, frames * W, 3] uint8.

        Nothing where latents are measured, which cannot be shown.
        """
        if self.measure is not pixel_statistics:
            return {}
        clips = {"samples": generated[:NUM_PICTURES], "data": real[:NUM_PICTURES]}
        return {name: side_by_side(self.decode(latents)) for name, latents in clips.items()}


def side_by_side(videos: Tensor) -> Tensor:
    """Evenly spaced video frames of [N, T, H, W, 3] in [0, 1], as [N, H, NUM_PICTURES * W, 3]."""
    places = torch.linspace(0, videos.shape[1] - 1, NUM_PICTURES).round().long()
    frames = videos[:, places.to(videos.device)].mul(255).round().clamp(0, 255).to(torch.uint8)
    return torch.cat(frames.unbind(1), dim=2)
