"""The teacher's ODE: its closed form for Gaussian data, there and back, and guidance."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tiny_models import ExactGaussian, conditioning, latents, tiny_network
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.context import ChunkContext, Conditioning, KVCache
from selfforcing_dfd.flow import add_noise
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.ode import (
    INVERSION_SIGMA,
    descend,
    integrate,
    inversion_ladder,
    invert,
    invert_by_chunks,
    sample,
    sample_by_chunks,
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


def inverted_gaussian(clip: Tensor, fresh: Tensor, mean: float, std: float) -> Tensor:
    """Where the ODE of N(mean, std^2) leads from INVERSION_SIGMA to 1, in closed form.

    At every sigma it keeps the place in units of the standard deviation there.
    """
    start = add_noise(clip, fresh, INVERSION_SIGMA)
    rest = 1 - INVERSION_SIGMA
    return (start - rest * mean) / ((rest * std) ** 2 + INVERSION_SIGMA**2) ** 0.5


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.5)])
def test_inversion_is_the_closed_form_for_gaussian_data(mean, std):
    """Catches noise of the wrong scale.

    The student starts from it in place of a standard normal draw.
    """
    clip, fresh = mean + std * latents("noise"), latents("fresh")
    noise = invert(ExactGaussian(mean, std), clip, fresh, conditioning(), 64, 1.0)
    torch.testing.assert_close(noise, inverted_gaussian(clip, fresh, mean, std), rtol=0, atol=2e-3)


def test_inversion_converges_with_the_square_of_the_steps():
    """Catches a Heun step that is only Euler's: four times the steps, a sixteenth of the error."""
    clip, fresh = 0.7 + 0.5 * latents("noise"), latents("fresh")
    exact = inverted_gaussian(clip, fresh, 0.7, 0.5)
    errors = [
        float(
            (invert(ExactGaussian(0.7, 0.5), clip, fresh, conditioning(), n, 1.0) - exact)
            .abs()
            .max()
        )
        for n in (16, 64)
    ]
    assert errors[1] < errors[0] / 10


@pytest.mark.parametrize("kept", [1, 16])
def test_noise_of_clips_that_fill_few_dimensions_is_standard_normal(kept):
    """Catches inversion from sigma 0, where the flow across such clips is 0 / 0.

    Clips differ in `kept` of 64 directions a frame, as renderings do. Their noise must have
    deviation 1 in every direction, also those in which clips never differ; started at sigma 0, the
    deviation there was next to nothing, and noise told of its clip. 4096 draws: 5 standard errors
    of a deviation are .055.
    """
    network = ExactGaussian(0.0, 1.0)
    network.dimensions = kept
    shape = (4096, 1, 1, 8, 8)
    clip = torch.zeros(shape, dtype=torch.float64)
    clip.flatten(1)[:, :kept] = rng.normal((4096, kept), 0, "clip").double()
    fresh = rng.normal(shape, 0, "fresh").double()
    noise = invert(network, clip, fresh, Conditioning(torch.zeros(4096, 1, 1)), 12, 3.0).flatten(1)
    torch.testing.assert_close(noise.std(0), torch.ones(64).double(), rtol=0, atol=0.055)
    across = noise[:, kept:]
    with_clip = (across.T @ clip.flatten(1)[:, :kept] / 4096).abs().max()
    assert with_clip < 6 / 4096**0.5


def test_sampling_an_inverted_clip_returns_it():
    """Catches inversion with other text, sigmas or direction than sampling.

    Noise and clip would not belong together. Real network in float64. What comes back is the clip
    at INVERSION_SIGMA carried down: closer with more steps, as Heun's error is h^3 a step.
    """
    network, clip, text = smooth_network(), latents("clip", 2), conditioning()
    start = add_noise(clip, latents("fresh", 2), INVERSION_SIGMA)
    errors = []
    for steps in (10, 20):
        noise = invert(network, clip, latents("fresh", 2), text, steps, 3.0)
        down = inversion_ladder(steps, 3.0)[::-1]
        errors.append(float((integrate(network, noise, down, text) - start).abs().max()))
        assert (noise - clip).abs().max() > 1  # it went somewhere
    assert errors[1] < 0.05
    assert errors[1] < 0.4 * errors[0]


def test_inversion_begins_above_zero_and_ends_at_one():
    """Catches a ladder in sigma where one in shifted time is meant, and one that stops early."""
    ladder = inversion_ladder(12, 3.0)
    assert ladder[0] == pytest.approx(INVERSION_SIGMA)
    assert ladder[-1] == 1
    assert len(ladder) == 13
    assert inversion_ladder(1, 1.0) == pytest.approx((INVERSION_SIGMA, 1.0))


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

    From the noise found, the ODE leads back to each chunk at INVERSION_SIGMA. The tolerance is
    Heun's error at 48 steps there and back, from a network that varies slowly with sigma. Without
    the context the error is larger.
    """
    network, clip, text = smooth_network(), latents("clip"), conditioning()
    chunks, cache, fresh = plan_chunks(clip.shape[1], 2), KVCache(), latents("fresh")
    noise = invert_by_chunks(network, clip, fresh, text, 48, 3.0, chunks, KVCache())
    noised = add_noise(clip, fresh, INVERSION_SIGMA)
    ladder, errors, alone = inversion_ladder(48, 3.0)[::-1], [], []
    for chunk in chunks:
        start, end = chunk.of(noise), chunk.of(noised)
        made = integrate(with_context(network, cache.read(chunk.frames)), start, ladder, text)
        errors.append(float((made - end).abs().max()))
        alone.append(float((integrate(network, start, ladder, text) - end).abs().max()))
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


def test_descending_from_any_level_is_the_closed_form_for_gaussian_data():
    """Catches frames that share a noise level, a first step of the wrong length, and Euler's steps.

    Each frame starts at a level of its own. The error is that of the last step, which is Euler's:
    from sigma .14 at 32 steps, .07 of values up to 3. A quarter of it is left with twice the steps.
    """
    mean, std = 0.7, 0.5
    sigma = torch.tensor([[1.0, 0.9375, 0.8333, 0.625, 0.3, 0.1]], dtype=torch.float64)
    x_t = rng.normal((2, 6, 4, 4, 4), 0, "x").double()
    level = sigma[..., None, None, None]
    scale = ((1 - level).square() * std**2 + level.square()).sqrt()
    exact = mean + std * (x_t - (1 - level) * mean) / scale
    errors = []
    for steps in (16, 32):
        network, levels = ExactGaussian(mean, std), sigma.expand(2, 6)
        ours = descend(network, x_t, levels, conditioning(), ChunkContext(), steps, 5.0)
        errors.append(float((ours - exact).abs().max()))
    assert errors[1] < 0.1
    assert errors[1] < 0.35 * errors[0]


def test_descending_step_by_step_down_the_ladder_is_descending_at_once():
    """Catches an end at another level than asked, and Euler's method where Heun's belongs.

    The ladder's steps are even before the shift, so both pass the same noise levels.
    """
    network, text = ExactGaussian(0.7, 0.5), conditioning()
    ladder = (1.0, 0.9375, 5 / 6, 0.625)
    x_t, context = latents("noise").double(), ChunkContext()
    levels = [torch.full(x_t.shape[:2], level, dtype=torch.float64) for level in (*ladder, 0.0)]
    at_once = descend(network, x_t, levels[0], text, context, 8, 5.0)
    for level, lower in pairwise(levels):
        x_t = descend(network, x_t, level, text, context, 2, 5.0, lower)
    torch.testing.assert_close(x_t, at_once)


def test_frames_may_end_at_different_levels():
    """Catches a frame whose step to 0 is taken as Heun's because other frames end above 0."""
    network, text, context = ExactGaussian(0.7, 0.5), conditioning(), ChunkContext()
    x_t = latents("noise")
    start, end = torch.full(x_t.shape[:2], 0.8), torch.full(x_t.shape[:2], 0.4)
    end[:, 0] = 0.0
    both = descend(network, x_t, start, text, context, 2, 5.0, end)
    for frames in (slice(0, 1), slice(1, None)):
        levels = start[:, frames], end[:, frames]
        alone = descend(
            network, x_t[:, frames], levels[0], text, context, 2, 5.0, down_to=levels[1]
        )
        torch.testing.assert_close(both[:, frames], alone)


def test_sampling_by_chunks_sees_the_chunks_before():
    """Catches a causal teacher that samples every chunk alone or sees its future."""
    network, noise, text = smooth_network(), latents("noise"), conditioning()
    chunks = plan_chunks(noise.shape[1], 2)
    clip = sample_by_chunks(network, noise, text, KVCache(), chunks, 3, 3.0)
    cache = KVCache()
    for chunk in chunks:
        own = with_context(network, cache.read(chunk.frames))
        torch.testing.assert_close(chunk.of(clip), sample(own, chunk.of(noise), text, 3, 3.0))
        commit_chunk(network, chunk.of(clip), text, cache)
