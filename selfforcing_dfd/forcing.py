"""Data-Forcing Distillation (DFD): all that it adds to distribution matching.

arXiv 2606.18478, Eq. 8-10 and Algorithm 1. DMD asks the teacher about the student's own sample; DFD
asks it, in some rows of the batch, about a real clip. For one student update:

1. `tied_rows`: a coin decides which rows are tied to a real clip.
2. `start_noise`, `real_past`: what a tied row starts from and sees as its past. With the paper's
   pairing (`caption`) nothing changes: only the caption ties sample and clip together.
3. `pair`: which real clip belongs to which generated sample, and how far apart they are.
4. `anchored_rows`, `anchor`: the teacher is asked about the real clip where the row is tied and its
   noise level lies in `sigma_range`, else about the student's own sample.

A tied row that is not anchored is trained by DMD, on a sample made from the real clip's noise or
past. That is a choice: real pasts are met at every noise level, and real clips pull only in range.
In expectation a real clip enters as its mean given what ties it; a loose caption's mean is grey.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import avg_pool2d

from selfforcing_dfd.flow import PER_SAMPLE
from selfforcing_dfd.rollout import Chunks, RealPast


@dataclass(frozen=True, slots=True)
class Pairing:
    """How a sample is tied to a real clip.

    stored_noise: the chunks that start from the noise to which the teacher's ODE maps the clip.
    real_past: every chunk sees the clip's chunks before it. assigned: samples and clips of a
    caption are matched one to one; else clip i belongs to sample i.
    """

    stored_noise: Literal["none", "first", "all"] = "none"
    real_past: bool = False
    assigned: bool = False


PAIRINGS = {
    "caption": Pairing(),  # the paper
    "assignment": Pairing(assigned=True),
    "inversion": Pairing(stored_noise="all"),
    "prefix": Pairing(stored_noise="first", real_past=True),
}


@dataclass(frozen=True, slots=True)
class Forcing:
    """Which data forcing, and how much. p = 0 is DMD.

    p: probability that a row is tied; it goes linearly from p_start to p in ramp_updates student
    updates. sigma_range: noise levels at which a tied row is anchored by its real clip.
    """

    pairing: Pairing = PAIRINGS["caption"]
    p: float = 0.0
    p_start: float = 0.0
    ramp_updates: int = 0
    sigma_range: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Pair:
    """The real clip x of each generated sample G."""

    real: Tensor  # [B, F, C, H, W]
    real_index: Tensor  # [B], its place in the batch
    gap: Tensor  # [B], mean |x - G|^2, as in Eq. 7


def tied_rows(coin: Tensor, forcing: Forcing, student_updates: int) -> Tensor:
    """[B] bool: the rows tied to a real clip. coin: [B], uniform in [0, 1) (Eq. 9)."""
    ramp = min(student_updates / forcing.ramp_updates, 1.0) if forcing.ramp_updates else 1.0
    return coin < (1 - ramp) * forcing.p_start + ramp * forcing.p


def start_noise(
    pairing: Pairing, noise: Tensor, stored: Tensor | None, tied: Tensor, chunks: Chunks
) -> Tensor:
    """What the ladder's first step starts from, [B, F, C, H, W]: fresh noise, or the real clip's.

    stored: [B, F, C, H, W], the noise stored with each real clip; None where there is none.
    """
    if stored is None or pairing.stored_noise == "none":
        return noise
    last = chunks[0] if pairing.stored_noise == "first" else chunks[-1]
    until = last.start + last.frames
    rows = tied[:, None, None, None, None]
    return torch.cat([torch.where(rows, stored, noise)[:, :until], noise[:, until:]], dim=1)


def real_past(pairing: Pairing, real: Tensor, tied: Tensor) -> RealPast | None:
    """What tied rows see as their past in place of their own chunks; None: nothing."""
    return RealPast(real, tied) if pairing.real_past else None


def pair(pairing: Pairing, generated: Tensor, real: Tensor, captions: Sequence[str]) -> Pair:
    """The real clip [F, C, H, W] of each generated one. Equal places have equal captions."""
    if pairing.assigned:
        real_index = assign_within_captions(generated, real, captions)
    else:
        real_index = torch.arange(len(captions))
    anchors = real[real_index.to(real.device)]
    return Pair(anchors, real_index, (anchors - generated).square().mean(PER_SAMPLE))


def anchored_rows(forcing: Forcing, tied: Tensor, sigma: Tensor) -> Tensor:
    """[B] bool: the tied rows whose noise level sigma [B] lies in `sigma_range`."""
    low, high = forcing.sigma_range
    return tied & (sigma >= low) & (sigma <= high)


def anchor(generated: Tensor, real: Tensor, anchored: Tensor) -> Tensor:
    """What the teacher is asked about: the real clip in anchored rows, else the sample (Eq. 10)."""
    return torch.where(anchored[:, None, None, None, None], real, generated)


def assign_within_captions(generated: Tensor, real: Tensor, captions: Sequence[str]) -> Tensor:
    """[B]: for each sample the place of its real clip, one to one within each caption.

    The total distance is least. Every real clip anchors one sample, so no mode is left out.
    """
    distance = torch.cdist(low_resolution(generated), low_resolution(real)).square()
    distance[~distance.isfinite()] = 1e30  # of a student that diverged: the loss will say so
    real_index = torch.empty(len(captions), dtype=torch.long)
    for caption in dict.fromkeys(captions):
        members = torch.tensor([i for i, other in enumerate(captions) if other == caption])
        _, columns = linear_sum_assignment(distance[members][:, members].numpy())
        real_index[members] = members[torch.from_numpy(columns)]
    return real_index


def low_resolution(latents: Tensor) -> Tensor:
    """[B, F, C, H, W] -> [B, D]: 2 x 2 averages; layout and motion decide, and texture does not."""
    return avg_pool2d(latents.flatten(1, 2), 2, ceil_mode=True).flatten(1).double().cpu()
