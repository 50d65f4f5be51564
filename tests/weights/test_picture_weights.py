"""Checkpoints of Wan2.1-I2V in both layouts: every tensor read, written and named."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from tiny_models import FRAMES, TINY, latents
from tiny_pictures import IMAGE_DIM, asked, picture_sizes
from wan_files import HEAD_DIM, same, wan_folder, wan_shapes, wan_state

from selfforcing_dfd.models.sizes import PUBLISHED_SIZES
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.weights.names import to_diffusers, to_wan
from selfforcing_dfd.weights.read import WeightsError, describe, load_network
from selfforcing_dfd.weights.write import convert

WIDTH = 5120
FURTHER = {
    "img_emb.proj.0.weight": (1280,),
    "img_emb.proj.0.bias": (1280,),
    "img_emb.proj.1.weight": (1280, 1280),
    "img_emb.proj.1.bias": (1280,),
    "img_emb.proj.3.weight": (WIDTH, 1280),
    "img_emb.proj.3.bias": (WIDTH,),
    "img_emb.proj.4.weight": (WIDTH,),
    "img_emb.proj.4.bias": (WIDTH,),
}
FURTHER_OF_A_BLOCK = {
    "cross_attn.k_img.weight": (WIDTH, WIDTH),
    "cross_attn.k_img.bias": (WIDTH,),
    "cross_attn.v_img.weight": (WIDTH, WIDTH),
    "cross_attn.v_img.bias": (WIDTH,),
    "cross_attn.norm_k_img.weight": (WIDTH,),
}
"""What the original Wan2.1-I2V-14B has beside the tensors of T2V-14B, from its description."""


def test_every_tensor_of_the_released_size_has_its_name_and_shape():
    """Catches a name that is not mapped, or mapped to another tensor of the same shape.

    The released checkpoint has 1,303 tensors and 16.4 billion values.
    """
    original = wan_shapes(WIDTH, 13824, 40) | {"patch_embedding.weight": (WIDTH, 36, 1, 2, 2)}
    original |= FURTHER
    for block in range(40):
        original |= {f"blocks.{block}.{name}": s for name, s in FURTHER_OF_A_BLOCK.items()}
    with torch.device("meta"):
        network = WanTransformer(**PUBLISHED_SIZES["wan14b_i2v"])
        twin = WanTransformer3DModel(in_channels=36, image_dim=1280, added_kv_proj_dim=WIDTH)
    ours = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert ours == {name: tuple(tensor.shape) for name, tensor in twin.state_dict().items()}
    assert {to_diffusers(name): shape for name, shape in original.items()} == ours
    assert {to_wan(name): shape for name, shape in ours.items()} == original
    assert len(ours) == 1303
    assert round(sum(torch.Size(s).numel() for s in ours.values()) / 1e9, 1) == 16.4


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return wan_state(**picture_sizes())


def test_an_original_folder_and_its_single_files_are_read(state, tmp_path):
    """Catches a size that follows from nothing: config.json says no image_dim."""
    config = {"model_type": "i2v", "in_dim": 12, "image_dim": IMAGE_DIM}
    folder = wan_folder(tmp_path / "original", state, **config)
    same(load_network(folder), state)
    save_file(state, tmp_path / "bare.safetensors")
    same(load_network(tmp_path / "bare.safetensors", head_dim=HEAD_DIM), state)
    torch.save({"generator": {f"model.{k}": t for k, t in state.items()}}, tmp_path / "w.pt")
    same(load_network(tmp_path / "w.pt", head_dim=HEAD_DIM), state)
    assert describe(folder).sizes["image_dim"] == IMAGE_DIM


@pytest.mark.parametrize("to", ["diffusers", "wan", "self-forcing", "single-file"])
def test_all_formats_keep_the_parts_for_a_picture(to, state, tmp_path):
    """Catches a written config that says text-to-video, and a tensor that a format drops."""
    source = tmp_path / "source.safetensors"
    save_file(state, source)
    convert(source, tmp_path / "made", to, head_dim=HEAD_DIM)
    head_dim = 0 if to != "bare" else HEAD_DIM
    same(load_network(tmp_path / "made", head_dim=head_dim), state)
    if to == "wan":
        config = json.loads((tmp_path / "made" / "config.json").read_text())
        assert (config["model_type"], config["in_dim"], config["out_dim"]) == ("i2v", 12, 4)


def test_diffusers_and_this_package_read_each_others_folders(tmp_path):
    """Catches a folder that only one of them understands; the flow is that of the same weights."""
    twin = WanTransformer3DModel(**{**TINY, **picture_sizes()}, eps=1e-6)
    twin.save_pretrained(tmp_path / "theirs")
    ours = load_network(tmp_path / "theirs")
    as_diffusers = WanTransformer.from_pretrained(tmp_path / "theirs", teacher=True)
    convert(tmp_path / "theirs", tmp_path / "written", "diffusers")
    again = WanTransformer3DModel.from_pretrained(tmp_path / "written")
    wanted = twin.state_dict()
    for network in (ours, as_diffusers, again):
        found = network.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    flow = ours(latents("x").float(), 0.5, asked(FRAMES, dtype=torch.float32)).flow
    assert flow.shape == (2, FRAMES, 4, 4, 6)


def test_a_checkpoint_that_lacks_a_part_is_refused(state, tmp_path):
    """Catches an image-to-video checkpoint of which half of the parts was left out."""
    without_keys = {k: t for k, t in state.items() if "k_img" not in k}
    save_file(without_keys, tmp_path / "keys.safetensors")
    with pytest.raises(WeightsError, match=r"k_img.*fetch it again"):
        load_network(tmp_path / "keys.safetensors", head_dim=HEAD_DIM)
    narrow = state | {"patch_embedding.weight": torch.ones(32, 4, 1, 2, 2)}
    save_file(narrow, tmp_path / "narrow.safetensors")
    with pytest.raises(WeightsError, match="takes 4 channels, gives 4 and has tensors of an image"):
        load_network(tmp_path / "narrow.safetensors", head_dim=HEAD_DIM)


def test_pictures_from_two_frames_are_refused(state, tmp_path):
    """Catches a first-and-last-frame checkpoint taken for one of a first frame."""
    both = state | {"img_emb.emb_pos": torch.ones(1, 514, IMAGE_DIM)}
    save_file(both, tmp_path / "flf.safetensors")
    with pytest.raises(WeightsError, match="first and a last picture"):
        load_network(tmp_path / "flf.safetensors", head_dim=HEAD_DIM)


def test_fresh_weights_of_a_network_for_pictures_are_usable():
    """Catches norms of the image embedder that begin near zero."""
    fresh = WanTransformer(**{**TINY, **picture_sizes()})
    fresh.init_weights(torch.Generator().manual_seed(0))
    assert bool((fresh.state_dict()["condition_embedder.image_embedder.norm1.weight"] == 1).all())
