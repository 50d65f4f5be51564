"""Reading and encoding of videos in other processes, for `pack`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from selfforcing_dfd.codecs.protocol import VideoCodec
from selfforcing_dfd.common import UserError
from selfforcing_dfd.data.source import ClipError, Item, Source
from selfforcing_dfd.processes.engine import Engine


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Processes that read and encode videos, each with one thread; captions are encoded here.

    The bytes are the same for any engine. load_codec: picklable.
    """

    engine: Engine
    load_codec: Callable[[], VideoCodec]

    def items(
        self, source: Source, numbers: Sequence[int], codec: str, device: torch.device | str
    ) -> Iterator[Item | ClipError]:
        """Items with latents in place of video, in order, or why there is none.

        codec: the fingerprint that theirs must have, or UserError is raised.
        """
        make = EncodeItem(source, self.load_codec, codec, device)
        found = self.engine.each_in_order(make, numbers)
        for item, latents in found:
            if isinstance(item, ClipError) or latents is None:
                yield item
            else:
                yield replace(item, latents=torch.from_numpy(latents))


@dataclass(frozen=True)
class EncodeItem:
    """Reads an item and encodes its video. It can be sent to another process.

    The latents come apart, as an array: tensors would pass through shared memory.
    """

    source: Source
    load_codec: Callable[[], VideoCodec]
    codec: str
    device: torch.device | str

    def __call__(self, number: int) -> tuple[Item | ClipError, np.ndarray | None]:
        item = read_item(self.source, number)
        if isinstance(item, ClipError) or item.video is None:
            return item, None
        codec = loaded(self.load_codec, self.codec)
        latents = latents_of(codec, item.video, self.device)
        return replace(item, video=None), latents.cpu().numpy()


@cache
def loaded(load_codec: Callable[[], VideoCodec], wanted: str) -> VideoCodec:
    """Once in each process. UserError for a codec of another fingerprint."""
    codec = load_codec()
    found = codec.fingerprint
    if found != wanted:
        raise UserError(
            f"another codec was loaded in a process: {found}, want {wanted}; leave its files as "
            "they are while packing"
        )
    return codec


def read_item(source: Source, number: int) -> Item | ClipError:
    try:
        return source.read(number)
    except ClipError as error:
        return error


def latents_of(codec: VideoCodec, video: Tensor, device: torch.device | str) -> Tensor:
    """[F, C, H, W] of video uint8 [T, H, W, 3]."""
    pixels = video.to(device)[None].float() / 255
    return codec.encode(pixels)[0]
