"""What a stream needs of a GPU's memory, counted from shapes: nothing is loaded, nothing measured.

Weights, keys and values, and what the decoder remembers are there all along. Beside them the
largest moment counts. Networks and decoder run on the meta device, uncompiled, with `live_bytes`.
Not in it are pictures in bytes, noise and the latents of what is seen, some 20 MB at Wan's size,
nor the CUDA context and what kernels take inside, some .5 to 1 GB. What fits is therefore judged by
a GPU's nominal size (a board of 24 GB has 25.7), of which a small board leaves too little for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from selfforcing_dfd.codecs.pictures import PictureEncoder
from selfforcing_dfd.codecs.prompts import MAX_LENGTH
from selfforcing_dfd.codecs.protocol import StreamingCodec
from selfforcing_dfd.codecs.small_codec import SmallCodec
from selfforcing_dfd.models.network import PlainWan
from selfforcing_dfd.models.offload import NUM_ROOMS, aligned, stored
from selfforcing_dfd.models.prepared import PreparedConditioning
from selfforcing_dfd.streaming.live_bytes import LiveBytes, OneKernel, peak_bytes
from selfforcing_dfd.streaming.ring import KVShape, RingCache
from selfforcing_dfd.streaming.saving import Saving
from selfforcing_dfd.streaming.session import StreamSettings

META = torch.device("meta")
GIGA = 1e9
BOARDS = (8, 12, 16, 24, 32, 48, 80, 96, 141)
"""Nominal sizes of GPUs, GB."""
UNCOUNTED = GIGA
"""Room for the CUDA context and kernels, at most."""
Parts = dict[str, int]
"""Bytes by what they are for."""


@dataclass(frozen=True, slots=True)
class Streamed:
    """What is streamed.

    sizes: WanTransformer's arguments. codec: on the meta device; None where another GPU decodes.
    text_bytes: of the text encoder's weights. latent_size: rows and columns. num_levels: noise
    levels, that of the commit included. pictures: what a student of Wan2.1-I2V sees pictures by, on
    the meta device; num_frames: latent frames of its videos.
    """

    sizes: Mapping[str, Any]
    codec: StreamingCodec | None
    text_bytes: int
    latent_size: tuple[int, int]
    chunk_frames: int
    num_levels: int
    dtype: torch.dtype
    pictures: PictureEncoder | None = None
    num_frames: int = 0

    def network(self, num_layers: int, fp8: bool) -> PlainWan:
        """The student with so many layers, on the meta device."""
        with META:
            network = PlainWan(**{**self.sizes, "num_layers": num_layers})
            nn.Module.to(network.requires_grad_(False), self.dtype)
            Saving(fp8).place(network, META)
        return network


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """Bytes on the GPU, and on the host.

    lasting: all the time. moments: what is alive besides, by moment. host: blocks and weights.
    """

    lasting: Parts
    moments: Parts
    host: Parts = field(default_factory=dict)

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=lambda name: self.moments[name])

    @property
    def total(self) -> int:
        return sum(self.lasting.values()) + max(self.moments.values())

    @property
    def board(self) -> int | None:
        """The smallest of BOARDS that holds it; None if none does."""
        needed = max(self.total / GIGA, (self.total + UNCOUNTED) / 2**30)
        return next((size for size in BOARDS if needed <= size), None)


def text_encoder_bytes(config: Mapping[str, Any], dtype: torch.dtype) -> int:
    """Of UMT5's encoder by its config."""
    from transformers import UMT5Config, UMT5EncoderModel

    with META:
        encoder: Any = UMT5EncoderModel(UMT5Config(**config))
    return num_bytes(encoder.to(dtype))


def memory_needs(
    streamed: Streamed, settings: StreamSettings, saving: Saving, graphs: bool = False
) -> MemoryNeeds:
    """Of one stream with a full window. graphs: its calls are captured as CUDA graphs.

    Raises Fp8Error for 8 bits without torchao.
    """
    one, two = (streamed.network(layers, saving.fp8) for layers in (1, 2))
    prepared = extrapolated(streamed, [prepared_bytes(streamed, net) for net in (one, two)])
    rings = [ring_of(streamed, settings, net) for net in (one, two)]
    lasting = student_bytes(streamed, two, saving)
    lasting["keys and values"] = extrapolated(streamed, [ring.num_bytes for ring in rings])
    lasting["prompt's keys and values"] = prepared
    encoder = streamed.text_bytes if saving.text != "cpu" else 0
    if saving.text == "keep":
        lasting["text encoder"] = encoder
    ring = rings[1]
    ring.next_frame = settings.sink_frames + settings.window_frames
    moments = {
        "a new prompt is encoded": prepared + (encoder if saving.text == "free" else 0),
        "a chunk is denoised": denoising_bytes(streamed, two, ring),
    }
    if graphs:  # they keep what a pass takes, and a copy of the prompt's keys and values
        lasting["CUDA graphs"] = moments["a chunk is denoised"] + prepared
    if streamed.codec is not None:
        codec_needs(streamed, streamed.codec, lasting, moments)
    if streamed.codec is not None and streamed.pictures is not None:
        lasting["image encoder"] = num_bytes(streamed.pictures.encoder)
        moments["a picture is encoded"] = picture_bytes(streamed, streamed.pictures)
    return MemoryNeeds(lasting, moments, host_bytes(streamed, two, saving))


def extrapolated(streamed: Streamed, of_layers: list[int]) -> int:
    """Bytes for all layers, from those for one and for two; layers are equal."""
    one, two = of_layers
    return one + (streamed.sizes["num_layers"] - 1) * (two - one)


def student_bytes(streamed: Streamed, network: PlainWan, saving: Saving) -> Parts:
    """The student's weights on the GPU."""
    block = block_bytes(network)
    layers = streamed.sizes["num_layers"]
    outer = num_bytes(network) - sum(num_bytes(block) for block in network.wan_blocks())
    on_gpu = NUM_ROOMS * saving.group_size if saving.group_size else layers
    name = f"student, {on_gpu} of {layers} blocks" if saving.group_size else "student"
    return {name: outer + on_gpu * block}


def host_bytes(streamed: Streamed, network: PlainWan, saving: Saving) -> Parts:
    """What lies on the host. torch rounds pinned memory up to a power of two."""
    host = {}
    if saving.group_size:
        blocks = streamed.sizes["num_layers"] * block_bytes(network)
        host["blocks, pinned"] = 2 ** (blocks - 1).bit_length()
    if saving.text == "cpu":
        host["text encoder"] = streamed.text_bytes
    return host


def block_bytes(network: PlainWan) -> int:
    """Of one block as it lies in a group."""
    block = network.wan_blocks()[0]
    return sum(aligned(part.nbytes) for tensor in block.parameters() for part in stored(tensor))


def num_bytes(module: nn.Module) -> int:
    """Of a module's parameters."""
    return sum(part.nbytes for tensor in module.parameters() for part in stored(tensor))


def codec_needs(streamed: Streamed, codec: StreamingCodec, lasting: Parts, moments: Parts) -> None:
    """Add what decoding takes. A small decoder is compared with the full one before the stream."""
    state, most = decoding_bytes(streamed, codec)
    lasting["VAE decoder's state"] = state
    moments["a latent frame is decoded"] = most - state
    full: Any = codec
    if isinstance(codec, SmallCodec):
        full = codec.full
        lasting["VAE's small decoder"] = num_bytes(codec.network)
        moments["the decoders are compared"] = decoding_bytes(streamed, full)[1]
    lasting["VAE"] = num_bytes(full.vae)


def picture_bytes(streamed: Streamed, pictures: PictureEncoder) -> int:
    """The most that is there while the VAE encodes a picture, and grey for all later frames."""
    rows, columns = streamed.latent_size
    _, row_stride, column_stride = pictures.codec.strides
    shape = (1, rows * row_stride, columns * column_stride, 3)
    picture = torch.empty(shape, device=META)
    with torch.no_grad():
        return peak_bytes(lambda: pictures.latents(picture, streamed.num_frames))


def prepare(streamed: Streamed, network: PlainWan) -> PreparedConditioning:
    with META:
        text = network.without_content(empty_chunk(streamed, network), MAX_LENGTH)
        text.text.data = text.text.to(streamed.dtype)
    levels = tuple(number / streamed.num_levels for number in range(streamed.num_levels))
    return network.prepare(text, levels)


def prepared_bytes(streamed: Streamed, network: PlainWan) -> int:
    """What a prompt leaves for all chunks under it."""
    counter = LiveBytes()
    with torch.no_grad(), counter, OneKernel():
        held = prepare(streamed, network)
    num_bytes = counter.now
    del held
    return num_bytes


def empty_chunk(streamed: Streamed, network: PlainWan) -> Tensor:
    shape = (1, streamed.chunk_frames, network.config["out_channels"], *streamed.latent_size)
    return torch.empty(shape, device=META)


def ring_of(streamed: Streamed, settings: StreamSettings, network: PlainWan) -> RingCache:
    """The keys and values of a stream."""
    rows, columns = streamed.latent_size
    _, patch_rows, patch_columns = network.patch
    config = network.config
    tokens = (rows // patch_rows) * (columns // patch_columns)
    heads = config["num_attention_heads"]
    shape = KVShape(config["num_layers"], 1, tokens, heads, config["attention_head_dim"])
    sizes = (streamed.chunk_frames, settings.sink_frames, settings.window_frames)
    return RingCache(shape, *sizes, settings.positions, streamed.dtype, META)


def denoising_bytes(streamed: Streamed, network: PlainWan, ring: RingCache) -> int:
    """The most that a pass holds at once, which does not depend on the number of layers."""
    with torch.no_grad():
        conditioning = prepare(streamed, network)
        x_t = empty_chunk(streamed, network)
        context = ring.read(streamed.chunk_frames)
        network(x_t, 0.0, conditioning, context)  # some tables are made once
        return peak_bytes(lambda: network(x_t, 0.0, conditioning, context).flow)


def decoding_bytes(streamed: Streamed, codec: StreamingCodec) -> tuple[int, int]:
    """What the decoder keeps between latent frames, and the most that is there within one."""
    latent = torch.empty(1, 1, codec.channels, *streamed.latent_size, device=META)
    counter = LiveBytes()
    with torch.no_grad(), counter, OneKernel():
        decoder = codec.start_decoding()
        for _ in range(3):  # the first two are smaller
            decoder.decode(latent)
        state = counter.now
    del decoder
    return state, counter.peak
