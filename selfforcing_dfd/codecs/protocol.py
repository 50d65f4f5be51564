"""The interfaces of codecs and text encoders: whole clips for packing, pieces for streaming."""

from __future__ import annotations

from typing import Any, Protocol, Self, runtime_checkable

from torch import Tensor


class Decoder(Protocol):
    """One video being decoded, in order. Any split into calls gives the bits of a full decode."""

    def decode(self, latents: Tensor) -> Tensor:
        """The next latent frames [B, f, C, h, w] as video [B, T, H, W, 3] in [0, 1], not clamped.

        The first latent frame of the video gives one video frame, every later one four.
        """
        ...

    def clone(self) -> Self:
        """An independent decoder that continues from here."""
        ...


class Encoder(Protocol):
    """One video being encoded, in order. Any split into calls gives the bits of a full encode."""

    def encode(self, videos: Tensor) -> Tensor:
        """The next video frames [B, T, H, W, 3] in [0, 1] as latents [B, f, C, h, w].

        The first call takes 1 + 4 n video frames, every later one 4 n. Raises ValueError otherwise.
        """
        ...


class StreamingCodec(Protocol):
    """Frozen weights, shared by all sessions; the state is in its decoders and encoders."""

    @property
    def channels(self) -> int: ...

    @property
    def strides(self) -> tuple[int, int, int]:
        """Video frames, rows and columns for one step of the latents."""
        ...

    def start_decoding(self) -> Decoder: ...

    def start_encoding(self) -> Encoder: ...


@runtime_checkable
class Compilable(Protocol):
    """A codec whose decoder is worth compiling."""

    def compile_decoding(self, **options: Any) -> None:
        """Compile the decoder for those who start decoding from now on, by torch.compile."""
        ...


class VideoCodec(Protocol):
    """What packing asks of a codec: the tiny world's linear one, or Wan's VAE."""

    @property
    def fingerprint(self) -> str: ...

    def num_latent_frames(self, num_video_frames: int) -> int:
        """Raises ValueError for a number of video frames that it cannot take."""
        ...

    def encode(self, video: Tensor) -> Tensor:
        """[B, T, H, W, 3] in [0, 1] -> [B, F, C, h, w]."""
        ...


class TextEncoder(Protocol):
    """What packing, and a cache of embeddings, ask of a text encoder: a word table, or UMT5."""

    @property
    def fingerprint(self) -> str: ...

    def encode(self, captions: list[str]) -> Tensor:
        """-> [B, L, D] with a fixed L, zeros past each caption's end.

        Raises ValueError for a caption that it cannot take.
        """
        ...
