"""PSNR and flicker of a small decoder, by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.codecs.fidelity import CheckedDecoder, Comparison, middle


def test_by_hand() -> None:
    """Catches a constant error that flickers, another peak, and a mean over the wrong number."""
    full = torch.zeros(1, 3, 2, 2, 3)
    found = Comparison()
    found.add(full + 0.1, full)
    assert found.result().psnr_db == pytest.approx(20, abs=1e-4)
    assert found.result().flicker == pytest.approx(0, abs=1e-4)
    flickering = Comparison()
    flickering.add(full + torch.tensor([0.0, 0.1, 0.0]).view(1, 3, 1, 1, 1), full)
    assert flickering.result().flicker == pytest.approx(25.5, abs=1e-3)
    assert flickering.result().psnr_db == pytest.approx(10 * math.log10(300), abs=1e-3)
    moving = Comparison()
    video = torch.tensor([0.0, 0.2, 0.4]).view(1, 3, 1, 1, 1).expand(2, 3, 2, 2, 3)
    moving.add(video, video)
    assert moving.result().change == pytest.approx(51, abs=1e-3)
    assert moving.result().psnr_db == math.inf
    assert moving.result().as_dict()["psnr_db"] is None
    assert moving.result().video_frames == 6


@dataclass
class Given:
    """A decoder that hands out a clip, as many frames as it is given latent frames."""

    video: Tensor
    done: int = 0

    def decode(self, latents: Tensor) -> Tensor:
        self.done += latents.shape[1]
        return self.video[:, self.done - latents.shape[1] : self.done]

    def clone(self) -> Given:
        return Given(self.video, self.done)


def test_pieces_count_as_the_whole() -> None:
    """Catches a change between two pieces that is not seen, and a frame that counts twice."""
    ours, full = (torch.rand(2, 1, 6, 2, 2, 3, generator=rng.generator(0, "videos"))).unbind(0)
    whole = Comparison()
    whole.add(ours, full)
    checked = CheckedDecoder(Given(ours), (Given(ours), Given(full)), Comparison())
    parts = [checked.decode(torch.empty(1, frames, 16, 4, 4)) for frames in (1, 3, 2)]
    assert torch.equal(torch.cat(parts, dim=1), ours)
    found = checked.comparison.result().as_dict()
    assert found == pytest.approx(whole.result().as_dict())


def test_the_middle_is_compared() -> None:
    """Catches a corner in place of the middle, and a small video that is cut."""
    latents = torch.arange(60.0 * 104).view(1, 1, 1, 60, 104).expand(1, 2, 16, 60, 104)
    part = middle(latents)
    assert part.shape == (1, 2, 16, 32, 32)
    assert torch.equal(part, latents[..., 14:46, 36:68])
    assert middle(latents[..., :8, :40]).shape[-2:] == (8, 32)
