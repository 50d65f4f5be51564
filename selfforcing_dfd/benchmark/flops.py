"""Operations of a streamed chunk, and the share of a GPU's peak that they reach (MFU)."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass

import torch

from selfforcing_dfd.codecs.protocol import StreamingCodec
from selfforcing_dfd.codecs.small_codec import SmallCodec
from selfforcing_dfd.cost import decode_flops, network_flops, peak_tflops
from selfforcing_dfd.streaming.session import StreamModel, StreamSettings
from selfforcing_dfd.tiny.codec import TinyCodec


@dataclass(frozen=True, slots=True)
class ChunkFlops:
    """Operations of one chunk.

    denoise: all steps of the ladder. commit: the pass that stores keys and values; 0 without one.
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
        return {**asdict(self), "total": self.total}


def chunk_flops(model: StreamModel, settings: StreamSettings, text_tokens: int) -> ChunkFlops:
    """A chunk of the steady state: window and sink are full, and the text is prepared."""
    chunk = model.chunk_frames
    past = settings.sink_frames + settings.window_frames - chunk
    one_pass = network_flops(
        model.student, 1, (chunk,), model.latent_size, text_tokens, (past,), prepared=True
    )
    one_latent_frame = decode_flops(on_meta(model.codec), model.latent_size)
    commit = one_pass if model.commits else 0
    return ChunkFlops(len(model.ladder) * one_pass, commit, chunk * one_latent_frame)


def on_meta(codec: StreamingCodec) -> StreamingCodec:
    """A codec of the same sizes without memory. The tiny codec follows its latents by itself."""
    if isinstance(codec, TinyCodec):
        return codec
    if isinstance(codec, SmallCodec):
        return SmallCodec(copy.deepcopy(codec.network).to("meta"), codec.full)
    from diffusers import AutoencoderKLWan

    from selfforcing_dfd.codecs.wan_vae import WanCodec

    if not isinstance(codec, WanCodec):
        return codec
    with torch.device("meta"):
        return WanCodec(AutoencoderKLWan.from_config(codec.vae.config))


def device_peak(model: StreamModel) -> float | None:
    """Peak of the model's GPU in TFLOP/s, for 16-bit models; else None: no peak, no MFU."""
    if model.device.type != "cuda" or model.dtype.itemsize != 2:
        return None
    return peak_tflops(torch.cuda.get_device_name(model.device))


def utilisation(flops: int, milliseconds: float, peak: float | None) -> dict[str, float | None]:
    """TFLOP/s reached, and as a fraction of the peak (TFLOP/s) where one is stated."""
    rate = flops / milliseconds / 1e9 if milliseconds > 0 else 0.0
    return {"tflops_per_s": rate, "mfu": rate / peak if peak else None}
