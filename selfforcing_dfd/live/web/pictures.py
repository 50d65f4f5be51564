"""Pictures that viewers send, for a stream to begin with."""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from selfforcing_dfd.common import UserError

MAX_PICTURE_BYTES = 16 * 2**20
MAX_PIXELS = 64_000_000
KEPT_SIDE = 2048  # pixels; no student makes larger videos
FORMATS = ("JPEG", "PNG", "WEBP")


class PictureError(UserError):
    """A file that no stream can begin with; the message says why and what to send."""


def open_picture(data: bytes) -> Image.Image:
    """A file's picture as RGB, upright, of KEPT_SIDE pixels a side at most.

    Other formats are not even looked at: some of them name further files to read. Raises
    PictureError for what is no picture, is damaged, or unpacks to more than MAX_PIXELS.
    """
    wanted = f"send a JPEG, PNG or WebP of at most {MAX_PICTURE_BYTES // 2**20} MiB"
    if len(data) > MAX_PICTURE_BYTES:
        raise PictureError(f"the file has more than {MAX_PICTURE_BYTES:,} bytes; {wanted}")
    try:
        # Pillow warns of large pictures; they are refused here
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise PictureError(
                f"the picture has {width} x {height} pixels; send one of at most "
                f"{MAX_PIXELS // 10**6} million"
            )
        image.draft("RGB", (KEPT_SIDE, KEPT_SIDE))  # a large JPEG is decoded at a smaller scale
        upright = ImageOps.exif_transpose(image)
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise PictureError(f"the file is no picture that is known here; {wanted}") from error
    except (OSError, ValueError, SyntaxError, TypeError, EOFError) as error:
        raise PictureError(f"the picture is damaged ({error}); {wanted}") from error
    upright = on_grey(upright)
    upright.thumbnail((KEPT_SIDE, KEPT_SIDE), Image.Resampling.LANCZOS)
    return upright


def on_grey(image: Image.Image) -> Image.Image:
    """RGB; what is transparent shows grey, as black or white would be an edge that nobody drew."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    layers = image.convert("RGBA")
    ground = Image.new("RGBA", layers.size, (128, 128, 128, 255))
    return Image.alpha_composite(ground, layers).convert("RGB")


def as_context(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """A stream's first video frame [1, H, W, 3] in [0, 1].

    The picture is scaled to fill `size`, height and width, and cropped evenly on both sides.
    """
    height, width = size
    fitted = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 255)[None]
