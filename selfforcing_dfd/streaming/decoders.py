"""Which decoder makes the pictures of latents: the codec's own, or a small one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from selfforcing_dfd.codecs.fidelity import CheckedCodec, Fidelity
from selfforcing_dfd.codecs.protocol import StreamingCodec
from selfforcing_dfd.codecs.small_codec import SmallCodec
from selfforcing_dfd.codecs.small_decoder import DecoderSize, SmallDecoder
from selfforcing_dfd.common import find_file
from selfforcing_dfd.streaming.load import TINY_ASSETS
from selfforcing_dfd.streaming.model import StreamModel
from selfforcing_dfd.streaming.parts import LoadError
from selfforcing_dfd.streaming.session import StreamSession, StreamSettings
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.weights.decoders import StoredDecoder, read_decoder

SMALL = "small"
TINY_DECODER = TINY_ASSETS / "decoder.safetensors"
RANDOM = "random weights"
NUM_COMPARED = 2  # chunks over which a small decoder is compared with the full one


def with_decoder(model: StreamModel, name: str | None, weights: Path | None) -> StreamModel:
    """The model with the decoder that was asked for.

    name: small, wan or tiny; None is small where weights are named, else the codec's own. weights:
    of the small decoder, a file or a run. Raises UserError for a decoder that does not fit.
    """
    codec = model.codec
    if not wants_small(name, weights, isinstance(codec, TinyCodec)):
        return model
    device = model.decode_device or model.device
    decoder = find_decoder(weights, mark_of(codec), device, dtype_of(model))
    return replace(model, codec=SmallCodec(decoder.network, codec, decoder.source))


def with_random_decoder(model: StreamModel) -> StreamModel:
    """The same with a small decoder of Wan's size and random weights: real speed, no picture."""
    network = SmallDecoder(DecoderSize())
    network.init_weights(torch.Generator().manual_seed(0))
    nn.Module.to(network, model.decode_device or model.device, dtype_of(model))
    return replace(model, codec=SmallCodec(network, model.codec, RANDOM))


def compare_decoders(model: StreamModel, settings: StreamSettings, prompt: str) -> Fidelity | None:
    """How far a small decoder is from the full one, over the first chunks of a discarded stream.

    Noted in the codec as well. None for the codec's own decoder.
    """
    codec = model.codec
    if not isinstance(codec, SmallCodec):
        return None
    checked = CheckedCodec(codec)
    session = StreamSession(replace(model, codec=checked), prompt, settings, model.grey())
    for _ in range(NUM_COMPARED):
        session.next_chunk()
    found = checked.comparison.result()
    codec.fidelity = str(found)
    return found


def shared(own: StreamingCodec, other: StreamingCodec) -> StreamingCodec:
    """The weights of the other codec, which is the same one; of a small decoder what was found."""
    if not (isinstance(own, SmallCodec) and isinstance(other, SmallCodec)):
        return other
    made = SmallCodec(other.network, other.full, own.name)
    made.fidelity = own.fidelity
    made.program = other.program
    return made


def wants_small(name: str | None, weights: Path | None, is_tiny: bool) -> bool:
    """Whether the small decoder is asked for. LoadError for another world's, or idle weights."""
    own = "tiny" if is_tiny else "wan"
    if name not in (None, SMALL, own):
        raise LoadError(
            f"--decoder is {name}, but these are latents of {own}; use --decoder {own} or {SMALL}"
        )
    if name == own and weights is not None:
        raise LoadError(
            f"--decoder-weights {weights} would have no effect with --decoder {own}; drop it, or "
            f"use --decoder {SMALL}"
        )
    return name == SMALL or weights is not None


def find_decoder(
    weights: Path | None,
    codec: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> StoredDecoder:
    """A small decoder for the latents of a codec, by its fingerprint.

    weights: None is the one that is shipped for the tiny world. Raises UserError.
    """
    if weights is None and not codec.startswith("tiny-codec"):
        raise LoadError(
            "--decoder small wants --decoder-weights FILE for Wan's latents: a run of "
            "configs/wan1.3b/decoder.yaml, or TAEHV's taew2_1.safetensors"
        )
    path = find_file(str(weights)) if weights is not None else TINY_DECODER
    decoder = read_decoder(path, device, dtype)
    decoder.check_latents(codec)
    return decoder


def mark_of(codec: StreamingCodec) -> str:
    """What stands for a codec in files of decoders; Wan's VAE is not hashed for it."""
    return codec.fingerprint if isinstance(codec, TinyCodec) else "wan-vae"


def dtype_of(model: StreamModel) -> torch.dtype:
    """What a small decoder computes in: float32 in the tiny world, else as the student."""
    return torch.float32 if isinstance(model.codec, TinyCodec) else model.dtype
