"""What a call costs in floating-point operations, and how many a GPU can do.

Operations are counted by torch's `FlopCounterMode` while the call runs on the meta device, where
tensors have shapes and no memory. Counted are matrix products, convolutions and attention, two
operations for each multiply-add. Norms, rotations and activations are not, and a GPU's stated peak
does not include them either.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from selfforcing_dfd.context import ChunkContext, ChunkKV, PackedContext

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
"""Part of a GPU's name and its peak in TFLOP/s; the first that fits counts. The peak is of dense
bf16 products with float32 sums, from NVIDIA's data sheets. `H100` alone is the SXM board.
"""


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU by its name as CUDA gives it; None for an unknown name."""
    for pattern, peak in BF16_PEAKS:
        if re.search(rf"\b(?:{pattern})\b", device_name):
            return peak
    return None


def flops_of(call: Callable[[], Any]) -> int:
    """Operations of a call, its backward passes included.

    Attention runs as plain products, which the counter knows on every device.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def network_flops(
    network: Any,
    batch: int,
    frames: tuple[int, ...],
    latent_size: tuple[int, int],
    text_tokens: int,
    past_frames: tuple[int, ...],
    *,
    prepared: bool = False,
    gradient: bool = False,
    checkpointing: bool = False,
) -> int:
    """Operations of one call of a network, exact for any number of layers.

    network: a `WanTransformer` on any device; only its config is read. frames, past_frames: of each
    chunk in the call, its latent frames and those of the history that it sees. A bidirectional call
    is one chunk without history. latent_size: rows and columns. prepared: the text's K/V and the
    noise level are ready, as `WanTransformer.prepare` makes them; else every latent frame has its
    own noise level, as in training. gradient: with the backward pass to all weights; checkpointing:
    which runs each block again.
    """

    def count(num_layers: int) -> int:
        with torch.device("meta"):
            small = network.from_config({**network.config, "num_layers": num_layers})
            if checkpointing:
                small.enable_gradient_checkpointing()
            x_t = torch.empty(batch, sum(frames), network.config["out_channels"], *latent_size)
            text = small.without_content(x_t, text_tokens)
            context = history(small, batch, frames, past_frames, latent_size)
            sigma = 0.5 if prepared else torch.empty(batch, sum(frames))
        # outside of the device's context, which looks at every operation and doubles the time
        with torch.set_grad_enabled(gradient):
            given = small.prepare(text, (0.5,)) if prepared else text
            return flops_of(lambda: run(small(x_t, sigma, given, context).flow, gradient))

    one_layer = count(1)
    each_further = count(2) - one_layer  # all layers are equal
    return one_layer + (network.config["num_layers"] - 1) * each_further


def run(flow: Tensor, gradient: bool) -> None:
    """The backward pass of a call that has been made, if there is one."""
    if gradient:
        flow.sum().backward()


def history(
    network: Any,
    batch: int,
    frames: tuple[int, ...],
    past_frames: tuple[int, ...],
    latent_size: tuple[int, int],
) -> PackedContext:
    """A context without content: for each chunk, K/V of its history."""
    _, patch_rows, patch_columns = network.patch
    tokens = (latent_size[0] // patch_rows) * (latent_size[1] // patch_columns)
    config = network.config
    contexts = []
    for past in past_frames:
        shape = (batch, past * tokens, config["num_attention_heads"], config["attention_head_dim"])
        layers = ((torch.empty(shape), torch.empty(shape)),) * config["num_layers"]
        contexts.append(ChunkContext((ChunkKV(past, layers),)))
    return PackedContext(tuple(contexts), frames)


def decode_flops(codec: Any, latent_size: tuple[int, int]) -> int:
    """Operations of decoding one latent frame of a video, but the first, which is cheaper.

    codec: a `codecs.protocol.StreamingCodec` whose weights are on the meta device.
    """
    latents = torch.empty(1, 1, codec.channels, *latent_size, device="meta")
    decoder = codec.start_decoding()
    decoder.decode(latents)
    return flops_of(lambda: decoder.decode(latents))


def encode_flops(codec: Any, size: tuple[int, int]) -> int:
    """Operations of encoding the video frames of one latent frame, but the first, which is one.

    codec: a `codecs.protocol.StreamingCodec` whose weights are on the meta device. size: height and
    width of the video.
    """
    encoder = codec.start_encoding()
    encoder.encode(torch.empty(1, 1, *size, 3, device="meta"))
    group = torch.empty(1, codec.strides[0], *size, 3, device="meta")
    return flops_of(lambda: encoder.encode(group))
