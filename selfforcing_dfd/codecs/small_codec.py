"""A small decoder in the place of a codec's own: for streams, and for whole clips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from selfforcing_dfd.codecs.protocol import Encoder, StreamingCodec
from selfforcing_dfd.codecs.small_decoder import SmallDecoder
from selfforcing_dfd.codecs.taew import TaewDecoder
from selfforcing_dfd.common import UserError

DecoderNetwork = SmallDecoder | TaewDecoder
Program = Callable[[Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]


class SmallStream:
    """`codecs.protocol.Decoder`: one latent frame after the other."""

    def __init__(self, network: DecoderNetwork, program: Program | None = None) -> None:
        """program: what runs in place of the network's forward, such as the same compiled."""
        self.network = network
        self.program: Program = program or network
        self.past: list[Tensor] = []

    @property
    def num_bytes(self) -> int:
        """Memory of the state: constant from the first latent frame on."""
        return sum(tensor.nbytes for tensor in self.past)

    def clone(self) -> SmallStream:
        """An independent decoder that continues from here."""
        copy = SmallStream(self.network, self.program)
        copy.past = [tensor.clone() for tensor in self.past]
        return copy

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The next latent frames [B, f, C, h, w] as video [B, T, 8 h, 8 w, 3] float32 in [0, 1].

        Raises UserError for another number of channels, or no latent frames.
        """
        channels = self.network.channels
        if latents.ndim != 5 or latents.shape[2] != channels or not latents.shape[1]:
            raise UserError(
                f"latents are {tuple(latents.shape)}; want [B, F, {channels}, h, w], F one or more"
            )
        parts = [self._decode_frame(frame) for frame in latents.split(1, dim=1)]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _decode_frame(self, latent: Tensor) -> Tensor:
        video, past = self.program(latent, self.past)
        # a view would keep the frames before it in memory
        self.past = [tensor.clone() for tensor in past]
        return video.float().clamp(0, 1)


class SmallCodec:
    """`codecs.protocol.StreamingCodec`: a small decoder, and another codec's encoder.

    full: the codec whose latents these are; it encodes, and is what the decoder is compared with.
    name: of the decoder, for people. fidelity: how far it was found to be from the full one.
    """

    def __init__(self, network: DecoderNetwork, full: StreamingCodec, name: str = "small") -> None:
        self.network = network.requires_grad_(False).eval()
        self.full = full
        self.name = name
        self.fidelity = ""
        self.program: Program | None = None
        weight = next(network.parameters())
        if weight.device.type != "cpu":
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def channels(self) -> int:
        return self.network.channels

    @property
    def strides(self) -> tuple[int, int, int]:
        return self.full.strides

    def compile_decoding(self, **options: Any) -> None:
        """Compile the decoder for those who start decoding from now on. options: of torch.compile.

        One program for a video's first latent frame, another for all others.
        """
        self.program = torch.compile(
            self.network.forward, **{"fullgraph": True, "dynamic": False, **options}
        )

    def start_decoding(self) -> SmallStream:
        return SmallStream(self.network, self.program)

    def start_encoding(self) -> Encoder:
        return self.full.start_encoding()
