"""Data-Forcing Distillation (DFD): all that it adds to distribution matching.

arXiv 2606.18478, Eq. 8-10 and Algorithm 1. DMD asks the teacher about the student's own sample; DFD
asks it, in some rows of the batch, about a real clip. For one student update:

1. `tied_rows`: a coin decides which rows are tied to a real clip.
2. `Pairing`, `start_noise`: how the sample of a tied row depends on its clip. With the pairing
   `caption` it does not: only the caption, and frames that are given, tie the two together.
3. `anchored_rows`, `anchor`: the teacher is asked about the real clip where the row is tied and its
   noise level lies in `sigma_range`, else about the student's own sample.
4. `rows_with_loss`: chunks after a real past do not continue each other, which the fake score has
   never seen. These rows are trained by their anchor or not at all.

In expectation a real clip enters as its mean given what ties it; a loose caption's mean is grey.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from selfforcing_dfd.flow import PER_SAMPLE
from selfforcing_dfd.rollout import Chunks


@dataclass(frozen=True, slots=True)
class Pairing:
    """How a sample is tied to a real clip."""

    # the chunks that start from the noise to which the teacher's ODE maps the clip
    stored_noise: Literal["none", "first", "all"] = "none"
    real_past: bool = False  # chunks see the clip's earlier ones
    real_input: bool = False  # the noised clip enters the exit step


PAIRINGS = {
    "caption": Pairing(),  # the paper's code for autoregressive students: from pure noise
    "noised_real": Pairing(real_input=True),  # the paper's code for bidirectional students
    "inversion": Pairing(stored_noise="all"),
    "prefix": Pairing(stored_noise="first", real_past=True),
    "noised_prefix": Pairing(stored_noise="first", real_past=True, real_input=True),
}


@dataclass(frozen=True, slots=True)
class Forcing:
    """Which data forcing, and how much. p = 0 is DMD."""

    pairing: Pairing = PAIRINGS["caption"]
    p: float = 0.0  # probability that a row is tied
    p_start: float = 0.0  # from which it goes linearly to p
    ramp_updates: int = 0  # in so many student updates
    sigma_range: tuple[float, float] = (0.0, 1.0)  # where a tied row is anchored by its real clip


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


def gap(generated: Tensor, real: Tensor) -> Tensor:
    """[B]: mean |x - G|^2, the validity condition of Eq. 7."""
    return (real - generated).square().mean(PER_SAMPLE)


def anchored_rows(forcing: Forcing, tied: Tensor, sigma: Tensor) -> Tensor:
    """[B] bool: the tied rows whose noise level sigma [B] lies in `sigma_range`."""
    low, high = forcing.sigma_range
    return tied & (sigma >= low) & (sigma <= high)


def rows_with_loss(pairing: Pairing, tied: Tensor, anchored: Tensor) -> Tensor:
    """[B] bool: all rows, but tied ones with a real past only where they are anchored."""
    return anchored | ~tied if pairing.real_past else torch.ones_like(tied)


def anchor(generated: Tensor, real: Tensor, anchored: Tensor) -> Tensor:
    """What the teacher is asked about: the real clip in anchored rows, else the sample (Eq. 10)."""
    return torch.where(anchored[:, None, None, None, None], real, generated)
