"""Distribution matching with a chosen anchor, and flow matching.

Distribution matching moves the student's sample G along d = fake(G_t) - teacher(anchor_t), both as
clean predictions at the same noise and sigma. anchor = G is DMD (arXiv 2311.18828, Eq. 7-8); anchor
= a real video is DFD (arXiv 2606.18478, Eq. 8-10 and Algorithm 1). It is written in x0 space
because only there does a real anchor attract the sample: the score-space form repels it and the
velocity form changes sign at sigma = 1/2.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from selfforcing_dfd.context import Conditioning, Context, Network
from selfforcing_dfd.flow import PER_SAMPLE, add_noise, sigma_by_frame, x0_from_flow


@dataclass(frozen=True, slots=True)
class Matching:
    """Loss of one batch and, per sample [B], what it is made of."""

    loss: Tensor  # [B], 0.5 mean (d / n)^2; its gradient with respect to x0 is d / n / numel
    discrepancy: Tensor  # [B], mean |d|
    normaliser: Tensor  # [B], mean |G - teacher|, clamped


def guided_x0(
    teacher: Network,
    x_t: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    negative: Conditioning,
    guidance: float,
) -> Tensor:
    """Classifier-free guidance of the clean prediction: uncond + guidance (cond - uncond).

    Ho & Salimans, arXiv 2207.12598. Guidance 1 asks the teacher once. Self-Forcing's 3.0 in
    `cond + s (cond - uncond)` is guidance 4.0 here.
    """
    if guidance == 1:
        return x0_from_flow(x_t, teacher(x_t, sigma, conditioning).flow, sigma)
    both = replace(conditioning, text=torch.cat([conditioning.text, negative.text]))
    cond, uncond = teacher(torch.cat([x_t, x_t]), torch.cat([sigma, sigma]), both).flow.chunk(2)
    return x0_from_flow(x_t, uncond + guidance * (cond - uncond), sigma)


def distribution_matching(
    x0: Tensor,
    anchor: Tensor,
    noise: Tensor,
    sigma: Tensor,
    *,
    teacher: Network,
    fake: Network,
    conditioning: Conditioning,
    negative: Conditioning,
    guidance: float,
    fake_guidance: float = 1.0,
    control: tuple[Tensor, Tensor] | None = None,
    min_normaliser: float = 1e-3,
    given: int = 0,
) -> Matching:
    """Per-sample distribution-matching loss; anchor rows equal to x0 are DMD, real rows are DFD.

    x0 (with gradient), anchor, noise: [B, F, C, H, W]; sigma: [B]. fake_guidance: of the fake
    score; 1 is the papers' form. control: real clips like x0, and the rows [B] (bool) from which
    their difference is subtracted: guidance w moves even a student that is the data, by T_1 - T_w.
    given: first frames, equal in x0 and anchor, that all networks see clean and no mean counts.
    """
    sigma = sigma_by_frame(sigma, x0, given) if given else sigma

    def difference(fake_t: Tensor, teacher_t: Tensor) -> tuple[Tensor, Tensor]:
        """fake - teacher, and the teacher's clean prediction."""
        fake_x0 = guided_x0(fake, fake_t, sigma, conditioning, negative, fake_guidance)
        teacher_x0 = guided_x0(teacher, teacher_t, sigma, conditioning, negative, guidance)
        return fake_x0 - teacher_x0, teacher_x0

    with torch.no_grad():
        generated = x0.detach()
        fake_t = add_noise(generated, noise, sigma)
        d, teacher_x0 = difference(fake_t, add_noise(anchor, noise, sigma))
        if control is not None:
            control_t = add_noise(control[0], noise, sigma)
            of_control = difference(control_t, control_t)[0]
            d = d - control[1][:, None, None, None, None] * of_control
        distance = (generated - teacher_x0)[:, given:].abs().mean(PER_SAMPLE)
        normaliser = distance.clamp_min(min_normaliser)
        target = generated - d / normaliser[:, None, None, None, None]
    loss = 0.5 * (x0 - target)[:, given:].square().mean(PER_SAMPLE)
    return Matching(loss, d[:, given:].abs().mean(PER_SAMPLE), normaliser)


def flow_matching(
    network: Network,
    x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    context: Context | None = None,
    given: int = 0,
) -> Tensor:
    """Per-sample flow regression [B] on x0 [B, F, C, H, W] at sigma [B] or [B, F] (2210.02747).

    On the student's own samples it is the fake score's loss; on data it trains a teacher; with the
    clean chunks before as context it is teacher forcing. given: first frames, clean, without loss.
    """
    sigma = sigma_by_frame(sigma, x0, given) if given else sigma
    flow = network(add_noise(x0, noise, sigma), sigma, conditioning, context).flow
    return (flow - (noise - x0))[:, given:].square().mean(PER_SAMPLE)
