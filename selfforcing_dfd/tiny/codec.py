"""Linear codec with the shape of Wan's VAE.

Strides 4x8x8 and 16 channels; the first latent frame stands for one video frame.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TIME = 4  # video frames of a latent frame
SPACE = 8  # pixels of a latent pixel, in height and in width
CHANNELS = 16
GREY = 0.35  # the tiny world's background, about which both bases are taken
FINGERPRINT = "tiny-codec-"  # how the fingerprints of tiny codecs begin
CODEC_FILE = "codec.safetensors"
BASIS = f"assets/tiny/{CODEC_FILE}"


@dataclass(frozen=True, slots=True)
class TinyCodec:
    """Two orthonormal bases and one scale.

    first: [192, 16], for a single video frame. rest: [768, 16], for four of them. Both are
    principal components of rendered clips. `first` is rotated so that its channels mean the same as
    those of `rest`: a clip that stands still has nearly equal latents in all latent frames. One
    scale makes the data's variance 1, so distances between latents stay proportional to distances
    between pixels.
    """

    first: Tensor
    rest: Tensor
    scale: float

    strides = (TIME, SPACE, SPACE)
    channels = CHANNELS

    @classmethod
    def fit(cls, videos: Tensor) -> TinyCodec:
        """Bases for videos [B, T, H, W, 3] in [0, 1]."""
        lone, groups = to_blocks(videos - GREY)
        first = principal_components(lone)
        rest = principal_components(groups)
        # maps a frame that stands still to the latents of its group
        static = rest.unflatten(0, (TIME, -1)).sum(0)
        u, _, v = torch.linalg.svd(first.T @ static)
        unscaled = cls((first @ (u @ v)).float(), rest.float(), 1.0)
        scale = float(1 / unscaled.encode(videos).std())
        return cls(unscaled.first.contiguous(), unscaled.rest.contiguous(), scale)

    @classmethod
    def load(cls, path: Path | str) -> TinyCodec:
        tensors = load_file(path)
        return cls(tensors["first"], tensors["rest"], float(tensors["scale"]))

    def save(self, path: Path | str) -> None:
        save_file({"first": self.first, "rest": self.rest, "scale": torch.tensor(self.scale)}, path)

    @property
    def fingerprint(self) -> str:
        values = torch.cat(
            [self.first.flatten().cpu(), self.rest.flatten().cpu(), torch.tensor([self.scale])]
        )
        return f"{FINGERPRINT}{hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]}"

    def num_latent_frames(self, num_video_frames: int) -> int:
        """1 + (T - 1) / 4. Raises ValueError for T that is not of the form 1 + 4 n."""
        if num_video_frames < 1 or (num_video_frames - 1) % TIME:
            lower = max(num_video_frames - 1, 0) // TIME * TIME + 1
            raise ValueError(
                f"{num_video_frames} video frames are not 1 + 4 n; use {lower} or {lower + TIME}"
            )
        return 1 + (num_video_frames - 1) // TIME

    def to(self, device: torch.device | str) -> TinyCodec:
        """The same codec with its bases on a device."""
        return TinyCodec(self.first.to(device), self.rest.to(device), self.scale)

    def encode(self, videos: Tensor) -> Tensor:
        """[B, T, H, W, 3] in [0, 1] -> [B, F, 16, H / 8, W / 8]."""
        self.num_latent_frames(videos.shape[1])
        return self.encode_part(videos, True)

    def decode(self, latents: Tensor) -> Tensor:
        """[B, F, 16, h, w] -> [B, 1 + 4 (F - 1), 8 h, 8 w, 3], not clamped."""
        return self.decode_part(latents, True)

    def start_decoding(self) -> TinyDecoder:
        return TinyDecoder(self)

    def start_encoding(self) -> TinyEncoder:
        return TinyEncoder(self)

    def encode_part(self, videos: Tensor, begins: bool) -> Tensor:
        """Video frames to latents.

        begins: the first video frame is the first of its video, and has a latent frame of its own.
        """
        if videos.ndim != 5 or videos.shape[-1] != 3:
            raise ValueError(
                f"videos are {tuple(videos.shape)}; want [B, T, H, W, 3], colours last"
            )
        lone, groups = to_blocks(videos.float() - GREY, int(begins))
        head = frame_by_frame(lone, self.first) * TIME**0.5
        tail = frame_by_frame(groups, self.rest)
        values = torch.cat([head, tail], dim=1) * self.scale
        return values.permute(0, 1, 4, 2, 3).contiguous()

    def decode_part(self, latents: Tensor, begins: bool) -> Tensor:
        """Latents to video frames.

        begins: the first latent frame is the first of its video, and stands for one video frame.
        """
        if latents.ndim != 5 or latents.shape[2] != CHANNELS:
            raise ValueError(
                f"latents are {tuple(latents.shape)}; want [B, F, {CHANNELS}, h, w], channels third"
            )
        values = latents.permute(0, 1, 3, 4, 2) / self.scale
        num_lone = int(begins)
        lone = frame_by_frame(values[:, :num_lone], self.first.T) / TIME**0.5
        groups = frame_by_frame(values[:, num_lone:], self.rest.T)
        return from_blocks(lone, groups) + GREY


@dataclass(slots=True)
class TinyDecoder:
    """`codecs.protocol.Decoder`. Latent frames decode alone; only the first is another kind."""

    codec: TinyCodec
    started: bool = False

    def decode(self, latents: Tensor) -> Tensor:
        """The next latent frames [B, f, 16, h, w] as video [B, T, 8 h, 8 w, 3].

        Not clamped; on the latents' device.
        """
        self.codec = self.codec.to(latents.device)
        video = self.codec.decode_part(latents.float(), not self.started)
        self.started = self.started or latents.shape[1] > 0
        return video

    def clone(self) -> TinyDecoder:
        return TinyDecoder(self.codec, self.started)


@dataclass(slots=True)
class TinyEncoder:
    """`codecs.protocol.Encoder`."""

    codec: TinyCodec
    started: bool = False

    def encode(self, videos: Tensor) -> Tensor:
        """The next video frames [B, T, H, W, 3] in [0, 1] as latents.

        The first call takes 1 + 4 n of them, later calls 4 n; ValueError otherwise, after which the
        encoder can go on with a right piece.
        """
        if self.started and videos.shape[1] % TIME:
            raise ValueError(
                f"{videos.shape[1]} video frames follow the first ones; want a multiple of {TIME}"
            )
        if not self.started:
            self.codec.num_latent_frames(videos.shape[1])
        self.codec = self.codec.to(videos.device)
        latents = self.codec.encode_part(videos, not self.started)
        self.started = True
        return latents


def num_video_frames(num_latent_frames: int, first: bool) -> int:
    """Video frames of a piece: 4 for each latent frame, but 1 for the first of a video.

    Three latent frames give 9 video frames at the start of a video, then 12.
    """
    if num_latent_frames < 1:
        raise ValueError(f"a piece has {num_latent_frames} latent frames; want one or more")
    return TIME * num_latent_frames - (TIME - 1 if first else 0)


def frame_by_frame(values: Tensor, basis: Tensor) -> Tensor:
    """[B, F, h, w, D] @ [D, E], one latent frame after the other.

    Which kernel multiplies, and so how it rounds, depends on shape, strides and alignment: with a
    fresh copy of the same shape for every latent frame, any split of a video gives the same bits.
    """
    out = values.new_empty(*values.shape[:-1], basis.shape[1])
    for frame in range(values.shape[1]):
        rows = values[:, frame].clone(memory_format=torch.contiguous_format).flatten(0, 2)
        out[:, frame] = (rows @ basis).view(out[:, frame].shape)
    return out


def principal_components(blocks: Tensor) -> Tensor:
    """The [D, 16] directions in which blocks [..., D] vary most about the origin.

    Each one's sign makes its sum positive.
    """
    rows = blocks.flatten(0, -2).double()
    directions = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)[:, :CHANNELS]
    return directions * torch.where(directions.sum(0) < 0, -1.0, 1.0)


def to_blocks(videos: Tensor, num_lone: int = 1) -> tuple[Tensor, Tensor]:
    """Videos [B, T, H, W, 3] in blocks of 8 x 8 pixels.

    Returns the first num_lone video frames, each alone [B, num_lone, h, w, 192], and the others in
    groups of four [B, g, h, w, 768].
    """
    frames, height, width = videos.shape[1:4]
    if height % SPACE or width % SPACE:
        raise ValueError(
            f"video frames are {height} x {width}; height and width must be multiples of {SPACE}"
        )
    grid = videos.unflatten(2, (-1, SPACE)).unflatten(4, (-1, SPACE))  # B, T, h, 8, w, 8, 3
    grid = grid.permute(0, 1, 2, 4, 3, 5, 6)  # B, T, h, w, 8, 8, 3
    rest = (
        grid[:, num_lone:]
        .unflatten(1, ((frames - num_lone) // TIME, TIME))
        .permute(0, 1, 3, 4, 2, 5, 6, 7)
    )
    return grid[:, :num_lone].flatten(4), rest.flatten(4)


def from_blocks(lone: Tensor, groups: Tensor) -> Tensor:
    """Inverse of `to_blocks`."""
    rest = (
        groups.unflatten(4, (TIME, SPACE, SPACE, 3)).permute(0, 1, 4, 2, 3, 5, 6, 7).flatten(1, 2)
    )
    grid = torch.cat([lone.unflatten(4, (SPACE, SPACE, 3)), rest], dim=1)
    return grid.permute(0, 1, 2, 4, 3, 5, 6).flatten(4, 5).flatten(2, 3)
