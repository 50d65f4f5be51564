"""Cosmos-Predict2.5's transformer at tiny size, against diffusers' pipeline, and trained."""

from __future__ import annotations

from inspect import signature
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import (
    Cosmos2_5_PredictBasePipeline,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tiny_models import DataForcing, fill_weights
from tiny_wan import tiny_vae
from torch import Tensor

from selfforcing_dfd import rng
from selfforcing_dfd.codecs.wan_vae import WanCodec
from selfforcing_dfd.context import ChunkContext, Conditioning
from selfforcing_dfd.data.shards import Batch
from selfforcing_dfd.models.cosmos import CosmosError, CosmosNetwork, cosmos_sigmas
from selfforcing_dfd.objectives import guided_x0
from selfforcing_dfd.ode import integrate
from selfforcing_dfd.rng import Draw
from selfforcing_dfd.rollout import plan_chunks
from selfforcing_dfd.stages.matching import MatchingStage

SIZES: dict[str, Any] = {  # as Cosmos-2.5-Predict-Base-2B, small; no padding mask: no torchvision
    "in_channels": 17,
    "out_channels": 16,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "text_embed_dim": 12,
    "adaln_lora_dim": 8,
    "rope_scale": (1.0, 3.0, 3.0),
    "concat_padding_mask": False,
    "extra_pos_embed_type": None,
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 24,
    "encoder_hidden_states_channels": 12,
}
FRAMES = 3
HEIGHT = 32
WIDTH = 48
SHAPE = (FRAMES, 16, HEIGHT // 8, WIDTH // 8)


def cosmos(seed: int = 0) -> CosmosNetwork:
    transformer = CosmosTransformer3DModel(**SIZES)
    fill_weights(transformer, seed)
    return CosmosNetwork(transformer)


def text(name: str = "text", batch: int = 1) -> Conditioning:
    return Conditioning(rng.normal((batch, 5, 24), 0, name).float())


def clip() -> Tensor:
    """A video in [0, 1], [1, T, H, W, 3]."""
    return rng.uniform((1, 1 + 4 * (FRAMES - 1), HEIGHT, WIDTH, 3), 0, "clip").float()


class NoChecker:
    """In place of a safety checker that has to be installed; latents are not checked."""

    def to(self, *place: Any) -> None:
        pass


@torch.no_grad()
def pipelines_latents(network: CosmosNetwork, noise: Tensor, given: int, scale: float) -> Tensor:
    """Three Euler steps by diffusers' pipeline after `given` latent frames of the clip."""
    pipeline = Cosmos2_5_PredictBasePipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=network.transformer,
        vae=tiny_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        safety_checker=NoChecker(),
    )
    pipeline.set_progress_bar_config(disable=True)
    video = None
    if given:
        video = 2 * clip().permute(0, 4, 1, 2, 3)[:, :, : 1 + 4 * (given - 1)] - 1
    return pipeline(
        video=video,
        height=HEIGHT,
        width=WIDTH,
        num_frames=1 + 4 * (FRAMES - 1),
        num_inference_steps=3,
        guidance_scale=scale,
        latents=noise.transpose(1, 2),
        prompt_embeds=text().text,
        negative_prompt_embeds=text("negative").text,
        num_latent_conditional_frames=given or 1,
        output_type="latent",
    ).frames.transpose(1, 2)


@pytest.mark.parametrize("given", [0, 1, 2])
def test_clips_are_those_of_diffusers_pipeline(given):
    """Catches another mask, time, guidance, direction of the flow, or given frames that move.

    Its guidance s adds s (cond - uncond) to cond, which is 1 + s here. Tolerance: float32, three
    steps of a network with random weights.
    """
    network = cosmos()
    noise = rng.normal((1, *SHAPE), 0, "noise").float()
    wanted = pipelines_latents(network, noise, given, scale=2.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(3)
    clean = WanCodec(tiny_vae()).encode(clip()[:, : 1 + 4 * (given - 1)]) if given else noise[:, :0]
    x_t = torch.cat([clean, noise[:, given:]], dim=1)
    with torch.no_grad():
        for level, following in pairwise(scheduler.sigmas.tolist()):
            sigma = torch.full((1, FRAMES), level)
            sigma[:, :given] = 0
            x0 = guided_x0(network, x_t, sigma, text(), text("negative"), 3.0)
            x_t = x_t + (following - level) * (x_t - x0) / level
    torch.testing.assert_close(x_t, wanted, atol=2e-4, rtol=2e-4)


def test_what_the_network_is_told_of_given_frames():
    """Catches another time for clean frames than the pipeline's, which moves flows by too little.

    Mask and time are told by frame, and a clean frame's time is the pipeline's own default.
    """
    network = cosmos()
    told: list[dict[str, Any]] = []
    network.transformer.register_forward_pre_hook(
        lambda _module, _inputs, named: told.append(named), with_kwargs=True
    )
    sigma = torch.tensor([[0.0, 0.7, 0.7]])
    with torch.no_grad():
        network(torch.zeros(1, *SHAPE), sigma, text())
    (named,) = told
    pipelines = signature(Cosmos2_5_PredictBasePipeline.__call__).parameters
    time = pipelines["conditional_frame_timestep"].default
    torch.testing.assert_close(named["timestep"].flatten(), torch.tensor([time, 0.7, 0.7]))
    mask = named["condition_mask"]
    assert mask.shape == (1, 1, FRAMES, *SHAPE[2:])
    assert torch.equal(mask[0, 0, :, 0, 0], torch.tensor([1.0, 0.0, 0.0]))


def test_noise_levels_are_those_of_the_published_scheduler():
    """Catches another spacing, or a last step that does not reach the data."""
    scheduler = UniPCMultistepScheduler(
        use_karras_sigmas=True,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        sigma_max=200.0,
        sigma_min=0.01,
    )
    scheduler.set_timesteps(10)
    wanted = scheduler.sigmas.double()
    torch.testing.assert_close(torch.tensor(cosmos_sigmas(10)).double(), wanted, atol=1e-6, rtol=0)


def test_the_ode_leaves_given_frames_as_they_are():
    """Catches a solver whose steps move a clean frame."""
    network = cosmos()
    start = rng.normal((1, *SHAPE), 0, "start").float()
    clips = integrate(network, start, cosmos_sigmas(2), text(), given=1)
    assert torch.equal(clips[:, 0], start[:, 0])
    assert not torch.equal(clips[:, 1:], start[:, 1:])


def stage(networks: dict[str, CosmosNetwork]) -> MatchingStage:
    """The paper's image-to-video setting: whole clips, noised real input, guidance 3."""
    return MatchingStage(
        trained={"student": networks["student"], "fake": networks["fake"]},
        teacher=networks["teacher"].requires_grad_(False),
        chunks=plan_chunks(FRAMES, FRAMES),
        ladder=(1.0, 0.75),
        guidance=3.0,
        shift=5.0,
        sigma_min=0.02,
        sigma_max=0.98,
        min_normaliser=1e-3,
        fake_per_student=4,
        real_input=True,
        given=1,
        **DataForcing(p=1.0, p_start=1.0, pairing="noised_real").settings(),
    )


def test_data_forcing_of_an_image_to_video_student_trains_it():
    """Catches an update that needs a causal network, and weights that no gradient reaches."""
    roles = ("student", "fake", "teacher")
    made = stage({role: cosmos(number) for number, role in enumerate(roles)})
    latents = rng.normal((2, *SHAPE), 0, "latents").float()
    batch = Batch(latents, text("text", 2).text, ("a", "b"), ("0", "1"), None)
    for turn in ("student", "fake"):
        draw = Draw(0, 0, 2, 0, (0, 1))
        found = made.loss(turn, batch, draw, 0)
        found.loss.backward()
        parameters = dict(made.trained[turn].named_parameters())
        silent = [n for n, p in parameters.items() if p.grad is None or not p.grad.any()]
        assert silent == []
        if found.generated is not None:
            assert torch.equal(found.generated[:, 0], latents[:, 0])


def test_a_saved_folder_is_read_whole(tmp_path):
    """Catches missing tensors drawn at random, and a folder that is not there."""
    network = cosmos()
    network.transformer.save_pretrained(tmp_path / "transformer")
    again = CosmosNetwork.from_pretrained(tmp_path, torch.float32)
    x_t = rng.normal((1, *SHAPE), 0, "x_t").float()
    with torch.no_grad():
        assert torch.equal(again(x_t, 0.5, text()).flow, network(x_t, 0.5, text()).flow)
    config = tmp_path / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"num_layers": 2', '"num_layers": 3'))
    with pytest.raises(CosmosError, match="missing, unknown or of another shape"):
        CosmosNetwork.from_pretrained(tmp_path)
    with pytest.raises(CosmosError, match=r"hf download nvidia/Cosmos-Predict2.5-2B --revision"):
        CosmosNetwork.from_pretrained(tmp_path / "none")


def test_it_takes_no_past_and_no_other_channels():
    """Catches a chunk after its past that is made as if it had none."""
    network = cosmos()
    later = ChunkContext(next_frame=3)
    with pytest.raises(CosmosError, match="sees no earlier chunks"):
        network(torch.zeros(1, *SHAPE), 0.5, text(), later)
    wrong = CosmosTransformer3DModel(**{**SIZES, "in_channels": 16})
    with pytest.raises(CosmosError, match="takes 16 channels and gives 16"):
        CosmosNetwork(wrong)
