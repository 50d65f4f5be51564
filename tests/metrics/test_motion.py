"""Block flow and camera, on pictures that were moved by known amounts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from selfforcing_dfd.metrics.motion import CameraPath, Flow, block_flow, fit_camera
from selfforcing_dfd.rng import normal

HEIGHT, WIDTH = 288, 384


def texture(seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Tensor:
    """A smooth random picture, wrapped round."""
    noise = torch.fft.rfft2(normal(size, seed, "texture").double())
    rows = torch.fft.fftfreq(size[0])[:, None]
    columns = torch.fft.rfftfreq(size[1])[None]
    smooth = torch.fft.irfft2(noise * torch.exp(-((rows**2 + columns**2) / 0.06**2)), s=size)
    return (128 + 40 * smooth / smooth.std()).float()


def moved(
    picture: Tensor, right: float, down: float, zoom: float = 0.0, turn: float = 0.0
) -> Tensor:
    """The picture after a similarity about its middle; what is seen moves right and down."""
    height, width = picture.shape
    scale, cos, sin = 1 / (1 + zoom), math.cos(turn), math.sin(turn)
    aspect = height / width
    matrix = [
        [scale * cos, scale * sin * aspect, -2 * right / width],
        [-scale * sin / aspect, scale * cos, -2 * down / height],
    ]
    grid = affine_grid(torch.tensor([matrix]), [1, 1, height, width], align_corners=False)
    return grid_sample(picture[None, None], grid, mode="bicubic", align_corners=False)[0, 0]


@pytest.mark.parametrize(("right", "down"), [(5, -4), (0, 0), (-13, 20), (1, 2)])
def test_a_shift_is_found_to_an_eighth_of_a_pixel(right: int, down: int):
    """Catches axes, signs and units of the flow, and a refinement that goes the wrong way.

    A cell is four pixels, so whole cells alone would be off by up to two. A paraboloid is no exact
    picture of the costs: at a quarter of a cell it is off by .03 cells.
    """
    picture = texture()
    flow = block_flow(picture, picture.roll((down, right), (0, 1)))
    found = flow.moved.median(0).values
    assert (found - torch.tensor([float(right), float(down)])).abs().max() < 0.125


def test_blocks_lie_where_they_are():
    """Catches centres in cells, or counted from a corner: zoom and turn would be wrong."""
    flow = block_flow(texture(), texture())
    assert flow.centres.shape == (10 * 7, 2)
    torch.testing.assert_close(flow.centres[0], torch.tensor([-144.0, -96.0]))
    torch.testing.assert_close(flow.centres[1] - flow.centres[0], torch.tensor([32.0, 0.0]))
    torch.testing.assert_close(flow.centres.mean(0), torch.zeros(2))


@pytest.mark.parametrize(
    ("right", "down", "zoom", "turn"),
    [(6, -3, 0, 0), (0, 0, 0.02, 0), (0, 0, 0, 0.03), (4, 2, -0.02, 0.02)],
)
def test_the_camera_is_the_similarity_that_was_applied(right, down, zoom, turn):
    """Catches a zoom taken for a shift, and a turn of the other sign.

    A tenth of a pixel; .002 of zoom and turn, which is a third of a pixel at the border.
    """
    camera = fit_camera(block_flow(texture(), moved(texture(), right, down, zoom, turn)))
    assert (camera.right, camera.down) == pytest.approx((right, down), abs=0.15)
    assert (camera.zoom, camera.turn) == pytest.approx((zoom, turn), abs=0.002)


def test_an_object_does_not_move_the_camera():
    """Catches a mean over all blocks: something that crosses the picture is no pan."""
    picture, thing = texture(), texture(seed=1)
    first, second = picture.clone(), picture.clone()
    first[96:192, 96:192] = thing[:96, :96]
    second[96:192, 112:208] = thing[:96, :96]
    camera = fit_camera(block_flow(first, second))
    assert (camera.right, camera.down) == pytest.approx((0, 0), abs=0.1)


def test_a_flat_picture_stands_still():
    """Catches a random shift where all shifts fit."""
    flat = torch.full((64, 64), 90.0)
    assert float(block_flow(flat, flat).length.max()) == 0


def test_a_picture_that_stands_still_has_no_flow():
    """Catches a refinement that moves what is unevenly shaded: frozen videos had a flow."""
    picture = texture(size=(64, 64))
    picture[20:50, 10:40] += 80
    assert float(block_flow(picture, picture).length.max()) == 0


def test_a_path_is_added_up_in_widths():
    """Catches pixels where widths are meant, and a way back that shortens the path."""
    path = CameraPath(200)
    centres = torch.tensor([[-50.0, -50], [50, -50], [-50, 50], [50, 50]])
    for right in (20.0, -20.0, 10.0):
        path.add(fit_camera(Flow(torch.tensor([[right, 0.0]]).expand(4, 2), centres)))
    numbers = path.numbers()
    assert numbers["camera_path"] == pytest.approx(0.25)
    assert numbers["camera_end"] == numbers["end_x"] == pytest.approx(0.05)
    path.add(fit_camera(Flow(0.1 * centres, centres)))
    path.add(fit_camera(Flow(centres.flip(1) * torch.tensor([-0.01, 0.01]), centres)))
    assert path.numbers()["camera_zoom"] == pytest.approx(math.log(1.1))
    assert path.numbers()["camera_turn"] == pytest.approx(math.degrees(0.01))


def test_frames_without_a_block_are_refused():
    """Catches a flow of nothing."""
    with pytest.raises(ValueError, match="smaller than a block"):
        block_flow(torch.zeros(16, 64), torch.zeros(16, 64))
