"""What distribution matching does at its optimum, near it, and in which space."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_objectives import NO_TEXT, SIGMAS, direction
from tiny_models import ExactGaussian, latents, tiny_network
from tiny_models import conditioning as tiny_conditioning
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

from selfforcing_dfd.flow import add_noise
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.objectives import distribution_matching, guided_x0


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


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_three_spaces_are_one_for_dmd_and_three_for_data_forcing(sigma):
    """Catches a form of the loss that is no longer DMD, and one taken for the paper's Eq. 8.

    Student and data are normal, so that their noised scores are known without x0. In DMD the
    differences of scores and of flows are the direction up to a positive factor. With a real anchor
    Eq. 8 is another direction, by the distance to the clip.
    """
    x0, real, noise = latents("x0"), latents("real"), latents("noise")
    teacher, fake = ExactGaussian(0.0, 1.0), ExactGaussian(0.4, 0.6)
    at = {"sigma": torch.full((2,), sigma, dtype=torch.float64), "guidance": 1.0}
    own_t, real_t = add_noise(x0, noise, sigma), add_noise(real, noise, sigma)

    def score(of: ExactGaussian, x_t: Tensor) -> Tensor:
        variance = (1 - sigma) ** 2 * of.std**2 + sigma**2
        return ((1 - sigma) * of.mean - x_t) / variance

    d = direction(x0, x0, teacher, fake, **at)
    scores = sigma**2 / (1 - sigma) * (score(fake, own_t) - score(teacher, own_t))
    torch.testing.assert_close(scores, d, rtol=1e-9, atol=1e-10)
    flows = fake(own_t, sigma, NO_TEXT).flow - teacher(own_t, sigma, NO_TEXT).flow
    torch.testing.assert_close(-sigma * flows, d, rtol=1e-9, atol=1e-10)
    forced = direction(x0, real, teacher, fake, **at)
    scores = sigma**2 / (1 - sigma) * (score(fake, own_t) - score(teacher, real_t))
    torch.testing.assert_close(scores, forced - (x0 - real), rtol=1e-9, atol=1e-9)


def largest_singular_value(function: Callable[[Tensor], Tensor], at: Tensor, like: Tensor) -> float:
    """Of the function's Jacobian at a point, by power iteration. like: its output.

    What a step inside does outside comes from a small step: attention has no forward derivatives.
    """
    outside = like
    for _ in range(12):
        there = at.detach().requires_grad_()
        out = function(there)
        (inside,) = torch.autograd.grad(out, there, outside)
        step = 1e-6 * inside / inside.norm()
        outside = (function(at + step) - out).detach() / 1e-6
    return float(outside.norm())


def test_what_a_real_anchor_adds_to_the_gradient_is_bounded_by_the_gap():
    """Catches noise or a level of its own for the anchor: what it adds would not go to 0 with it.

    The gradient to the student's weights changes by J^T (T(x_t) - T(G_t)). With the student's
    Jacobian J and the teacher's Lipschitz constant L, both measured here, that is at most
    |J| L (1 - sigma) |x - G|: what appendix A.2 of arXiv 2606.18478 is about.
    """
    student = tiny_network(0)
    teacher, fake = tiny_network(1), tiny_network(2)
    noise = latents("noise")
    of_score = latents("noise of the score")
    level = 0.6
    text = tiny_conditioning()
    sigma = torch.full((len(noise),), level, dtype=torch.float64)
    weights = parameters_to_vector(student.parameters()).detach()
    shapes = {name: p.shape for name, p in student.named_parameters()}

    def sample(values: Tensor) -> Tensor:
        parts = values.split([shape.numel() for shape in shapes.values()])
        named = {
            name: part.view(shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }
        return noise - functional_call(student, named, (noise, 1.0, text)).flow

    def clean(x_t: Tensor, network: WanTransformer = teacher) -> Tensor:
        return guided_x0(network, x_t, sigma, text, text, 1.0)

    generated = sample(weights).detach()
    own_t = add_noise(generated, of_score, level)
    away = latents("away")
    of_student = largest_singular_value(sample, weights, away)
    of_teacher = largest_singular_value(clean, own_t, away)

    def gradient(anchor: Tensor) -> Tensor:
        student.zero_grad()
        matching = distribution_matching(
            noise - student(noise, 1.0, text).flow,
            anchor,
            of_score,
            sigma,
            teacher=teacher,
            fake=fake,
            conditioning=text,
            negative=text,
            guidance=1.0,
            min_normaliser=1e3,  # one for all anchors
        )
        (matching.loss.sum() * 1e3 * noise[0].numel()).backward()
        return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])

    at_weights = weights.clone().requires_grad_()
    difference = (clean(own_t, fake) - clean(own_t)).detach()
    (alone,) = torch.autograd.grad(sample(at_weights), at_weights, difference)  # DMD's
    torch.testing.assert_close(gradient(generated), alone)
    added = []
    for share in (1e-2, 1e-3):
        added.append(float((gradient(generated + share * away) - alone).norm()))
        gap = share * float(away.norm())
        assert added[-1] < 1.1 * of_student * of_teacher * (1 - level) * gap
    assert 9 < added[0] / added[1] < 11
    assert added[0] > 0
