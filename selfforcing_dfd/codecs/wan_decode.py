"""The decoder of Wan's VAE as a stream, with diffusers' layers and weights.

Each causal convolution reads a room of its own: the last two frames that it has seen, then the
present ones. A room is allocated once, and what the convolution is given is written straight into
it. diffusers joins cache and input, pads the result and clones the next cache: three copies of
every activation, the largest of which have the size of the video.

`first_frame` and `next_frame` are functions of modules and tensors alone, so torch.compile takes
each as one graph, in which norm, SiLU and the store into the room are one kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    conv2d,
    conv3d,
    interpolate,
    linear,
    rms_norm,
    scaled_dot_product_attention,
    silu,
)

PAST = 2
"""Frames before the present ones that a causal convolution sees."""
EPSILON = 1e-24
"""Added to a mean square before its root. diffusers limits the root itself to 1e-12 from below."""


def first_frame(
    decoder: Any, x: Tensor, rooms: list[Tensor], past: list[Tensor] | None = None
) -> Tensor:
    """A video's first latent frame [B, z, 1, h, w] -> [B, 3, 1, 8 h, 8 w]."""
    return Pass(rooms, past, first=True).decode(decoder, x)


def next_frame(
    decoder: Any, x: Tensor, rooms: list[Tensor], past: list[Tensor] | None = None
) -> Tensor:
    """A later latent frame [B, z, 1, h, w] -> [B, 3, 4, 8 h, 8 w].

    rooms: each begins with the past of its convolution, and ends up with the present after it.
    past: where rooms are shared, each convolution's own past, which is renewed here.
    """
    return Pass(rooms, past, first=False).decode(decoder, x)


@dataclass(frozen=True, slots=True)
class Programs:
    """What decodes a latent frame: the functions above, or the same compiled."""

    first: Callable[..., Tensor] = first_frame
    later: Callable[..., Tensor] = next_frame

    def compiled(self, **options: Any) -> Programs:
        """One graph each, for one size of video. options: of torch.compile."""
        options = {"fullgraph": True, "dynamic": False, **options}
        return Programs(torch.compile(self.first, **options), torch.compile(self.later, **options))


class StreamingDecoder:
    """Decodes one video, latent frame by latent frame.

    decoder: diffusers' WanDecoder3d of a VAE of Wan2.1, in eval mode. In float32 bit-equal to
    diffusers' own decode with feature caches: each convolution gets the same numbers in the same
    layout. In 16 bits it takes fewer steps and rounds less often: see `Pass`. lean: convolutions of
    one size share a room and keep their pasts aside: less memory, two more copies of each past.
    """

    def __init__(
        self,
        decoder: Any,
        memory_format: torch.memory_format = torch.contiguous_format,
        programs: Programs | None = None,
        lean: bool = False,
    ) -> None:
        self.decoder = decoder
        self.lean = lean
        self.memory_format = memory_format
        self.programs = programs or Programs()
        self.started = False
        self.rooms: list[Tensor] = []
        # of a clone that has no rooms yet; of a lean one always
        self.past: list[Tensor] = []

    @property
    def num_bytes(self) -> int:
        """Memory of the state: constant from the first latent frame on."""
        rooms = {id(room): room.nbytes for room in self.rooms}  # some may be shared
        return sum(rooms.values()) + sum(past.nbytes for past in self.past)

    def clone(self) -> StreamingDecoder:
        """An independent decoder that continues from here. Holds the past alone until it runs."""
        copy = StreamingDecoder(self.decoder, self.memory_format, self.programs, self.lean)
        copy.started = self.started
        held = self.past or self.rooms
        copy.past = [tensor[:, :, :PAST].clone() for tensor in held]
        return copy

    def __call__(self, x: Tensor) -> Tensor:
        """[B, z, 1, h, w] -> [B, 3, T, 8 h, 8 w]; T is 1 for the first latent frame, then 4."""
        if not self.rooms:
            self.build(x)
        program = self.programs.later if self.started else self.programs.first
        if self.lean:
            video = program(self.decoder, x, self.rooms, self.past)
        else:
            video = program(self.decoder, x, self.rooms)
            self.remember()
        self.started = True
        return video

    def build(self, x: Tensor) -> None:
        """Rooms for inputs like x, with the past of a clone in them."""
        self.rooms = build_rooms(self.decoder, x, self.memory_format, self.lean)
        if self.lean:
            self.past = self.past or [room[:, :, :PAST].clone() for room in self.rooms]
            return
        for room, past in zip(self.rooms, self.past, strict=bool(self.past)):
            room[:, :, :PAST] = past
        self.past = []

    def remember(self) -> None:
        """Move the last frames of each room to its beginning.

        Frame by frame, since past and present overlap where there is one present frame.
        """
        for frame in range(PAST):
            newest = []
            for room in self.rooms:
                num_seen = room.shape[2] if self.started else PAST + 1
                newest.append(room[:, :, num_seen - PAST + frame])
            torch._foreach_copy_([room[:, :, frame] for room in self.rooms], newest)


def build_rooms(
    decoder: Any, x: Tensor, memory_format: torch.memory_format, shared: bool = False
) -> list[Tensor]:
    """For each causal convolution in order, zeros for its past and the most frames it is given.

    x: [B, z, 1, h, w], the decoder's input. shared: the same tensor wherever the shape is the same.
    """
    batch, _, _, height, width = x.shape
    rooms: list[Tensor] = []
    known: dict[tuple[int, ...], Tensor] = {}
    for conv, num_frames, scale in causal_convolutions(decoder):
        rows, columns = border(conv, x.dtype)
        size = (height * scale + 2 * rows, width * scale + 2 * columns)
        shape = torch.Size((batch, conv.in_channels, PAST + num_frames, *size))
        room = known.get((*shape, rows)) if shared else None
        if room is None:
            room = torch.empty(
                shape, dtype=x.dtype, device=x.device, memory_format=memory_format
            ).zero_()
            known[(*shape, rows)] = room
        rooms.append(room)
    return rooms


def causal_convolutions(decoder: Any) -> Iterator[tuple[nn.Conv3d, int, int]]:
    """Convolutions in the order of `Pass`, with frames for a latent frame and rows for a row."""
    num_frames = 1
    scale = 1
    yield decoder.conv_in, num_frames, scale
    for block in decoder.mid_block.resnets:
        yield block.conv1, num_frames, scale
        yield block.conv2, num_frames, scale
    for stage in decoder.up_blocks:
        for block in stage.resnets:
            yield block.conv1, num_frames, scale
            yield block.conv2, num_frames, scale
        for layer in stage.upsamplers or ():
            if layer.mode == "upsample3d":
                yield layer.time_conv, num_frames, scale
                num_frames *= 2
            scale *= 2
    yield decoder.conv_out, num_frames, scale


def is_exact(dtype: torch.dtype) -> bool:
    """Whether results in this dtype are those of diffusers to the bit."""
    return dtype.itemsize > 2


def padding(conv: nn.Conv3d) -> tuple[int, int]:
    """Rows and columns of zeros that a convolution wants around its input."""
    return conv.kernel_size[1] // 2, conv.kernel_size[2] // 2


def border(conv: nn.Conv3d, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and columns of zeros around the frames in a room.

    None in 16 bits, where the convolution pads by itself: faster, but it sums in another order.
    """
    return padding(conv) if is_exact(dtype) else (0, 0)


class Pass:
    """One latent frame on its way through the decoder.

    In float32 it computes as diffusers does, to the bit. In 16 bits diffusers' norm rounds three
    times and SiLU once more; here norm and SiLU round once each. With the store into the room they
    are two operators in place of ten, and one kernel if compiled.
    """

    def __init__(self, rooms: list[Tensor], past: list[Tensor] | None, first: bool) -> None:
        own: Sequence[Tensor | None] = [None] * len(rooms) if past is None else past
        self.rooms = zip(rooms, own, strict=True)
        self.first = first

    def decode(self, decoder: Any, x: Tensor) -> Tensor:
        x = self.convolve(decoder.conv_in, x)
        x = self.residual(decoder.mid_block.resnets[0], x)
        for attention, block in zip(
            decoder.mid_block.attentions, decoder.mid_block.resnets[1:], strict=True
        ):
            x = self.residual(block, attend(attention, x))
        for stage in decoder.up_blocks:
            for block in stage.resnets:
                x = self.residual(block, x)
            for layer in stage.upsamplers or ():
                x = self.upsample(layer, x)
        return self.convolve(decoder.conv_out, x, decoder.norm_out)

    def residual(self, block: Any, x: Tensor) -> Tensor:
        """Two convolutions, each after norm and SiLU, and the shortcut."""
        within = self.convolve(block.conv2, self.convolve(block.conv1, x, block.norm1), block.norm2)
        return within + pointwise(block.conv_shortcut, x)

    def upsample(self, layer: Any, x: Tensor) -> Tensor:
        """Doubles rows and columns, and the frames too except a video's first one."""
        pictures = self.pictures(layer, x)
        # diffusers goes through float32, which changes no bit: values are only repeated
        pictures = interpolate(pictures, scale_factor=2.0, mode="nearest-exact")
        conv = layer.resample[1]
        pictures = conv2d(pictures, conv.weight, conv.bias, padding=conv.padding)
        return pictures.unflatten(0, (x.shape[0], -1)).transpose(1, 2)

    def pictures(self, layer: Any, x: Tensor) -> Tensor:
        """[B, C, T, h, w] -> [B T, C, h, w], T doubled where the layer does so.

        A video's first frame is not doubled, and does not enter the room.
        """
        if layer.mode == "upsample3d" and not self.first:
            both = self.convolve(layer.time_conv, x).unflatten(1, (2, -1))
            if both.stride(2) == 1:  # channels_last stays so, where one frame is doubled too
                pictures = both.permute(0, 3, 1, 4, 5, 2).contiguous()
                return pictures.flatten(0, 2).permute(0, 3, 1, 2)
            return both.permute(0, 3, 1, 2, 4, 5).flatten(0, 2)
        if layer.mode == "upsample3d":
            next(self.rooms)
        return x.transpose(1, 2).flatten(0, 1)

    def convolve(self, conv: nn.Conv3d, x: Tensor, norm: Any = None) -> Tensor:
        """A causal convolution of x, after norm and SiLU if there is a norm.

        Zeros come before a video.
        """
        rows, columns = border(conv, x.dtype)
        room, past = next(self.rooms)
        seen = room[:, :, : PAST + x.shape[2]]
        if past is not None:
            seen[:, :, :PAST] = past
        store(x, norm, seen[:, :, PAST:, rows : rows + x.shape[3], columns : columns + x.shape[4]])
        if past is not None:
            past.copy_(seen[:, :, -PAST:])
        if is_exact(x.dtype):
            return conv3d(seen, conv.weight, conv.bias)
        return conv3d(seen, conv.weight, conv.bias, padding=(0, *padding(conv)))


def store(x: Tensor, norm: Any, present: Tensor) -> None:
    """Write x, or SiLU of the normalised x, into the present frames of a room."""
    if norm is None:
        present.copy_(x)
    elif is_exact(x.dtype):
        # SiLU in place: written into the room directly, it rounds differently on a CPU
        present.copy_(silu(norm(x), inplace=True))
    elif stores_directly(x.device):
        torch.ops.aten.silu.out(normalise(norm, x), out=present)
    else:
        present.copy_(silu(normalise(norm, x), inplace=True))


def stores_directly(device: torch.device) -> bool:
    """Whether SiLU writes into a room by itself.

    Compiled code needs no help to do so; on a CPU it takes longer than SiLU and a copy.
    """
    return device.type != "cpu" and not torch.compiler.is_compiling()


def normalise(norm: Any, x: Tensor) -> Tensor:
    """diffusers' WanRMS_norm of x [B, C, ...] with one rounding; one kernel in channels_last."""
    channels_last = x.movedim(1, -1)
    return rms_norm(channels_last, x.shape[1:2], norm.gamma.flatten(), EPSILON).movedim(-1, 1)


def attend(attention: Any, x: Tensor) -> Tensor:
    """Attention with one head between the places of each frame, and the shortcut."""
    if is_exact(x.dtype):
        attended: Tensor = attention(x)
        return attended
    # a convolution of size 1 is a linear layer over the channels
    normal = normalise(attention.norm, x).movedim(1, -1)
    to_qkv = attention.to_qkv
    qkv = linear(normal.flatten(0, 1), to_qkv.weight.flatten(1), to_qkv.bias)
    q, k, v = qkv.flatten(1, 2).unsqueeze(1).chunk(3, dim=-1)
    proj = attention.proj
    places = linear(scaled_dot_product_attention(q, k, v), proj.weight.flatten(1), proj.bias)
    return x + places.reshape(normal.shape).movedim(-1, 1)


def pointwise(module: nn.Module, x: Tensor) -> Tensor:
    """A convolution of size 1 without diffusers' padding by nothing, which copies; or identity."""
    if isinstance(module, nn.Conv3d):
        return conv3d(x, module.weight, module.bias)
    return x
