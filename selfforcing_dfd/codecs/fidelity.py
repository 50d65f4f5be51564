"""How far a small decoder is from the full one, on the same latents: PSNR, and flicker."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from selfforcing_dfd.codecs.protocol import Decoder, Encoder
from selfforcing_dfd.codecs.small_codec import SmallCodec

LEVELS = 255  # of a byte: what flicker is counted in


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
    """`codecs.protocol.Decoder`: the small decoder's video, compared with the full one's."""

    small: Decoder
    full: Decoder
    comparison: Comparison
    # the last frame of each
    last: tuple[Tensor, ...] = ()

    def decode(self, latents: Tensor) -> Tensor:
        video = self.small.decode(latents)
        both = (video, self.full.decode(latents))
        counted = 1 if self.last else 0
        before = self.last or tuple(each[:, :0] for each in both)
        ours, full = (torch.cat(pair, dim=1) for pair in zip(before, both, strict=True))
        self.comparison.add(ours, full, counted)
        self.last = tuple(each[:, -1:] for each in both)
        return video

    def clone(self) -> CheckedDecoder:
        return CheckedDecoder(self.small.clone(), self.full.clone(), self.comparison, self.last)


@dataclass(slots=True)
class CheckedCodec:
    """`codecs.protocol.StreamingCodec`: a small decoder whose every decode is compared.

    Twice the work and more; for a short check.
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
        return CheckedDecoder(codec.start_decoding(), codec.full.start_decoding(), self.comparison)

    def start_encoding(self) -> Encoder:
        return self.codec.start_encoding()
