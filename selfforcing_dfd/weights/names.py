"""Names of Wan's tensors: the original ones, diffusers', and those that wrappers change.

This package uses diffusers' names. Original Wan's norm3, the affine norm before cross-attention, is
called norm2 there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

Layout = Literal["diffusers", "wan"]
Shape = tuple[int, ...]

OUTER_MODULES = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
}
BLOCK_MODULES = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "norm3": "norm2",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
"""Modules with a weight and a bias: original Wan name -> diffusers name.

Those of `img_emb`, `k_img` and `v_img` are in image-to-video models alone.
"""

TO_DIFFUSERS_OUTER = {
    **{
        f"{wan}.{kind}": f"{name}.{kind}"
        for wan, name in OUTER_MODULES.items()
        for kind in ("weight", "bias")
    },
    "head.modulation": "scale_shift_table",
}
TO_DIFFUSERS_BLOCK = {
    **{
        f"{wan}.{kind}": f"{name}.{kind}"
        for wan, name in BLOCK_MODULES.items()
        for kind in ("weight", "bias")
    },
    **{
        f"{wan}.norm_{part}.weight": f"{name}.norm_{part}.weight"
        for wan, name in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part in "qk"
    },
    "cross_attn.norm_k_img.weight": "attn2.norm_added_k.weight",
    "modulation": "scale_shift_table",
}
TO_WAN_OUTER = {name: wan for wan, name in TO_DIFFUSERS_OUTER.items()}
TO_WAN_BLOCK = {name: wan for wan, name in TO_DIFFUSERS_BLOCK.items()}

WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module")
PREFIXES = ("model", "diffusion_model", "transformer")  # of enclosing modules
BLOCK = re.compile(r"blocks\.(0|[1-9]\d*)\.(.+)")


class Extra(NamedTuple):
    """Tensors of something else, recognised by their names, and what to do about them."""

    name: str
    pattern: re.Pattern[str]
    advice: str


EXTRAS = (
    Extra(
        "image-to-video",
        re.compile(
            r"(^|\.)(img_emb\.proj|k_img|v_img|norm_k_img|image_embedder\.(norm|ff)"
            r"|add_[kv]_proj|norm_added_k)"
        ),
        "an image-to-video checkpoint (Wan2.1 I2V) has img_emb, k_img, v_img and norm_k_img and 36 "
        "input channels; one of them is missing or of another size: fetch it again",
    ),
    Extra(
        "first-and-last-frame",
        re.compile(r"(^|\.)(img_emb\.emb_pos|image_embedder\.pos_embed)$"),
        "this is a checkpoint that takes a first and a last picture (FLF2V), which is not "
        "supported; use Wan2.1 I2V, which takes the first one",
    ),
    Extra(
        "GAN",
        re.compile(r"(^|\.)(_cls_pred_branch|_register_tokens|_gan_ca_blocks)(\.|$)"),
        "GAN heads of a Self-Forcing critic, which this network does not have; to read the rest "
        "without them: drop_gan_heads=True, or --drop-gan-heads for convert",
    ),
    Extra(
        "LoRA",
        re.compile(r"(^|[._])lora_|\.alpha$"),
        "this is a LoRA adapter and no model; load it into one with load_lora_adapter",
    ),
    Extra(
        "VACE or control",
        re.compile(r"(^|\.)(vace_|control_|ref_conv|motion_encoder|face_)"),
        "this is a checkpoint for control or editing (VACE, Fun, Animate), which is not supported; "
        "use Wan2.1 T2V",
    ),
    Extra(
        "FSDP shard",
        re.compile(r"_flat_param"),
        "these are one rank's flattened shards; gather them (FULL_STATE_DICT) where they were "
        "trained, then save again",
    ),
    Extra(
        "quantised",
        re.compile(
            r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale|absmax|quant_map"
            r"|quant_state)(\.|$)"
        ),
        "these are quantised weights, which are not supported; use those in bfloat16, float16 or "
        "float32",
    ),
)


def unwrap(key: str) -> str:
    """A key without the names that FSDP, checkpointing, torch.compile, DDP and modules add."""
    parts = [part for part in key.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] in PREFIXES:
        parts = parts[1:]
    return ".".join(parts)


def to_diffusers(wan: str) -> str | None:
    """diffusers' name of an original Wan name; None for one that Wan does not have."""
    return _renamed(wan, TO_DIFFUSERS_OUTER, TO_DIFFUSERS_BLOCK)


def to_wan(name: str) -> str | None:
    """The original Wan name of diffusers' name; None for one that diffusers does not have."""
    return _renamed(name, TO_WAN_OUTER, TO_WAN_BLOCK)


def _renamed(key: str, outer: Mapping[str, str], block: Mapping[str, str]) -> str | None:
    inside = BLOCK.fullmatch(key)
    if inside is None:
        return outer.get(key)
    renamed = block.get(inside[2])
    return None if renamed is None else f"blocks.{inside[1]}.{renamed}"


def layouts_in(keys: Iterable[str]) -> dict[Layout, list[str]]:
    """The unwrapped keys that only one layout has, by layout; both lists may be empty."""
    found: dict[Layout, list[str]] = {"diffusers": [], "wan": []}
    for key in keys:
        is_wan = to_diffusers(key) is not None
        is_diffusers = to_wan(key) is not None
        if is_wan != is_diffusers:
            found["wan" if is_wan else "diffusers"].append(key)
    return found


def extras_in(keys: Iterable[str]) -> dict[Extra, list[str]]:
    """Keys of known additions to Wan, by addition; each key in the first that fits."""
    found: dict[Extra, list[str]] = {}
    for key in keys:
        for extra in EXTRAS:
            if extra.pattern.search(key):
                found.setdefault(extra, []).append(key)
                break
    return found


def is_gan_head(key: str) -> bool:
    return any(extra.name == "GAN" for extra in extras_in([key]))


ANCHORS = {
    "patch_embedding.weight": 5,
    "condition_embedder.text_embedder.linear_1.weight": 2,
    "condition_embedder.time_embedder.linear_1.weight": 2,
    "blocks.0.ffn.net.0.proj.weight": 2,
    "proj_out.weight": 2,
}
"""Tensors that a network's sizes follow from, with their number of dimensions."""
IMAGE_NORM = "condition_embedder.image_embedder.norm1.weight"
"""Of the width of an image encoder's states; only image-to-video models have it."""


def sizes_of(
    shapes: Mapping[str, Shape],
) -> tuple[int, dict[str, int | tuple[int, int, int] | None]]:
    """Width D and WanTransformer's arguments but heads and eps, from shapes by diffusers name.

    Raises KeyError for one of ANCHORS that is missing or has another number of dimensions.
    """
    for name, num_dimensions in ANCHORS.items():
        if len(shapes.get(name, ())) != num_dimensions:
            raise KeyError(name)
    width, in_channels, *patch = shapes["patch_embedding.weight"]
    blocks = {int(inside[1]) for name in shapes if (inside := BLOCK.fullmatch(name))}
    image_dim = shapes[IMAGE_NORM][0] if shapes.get(IMAGE_NORM) else None
    return width, {
        "patch_size": (patch[0], patch[1], patch[2]),
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // (patch[0] * patch[1] * patch[2]),
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": max(blocks) + 1,
        "image_dim": image_dim,
        "added_kv_proj_dim": None if image_dim is None else width,
    }
