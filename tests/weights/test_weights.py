"""Wan's weights in every format: the same tensors, or an error with its reason and remedy."""

from __future__ import annotations

import pytest
import torch
from golden_weights import FOLDER, FORWARD, SIZES, golden
from safetensors.torch import save_file
from wan_files import HEAD_DIM, same, sharded_folder, wan_folder, wan_shapes, wan_state

from selfforcing_dfd.context import Conditioning
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.weights.names import sizes_of, to_diffusers, to_wan, unwrap
from selfforcing_dfd.weights.read import WeightsError, load_network, read_weights


@pytest.mark.parametrize(
    ("width", "ffn", "layers", "heads", "count", "parameters"),
    [(1536, 8960, 30, 12, 825, 1_418_996_800), (5120, 13824, 40, 40, 1095, 14_288_491_584)],
)
def test_every_tensor_of_the_released_sizes_has_its_name_and_shape(
    width, ffn, layers, heads, count, parameters
):
    """Catches a name that is not mapped, or mapped to another tensor of the same shape."""
    with torch.device("meta"):
        network = WanTransformer(num_attention_heads=heads, ffn_dim=ffn, num_layers=layers)
    ours = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    original = wan_shapes(width, ffn, layers)
    assert {to_diffusers(name): shape for name, shape in original.items()} == ours
    assert {to_wan(name): shape for name, shape in ours.items()} == original
    assert (len(ours), sum(torch.Size(shape).numel() for shape in ours.values())) == (
        count,
        parameters,
    )
    found_width, sizes = sizes_of(ours)
    assert (found_width, sizes) == (width, {key: network.config[key] for key in sizes})


def test_the_affine_norm_changes_its_number():
    """Catches the wrong number of the norm before cross-attention.

    Wan's norm3 is diffusers' norm2, and the other norms of both have no weights.
    """
    assert to_diffusers("blocks.7.norm3.weight") == "blocks.7.norm2.weight"
    assert to_diffusers("blocks.7.norm2.weight") is None
    assert to_wan("blocks.7.norm3.weight") is None


def test_golden_weights_give_the_reference_flow():
    """Catches two names swapped where no shape shows it.

    Original names must give the reference's own output.
    """
    data = golden("bidirectional")
    network = load_network(
        FOLDER / "weights.safetensors", dtype=torch.float32, head_dim=SIZES["attention_head_dim"]
    )
    out = network(data["x"], data["t"] / 1000, Conditioning(data["text"]))
    torch.testing.assert_close(out.flow, data["flow"], **FORWARD)


WRAPPED = {
    "generator, as Self-Forcing": ("generator", "model."),
    "averaged, named by FSDP": ("generator_ema", "model._fsdp_wrapped_module."),
    "critic, as CausVid": ("critic", "model."),
    "model, compiled, in DDP": ("model", "module._orig_mod."),
    "bare state dict": ("", ""),
    "all of them": (
        "generator",
        "_orig_mod.module.model._fsdp_wrapped_module.model._checkpoint_wrapped_module.",
    ),
}


@pytest.mark.parametrize("form", WRAPPED)
def test_wrapped_forms_are_the_same_network(form, tmp_path):
    """Catches a prefix that stays on, in a file of torch.save."""
    entry, prefix = WRAPPED[form]
    state = {prefix + name: tensor for name, tensor in wan_state().items()}
    torch.save({entry: state, "step": 600} if entry else state, tmp_path / "weights.pt")
    same(load_network(tmp_path / "weights.pt", head_dim=HEAD_DIM))


def test_wrappers_inside_a_name_go(tmp_path):
    """Catches stripping at the front only: checkpointing and nested FSDP wrap single blocks."""
    inside = {
        n.replace("blocks.1.", "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module."): t
        for n, t in wan_state().items()
    }
    torch.save(
        {"generator": {f"model.{name}": tensor for name, tensor in inside.items()}},
        tmp_path / "weights.pt",
    )
    same(load_network(tmp_path / "weights.pt", head_dim=HEAD_DIM))
    assert unwrap("model.model") == "model", "a name never vanishes"


def test_old_files_of_torch_are_read(tmp_path):
    """Catches memory mapping asked of a file from before torch 1.6, which cannot be mapped."""
    torch.save(wan_state(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    same(load_network(tmp_path / "old.pth", head_dim=HEAD_DIM))


def test_folders_of_both_kinds_and_their_single_files(tmp_path):
    """Catches a usual place that is not searched.

    An original folder, diffusers' shards, a pipeline's subfolder, one file.
    """
    original = wan_folder(tmp_path / "original", wan_state())
    same(load_network(original))
    # heads from the config beside it
    same(load_network(original / "diffusion_pytorch_model.safetensors"))
    sharded_folder(tmp_path / "pipeline" / "transformer")
    same(load_network(tmp_path / "pipeline" / "transformer"))
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    same(load_network(tmp_path / "pipeline"))


def test_of_several_models_the_averaged_one_unless_another_is_named(tmp_path):
    """Catches the wrong one of three networks in a file, and an error that does not list them."""
    models = {
        name: {f"model.{k}": t for k, t in wan_state(seed).items()}
        for seed, name in enumerate(("critic", "generator"), 1)
    }
    models["generator_ema"] = {f"model.{k}": t for k, t in wan_state(0).items()}
    torch.save(models, tmp_path / "weights.pt")
    same(load_network(tmp_path / "weights.pt", head_dim=HEAD_DIM))
    same(load_network(tmp_path / "weights.pt", entry="generator", head_dim=HEAD_DIM), wan_state(2))
    with pytest.raises(
        WeightsError, match="no entry 'ema'; it holds critic, generator, generator_ema"
    ):
        read_weights(tmp_path / "weights.pt", entry="ema")
    torch.save({"a": models["critic"], "b": models["generator"]}, tmp_path / "unknown.pt")
    with pytest.raises(WeightsError, match="holds a, b; say which"):
        read_weights(tmp_path / "unknown.pt")
    with pytest.raises(WeightsError, match="one model; leave entry 'generator' out"):
        read_weights(wan_folder(tmp_path / "original", wan_state()), entry="generator")


@pytest.mark.parametrize(
    ("entry", "role"),
    [
        ("generator", "causal_student"),
        ("generator_ema", "causal_student"),
        ("critic", "fake_score"),
        ("model", None),
    ],
)
def test_what_an_entry_says_of_its_role(entry, role, tmp_path):
    """Catches a student that is later taken for a bidirectional teacher, or the other way round."""
    torch.save({entry: wan_state()}, tmp_path / "weights.pt")
    assert read_weights(tmp_path / "weights.pt").role == role
    assert load_network(tmp_path / "weights.pt", head_dim=HEAD_DIM).config.get("role") == role


def test_names_that_become_one_are_refused(tmp_path):
    """Catches one of two tensors overwritten by the other when prefixes go."""
    state = wan_state()
    state |= {"model._orig_mod.head.head.bias": state["head.head.bias"] + 1}
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(
        WeightsError,
        match=r"head.head.bias and model._orig_mod.head.head.bias are both head.head.bias",
    ):
        read_weights(tmp_path / "weights.pt")


EXTRAS = {
    "img_emb.proj.0.weight": "image-to-video",
    "blocks.0.cross_attn.k_img.weight": "image-to-video",
    "blocks.0.cross_attn.norm_k_img.weight": "image-to-video",
    "_cls_pred_branch.0.weight": "GAN heads",
    "_register_tokens.0": "GAN heads",
    "_gan_ca_blocks.1.norm3.weight": "GAN heads",
    "vace_blocks.0.modulation": "VACE",
    "blocks.0.self_attn.q.lora_A.weight": "LoRA",
    "surprise.weight": "surprise.weight is not known",
}


@pytest.mark.parametrize("key", EXTRAS)
def test_additional_tensors_are_named_and_explained(key, tmp_path):
    """Catches a tensor dropped in silence, and an error that leaves the user with a key."""
    torch.save(
        {"critic": {f"model.{k}": t for k, t in (wan_state() | {key: torch.ones(3)}).items()}},
        tmp_path / "w.pt",
    )
    with pytest.raises(WeightsError, match=EXTRAS[key]):
        load_network(tmp_path / "w.pt", head_dim=HEAD_DIM)
    if EXTRAS[key] == "GAN heads":
        same(load_network(tmp_path / "w.pt", head_dim=HEAD_DIM, drop_gan_heads=True))


def test_differences_are_counted_and_shown_in_the_sources_names(tmp_path):
    """Catches a strict load that reports one of three kinds only, or thousands of lines."""
    state = wan_state()
    del state["blocks.0.norm3.weight"], state["blocks.1.ffn.2.bias"]
    state["blocks.0.self_attn.q.bias"] = torch.ones(31)
    save_file(
        state | {f"blocks.0.other{i}": torch.ones(1) for i in range(20)}, tmp_path / "w.safetensors"
    )
    with pytest.raises(
        WeightsError, match="of 69 tensors 2 missing, 20 unknown and 1 of another shape"
    ) as caught:
        load_network(tmp_path / "w.safetensors", head_dim=HEAD_DIM)
    text = str(caught.value)
    assert (
        "blocks.0.norm3.weight [32] is missing" in text
        and "blocks.0.self_attn.q.bias is [31], wanted [32]" in text
    )
    assert "and 18 more" in text and len(text.splitlines()) <= 10


def test_the_config_must_agree_with_the_tensors(tmp_path):
    """Catches a config.json of another size, and guessed heads, which no shape shows."""
    with pytest.raises(WeightsError, match="num_layers 30 instead of 2"):
        load_network(wan_folder(tmp_path / "layers", wan_state(), num_layers=30))
    with pytest.raises(WeightsError, match="image_dim 1280 instead of None"):
        load_network(wan_folder(tmp_path / "i2v", wan_state(), model_type="i2v"))
    with pytest.raises(WeightsError, match=r"'model_type': 'flf2v'.*or image-to-video"):
        read_weights(wan_folder(tmp_path / "flf2v", wan_state(), model_type="flf2v"))
    save_file(wan_state(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"width 32 and no word about heads; .* head_dim=N"):
        load_network(tmp_path / "w.safetensors")


def test_extra_channels_are_refused(tmp_path):
    """Catches further input channels of something other than a picture, as Wan2.2 has them.

    Such a checkpoint has no image encoder's tensors.
    """
    state = wan_state()
    state["patch_embedding.weight"] = torch.ones(32, 12, 1, 2, 2)
    save_file(state, tmp_path / "fun.safetensors")
    with pytest.raises(
        WeightsError, match="takes 12 channels, gives 4 and has no tensors of an image encoder"
    ):
        load_network(tmp_path / "fun.safetensors", head_dim=HEAD_DIM)


def test_a_config_of_another_class_or_of_the_other_names(tmp_path):
    """Catches a VAE's folder, and a config.json beside weights with the other names."""
    with pytest.raises(WeightsError, match="holds AutoencoderKLWan; wanted: WanTransformer3DModel"):
        read_weights(wan_folder(tmp_path / "vae", wan_state(), _class_name="AutoencoderKLWan"))
    with pytest.raises(
        WeightsError,
        match="is of a WanTransformer3DModel, but the tensors have names of the other kind",
    ):
        read_weights(
            wan_folder(tmp_path / "mixed", wan_state(), _class_name="WanTransformer3DModel")
        )


def test_released_widths_have_heads_of_128(tmp_path):
    """Catches the 1.3B student in a .pt file loaded with a wrong number of heads.

    The file does not store it.
    """
    with torch.device("meta"):
        shapes = WanTransformer(num_layers=1, ffn_dim=8, text_dim=8).state_dict()
    save_file(
        {name: torch.zeros(t.shape, dtype=torch.bfloat16) for name, t in shapes.items()},
        tmp_path / "w.safetensors",
    )
    network = load_network(tmp_path / "w.safetensors")
    assert network.config["num_attention_heads"] == 12
    assert network.dtype == torch.bfloat16, "each tensor keeps its dtype"
