"""Distribution matching, guidance, flow matching: identities, posteriors, reference numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_weights import MATCHING, diffusers_name, golden, golden_network, manifest
from test_rollout import golden_noise
from tiny_models import ExactGaussian, conditioning, latents, tiny_network
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.context import ChunkContext, Conditioning, KVCache, Network
from selfforcing_dfd.flow import add_noise, x0_from_flow
from selfforcing_dfd.objectives import Matching, distribution_matching, flow_matching, guided_x0
from selfforcing_dfd.rollout import plan_chunks, replay, rollout

SIGMA = torch.tensor([0.83, 0.31], dtype=torch.float64)
NO_TEXT = Conditioning(torch.zeros_like(conditioning().text))
SIGMAS = [0.02, 0.1, 0.3, 0.49, 0.51, 0.7, 0.9, 0.98]


def match(x0: Tensor, anchor: Tensor, teacher: Network, fake: Network, **changes: Any) -> Matching:
    """distribution_matching at tiny size with fixed noise, text and noise levels."""
    settings: dict[str, Any] = {
        "guidance": 4.0,
        "conditioning": conditioning(),
        "negative": NO_TEXT,
    } | changes
    noise, sigma = settings.pop("noise", latents("noise")), settings.pop("sigma", SIGMA)
    return distribution_matching(x0, anchor, noise, sigma, teacher=teacher, fake=fake, **settings)


def direction(
    x0: Tensor, anchor: Tensor, teacher: Network, fake: Network, **changes: Any
) -> Tensor:
    """d = fake - teacher, computed from the student's gradient.

    The gradient is d / n / numel of the loss summed over samples.
    """
    x0 = x0.detach().requires_grad_()
    matching = match(x0, anchor, teacher, fake, **changes)
    (gradient,) = torch.autograd.grad(matching.loss.sum(), x0)
    return gradient * matching.normaliser[:, None, None, None, None] * x0[0].numel()


@pytest.fixture(scope="module")
def networks() -> dict[str, Network]:
    """student, teacher and fake score with different weights."""
    return {name: tiny_network(seed) for seed, name in enumerate(("student", "teacher", "fake"))}


def test_real_equal_to_own_sample_is_dmd_bitwise(networks):
    """Catches a DFD branch that differs from DMD in more than the anchor.

    Data that equal the sample change nothing.
    """
    results = []
    for anchor in ("own", "equal data"):
        x0 = latents("x0").requires_grad_()
        real = x0.detach() if anchor == "own" else latents("x0")
        matching = match(x0, real, networks["teacher"], networks["fake"])
        results.append((matching, torch.autograd.grad(matching.loss.sum(), x0)[0]))
    (dmd, dmd_grad), (dfd, dfd_grad) = results
    assert torch.equal(dmd.loss, dfd.loss)
    assert torch.equal(dmd.discrepancy, dfd.discrepancy)
    assert torch.equal(dmd.normaliser, dfd.normaliser)
    assert torch.equal(dmd_grad, dfd_grad)


def test_gradient_is_d_over_n_over_numel(networks):
    """Catches a normaliser inside the graph, or a mean over the wrong axes.

    The step size would depend on the clip's size.
    """
    x0, anchor, noise, text = (
        latents("x0").requires_grad_(),
        latents("real"),
        latents("noise"),
        conditioning(),
    )
    matching = match(x0, anchor, networks["teacher"], networks["fake"], guidance=1.0)
    (gradient,) = torch.autograd.grad(matching.loss.sum(), x0)
    with torch.no_grad():
        fake_t, real_t = add_noise(x0, noise, SIGMA), add_noise(anchor, noise, SIGMA)
        fake = x0_from_flow(fake_t, networks["fake"](fake_t, SIGMA, text).flow, SIGMA)
        real = x0_from_flow(real_t, networks["teacher"](real_t, SIGMA, text).flow, SIGMA)
    for row in range(2):
        n = (x0[row] - real[row]).abs().mean()
        d = fake[row] - real[row]
        expected = d / n / x0[row].numel()
        # x0 - (x0 - d / n) rounds once
        torch.testing.assert_close(gradient[row], expected, rtol=1e-10, atol=1e-15)
        torch.testing.assert_close(matching.loss[row], 0.5 * (d / n).square().mean())
        torch.testing.assert_close(matching.discrepancy[row], d.abs().mean())
        torch.testing.assert_close(matching.normaliser[row], n)


def test_samples_do_not_share_a_normaliser(networks):
    """Catches a normaliser over the batch: a clip far from the teacher would silence the others."""
    x0, real, text = latents("x0"), latents("real"), conditioning()
    both = match(x0, real, networks["teacher"], networks["fake"])
    for row in range(2):
        one = slice(row, row + 1)
        alone = match(
            x0[one],
            real[one],
            networks["teacher"],
            networks["fake"],
            noise=latents("noise")[one],
            sigma=SIGMA[one],
            conditioning=Conditioning(text.text[one]),
            negative=Conditioning(NO_TEXT.text[one]),
        )
        torch.testing.assert_close(both.loss[one], alone.loss, rtol=1e-11, atol=0)


def test_normaliser_is_clamped_where_the_teacher_agrees():
    """Catches a division by zero on a student that is already right.

    At sigma .02 an exact teacher moves almost nothing.
    """
    x0 = torch.full((1, 2, 4, 4, 6), 0.5, dtype=torch.float64)
    exact = ExactGaussian(0.5, 1e-9)
    fake = ExactGaussian(0.6, 1e-9)
    matching = match(
        x0.requires_grad_(),
        x0.detach(),
        exact,
        fake,
        guidance=1.0,
        noise=torch.ones_like(x0),
        sigma=SIGMA[:1],
    )
    assert matching.normaliser.item() == 1e-3
    torch.testing.assert_close(matching.discrepancy.item(), 0.1, rtol=1e-6, atol=0)
    torch.testing.assert_close(matching.loss.item(), 0.5 * (0.1 / 1e-3) ** 2, rtol=1e-6, atol=0)


def test_nothing_to_learn_when_fake_and_teacher_agree_on_the_own_sample(networks):
    """Catches an asymmetry between the branches.

    The same network, no guidance and the same input must give exactly zero.
    """
    x0 = latents("x0").requires_grad_()
    matching = match(x0, x0.detach(), networks["teacher"], networks["teacher"], guidance=1.0)
    assert not matching.loss.any()
    assert not torch.autograd.grad(matching.loss.sum(), x0)[0].any()


def test_both_branches_share_noise_and_noise_level():
    """Catches a second draw for the real branch.

    With one exact posterior k y for both, d must be k alpha (G - x), without noise.
    """
    x0, real, exact = latents("x0"), latents("real"), ExactGaussian()
    level = SIGMA[:, None, None, None, None]
    expected = (1 - level) ** 2 / ((1 - level) ** 2 + level**2) * (x0 - real)
    torch.testing.assert_close(
        direction(x0, real, exact, exact, guidance=1.0), expected, rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("sigma", SIGMAS)
def test_a_real_anchor_attracts_in_x0_space(sigma):
    """Catches the wrong sign or space.

    With the exact posterior, DFD minus DMD always pulls the sample towards the data.
    """
    x0, real, exact = latents("x0"), latents("real"), ExactGaussian()
    at = {"sigma": torch.full((2,), sigma, dtype=torch.float64), "guidance": 1.0}
    pull = direction(x0, x0, exact, exact, **at) - direction(x0, real, exact, exact, **at)
    assert (pull * (real - x0)).sum() > 0


@pytest.mark.parametrize("sigma", SIGMAS)
def test_score_space_repels_and_velocity_space_changes_sign(sigma):
    """Catches a loss in score or velocity space.

    A difference between scores pushes the sample away from the data. score = (alpha x0 - y) /
    sigma^2; flow = (y - x0) / sigma, along whose negative a sample would move.
    """
    x0, real, noise, exact = latents("x0"), latents("real"), latents("noise"), ExactGaussian()
    own_t, real_t = add_noise(x0, noise, sigma), add_noise(real, noise, sigma)
    own, data = exact.posterior_mean(own_t, sigma), exact.posterior_mean(real_t, sigma)
    towards = real - x0
    score_pull = ((1 - sigma) * data - real_t) / sigma**2 - ((1 - sigma) * own - own_t) / sigma**2
    flow_pull = (own_t - own) / sigma - (real_t - data) / sigma
    assert (score_pull * towards).sum() < 0
    assert ((flow_pull * towards).sum() > 0) == (sigma < 0.5)


@pytest.mark.parametrize(
    ("mean", "balanced"), [(0.0, True), (0.1, False)], ids=["like the data", "off by 0.1"]
)
def test_direction_vanishes_in_expectation_only_when_samples_are_like_data(mean, balanced):
    """Catches a biased estimator.

    With unpaired real anchors, E[d] = 0 at the optimum (arXiv 2606.18478, Prop. A.1). 98,304
    independent values; 4 standard errors of their mean are crossed by chance once in 16,000. An
    offset of 0.1 at sigma .3 moves the mean by .1 k alpha = .084, 20 standard errors.
    """
    shape = (256, 4, 4, 4, 6)
    own, real, noise = (rng.normal(shape, 3, name).double() for name in ("own", "real", "noise"))
    sigma = torch.full((256,), 0.3, dtype=torch.float64)
    unused = Conditioning(torch.zeros(256, 1, 1, dtype=torch.float64))
    teacher, fake = ExactGaussian(), ExactGaussian(mean)
    text = {"conditioning": unused, "negative": unused, "guidance": 1.0}
    d = direction(own + mean, real, teacher, fake, noise=noise, sigma=sigma, **text)
    assert (d.mean().abs() < 4 * d.std() / d.numel() ** 0.5) == balanced


def test_guidance_one_asks_for_the_condition_only(networks):
    """Catches a guidance that is off by one, as Self-Forcing's is against the standard one."""
    x_t, text, teacher = latents("x_t"), conditioning(), networks["teacher"]
    expected = x0_from_flow(x_t, teacher(x_t, SIGMA, text).flow, SIGMA)
    assert torch.equal(guided_x0(teacher, x_t, SIGMA, text, NO_TEXT, 1.0), expected)


@pytest.mark.parametrize("guidance", [0.0, 2.5, 4.0])
def test_guidance_is_the_standard_one(networks, guidance):
    """Catches cond + w (cond - uncond).

    It is uncond + w (cond - uncond) on clean predictions, which equals guiding the flow.
    """
    x_t, text, teacher = latents("x_t"), conditioning(), networks["teacher"]
    cond, uncond = (x0_from_flow(x_t, teacher(x_t, SIGMA, t).flow, SIGMA) for t in (text, NO_TEXT))
    ours = guided_x0(teacher, x_t, SIGMA, text, NO_TEXT, guidance)
    torch.testing.assert_close(ours, uncond + guidance * (cond - uncond), rtol=0, atol=1e-12)
    if guidance == 4.0:
        # Self-Forcing's 3.0
        torch.testing.assert_close(ours, cond + 3.0 * (cond - uncond), rtol=0, atol=1e-12)


def test_the_teacher_alone_is_guided(networks):
    """Catches a guided fake score: guidance must enter d with the teacher's factor and no other."""
    x0, teacher, fake = latents("x0"), networks["teacher"], networks["fake"]
    x_t = add_noise(x0, latents("noise"), SIGMA)
    change = direction(x0, x0, teacher, fake, guidance=4.0) - direction(
        x0, x0, teacher, fake, guidance=1.0
    )
    one, four = (guided_x0(teacher, x_t, SIGMA, conditioning(), NO_TEXT, w) for w in (1.0, 4.0))
    torch.testing.assert_close(change, one - four, rtol=0, atol=1e-10)


def test_student_loss_gives_gradient_to_the_student_alone():
    """Catches scores inside the graph.

    The student's loss would train the teacher or the fake score.
    """
    student, teacher, fake = tiny_network(0), tiny_network(1), tiny_network(2)
    noise = latents("start")
    x0 = x0_from_flow(noise, student(noise, 1.0, conditioning()).flow, 1.0)
    match(x0, latents("real"), teacher, fake).loss.sum().backward()
    assert all(p.grad is None for network in (teacher, fake) for p in network.parameters())
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())


def test_flow_matching_regresses_noise_minus_data(networks):
    """Catches the opposite flow.

    Both train, but the sampler integrates only one of them. One sigma a frame works as well.
    """
    x0, noise, text, network = latents("x0"), latents("noise"), conditioning(), networks["fake"]
    for sigma in (SIGMA, torch.linspace(0.1, 0.9, 12, dtype=torch.float64).reshape(2, 6)):
        flow = network(add_noise(x0, noise, sigma), sigma, text).flow
        expected = (flow - (noise - x0)).square().mean((1, 2, 3, 4))
        torch.testing.assert_close(flow_matching(network, x0, noise, sigma, text), expected)


def test_the_best_flow_matching_loss_is_that_of_the_exact_posterior():
    """Catches a target whose optimum is not the denoiser.

    N(0, 1) leaves Var(x0 | x_t) / sigma^2, the least possible. The loss of 98,304 values has a
    standard error of half a per cent.
    """
    shape = (256, 4, 4, 4, 6)
    x0, noise = (rng.normal(shape, 0, name).double() for name in ("data", "noise"))
    sigma = torch.full((256,), 0.4, dtype=torch.float64)
    text = Conditioning(torch.zeros(256, 1, 1, dtype=torch.float64))
    best = flow_matching(ExactGaussian(), x0, noise, sigma, text).mean()
    assert best == pytest.approx(1 / (0.6**2 + 0.4**2), rel=0.02)
    assert all(
        flow_matching(ExactGaussian(m, s), x0, noise, sigma, text).mean() > best
        for m, s in ((0.1, 1), (0, 1.2), (0, 0.8))
    )


def test_flow_matching_sees_the_given_past(networks):
    """Catches teacher forcing without its context."""
    network, text, x0 = networks["student"], conditioning(), latents("x0")
    kv = network(x0[:, :2], 0.0, text, ChunkContext()).kv
    losses = [
        flow_matching(network, x0[:, 2:4], latents("noise")[:, 2:4], SIGMA, text, context)
        for context in (ChunkContext((kv,), 2), ChunkContext((), 2), None)
    ]
    assert (losses[0] - losses[1]).abs().min() > 1e-6
    torch.testing.assert_close(losses[1], losses[2], rtol=1e-10, atol=0)  # positions are relative


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return {
        "data": golden("losses"),
        "teacher": golden_network("weights_teacher"),
        "fake": golden_network("weights_fake"),
    }


@pytest.mark.parametrize("case", ["case0", "case1"])
@pytest.mark.parametrize(("branch", "anchor"), [("dmd", "x_gen"), ("dfd", "x_real")])
def test_matching_equals_the_reference(reference, case, branch, anchor):
    """Catches any difference to the published DMD and DFD losses.

    Loss, normaliser and gradient, with sigma = t / 1000.
    """
    data = reference["data"]
    expected = {
        name: data[f"{case}/exact/{branch}/{name}"] for name in ("loss", "normaliser", "grad")
    }
    x0 = data["x_gen"].clone().requires_grad_()
    matching = distribution_matching(
        x0,
        data[anchor],
        data["eps"],
        data[f"{case}/t"] / 1000,
        teacher=reference["teacher"],
        fake=reference["fake"],
        conditioning=Conditioning(data["cond"]),
        negative=Conditioning(data["uncond"]),
        guidance=float(data["guidance_scale"][1]),
    )
    (gradient,) = torch.autograd.grad(matching.loss.mean(), x0)
    torch.testing.assert_close(gradient * x0.numel(), expected["grad"], **MATCHING)
    torch.testing.assert_close(
        matching.normaliser, expected["normaliser"].flatten(), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        matching.loss.mean().double(), expected["loss"][0], rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_fake_score_loss_equals_the_reference(reference, case):
    """Catches a weight by sigma in the fake score's regression, or x0 in place of flow."""
    data = reference["data"]
    sigma, text = data[f"{case}/t"] / 1000, Conditioning(data["cond"])
    loss = flow_matching(reference["fake"], data["x_gen"], data["eps"], sigma, text)
    torch.testing.assert_close(
        loss.mean().double(), data[f"{case}/exact/critic/loss"][0], rtol=1e-5, atol=0
    )


def test_parameter_gradients_of_a_whole_student_update_equal_the_reference(reference):
    """Catches errors that no single part shows.

    Rollout, replay and loss together give the reference's detached gradient. Per tensor 1e-4 of its
    largest value, over everything 1e-5 relative; the leaky gradient of the public code is 7e-2
    away.
    """
    data, draws, student = golden("gradients"), golden("rollout_exit2"), golden_network()
    text = Conditioning(draws["text"])
    ladder = tuple((draws["steps"].double() / 1000).tolist())
    record = rollout(
        student, golden_noise(draws), text, KVCache(), ladder, plan_chunks(6, 3), (2, 2)
    )
    x0 = replay(student, record, text)
    matching = distribution_matching(
        x0,
        x0.detach(),
        data["eps"],
        data["t"] / 1000,
        teacher=reference["teacher"],
        fake=reference["fake"],
        conditioning=text,
        negative=Conditioning(reference["data"]["uncond"]),
        guidance=4.0,
    )
    matching.loss.mean().backward()
    prefix = "detached_clean_context_exact/"
    torch.testing.assert_close(
        matching.loss.mean().double(), data[prefix + "loss"][0], rtol=1e-4, atol=0
    )
    order = manifest()["files"]["gradients.safetensors"]["parameter_order"]
    ours = {name: student.get_parameter(diffusers_name(name)).grad for name in order}
    norms = torch.stack([gradient.double().norm() for gradient in ours.values()])
    torch.testing.assert_close(norms, data[prefix + "param_norms"], rtol=1e-4, atol=1e-7)
    stored = [key for key in data if key.startswith(prefix + "grad/")]
    assert len(stored) > 20
    difference, size = 0.0, 0.0
    for key in stored:
        expected, gradient = data[key], ours[key.removeprefix(prefix + "grad/")]
        assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max(), key
        difference += float((gradient - expected).double().square().sum())
        size += float(expected.double().square().sum())
    assert (difference / size) ** 0.5 < 1e-5
