"""Wan2.1's image-to-video network against diffusers' own model, and pictures chunk by chunk."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from tiny_models import CHUNK, FRAMES, LADDER, TINY, conditioning, fill_weights, latents
from tiny_pictures import asked, picture, picture_network, picture_sizes

from selfforcing_dfd.context import ChunkContext, KVCache, PackedContext
from selfforcing_dfd.models.picture import PictureConditioning, PictureError, picture_channels
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.objectives import guided_x0
from selfforcing_dfd.rollout import commit_chunk, plan_chunks

DIFFUSERS_TEXT = 512  # its code counts the picture's tokens as those beyond 512
ROUNDING = 1e-12  # float64: one row or many through the same product
SIGMA = torch.tensor([0.83, 0.31], dtype=torch.float64)


def test_flow_equals_diffusers_for_a_picture():
    """Catches any departure from the image-to-video architecture: names, channels, embedder, norms.

    float32 on both sides; diffusers' sinusoid is in float32, so 5e-5 as for text-to-video. The
    distance measured here is 1e-5.
    """
    twin = WanTransformer3DModel(**{**TINY, **picture_sizes()}, eps=1e-6)
    fill_weights(twin, 0)
    ours = picture_network(dtype=torch.float32)
    ours.load_state_dict(twin.state_dict(), strict=True)
    x = latents("x").float()
    given = asked(FRAMES, dtype=torch.float32, length=DIFFUSERS_TEXT)
    assert given.picture is not None
    channels = torch.cat([x, given.picture.channels], dim=2).transpose(1, 2)
    with torch.no_grad():
        expected = twin(
            channels, 1000 * SIGMA.float(), given.text, given.picture.tokens, return_dict=False
        )[0].transpose(1, 2)
        found = ours(x, SIGMA.float(), given).flow
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("part", ["channels", "tokens"])
def test_each_part_of_a_picture_matters(part):
    """Catches the test above passing on networks that do not look at the picture."""
    network = picture_network()
    given = asked(FRAMES)
    assert given.picture is not None
    changed = replace(given.picture, **{part: getattr(given.picture, part).flip(0)})
    x = latents("x")
    plain, other = (
        network(x, SIGMA, replace(given, picture=one)).flow for one in (given.picture, changed)
    )
    assert (plain - other).abs().max() > 1e-3


@pytest.mark.parametrize("sigma", [*LADDER, 0.0])
def test_a_prepared_picture_changes_nothing(sigma):
    """Catches prepared keys of another block, and channels that a prepared prompt loses."""
    network = picture_network()
    given = asked(FRAMES)
    prepared = network.prepare(given, (*LADDER, 0.0))
    context = ChunkContext(next_frame=2)
    x_t = latents("x_t", 2)
    plain, quick = (network(x_t, sigma, one, context).flow for one in (given, prepared))
    assert (plain - quick).abs().max() < ROUNDING


def test_a_chunk_gets_the_channels_of_its_own_frames():
    """Catches the mask in every chunk, and a replay whose frames see other channels.

    The packed pass, which knows the whole clip, must equal the chunks one by one.
    """
    network = picture_network()
    given = asked(FRAMES)
    clean = latents("clean")
    cache = KVCache()
    contexts = []
    flows = []
    chunks = plan_chunks(FRAMES, CHUNK)
    for chunk in chunks:
        contexts.append(cache.read(chunk.frames))
        flows.append(network(chunk.of(clean), 0.5, given, contexts[-1]).flow)
        commit_chunk(network, chunk.of(clean), given, cache)
    packed = PackedContext(tuple(contexts), (CHUNK,) * len(chunks))
    whole = network(clean, torch.full((2, FRAMES), 0.5, dtype=torch.float64), given, packed).flow
    assert (whole - torch.cat(flows, 1)).abs().max() < ROUNDING
    one = picture(FRAMES)
    for chunk in chunks:
        assert torch.equal(one.channels_of(chunk.start, chunk.frames), chunk.of(one.channels))


def test_a_stream_that_outlasts_the_picture_keeps_its_last_frame():
    """Catches an index error, or the picture again, beyond the frames that were encoded."""
    one = picture(4)
    last = one.channels[:, 3:]
    assert torch.equal(one.channels_of(9, 3), last.expand(-1, 3, -1, -1, -1))
    assert torch.equal(one.channels_of(3, 2), last.expand(-1, 2, -1, -1, -1))


def test_the_mask_is_one_at_the_picture_alone():
    """Catches channels in another order than diffusers': four of the mask, then the latents."""
    shown = latents("shown", 3)
    channels = picture_channels(shown)
    assert torch.equal(channels[:, :, 4:], shown)
    assert bool((channels[:, 0, :4] == 1).all()) and not bool(channels[:, 1:, :4].any())


def test_guidance_keeps_the_picture_in_both_halves():
    """Catches an unconditional half without picture, or with another row's."""
    network = picture_network()
    given = asked(FRAMES)
    negative = replace(given, text=torch.zeros_like(given.text))
    x_t = latents("x_t")
    halves = [network(x_t, SIGMA, one).flow for one in (given, negative)]
    flow = halves[1] + 3 * (halves[0] - halves[1])
    wanted = x_t - SIGMA[:, None, None, None, None] * flow
    found = guided_x0(network, x_t, SIGMA, given, conditioning(), 1.0)
    assert (found - (x_t - SIGMA[:, None, None, None, None] * halves[0])).abs().max() < ROUNDING
    text_alone = replace(conditioning(), text=negative.text)
    found = guided_x0(network, x_t, SIGMA, given, text_alone, 3.0)
    assert (found - wanted).abs().max() < ROUNDING


def test_a_network_for_pictures_is_not_asked_without_one():
    """Catches a picture of zeros in place of one that was forgotten."""
    network = picture_network()
    for without in (conditioning(), PictureConditioning(conditioning().text, None)):
        with pytest.raises(PictureError, match=r"36 input channels.*without a picture.*--image"):
            network(latents("x"), 0.5, without)


@pytest.mark.parametrize("wrong", [{"in_channels": 4}, {"added_kv_proj_dim": None}])
def test_sizes_that_no_model_has_are_refused(wrong):
    """Catches a network that is built and fails in its first call."""
    with pytest.raises(PictureError, match="instead of"):
        WanTransformer(**{**TINY, **picture_sizes(), **wrong})


def test_gradient_reaches_all_parts_for_the_picture():
    """Catches a layer that is never used, or whose keys were detached."""
    network = picture_network()
    network.enable_gradient_checkpointing()
    network(latents("x"), SIGMA, asked(FRAMES)).flow.square().mean().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
