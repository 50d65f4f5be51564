"""How far a small decoder is from the full one, on the same latents: PSNR, and flicker."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from selfforcing_dfd.codecs.protocol import Decoder, Encoder
from selfforcing_dfd.codecs.small_codec import SmallCodec, SmallStream

LEVELS = 255  # of a byte: what flicker is counted in
MOST_SIDE = 32  # rows and columns of latents that are compared in a stream


@dataclass(frozen=True, slots=True)
class Fidelity:
    """psnr_db: of all pixels against the full decode, peak 1; infinite where both are equal.

    flicker: mean change of the difference from one video frame to the next, in 255ths. A constant
    error does not flicker. change: of the full decode itself, likewise. Both are 0 for one frame.
    """

    psnr_db: float
    flicker: float
    change: float
    video_frames: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which knows no infinity: None in its place."""
        return {
            name: value if math.isfinite(value) else None for name, value in asdict(self).items()
        }

    def __str__(self) -> str:
        return (
            f"against the full decode of the same latents ({self.video_frames} video frames): "
            f"PSNR {self.psnr_db:.1f} dB, flicker {self.flicker:.2f} of 255 (the full decode "
            f"itself changes by {self.change:.2f} from frame to frame)"
        )


@dataclass(slots=True)
class Comparison:
    """Sums over clips, or over the pieces of one stream."""

    squares: float = 0.0
    values: int = 0
    flicker: float = 0.0
    change: float = 0.0
    changes: int = 0
    video_frames: int = 0

    def add(self, ours: Tensor, full: Tensor, counted: int = 0) -> None:
        """Two decodes of the same latents, [B, T, H, W, 3] in [0, 1].

        counted: first frames that were added before, and here are what the next ones follow.
        """
        wanted = full.float().clamp(0, 1)
        difference = ours.float().clamp(0, 1).to(wanted.device) - wanted
        self.flicker += float(difference.diff(dim=1).abs().double().sum())
        self.change += float(wanted.diff(dim=1).abs().double().sum())
        self.changes += difference[:, 1:].numel()
        fresh = difference[:, counted:]
        self.squares += float(fresh.double().square().sum())
        self.values += fresh.numel()
        self.video_frames += len(fresh) * fresh.shape[1]

    def result(self) -> Fidelity:
        error = self.squares / max(self.values, 1)
        scale = LEVELS / max(self.changes, 1)
        psnr = -10 * math.log10(error) if error else math.inf
        return Fidelity(psnr, scale * self.flicker, scale * self.change, self.video_frames)


@dataclass(slots=True)
class CheckedDecoder:
    """`codecs.protocol.Decoder`: the small decoder's video.

    pair: a small and a full decoder of the middle of the same latents, which are compared.
    """

    small: Decoder
    pair: tuple[Decoder, Decoder]
    comparison: Comparison
    # the last frame of each
    last: tuple[Tensor, ...] = ()

    def decode(self, latents: Tensor) -> Tensor:
        part = middle(latents)
        both = [decoder.decode(part) for decoder in self.pair]
        counted = 1 if self.last else 0
        before = self.last or tuple(each[:, :0] for each in both)
        ours, full = (torch.cat(pair, dim=1) for pair in zip(before, both, strict=True))
        self.comparison.add(ours, full, counted)
        self.last = tuple(each[:, -1:] for each in both)
        return self.small.decode(latents)

    def clone(self) -> CheckedDecoder:
        pair = (self.pair[0].clone(), self.pair[1].clone())
        return CheckedDecoder(self.small.clone(), pair, self.comparison, self.last)


def middle(latents: Tensor) -> Tensor:
    """At most MOST_SIDE rows and columns of latents [B, F, C, h, w]."""
    starts = [max(side - MOST_SIDE, 0) // 2 for side in latents.shape[-2:]]
    top, left = starts
    return latents[..., top : top + MOST_SIDE, left : left + MOST_SIDE]


@dataclass(slots=True)
class CheckedCodec:
    """`codecs.protocol.StreamingCodec`: a small decoder that is compared, for a short check.

    The middle of the latents alone is compared: decoding all of a large video takes gigabytes,
    which those who use a small decoder may not have.
    """

    codec: SmallCodec
    comparison: Comparison = field(default_factory=Comparison)

    @property
    def channels(self) -> int:
        return self.codec.channels

    @property
    def strides(self) -> tuple[int, int, int]:
        return self.codec.strides

    def start_decoding(self) -> CheckedDecoder:
        codec = self.codec
        # not the compiled program, which would compile again for this size
        pair = (SmallStream(codec.network), codec.full.start_decoding())
        return CheckedDecoder(codec.start_decoding(), pair, self.comparison)

    def start_encoding(self) -> Encoder:
        return self.codec.start_encoding()
