"""Which real sample anchors which generated one.

Given only the caption, a real sample is independent of the student's noise, so in expectation data
enters DFD as the conditional mean and every sample shrinks towards it; pairings that tie the two
together shrink less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selfforcing_dfd.assignment import assign
from selfforcing_dfd.objectives import PER_SAMPLE


@dataclass(frozen=True, slots=True)
class Pair:
    """The anchor of each generated sample."""

    real: Tensor  # [B, F, C, H, W]
    real_index: Tensor  # [B], its place in the batch
    # [B], mean |real - generated|^2: the validity condition's E|x - G|^2 (arXiv 2606.18478, Eq. 7)
    gap: Tensor


def _pair(generated: Tensor, real: Tensor, real_index: Tensor) -> Pair:
    anchors = real[real_index.to(real.device)]
    return Pair(anchors, real_index, (anchors - generated).square().mean(PER_SAMPLE))


def pair_in_order(generated: Tensor, real: Tensor, groups: Sequence[object]) -> Pair:
    """Sample i is anchored by real sample i, whose caption it was asked for: all but `assignment`."""
    return _pair(generated, real, torch.arange(len(groups)))


def pair_by_assignment(generated: Tensor, real: Tensor, groups: Sequence[object]) -> Pair:
    """Within each caption, the one-to-one assignment of least total distance on a low-resolution
    view.

    groups: one hashable per sample. Counts are equal within a caption, so every real sample anchors
    exactly one sample and no mode is left out, however far the student is from it.
    """
    real_index = torch.empty(len(groups), dtype=torch.long)
    view_generated, view_real = _low_resolution(generated), _low_resolution(real)
    for group in dict.fromkeys(groups):
        members = torch.tensor([i for i, other in enumerate(groups) if other == group])
        cost = torch.cdist(view_generated[members], view_real[members]).square()
        real_index[members] = members[torch.tensor(assign(cost.tolist()))]
    return _pair(generated, real, real_index)


PAIRINGS = dict.fromkeys(("caption", "inversion", "prefix"), pair_in_order) | {
    "assignment": pair_by_assignment
}


def _low_resolution(latents: Tensor) -> Tensor:
    """[B, F, C, H, W] -> [B, D]: 2 x 2 spatial averages, so that layout and motion decide and
    texture does not.
    """
    return (
        torch.nn.functional.avg_pool2d(latents.flatten(1, 2), 2, ceil_mode=True)
        .flatten(1)
        .double()
        .cpu()
    )
