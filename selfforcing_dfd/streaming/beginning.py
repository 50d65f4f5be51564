"""What a stream begins with: a picture or a clip that somebody gives."""

from __future__ import annotations

from torch import Tensor

from selfforcing_dfd.common import UserError


def require_context(num_given: int) -> None:
    """Raise UserError for a student that needs the first frames of its video, where none are given.

    num_given: video frames.
    """
    if num_given:
        raise UserError(
            f"this student needs the first {num_given} video frame(s) of a video: name a picture "
            "by --image or a clip by --video, or in Python by context="
        )


def check_context(context: Tensor, size: tuple[int, int], stride: int, num_given: int) -> None:
    """Raise UserError for a context [T, H, W, 3] that does not fit the model.

    size: height and width. stride: video frames of a latent frame. num_given: video frames that the
    student was trained to be given.
    """
    height, width = size
    fits = context.ndim == 4 and tuple(context.shape[1:]) == (height, width, 3)
    if not fits or context.shape[0] % stride != 1:
        raise UserError(
            f"context is {tuple(context.shape)} [T, H, W, 3]; want T = 1 + {stride} n video "
            f"frames of {height} x {width}: resize the pictures and cut the clip"
        )
    if context.shape[0] < num_given:
        raise UserError(
            f"context is {context.shape[0]} video frames; this student was trained with "
            f"{num_given} that are given: name a longer clip"
        )


def whole_chunks(latents: Tensor, chunk_frames: int) -> tuple[Tensor, ...]:
    """Latents [B, F, C, H, W] in chunks; only the first one may be shorter."""
    num_chunks, rest = divmod(latents.shape[1], chunk_frames)
    lengths = [chunk_frames] * num_chunks
    if rest:
        lengths.insert(0, rest)
    return latents.split(lengths, dim=1)
