"""A diffusers folder of Wan2.1 at tiny size, with its real classes and file layout.

All weights are functions of a seed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from tiny_models import fill_weights
from tiny_text import DIM, save_text_folder, tiny_encoder, tiny_tokenizer

from selfforcing_dfd.models.identity import Recipe, mark
from selfforcing_dfd.models.wan import WanTransformer

SIZES: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "text_dim": DIM,
    "freq_dim": 64,
    "ffn_dim": 256,
    "num_layers": 2,
}
HEIGHT, WIDTH = 32, 48
# two steps, to be quick
RECIPE = Recipe(ladder=(1000, 500), shift=3.0, chunk_frames=3, frames=6)


def tiny_student(seed: int = 0, recipe: Recipe = RECIPE) -> WanTransformer:
    student = WanTransformer(**SIZES)
    fill_weights(student, seed)
    mark(student, "causal_student", recipe)
    return student.requires_grad_(False)


def tiny_vae() -> Any:
    """The real plan of layers, an eighth as wide."""
    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1)


def tiny_parts() -> tuple[Any, Any, Any]:
    """VAE, text encoder and tokenizer, as the pipeline takes them after its transformer."""
    return tiny_vae(), tiny_encoder(), tiny_tokenizer()


def save_wan_folder(folder: Path, seed: int = 7) -> Path:
    """As `Wan-AI/Wan2.1-T2V-1.3B-Diffusers`: its transformer is the bidirectional teacher."""
    teacher = WanTransformer3DModel(in_channels=16, out_channels=16, **SIZES)
    fill_weights(teacher, seed)
    teacher.save_pretrained(folder / "transformer")
    tiny_vae().save_pretrained(folder / "vae")
    save_text_folder(folder)
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True
    ).save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    index = {"_class_name": "WanPipeline", "_diffusers_version": "0.33.0.dev0", **parts}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
