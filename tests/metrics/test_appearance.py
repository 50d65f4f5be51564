"""Numbers of one frame, against values that are known by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from selfforcing_dfd.metrics.appearance import appearance, laplacian, luma, thumbnail
from selfforcing_dfd.rng import uniform

RED, GREEN, BLUE = ((255.0 * torch.eye(3))[n] for n in range(3))


def plain(*colours: Tensor, side: int = 24) -> Tensor:
    """Upright bands of equal width."""
    width = side // len(colours)
    return torch.cat([colour.expand(side, width, 3) for colour in colours], dim=1)


def checkerboard(side: int = 24) -> Tensor:
    places = torch.arange(side)
    return (255.0 * ((places[:, None] + places[None]) % 2))[..., None].expand(side, side, 3)


@pytest.mark.parametrize(
    ("frame", "wanted"),
    [
        (plain(RED), {"saturation": 1, "chroma": 1, "colorful": 85.5296, "contrast": 0}),
        (plain(RED), {"luma": 0.299, "clipped": 1, "gradient": 0, "laplacian": 0}),
        (torch.full((24, 24, 3), 128.0), {"saturation": 0, "chroma": 0, "colorful": 0}),
        (torch.full((24, 24, 3), 128.0), {"luma": 0.50196, "clipped": 0, "contrast": 0}),
        (checkerboard(), {"contrast": 0.5, "gradient": 255, "laplacian": 1020.0**2}),
        (checkerboard(), {"saturation": 0, "clipped": 1, "luma": 0.5}),
        (plain(0.4 * RED), {"saturation": 1, "chroma": 0.4}),
        (plain(RED, BLUE), {"colorful": 272.6187}),
        (plain(RED, GREEN, BLUE), {"colorful": 275.4315}),
        (torch.zeros(24, 24, 3), {"saturation": 0, "clipped": 1, "luma": 0}),
    ],
)
def test_known_pictures_have_known_numbers(frame: Tensor, wanted: dict[str, float]):
    """Catches another definition: unsigned colourfulness has 206.5 for three colours.

    Values of evaluation notes made with an independent program; 4 decimals, in float32.
    """
    found = appearance(frame)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=2e-5, abs=2e-4), name


def test_numbers_equal_a_loop_over_pixels():
    """Catches axes that are mixed up, on a picture that is not square."""
    frame = 255 * uniform((5, 7, 3), 0, "pixels").float()
    grey = luma(frame)
    wanted = []
    for row in range(1, 4):
        for column in range(1, 6):
            around = grey[row - 1, column] + grey[row + 1, column]
            around = around + grey[row, column - 1] + grey[row, column + 1]
            wanted.append(around - 4 * grey[row, column])
    torch.testing.assert_close(laplacian(grey).flatten(), torch.stack(wanted))
    steps = [abs(grey[r + 1, c] - grey[r, c]) for r in range(4) for c in range(7)]
    steps += [abs(grey[r, c + 1] - grey[r, c]) for r in range(5) for c in range(6)]
    assert appearance(frame)["gradient"] == pytest.approx(float(torch.stack(steps).mean()))


@pytest.mark.parametrize(
    ("distort", "name", "sign"),
    [
        (lambda x: x.mean(-1, keepdim=True).expand_as(x), "saturation", -1),
        (lambda x: x.mean(-1, keepdim=True).expand_as(x), "colorful", -1),
        (lambda x: 128 + 0.5 * (x - 128), "contrast", -1),
        (lambda x: x + 40, "luma", 1),
        (lambda x: 128 + 9 * (x - 128), "clipped", 1),
        (lambda x: (x + x.roll(1, 0) + x.roll(1, 1) + x.roll(2, 1)) / 4, "laplacian", -1),
        (lambda x: x + 20 * (x - x.roll(1, 1)).sign(), "gradient", 1),
    ],
)
def test_each_distortion_moves_its_number(distort, name: str, sign: int):
    """Catches a number that does not see what it is for."""
    frame = 60 + 130 * uniform((24, 30, 3), 0, "pixels").float()
    changed = distort(frame).clamp(0, 255)
    moved = appearance(changed)[name] - appearance(frame)[name]
    assert sign * moved > 0.05 * abs(appearance(frame)[name])


def test_a_thumbnail_is_means_of_areas():
    """Catches thumbnails of single pixels, which noise moves."""
    frame = 255 * uniform((18, 32, 3), 0, "pixels").float()
    torch.testing.assert_close(thumbnail(frame)[1, 2], frame[2:4, 4:6].mean((0, 1)))
