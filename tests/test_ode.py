"""The teacher's ODE: its closed form for Gaussian data, there and back, and guidance."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tiny_models import ExactGaussian, conditioning, latents, tiny_network

from selfforcing_dfd.context import Conditioning, KVCache
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.ode import (
    integrate,
    invert,
    invert_by_chunks,
    sample,
    sampling_ladder,
    with_context,
)
from selfforcing_dfd.rollout import commit_chunk, plan_chunks


def smooth_network() -> WanTransformer:
    """A random network whose answer varies slowly with sigma, as a trained one's does.

    Random weights pass on the fastest feature, cos(1000 sigma), which a few hundred steps cannot
    follow.
    """
    network = tiny_network()
    with torch.no_grad():
        # cosines that turn within the step
        network.condition_embedder.time_embedder.linear_1.weight[:, :12] = 0
        network.condition_embedder.time_embedder.linear_1.weight[:, 16:28] = 0  # and their sines
    return network


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.5)])
def test_sampling_is_the_closed_form_for_gaussian_data(mean, std):
    """Catches a wrong sign, order or end of the integration.

    For N(m, s^2) the ODE maps noise z to m + s z exactly. Heun's local error is h^3 with h up to
    1/64 under shift 1, and the last step is Euler's, h^2: some 1e-4 together.
    """
    noise = latents("noise")
    clip = sample(ExactGaussian(mean, std), noise, conditioning(), 64, 1.0)
    torch.testing.assert_close(clip, mean + std * noise, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.5)])
def test_inversion_is_the_closed_form_for_gaussian_data(mean, std):
    """Catches noise of the wrong scale.

    The student starts from it in place of a standard normal draw.
    """
    clip = mean + std * latents("noise")
    noise = invert(ExactGaussian(mean, std), clip, conditioning(), 64, 1.0)
    torch.testing.assert_close(noise, latents("noise"), rtol=0, atol=2e-3)


def test_inversion_converges_with_the_square_of_the_steps():
    """Catches a Heun step that is only Euler's.

    Four times the steps leave a sixteenth of the error. The flow taken at sigma .001 in place of 0
    costs .001 h, also less with more steps; so at least a factor of ten.
    """
    clip = 0.7 + 0.5 * latents("noise")
    errors = [
        float(
            (invert(ExactGaussian(0.7, 0.5), clip, conditioning(), n, 1.0) - latents("noise"))
            .abs()
            .max()
        )
        for n in (16, 64)
    ]
    assert errors[1] < errors[0] / 10


def test_sampling_an_inverted_clip_returns_it():
    """Catches inversion with other text, sigmas or direction than sampling.

    Noise and clip would not belong together. Real network in float64. The two ways differ by Heun's
    h^3 a step and by the last step, Euler's, h^2. With twice the steps a quarter of the error is
    left (measured .130 and .036, of clips that move by 3).
    """
    network, clip, text = smooth_network(), latents("clip", 2), conditioning()
    errors = []
    for steps in (10, 20):
        noise = invert(network, clip, text, steps, 3.0)
        errors.append(float((sample(network, noise, text, steps, 3.0) - clip).abs().max()))
        assert (noise - clip).abs().max() > 1  # it went somewhere
    assert errors[1] < 0.05
    assert errors[1] < 0.4 * errors[0]


def test_inversion_walks_the_samplers_levels_backwards():
    """Catches two ladders that differ.

    Both would converge, but a few steps of one would not undo those of the other.
    """
    network, clip, text = tiny_network(), latents("clip", 2), conditioning()
    backwards = integrate(network, clip, sampling_ladder(3, 5.0)[::-1], text)
    assert torch.equal(invert(network, clip, text, 3, 5.0), backwards)


def test_integration_goes_down_as_it_goes_up():
    """Catches a step taken with the sigma of its far end.

    Between inner sigmas both ways are Heun's: 4e-5 at 20 steps.
    """
    network, start, text = smooth_network(), latents("x", 2), conditioning()
    levels = tuple(torch.linspace(0.2, 0.8, 21, dtype=torch.float64).tolist())
    there = integrate(network, start, levels, text)
    back = integrate(network, there, levels[::-1], text)
    assert (there - start).abs().max() > 0.1
    torch.testing.assert_close(back, start, rtol=0, atol=2e-4)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_one_step_is_the_guided_prediction(guidance):
    """Catches sampling without guidance, or with Self-Forcing's scale, which is one less.

    Guidance is uncond + w (cond - uncond).
    """
    network, noise, text = tiny_network(), latents("noise"), conditioning()
    cond, uncond = (
        noise - network(noise, 1.0, t).flow
        for t in (text, Conditioning(torch.zeros_like(text.text)))
    )
    clip = sample(network, noise, text, 1, 5.0, guidance)
    torch.testing.assert_close(clip, uncond + guidance * (cond - uncond), rtol=0, atol=1e-12)


def test_sampling_keeps_no_graph():
    """Catches memory that grows with each step when a clip is sampled during training."""
    clip = sample(tiny_network(), latents("noise").requires_grad_(), conditioning(), 2, 5.0)
    assert not clip.requires_grad


def test_sampling_ladder_falls_from_noise_to_exactly_zero():
    """Catches a sampler that stops short of sigma 0 and returns noisy clips, or skips a step."""
    ladder = sampling_ladder(8, 5.0)
    assert (ladder[0], ladder[-1], len(ladder)) == (1.0, 0.0, 9)
    assert all(high > low for high, low in pairwise(ladder))
    assert sampling_ladder(4, 1.0) == pytest.approx((1, 0.75, 0.5, 0.25, 0))


def test_inversion_by_chunks_is_each_chunk_after_its_clean_past():
    """Catches a context that is missing, noisy or of the wrong chunk.

    From the noise found, the ODE leads back to each chunk. The tolerance is Heun's error at 48
    steps there and back, from a network that varies slowly with sigma. Without the context the
    error is larger.
    """
    network, clip, text = smooth_network(), latents("clip"), conditioning()
    chunks, cache = plan_chunks(clip.shape[1], 2), KVCache()
    noise = invert_by_chunks(network, clip, text, 48, 3.0, chunks, KVCache())
    ladder, errors, alone = sampling_ladder(48, 3.0), [], []
    for chunk in chunks:
        start = chunk.of(noise)
        made = integrate(with_context(network, cache.read(chunk.frames)), start, ladder, text)
        errors.append(float((made - chunk.of(clip)).abs().max()))
        alone.append(float((integrate(network, start, ladder, text) - chunk.of(clip)).abs().max()))
        commit_chunk(network, chunk.of(clip), text, cache)
    assert max(errors) < 0.02
    assert min(alone[1:]) > 5 * max(errors)


def test_guidance_leaves_the_text_that_it_is_told():
    """Catches zeros where the negative prompt belongs: Wan is guided away from one."""
    network, text = tiny_network(), conditioning()
    other = conditioning(seed=5)
    made = [
        sample(network, latents("noise"), text, 2, 5.0, 4.0, negative)
        for negative in (None, other, text)
    ]
    assert not torch.equal(made[0], made[1])
    torch.testing.assert_close(
        made[2], sample(network, latents("noise"), text, 2, 5.0, 1.0), rtol=1e-9, atol=1e-9
    )
