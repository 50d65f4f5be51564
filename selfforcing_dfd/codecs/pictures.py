"""Pictures as Wan2.1's image-to-video models take them: latents of the VAE, states of CLIP.

The image encoder is `CLIPVisionModel` of a diffusers folder of Wan2.1-I2V; the states are those
before its last layer, as in diffusers' WanImageToVideoPipeline.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from selfforcing_dfd.codecs.protocol import StreamingCodec
from selfforcing_dfd.common import UserError
from selfforcing_dfd.models.picture import Picture, picture_channels

REPOSITORY = "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
ENCODER = "image_encoder"
PROCESSOR = "image_processor"
FILES = {ENCODER: "config.json", PROCESSOR: "preprocessor_config.json"}
STATES = -2  # which of CLIP's hidden states, counted from the last layer's
GREY = 0.5


class PictureEncoderError(UserError):
    """An image encoder that is missing or another one; the message says what to do."""


class PictureEncoder:
    """Pictures to `models.picture.Picture`, with the codec that makes the videos."""

    def __init__(self, codec: StreamingCodec, processor: Any, encoder: Any) -> None:
        """processor, encoder: transformers' CLIPImageProcessor and CLIPVisionModel."""
        self.codec = codec
        self.processor = processor
        self.encoder = encoder.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, codec: StreamingCodec, device: torch.device | str = "cpu"
    ) -> Self:
        """From a diffusers folder of Wan2.1-I2V: its subfolders image_encoder and image_processor.

        It computes in float32, as the published pipeline does. Raises PictureEncoderError for
        missing files, with the command that fetches them, and for another model.
        """
        from transformers import CLIPImageProcessor, CLIPVisionModel  # seconds to import

        check_picture_encoder(Path(folder))
        path = Path(folder) / ENCODER
        try:
            loaded: Any = CLIPVisionModel.from_pretrained(
                path, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
        except OSError as error:
            raise PictureEncoderError(f"{path} cannot be read: {error}; {fetch(folder)}") from error
        encoder, report = loaded
        absent = sorted(report["missing_keys"])
        if absent:
            raise PictureEncoderError(
                f"{path} lacks {', '.join(absent[:3])} ({len(absent)} tensors); {fetch(folder)}"
            )
        processor = CLIPImageProcessor.from_pretrained(
            Path(folder) / PROCESSOR, local_files_only=True
        )
        return cls(codec, processor, encoder.to(device))

    @property
    def image_dim(self) -> int:
        """Width of the states."""
        return int(self.encoder.config.hidden_size)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
        return f"clip-{digest.hexdigest()[:16]}"

    def encode(self, pictures: Tensor, frames: int) -> Picture:
        """Pictures [B, H, W, 3] in [0, 1] for videos of `frames` latent frames, on their device."""
        return Picture(
            picture_channels(self.latents(pictures, frames)),
            self.tokens(pictures).to(pictures.device),
        )

    @torch.no_grad()
    def tokens(self, pictures: Tensor) -> Tensor:
        """The image encoder's states [B, T, D_image], float32."""
        shown = [(255 * picture).round().to(torch.uint8).cpu().numpy() for picture in pictures]
        found = self.processor(images=shown, return_tensors="pt", input_data_format="channels_last")
        pixels = found["pixel_values"].to(self.encoder.device)
        states: Tensor = self.encoder(pixel_values=pixels, output_hidden_states=True).hidden_states[
            STATES
        ]
        return states

    def latents(self, pictures: Tensor, frames: int) -> Tensor:
        """[B, frames, C, h, w] of videos that are the picture first and grey afterwards."""
        stride = self.codec.strides[0]
        grey = torch.full_like(pictures[:, None], GREY)
        videos = torch.cat([pictures[:, None], grey.repeat(1, stride * (frames - 1), 1, 1, 1)], 1)
        return self.codec.start_encoding().encode(videos)

    def of_clips(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Picture latents and tokens for clips [B, F, C, h, w], from their first video frames.

        Those are decoded. The first latent frame knows nothing of later video frames, so the
        clip's own is the picture's.
        """
        first = latents[:, :1].to(self.encoder.device)
        pictures = self.codec.start_decoding().decode(first)[:, 0].clamp(0, 1)
        found = self.latents(pictures, latents.shape[1])
        return torch.cat([first, found[:, 1:]], dim=1), self.tokens(pictures)


def check_picture_encoder(folder: Path, image_dim: int | None = None) -> None:
    """Raise PictureEncoderError unless the folder has an image encoder that may be Wan's.

    image_dim: the width of its states that a network wants; None is any.
    """
    missing = missing_files(folder)
    if missing:
        raise PictureEncoderError(
            f"{folder} has no {', '.join(missing)}; an image-to-video model of Wan2.1 needs its "
            f"image encoder. {fetch(folder)}. The .pth file of the original repository is not read"
        )
    config = folder / ENCODER / FILES[ENCODER]
    stated = json.loads(config.read_text())
    kind = stated.get("model_type")
    if kind != "clip_vision_model":
        raise PictureEncoderError(
            f"{config} describes a {kind!r} model; Wan2.1 wants 'clip_vision_model'; "
            f"{fetch(folder)}"
        )
    if image_dim not in (None, stated.get("hidden_size")):
        raise PictureEncoderError(
            f"{config} describes states of width {stated.get('hidden_size')}, the network wants "
            f"{image_dim}; name the folder that belongs to it. {fetch(folder)}"
        )


def missing_files(folder: Path) -> list[str]:
    """Files of the image encoder that a folder lacks, its weights included."""
    wanted = [f"{part}/{file}" for part, file in FILES.items()]
    missing = [name for name in wanted if not (folder / name).is_file()]
    has_weights = any((folder / ENCODER).glob("*.safetensors"))
    return missing if has_weights else [*missing, f"{ENCODER}/*.safetensors"]


def fetch(folder: Path | str) -> str:
    """The command that downloads an image encoder into a folder."""
    return (
        f"Fetch it: hf download {REPOSITORY} --include '{ENCODER}/*' --include '{PROCESSOR}/*' "
        f"--local-dir {shlex.quote(str(folder))}"
    )
