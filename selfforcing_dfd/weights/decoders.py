"""Files of small decoders: ours, and those of TAEHV's layout (`taew2_1`), as safetensors or .pth.

What is read has to be all of a decoder's tensors and no others. Of TAEHV's files the encoder is
left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selfforcing_dfd.codecs.small_codec import DecoderNetwork
from selfforcing_dfd.codecs.small_decoder import DecoderSize, SmallDecoder
from selfforcing_dfd.codecs.taew import TaewDecoder
from selfforcing_dfd.weights.runs import student_of
from selfforcing_dfd.weights.sources import DECODER_CLASS
from selfforcing_dfd.weights.stored import (
    StoredTensor,
    WeightsError,
    is_torch_file,
    models_in,
    read_safetensors,
    read_torch_file,
    stored,
)

CODEC = "codec"  # key of the fingerprint of the codec whose latents are decoded
TAEW_FIRST = "decoder.1.weight"
TAEW_SPREADING = ("decoder.7.conv.weight", "decoder.13.conv.weight", "decoder.19.conv.weight")
TINY = "tiny-codec"
NUM_SHOWN = 6


@dataclass(frozen=True, slots=True)
class StoredDecoder:
    """A decoder as it was read. codec: fingerprint of its latents' codec; empty: Wan2.1's VAE."""

    network: DecoderNetwork
    source: str
    codec: str = ""

    def check_latents(self, codec: str) -> None:
        """Raise WeightsError unless it decodes latents of the codec with this fingerprint.

        Of Wan's VAE the fingerprint depends on the dtype that it was loaded in, so any will do.
        """
        ours_is_tiny = self.codec.startswith(TINY)
        if ours_is_tiny != codec.startswith(TINY) or (ours_is_tiny and codec != self.codec):
            raise WeightsError(
                f"{self.source} decodes latents of {self.codec or 'the VAE of Wan2.1'}, but these "
                f"are of {codec}; train one for them (stage decoder), or name another file by "
                "--decoder-weights"
            )


def decoder_metadata(size: DecoderSize, codec: str) -> dict[str, str]:
    """Metadata of a safetensors file from which `read_decoder` reads it.

    codec: fingerprint of the codec whose latents it decodes.
    """
    config = {"_class_name": DECODER_CLASS, **size.as_dict(), CODEC: codec}
    return {"config": json.dumps(config)}


def read_decoder(
    source: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> StoredDecoder:
    """The decoder of a file, or of a run of stage `decoder`.

    Raises WeightsError for what is missing, damaged, refused or no decoder, with every missing,
    unexpected or misshapen tensor.
    """
    path = Path(source)
    if path.is_dir():
        path = student_of(path)
    if not path.is_file():
        raise WeightsError(
            f"{path} does not exist; wanted: a small decoder, which stage decoder trains, or "
            "taew2_1.safetensors"
        )
    tensors, config = _read(path)
    codec = ""
    network: DecoderNetwork
    if config.get("_class_name") == DECODER_CLASS:
        codec = str(config[CODEC])
        with torch.device("meta"):
            network = SmallDecoder(DecoderSize.of(config))
    elif TAEW_FIRST in tensors:
        tensors = _only_wanted(tensors)
        with torch.device("meta"):
            network = TaewDecoder()
    else:
        raise WeightsError(
            f"{path} holds no small decoder: its config is no {DECODER_CLASS}'s, and it has no "
            f"{TAEW_FIRST}, as TAEHV's files do"
        )
    _fill(network, tensors, path, device, dtype)
    return StoredDecoder(network, str(path), codec)


def _read(path: Path) -> tuple[Mapping[str, StoredTensor], Mapping[str, Any]]:
    """Tensors by name, and the config in the metadata of a safetensors file."""
    if not is_torch_file(path):
        tensors, metadata = read_safetensors(path)
        return tensors, json.loads(metadata.get("config", "{}"))
    models = models_in(read_torch_file(path), path)
    if "" not in models:
        raise WeightsError(
            f"{path} holds {', '.join(sorted(models))}; wanted: the state dict of a decoder"
        )
    return {str(name): stored(str(name), tensor) for name, tensor in models[""].items()}, {}


def _only_wanted(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Without the encoder."""
    return {name: each for name, each in tensors.items() if not name.startswith("encoder.")}


def _fill(
    network: nn.Module,
    tensors: Mapping[str, StoredTensor],
    path: Path,
    device: torch.device | str,
    dtype: torch.dtype,
) -> None:
    """Give a network on the meta device its tensors."""
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    read = {}
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in wanted]
    for name, tensor in tensors.items():
        shape = wanted.get(name)
        if shape is None:
            continue
        more_frames = name in TAEW_SPREADING and tensor.shape[0] > shape[0]
        if not more_frames and tensor.shape != shape:
            problems.append(f"{name} has shape {list(tensor.shape)} in place of {list(shape)}")
            continue
        value = tensor.read()
        # TAEHV's own reader takes the last frames where a file has more than the decoder makes
        value = value[-shape[0] :].contiguous() if more_frames else value
        if not bool(value.isfinite().all()):
            problems.append(f"{name} is not finite")
        read[name] = value.to(device, dtype)
    if problems:
        others = f" and {len(problems) - NUM_SHOWN} more" if len(problems) > NUM_SHOWN else ""
        raise WeightsError(
            f"{path} is not a decoder of Wan2.1's latents: {'; '.join(problems[:NUM_SHOWN])}"
            f"{others}"
        )
    network.load_state_dict(read, strict=True, assign=True)
    network.requires_grad_(False)
