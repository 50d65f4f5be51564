"""Floating-point operations of a chunk, worked out from sizes, and the share of a GPU's peak that
they make (MFU).

Matrix products, convolutions and attention only, two operations for each multiply-add; norms and
rotations are not counted, nor are they what a peak is stated for.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import nn

from selfforcing_dfd.codecs.protocol import StreamingCodec
from selfforcing_dfd.codecs.wan_vae import WanCodec
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.streaming.session import StreamModel, StreamSettings
from selfforcing_dfd.tiny.codec import CHANNELS, SPACE, TIME, TinyCodec

BF16_PEAKS = (
    (r"GB200", 2500.0),
    (r"B[23]00", 2250.0),
    (r"H200 NVL", 835.5),
    (r"H100 NVL", 835.5),
    (r"H100 PCIe", 756.0),
    (r"H100|H200|H800|GH200", 989.4),
    (r"H20", 148.0),
    (r"A100|A800", 312.0),
    (r"A30", 165.0),
    (r"A40", 149.7),
    (r"A10", 125.0),
    (r"L40S", 362.0),
    (r"L40", 181.0),
    (r"L4", 121.0),
    (r"RTX 6000 Ada", 364.2),
    (r"RTX A6000", 154.8),
    (r"RTX 5090", 209.5),
    (r"RTX 4090", 165.2),
    (r"RTX 3090", 71.0),
)
"""TFLOP/s of dense bf16 matrix products with float32 sums, without sparsity, from NVIDIA's data
sheets and white papers, by a part of the device's name; the first that fits. `H100` alone is the
SXM board.
"""


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU by its name as CUDA gives it; None for a device that the table does
    not know.
    """
    fitting = (
        peak for pattern, peak in BF16_PEAKS if re.search(rf"\b(?:{pattern})\b", device_name)
    )
    return next(fitting, None)


def device_peak(model: StreamModel) -> float | None:
    """The peak that a model's GPU is known for, where the model computes in 16 bits; else None: no
    peak, no MFU.
    """
    if model.device.type != "cuda" or model.dtype.itemsize != 2:
        return None
    return peak_tflops(torch.cuda.get_device_name(model.device))


@dataclass(frozen=True, slots=True)
class ChunkFlops:
    """Operations of one chunk. denoise: all steps of the ladder; commit: the pass that stores keys
    and values.
    """

    denoise: int
    commit: int
    decode: int

    @property
    def dit(self) -> int:
        return self.denoise + self.commit

    @property
    def total(self) -> int:
        return self.dit + self.decode

    def as_dict(self) -> dict[str, int]:
        return {
            "denoise": self.denoise,
            "commit": self.commit,
            "decode": self.decode,
            "total": self.total,
        }


def chunk_flops(model: StreamModel, settings: StreamSettings, text_tokens: int) -> ChunkFlops:
    """A chunk of the steady state: window and sink are full, the text's keys and values are there."""
    visible = settings.sink_frames + settings.window_frames
    one = forward_flops(model.student, model.chunk_frames, visible, model.latent_size, text_tokens)
    decode = model.chunk_frames * decode_flops(model.codec, model.latent_size)
    return ChunkFlops(len(model.ladder) * one, one, decode)


def forward_flops(
    student: WanTransformer,
    frames: int,
    visible_frames: int,
    latent_size: tuple[int, int],
    text_tokens: int,
) -> int:
    """One call on `frames` latent frames that see `visible_frames`, themselves included; text and
    noise level prepared.
    """
    config, patch = student.config, student.patch
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    tokens_per_frame = (latent_size[0] // patch[1]) * (latent_size[1] // patch[2])
    tokens, patch_size = frames * tokens_per_frame, math.prod(patch)
    # self-attention has four projections; of the text's, queries and output are left
    linear = 2 * tokens * ((4 + 2) * dim**2 + 2 * dim * config["ffn_dim"])
    attention = 4 * tokens * (visible_frames * tokens_per_frame + text_tokens) * dim
    ends = 2 * tokens * dim * patch_size * (config["in_channels"] + config["out_channels"])
    return config["num_layers"] * (linear + attention) + ends


def text_flops(student: WanTransformer, text_tokens: int) -> int:
    """The text's embedding, keys and values: once for each prompt."""
    config = student.config
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    embedder = config["text_dim"] * dim + dim**2
    return 2 * text_tokens * (embedder + config["num_layers"] * 2 * dim**2)


def level_flops(student: WanTransformer) -> int:
    """The embedding of one noise level: once for each prompt and step of the ladder."""
    dim = student.config["num_attention_heads"] * student.config["attention_head_dim"]
    return 2 * (student.config["freq_dim"] * dim + dim**2 + 6 * dim**2)


def decode_flops(codec: StreamingCodec, latent_size: tuple[int, int], first: bool = False) -> int:
    """One latent frame to video; a video's `first` gives one video frame, any other one four.

    Raises ValueError for a codec of another kind.
    """
    if isinstance(codec, TinyCodec):
        return 2 * math.prod(latent_size) * CHANNELS * (1 if first else TIME) * SPACE**2 * 3
    if isinstance(codec, WanCodec):
        return wan_decode_flops(codec.vae, latent_size, first)
    raise ValueError(
        f"the FLOPs of a {type(codec).__name__} are not known; want a TinyCodec or a WanCodec"
    )


def wan_decode_flops(vae: nn.Module, latent_size: tuple[int, int], first: bool = False) -> int:
    """Every convolution of the Wan VAE's decoder at its resolution, from the shapes of its weights,
    and its attention.

    A causal convolution works on its halo of earlier frames too, but its result, which counts, is
    as long as its input. The first latent frame skips the convolutions that double time.
    """
    decoder, post_quant = vae.get_submodule("decoder"), vae.get_submodule("post_quant_conv")
    (rows, columns), frames = latent_size, 1
    total = convolutions(post_quant, rows * columns)
    for name, part in decoder.named_children():
        if name != "up_blocks":
            total += convolutions(part, frames * rows * columns)
            continue
        for block in part.children():
            stem, upsampler = block.get_submodule("resnets"), next(iter(upsamplers(block)), None)
            total += convolutions(stem, frames * rows * columns)
            if upsampler is None:
                continue
            doubles = hasattr(upsampler, "time_conv") and not first
            total += (
                convolutions(upsampler.get_submodule("time_conv"), frames * rows * columns)
                if doubles
                else 0
            )
            frames, rows, columns = frames * (2 if doubles else 1), 2 * rows, 2 * columns
            total += convolutions(upsampler.get_submodule("resample"), frames * rows * columns)
    heads = (layer for name, layer in decoder.named_modules() if name.endswith("to_qkv"))
    return total + sum(4 * math.prod(latent_size) ** 2 * conv_shape(layer)[1] for layer in heads)


def upsamplers(block: nn.Module) -> list[nn.Module]:
    """Of Wan2.1's decoder blocks, each of which has one or none."""
    holder = dict(block.named_children()).get("upsamplers")
    return list(holder.children()) if holder is not None else []


def convolutions(module: nn.Module, positions: int) -> int:
    """All convolutions of a module, each giving a result at `positions` places."""
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Conv3d))
    return sum(2 * positions * math.prod(conv_shape(layer)) for layer in layers)


def conv_shape(layer: nn.Module) -> torch.Size:
    """[out, in, *kernel]."""
    weight = layer.get_parameter("weight")
    return weight.shape


def utilisation(flops: int, milliseconds: float, peak: float | None) -> dict[str, float | None]:
    """TFLOP/s reached, and as a fraction of the peak (TFLOP/s) where one is stated."""
    rate = flops / milliseconds / 1e9 if milliseconds > 0 else 0.0
    return {"tflops_per_s": rate, "mfu": rate / peak if peak else None}
