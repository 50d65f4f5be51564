"""Clips by a small decoder, compared with the full decode of the same latents."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from selfforcing_dfd.codecs.fidelity import Comparison
from selfforcing_dfd.codecs.small_codec import SmallStream
from selfforcing_dfd.common import find_device
from selfforcing_dfd.evaluation.generate import Decode
from selfforcing_dfd.evaluation.worlds import TINY, world_of
from selfforcing_dfd.stages import load_config
from selfforcing_dfd.streaming.decoders import find_decoder, wants_small
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.training.build_data import codec_file
from selfforcing_dfd.weights.decoders import StoredDecoder
from selfforcing_dfd.weights.runs import config_of, student_of


@dataclass(slots=True)
class SmallDecode:
    """A small decoder for whole clips, and what its clips were found to differ by."""

    decoder: StoredDecoder
    device: torch.device
    comparison: Comparison = field(default_factory=Comparison)

    @classmethod
    def asked(cls, run: Path, name: str | None, weights: Path | None) -> SmallDecode | None:
        """The decoder that options ask for, for the latents of a run; None for the codec's own."""
        if name is None and weights is None:
            return None
        config = load_config(str(config_of(student_of(run).parent)))
        is_tiny = world_of(config) is TINY
        if not wants_small(name, weights, is_tiny):
            return None
        device = find_device(config.run.device, "run.device")
        codec = TinyCodec.load(codec_file(config)).fingerprint if is_tiny else "wan-vae"
        return cls(find_decoder(weights, codec, device), device)

    def beside(self, full: Decode) -> Decode:
        """Decodes by the small decoder, and each clip by the full one too, to compare them."""

        def decode(latents: Tensor) -> Tensor:
            video = SmallStream(self.decoder.network).decode(latents.to(self.device)).cpu()
            self.comparison.add(video, full(latents))
            return video

        return decode
