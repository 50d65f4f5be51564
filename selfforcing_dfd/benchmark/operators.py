"""What a latent frame costs the VAE's decoder besides its products: operators, and bytes moved.

An operator is a call that reaches torch's dispatcher; views and bare allocations are none. Bytes
are those of the tensors that an operator reads and writes, each once; a tensor that is repeated
along an axis counts as what is stored of it. Convolutions, matrix products and attention count as
operators and without bytes: their time is that of their arithmetic (`cost`).

Everything runs on shapes alone, so the true size needs neither memory nor a GPU. RMS norm and
attention count as one operator each, as on CUDA; other devices take them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selfforcing_dfd.codecs.small_codec import SmallStream
from selfforcing_dfd.codecs.small_decoder import DecoderSize, SmallDecoder
from selfforcing_dfd.codecs.taew import TaewDecoder
from selfforcing_dfd.codecs.wan_vae import SPACE, WanCodec

PRODUCTS = ("convolution", "mm", "addmm", "bmm", "baddbmm", "scaled_dot_product_attention")
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "detach", "alias")
WRITE_ONLY = ("copy_", "_foreach_copy_", "zero_", "fill_")
ONE_KERNEL = (rms_norm, torch.rms_norm, scaled_dot_product_attention)
"""Functions that the meta device takes apart and CUDA does not."""


@dataclass(frozen=True, slots=True)
class Work:
    """Operators of all kinds, and bytes moved by those that are no products."""

    operators: int
    num_bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.operators + other.operators, self.num_bytes + other.num_bytes)


class OperatorCounter(TorchDispatchMode):
    """Counts what runs while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work(0, 0)
        self.is_inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not self.is_inside and not func.is_view and name not in FREE:
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
            self.count(name, moved(func, given | (kwargs or {}), result))
        return result

    def count(self, name: str, num_bytes: int) -> None:
        self.work += Work(1, 0 if name in PRODUCTS else num_bytes)


class OneKernel(TorchFunctionMode):
    """Counts the functions of ONE_KERNEL as one operator each."""

    def __init__(self, counter: OperatorCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in ONE_KERNEL or self.counter.is_inside:
            return func(*args, **(kwargs or {}))
        self.counter.is_inside = True
        result = func(*args, **(kwargs or {}))
        self.counter.is_inside = False
        self.counter.count(func.__name__, sum(map(stored_bytes, (*tensors(args), result))))
        return result


def moved(func: Any, given: dict[str, Any], result: Any) -> int:
    """Bytes that an operator reads and writes."""
    num_bytes = 0
    writes_in_place = False
    for argument in func._schema.arguments:
        written = argument.alias_info is not None and argument.alias_info.is_write
        only_written = argument.name == "out" or func.overloadpacket.__name__ in WRITE_ONLY
        times = 2 if written and not only_written else 1
        num_bytes += times * sum(map(stored_bytes, tensors(given.get(argument.name))))
        writes_in_place = writes_in_place or written
    if not writes_in_place:
        num_bytes += sum(map(stored_bytes, tensors(result)))
    return num_bytes


def tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def stored_bytes(tensor: Tensor) -> int:
    """Bytes in memory: an axis of stride 0 is stored once."""
    lengths = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(lengths) * tensor.itemsize


def work_of(call: Callable[[], Any]) -> Work:
    """What a call on the meta device costs."""
    counter = OperatorCounter()
    with counter, OneKernel(counter):
        call()
    return counter.work


def decoder_work(
    size: tuple[int, int], dtype: torch.dtype, config: dict[str, Any] | None = None
) -> dict[str, Work]:
    """A later latent frame of a stream, laid out as on CUDA: of diffusers' decoder, and of ours.

    size: height and width of the video. config: of AutoencoderKLWan, Wan2.1's by default.
    """
    codec = meta_codec(dtype, config)
    latents = torch.empty(1, 1, codec.channels, *latent_size(size), device="meta")
    features: list[Any] = [None] * sum(isinstance(m, nn.Conv3d) for m in codec.vae.modules())

    def by_diffusers() -> None:
        z = (latents.transpose(1, 2) * codec.deviation + codec.mean).to(dtype)
        z = codec.vae.post_quant_conv(z.contiguous(memory_format=codec.memory_format))
        video = codec.vae.decoder(z, feat_cache=features, feat_idx=[0])
        (video.float().clamp(-1, 1).permute(0, 2, 3, 4, 1) + 1) / 2

    decoder = codec.start_decoding()
    work = {}
    for name, call in (("diffusers", by_diffusers), ("ours", lambda: decoder.decode(latents))):
        with torch.no_grad():
            call()
            call()  # the first later frame allocates what is kept
            work[name] = work_of(call)
    return work


def small_decoder_work(size: tuple[int, int], dtype: torch.dtype) -> dict[str, Work]:
    """A later latent frame by small decoders of Wan's size: ours, and that of taew2_1's layout."""
    work = {}
    for name, kind in (("small", lambda: SmallDecoder(DecoderSize())), ("taew2_1", TaewDecoder)):
        with torch.device("meta"):
            network: Any = kind()
        nn.Module.to(network, dtype)
        # as `SmallCodec` does on CUDA
        network.to(memory_format=torch.channels_last)
        stream = SmallStream(network)
        latents = torch.empty(1, 1, network.channels, *latent_size(size), device="meta")
        stream.decode(latents)
        work[name] = work_of(partial(stream.decode, latents))
    return work


def latent_size(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] // SPACE, size[1] // SPACE


def meta_codec(dtype: torch.dtype, config: dict[str, Any] | None = None) -> WanCodec:
    with torch.device("meta"):
        vae: Any = AutoencoderKLWan(**config or {})
        nn.Module.to(vae, dtype)
        return WanCodec(vae, channels_last=True)
