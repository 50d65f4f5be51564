"""The network against diffusers' own model, and its causal context, positions, checkpointing."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel
from tiny_models import CHUNK, FRAMES, TINY, conditioning, fill_weights, latents, tiny_network
from torch import Tensor

from selfforcing_dfd.context import ChunkContext, ChunkKV, Conditioning, KVCache, PackedContext
from selfforcing_dfd.models.layers import sigma_per_frame
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.rollout import commit_chunk, plan_chunks

SIGMA = torch.tensor([0.83, 0.31], dtype=torch.float64)


def diffusers_twin(seed: int = 0, dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    twin = WanTransformer3DModel(
        **TINY, cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=1e-6
    )
    fill_weights(twin, seed)
    return twin.to(dtype).requires_grad_(False)


def diffusers_flow(
    twin: WanTransformer3DModel, x: Tensor, timestep: Tensor, text: Tensor
) -> Tensor:
    return twin(x.transpose(1, 2), timestep, text, return_dict=False)[0].transpose(1, 2)


def packed_context(network: WanTransformer, clean: Tensor, text: Conditioning) -> PackedContext:
    """Every chunk's context when the clip `clean` came before it."""
    cache = KVCache()
    contexts = []
    for chunk in plan_chunks(clean.shape[1], CHUNK):
        contexts.append(cache.read(chunk.frames))
        commit_chunk(network, chunk.of(clean), text, cache)
    return PackedContext(tuple(contexts), (CHUNK,) * len(contexts))


def test_flow_without_context_equals_diffusers():
    """Catches any departure from the architecture of Wan's checkpoints; names must fit strictly.

    float32 on both sides. diffusers computes the angles 1000 sigma w in float32, wrong by up to
    3e-5, ours are in float64. The distance measured here is 1.4e-5.
    """
    twin = diffusers_twin()
    ours = tiny_network(dtype=torch.float32)
    ours.load_state_dict(twin.state_dict(), strict=True)
    x = latents("x").float()
    text = conditioning().text.float()
    sigma = SIGMA.float()
    expected = diffusers_flow(twin, x, 1000 * sigma, text)
    torch.testing.assert_close(ours(x, sigma, Conditioning(text)).flow, expected, atol=5e-5, rtol=0)


def test_sigma_of_each_latent_frame_equals_diffusers_timestep_of_each_token():
    """Catches modulation of the wrong frame.

    One sigma for the clip would hide every mix-up of frames.
    """
    twin = diffusers_twin()
    ours = tiny_network(dtype=torch.float32)
    ours.load_state_dict(twin.state_dict(), strict=True)
    x = latents("x").float()
    text = conditioning().text.float()
    sigma = torch.linspace(0.05, 0.95, 2 * FRAMES).reshape(2, FRAMES)
    tokens = x.shape[3] * x.shape[4] // 4
    expected = diffusers_flow(twin, x, 1000 * sigma.repeat_interleave(tokens, dim=1), text)
    torch.testing.assert_close(ours(x, sigma, Conditioning(text)).flow, expected, atol=5e-5, rtol=0)


def test_folders_saved_by_diffusers_load(tmp_path):
    """Catches a config or file layout of our own: Wan's published folders could not be read."""
    twin = diffusers_twin()
    twin.save_pretrained(tmp_path)
    ours = WanTransformer.from_pretrained(tmp_path, teacher=True)
    state = ours.state_dict()
    assert state.keys() == twin.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in twin.state_dict().items())


def test_folders_saved_here_load_in_diffusers(tmp_path):
    """Catches exports that other programs cannot read."""
    ours = tiny_network(dtype=torch.float32)
    ours.save_pretrained(tmp_path)
    twin = WanTransformer3DModel.from_pretrained(tmp_path)
    assert all(
        torch.equal(twin.state_dict()[name], value) for name, value in ours.state_dict().items()
    )


def test_one_chunk_over_all_frames_is_bidirectional():
    """Catches a causal path that differs from the bidirectional one by more than its context."""
    network = tiny_network()
    x = latents("x")
    text = conditioning()
    plain = network(x, SIGMA, text).flow
    assert torch.equal(network(x, SIGMA, text, ChunkContext()).flow, plain)
    assert torch.equal(
        network(x, SIGMA, text, PackedContext((ChunkContext(),), (FRAMES,))).flow, plain
    )


@pytest.mark.parametrize("shift", [1, 1024, 1_000_000])
def test_flow_depends_on_differences_of_positions_only(shift):
    """Catches absolute positions and tables that end.

    Angles of 1e6 are good to 1e-10 in float64.
    """
    network = tiny_network()
    x = latents("x")
    text = conditioning()
    past = x[:, :CHUNK]
    present = x[:, CHUNK:]

    def flow(start: int) -> Tensor:
        kv = network(past, 0.0, text, ChunkContext((), start)).kv
        return network(present, SIGMA, text, ChunkContext((kv,), start + CHUNK)).flow

    torch.testing.assert_close(flow(shift), flow(0), rtol=0, atol=1e-9)


def test_distance_in_time_matters():
    """Catches positions that are ignored, which the test of relative positions would not see."""
    network = tiny_network()
    x = latents("x")
    text = conditioning()
    kv = network(x[:, :CHUNK], 0.0, text, ChunkContext()).kv
    near, far = (
        network(x[:, CHUNK:], SIGMA, text, ChunkContext((kv,), start)).flow
        for start in (CHUNK, CHUNK + 1)
    )
    assert (near - far).abs().max() > 1e-3


def test_samples_of_a_batch_do_not_see_each_other():
    """Catches statistics or modulation taken over the batch.

    float64; kernels may round by batch size.
    """
    network = tiny_network()
    x = latents("x")
    text = conditioning()
    clean = latents("clean")
    both = network(x, SIGMA, text, packed_context(network, clean, text)).flow
    for row in range(2):
        one = Conditioning(text.text[row : row + 1])
        context = packed_context(network, clean[row : row + 1], one)
        alone = network(x[row : row + 1], SIGMA[row : row + 1], one, context).flow
        torch.testing.assert_close(both[row : row + 1], alone, rtol=0, atol=1e-12)


def test_packed_chunks_equal_one_after_the_other():
    """Catches positions, sigmas or contexts mixed up by packing.

    The same sums in float64, up to the kernel's order.
    """
    network = tiny_network()
    x = latents("x")
    text = conditioning()
    sigma = torch.linspace(0.1, 0.9, 2 * FRAMES, dtype=torch.float64).reshape(2, FRAMES)
    packed = packed_context(network, latents("clean"), text)
    together = network(x, sigma, text, packed).flow
    for chunk, context in zip(plan_chunks(FRAMES, CHUNK), packed.contexts, strict=True):
        alone = network(chunk.of(x), chunk.of(sigma), text, context).flow
        torch.testing.assert_close(chunk.of(together), alone, rtol=0, atol=1e-12)


def test_packed_chunks_do_not_see_each_other():
    """Catches noisy chunks that attend to noisy neighbours instead of clean context.

    One of them is changed; the others must stay equal bit for bit.
    """
    network = tiny_network()
    x = latents("x")
    text = conditioning()
    packed = packed_context(network, latents("clean"), text)
    changed = x.clone()
    changed[:, CHUNK : 2 * CHUNK] += 1
    before, after = (network(value, SIGMA, text, packed).flow for value in (x, changed))
    others = [0, 1, 4, 5]
    assert torch.equal(before[:, others], after[:, others])
    assert (before - after)[:, CHUNK : 2 * CHUNK].abs().max() > 1e-3


@pytest.mark.parametrize("with_context", [False, True], ids=["bidirectional", "with context"])
def test_gradient_checkpointing_changes_nothing(with_context):
    """Catches recomputation with another context or precision.

    Outputs and gradients are equal bit for bit.
    """
    x = latents("x")
    text = conditioning()
    results = []
    for checkpointing in (False, True):
        network = tiny_network(dtype=torch.float32)
        if checkpointing:
            network.enable_gradient_checkpointing()
        context = packed_context(network, latents("clean"), text) if with_context else None
        flow = network(x, SIGMA, text, context).flow
        (flow * latents("weight").float()).sum().backward()
        results.append((flow.detach(), {name: p.grad for name, p in network.named_parameters()}))
    (flow, gradients), (flow_again, gradients_again) = results
    assert torch.equal(flow, flow_again)
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


def test_gradient_checkpointing_does_recompute():
    """Catches a switch without effect: the test above would pass, but save no memory.

    Counts the values that the backward pass keeps, which checkpointing reduces.
    """
    kept = []
    for checkpointing in (False, True):
        network = tiny_network()
        if checkpointing:
            network.enable_gradient_checkpointing()
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network(latents("x"), SIGMA, conditioning()).flow.sum()
        kept.append(sum(sizes))
    assert kept[1] < 0.3 * kept[0]


def test_every_parameter_matters_to_the_flow():
    """Catches a layer that is built, loaded and never used."""
    network = tiny_network()
    (network(latents("x"), SIGMA, conditioning()).flow * latents("weight")).sum().backward()
    assert [
        name
        for name, p in network.named_parameters()
        if p.grad is None or not p.grad.abs().max() > 0
    ] == []


def test_kv_of_a_chunk_carries_no_gradient():
    """Catches a past through which gradient flows back into earlier chunks."""
    kv = tiny_network()(latents("x"), SIGMA, conditioning()).kv
    assert kv.frames == FRAMES
    assert not any(part.requires_grad for layer in kv.layers for part in layer)


def test_padding_of_the_text_is_attended_to():
    """Catches a text mask.

    Wan has none: its checkpoints were trained with the padding visible.
    """
    network = tiny_network()
    x = latents("x")
    text = conditioning().text
    longer = torch.nn.functional.pad(text, (0, 0, 0, 3))
    short, long = (network(x, SIGMA, Conditioning(value)).flow for value in (text, longer))
    assert (short - long).abs().max() > 1e-3


def test_sigma_reaches_the_network_as_a_fine_thousandfold_timestep():
    """Catches a timestep rounded to an integer or to float32.

    A change of 1e-7 in sigma must have an effect. The fastest feature is cos(1000 sigma), which
    such a step moves by up to 1e-4; three steps move it three times as far.
    """
    network = tiny_network()
    x = latents("x")
    text = conditioning()
    base = network(x, 0.5, text).flow
    one, three = (
        (network(x, 0.5 + step, text).flow - base).abs().max().item() for step in (1e-7, 3e-7)
    )
    assert 1e-6 < one < 1e-3
    assert three / one == pytest.approx(3, rel=1e-2)


def test_norms_have_wans_epsilon():
    """Catches a norm's default of 1e-5.

    It shows only where activations are tiny: about 1e-3 before each norm here. With a variance near
    1e-6 the two epsilons differ by a factor of two in the norm's output.
    """
    twin = diffusers_twin()
    ours = tiny_network(dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if any(
                part in name for part in ("patch_embedding", "to_out", "to_q", "to_k", "ffn.net.2")
            ):
                parameter.mul_(1e-3)
    ours.load_state_dict(twin.state_dict(), strict=True)
    x = latents("x").float()
    text = conditioning().text.float()
    sigma = SIGMA.float()
    expected = diffusers_flow(twin, x, 1000 * sigma, text)
    torch.testing.assert_close(ours(x, sigma, Conditioning(text)).flow, expected, atol=5e-5, rtol=0)


def test_half_precision_answers_as_full_precision_does():
    """Catches a timestep in bfloat16, wrong by up to two steps of the fastest feature.

    8 mantissa bits through 2 layers leave .6 % of the flow's spread (three seeds: .6 to .9); 2 %
    are allowed.
    """
    half = tiny_network(dtype=torch.bfloat16)
    exact = tiny_network()
    exact.load_state_dict({name: value.double() for name, value in half.state_dict().items()})
    x = latents("x").bfloat16().double()
    text = Conditioning(conditioning().text.bfloat16().double())
    context = ChunkContext((), 10_000)
    flow = exact(x, SIGMA, text, context).flow
    error = half(x, SIGMA, text, context).flow.double() - flow
    assert error.square().mean().sqrt() < 0.02 * flow.std()


def test_initial_weights_are_wans_and_a_function_of_the_generator():
    """Catches weights drawn from torch's global state.

    Two machines would start from different teachers.
    """
    networks = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        network = WanTransformer(**TINY)
        network.init_weights(torch.Generator().manual_seed(5))
        networks.append(network)
    first, second = (network.state_dict() for network in networks)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not first["proj_out.weight"].any()
    assert first["blocks.0.attn1.norm_q.weight"].eq(1).all()
    flow = networks[0](latents("x"), SIGMA, conditioning()).flow
    assert not flow.any()


@pytest.mark.parametrize("shape", [(1, 2, 4, 5, 6), (1, 2, 4, 4, 7)], ids=["height", "width"])
def test_latents_that_do_not_fit_the_patch_are_refused(shape):
    """Catches a convolution that quietly drops the last row of an odd frame."""
    with pytest.raises(
        ValueError, match=r"must be multiples of the patch \(1, 2, 2\).*divisible by 16"
    ):
        tiny_network()(torch.zeros(shape), 0.5, conditioning(1))


def test_chunk_kv_counts_latent_frames_not_tokens():
    """Catches windows that evict by tokens: one chunk would fill them."""
    kv: ChunkKV = tiny_network()(latents("x", frames=2), SIGMA, conditioning(), ChunkContext()).kv
    assert kv.frames == 2
    assert kv.layers[0][0].shape[1] == 2 * (4 // 2) * (6 // 2)


def test_network_is_told_one_sigma_for_each_latent_frame():
    """Catches a sigma given per sample but read per frame.

    Shapes cannot tell them apart when B = F.
    """
    x = torch.zeros(2, 2, 1, 1, 1)
    per_sample = torch.tensor([0.25, 0.75])
    assert sigma_per_frame(per_sample, x).tolist() == [[0.25, 0.25], [0.75, 0.75]]
    assert sigma_per_frame(per_sample.expand(2, 2), x).tolist() == [[0.25, 0.75], [0.25, 0.75]]
    assert sigma_per_frame(0.5, x).tolist() == [[0.5]]
