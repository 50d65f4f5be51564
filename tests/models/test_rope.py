"""Rotary positions: Wan's axes and frequencies, and that only differences of positions count."""

from __future__ import annotations

import pytest
import torch
from golden_weights import golden

from selfforcing_dfd import rng
from selfforcing_dfd.models.layers import sinusoid
from selfforcing_dfd.models.rope import axis_dims, rotary_angles, rotary_tables, rotate

GRID = (2, 2, 3)  # latent frames, rows, columns of the golden tensors


def turned(x: torch.Tensor, start_frame: int, grid: tuple[int, int, int] = GRID) -> torch.Tensor:
    angles = rotary_angles(start_frame, *grid, x.shape[-1])[:, None]
    return rotate(x, *rotary_tables(angles, torch.float64))


def test_axes_split_as_in_wan():
    """Catches an even split of a head over the axes.

    At Wan's head of 128 time gets 44 values, height and width 42 each.
    """
    assert axis_dims(128) == (44, 42, 42)
    assert axis_dims(16) == (8, 4, 4)


@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize("start", [0, 7])
def test_rotation_equals_the_reference(head_dim, start):
    """Catches wrong frequencies, a swapped row and column, and halves in place of pairs.

    At Wan's real head size. Both sides rotate in float64 and round once to float32: 2e-6 is a few
    ulps of values up to 4.
    """
    tables = golden("primitives")
    x = tables[f"rope{head_dim}/x"]
    torch.testing.assert_close(
        turned(x.double(), start).float(),
        tables[f"rope{head_dim}/out_start{start}"],
        rtol=0,
        atol=2e-6,
    )


def test_sinusoid_equals_the_reference():
    """Catches sines before cosines, or angles in float32: 6e-5 off at timestep 1000."""
    tables = golden("primitives")
    features = sinusoid(tables["sinusoid256/t"].double(), 256)
    # one float32 ulp
    torch.testing.assert_close(features.float(), tables["sinusoid256/out"], rtol=0, atol=2e-7)


def test_later_frames_are_a_slice_of_the_longer_video():
    """Catches positions that restart with every chunk.

    A chunk must be rotated as it would be within the whole video.
    """
    whole = rotary_angles(0, 9, 2, 3, 16).unflatten(0, (9, 6))
    assert torch.equal(rotary_angles(6, 3, 2, 3, 16), whole[6:].flatten(0, 1))


@pytest.mark.parametrize("shift", [1, 1024, 1_000_000])
def test_scores_depend_on_differences_of_positions_only(shift):
    """Catches a table that ends, and angles too coarse for long videos.

    float64 angles of 1e6 are good to 1e-10.
    """
    q, k = (rng.normal((1, 12, 2, 16), 0, name).double() for name in "qk")

    def scores(start: int) -> torch.Tensor:
        return torch.einsum("bqhd,bkhd->bhqk", turned(q, start), turned(k, start + 2))

    torch.testing.assert_close(scores(shift), scores(0), rtol=0, atol=1e-8)


def test_rotation_keeps_lengths():
    """Catches a cos and a sin of different angles.

    Keys would grow or shrink with their position.
    """
    x = rng.normal((1, 12, 2, 16), 0, "x").double()
    torch.testing.assert_close(turned(x, 5).norm(dim=-1), x.norm(dim=-1), rtol=1e-14, atol=0)


def test_position_zero_does_not_turn():
    """Catches positions that count from one."""
    x = rng.normal((1, 1, 2, 16), 0, "x").double()
    assert torch.equal(turned(x, 0, (1, 1, 1)), x)
