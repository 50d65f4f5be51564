"""Wan's video VAE, piece by piece: diffusers' `AutoencoderKLWan` with state that the caller owns.

The module itself does not change; a decoder or encoder holds the last features of every causal
convolution. Latents are the transformer's, normalised by the VAE config's means and deviations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKLWan
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from selfforcing_dfd.codecs.wan_decode import Programs, StreamingDecoder, pointwise
from selfforcing_dfd.common import UserError

TIME = 4
SPACE = 8
VIDEO_SIZE = (480, 832)
"""Height and width that Wan2.1's 480p models are made for; the default where nothing states one."""
FPS = 16
"""Video frames a second of Wan2.1's videos."""
# "Rep": an upsampler that has seen one latent frame; None: nothing yet
Features = Tensor | str | None


class CodecError(UserError):
    """Weights that cannot be used, or latents and videos that do not fit."""


class WanCodec:
    """`codecs.protocol.StreamingCodec` over a frozen `AutoencoderKLWan`.

    Computes in the VAE's dtype, returns float32. channels_last: weights and activations in
    channels_last_3d, which is more than twice as fast on Hopper GPUs as NCDHW; the last bits of the
    results change, and on a CPU nothing is gained.
    """

    strides = (TIME, SPACE, SPACE)

    def __init__(
        self,
        vae: Any,
        channels_last: bool = False,
        device: torch.device | None = None,
        lean: bool = False,
    ) -> None:
        """vae: an AutoencoderKLWan (which type checkers misread).

        device: where it computes, if it comes there by accelerate's hooks; None: where it is. lean:
        decoders take less memory and a little longer, with the same bits (`StreamingDecoder`).
        Raises CodecError for the VAE of Wan2.2 5B, which has another architecture.
        """
        if vae.config["patch_size"] is not None:
            raise CodecError(
                f"the VAE has patch_size {vae.config['patch_size']}, as Wan2.2 5B has; want the "
                "one of Wan2.1 and Wan2.2 14B"
            )
        vae.requires_grad_(False).eval()
        self.vae = vae
        self.lean = lean
        self.programs = Programs()
        self.memory_format = torch.contiguous_format
        if channels_last:
            self.memory_format = torch.channels_last_3d
            use_channels_last(vae)
        weight = next(vae.parameters())
        self.dtype = weight.dtype
        self.device = device or weight.device
        shape = (1, -1, 1, 1, 1)
        self.mean, self.deviation = (
            torch.tensor(vae.config[name], device=self.device).view(shape)
            for name in ("latents_mean", "latents_std")
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        lean: bool = False,
    ) -> Self:
        """From a diffusers folder of Wan, or its subfolder `vae`. Raises CodecError without one."""
        found = [
            path
            for path in (Path(folder) / "vae", Path(folder))
            if (path / "config.json").is_file()
        ]
        if not found:
            raise CodecError(
                f"{folder} holds no vae/config.json; want a diffusers folder of Wan2.1, or its "
                "subfolder vae"
            )
        vae: Any = AutoencoderKLWan.from_pretrained(found[0], torch_dtype=dtype)
        return cls(vae.to(device), channels_last, lean=lean)

    @property
    def channels(self) -> int:
        return int(self.vae.config["z_dim"])

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.vae.state_dict().items()):
            digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
        return f"wan-vae-{digest.hexdigest()[:16]}"

    def num_latent_frames(self, num_video_frames: int) -> int:
        """1 + (T - 1) / 4. Raises CodecError for T that is not of the form 1 + 4 n."""
        if num_video_frames < 1 or (num_video_frames - 1) % TIME:
            lower = max(num_video_frames - 1, 0) // TIME * TIME + 1
            raise CodecError(
                f"{num_video_frames} video frames are not 1 + 4 n; use {lower} or {lower + TIME}"
            )
        return 1 + (num_video_frames - 1) // TIME

    def encode(self, videos: Tensor) -> Tensor:
        """[B, T, H, W, 3] in [0, 1] -> [B, F, 16, H / 8, W / 8] float32, the posterior's mode."""
        return self.start_encoding().encode(videos)

    def decode(self, latents: Tensor) -> Tensor:
        """[B, F, 16, h, w] -> [B, 1 + 4 (F - 1), 8 h, 8 w, 3] float32, clamped to [0, 1]."""
        return self.start_decoding().decode(latents)

    def compile_decoding(self, **options: Any) -> None:
        """Compile the decoder for those who start decoding from now on.

        One program for a video's first latent frame, another for all others; both compile again for
        another size of video. options: of torch.compile.
        """
        self.programs = Programs().compiled(**options)

    def start_decoding(self) -> WanDecoder:
        return WanDecoder(self)

    def start_encoding(self) -> WanEncoder:
        return WanEncoder(self)


class WanDecoder:
    """`codecs.protocol.Decoder`: equal to diffusers' decode of the whole video."""

    def __init__(self, codec: WanCodec, stream: StreamingDecoder | None = None) -> None:
        self.codec = codec
        self.stream = stream or StreamingDecoder(
            codec.vae.decoder, codec.memory_format, codec.programs, codec.lean
        )

    @property
    def num_bytes(self) -> int:
        """Memory of the state: constant from the second latent frame on."""
        return self.stream.num_bytes

    def clone(self) -> WanDecoder:
        """An independent decoder that continues from here."""
        return WanDecoder(self.codec, self.stream.clone())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The next latent frames [B, f, 16, h, w] as video [B, T, 8 h, 8 w, 3] float32 in [0, 1].

        Raises CodecError for another number of channels, or no latent frames.
        """
        codec = self.codec
        if latents.ndim != 5 or latents.shape[2] != codec.channels or not latents.shape[1]:
            raise CodecError(
                f"latents are {tuple(latents.shape)}; want [B, F, {codec.channels}, h, w], F one "
                "or more"
            )
        bring(codec.vae)
        with tuned_convolutions(codec.device):
            parts = [self._decode_frame(frame) for frame in latents.split(1, dim=1)]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _decode_frame(self, latent: Tensor) -> Tensor:
        """[B, 1, 16, h, w] -> [B, 1 or 4, 8 h, 8 w, 3] float32 in [0, 1]."""
        codec = self.codec
        z = latent.transpose(1, 2).float() * codec.deviation + codec.mean
        given = z.to(codec.dtype, memory_format=codec.memory_format)
        video = self.stream(pointwise(codec.vae.post_quant_conv, given))
        return (video.float().clamp(-1, 1).permute(0, 2, 3, 4, 1) + 1) / 2


@apply_forward_hook
def bring(vae: Any) -> None:
    """Have accelerate's hook, where there is one, move the VAE to the device that it computes on.

    A call of the VAE would do so; its layers are called here.
    """


@contextmanager
def tuned_convolutions(device: torch.device) -> Iterator[None]:
    """On a GPU, let cuDNN try its kernels for each new shape, and keep the fastest.

    Not where `torch.backends.cudnn.deterministic` asks for the same bits in every process.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark
    cudnn.benchmark = before or (device.type == "cuda" and not cudnn.deterministic)
    try:
        yield
    finally:
        cudnn.benchmark = before


class WanEncoder:
    """`codecs.protocol.Encoder`: the first video frame alone, then fours."""

    def __init__(self, codec: WanCodec) -> None:
        self.codec = codec
        # diffusers' feature cache, one entry a causal convolution
        self.features: list[Features] = []

    @torch.no_grad()
    def encode(self, videos: Tensor) -> Tensor:
        """The next video frames [B, T, H, W, 3] in [0, 1] as latents [B, f, 16, H / 8, W / 8].

        First 1 + 4 n of them, then 4 n. Returns float32. Raises CodecError for other counts, and
        for sizes that are no multiples of 8.
        """
        if videos.ndim != 5 or videos.shape[-1] != 3 or not videos.shape[1]:
            raise CodecError(
                f"videos are {tuple(videos.shape)}; want [B, T, H, W, 3], colours last, T one or "
                "more"
            )
        codec = self.codec
        frames, height, width = videos.shape[1:4]
        if self.features and frames % TIME:
            raise CodecError(
                f"{frames} video frames follow the first ones; want a multiple of {TIME}"
            )
        if not self.features:
            codec.num_latent_frames(frames)
        if height % SPACE or width % SPACE:
            raise CodecError(
                f"video frames are {height} x {width}; height and width must be multiples of "
                f"{SPACE}"
            )
        x = (2 * videos.float() - 1).permute(0, 4, 1, 2, 3).to(codec.dtype)
        lone = frames % TIME
        pieces = x.split([lone, *[TIME] * (frames // TIME)] if lone else TIME, dim=2)
        bring(codec.vae)
        encoder = codec.vae.encoder
        parts = []
        self.features = self.features or [
            None for module in encoder.modules() if isinstance(module, nn.Conv3d)
        ]
        for piece in pieces:
            given = piece.contiguous(memory_format=codec.memory_format)
            out = encoder(given, feat_cache=self.features, feat_idx=[0])
            parts.append(codec.vae.quant_conv(out)[:, : codec.channels])
        mode = torch.cat(parts, dim=2).float()
        return ((mode - codec.mean) / codec.deviation).transpose(1, 2).contiguous()


def use_channels_last(vae: nn.Module) -> None:
    """Store the weights of all convolutions in channels_last."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
        # upsamplers: without it the layers after them would compute in NCDHW again
        elif isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
