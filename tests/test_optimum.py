"""What distribution matching does to a student that has nothing left to learn."""

from __future__ import annotations

import torch
from test_objectives import direction
from tiny_models import latents, tiny_network


def test_a_student_that_is_the_data_is_left_alone_with_a_control():
    """Catches guidance that moves even the optimum, and a control subtracted from other rows.

    With G = x the difference on the control is that on the sample, whatever networks and guidance.
    Rows that are not controlled keep theirs.
    """
    teacher, fake = tiny_network(1), tiny_network(2)
    real = latents("real")
    none = direction(real, real, teacher, fake)
    both = direction(real, real, teacher, fake, control=(real, torch.tensor([True, True])))
    assert both.abs().max() < 1e-12
    one = direction(real, real, teacher, fake, control=(real, torch.tensor([False, True])))
    torch.testing.assert_close(one[0], none[0])
    assert one[1].abs().max() < 1e-12


def test_equal_guidance_on_both_sides_leaves_equal_networks_alone():
    """Catches a fake score that is guided otherwise than the teacher, or not at all."""
    teacher = tiny_network(1)
    sample = latents("sample")
    assert direction(sample, sample, teacher, teacher, fake_guidance=4.0).abs().max() < 1e-12
    assert direction(sample, sample, teacher, teacher).abs().max() > 1e-3
