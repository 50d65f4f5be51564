"""Contact sheets: the candidates of a cluster in one picture, numbered, for a person to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from selfforcing_dfd.common import atomic_file
from selfforcing_dfd.curate.candidates import Candidate, Shown

HEIGHT = 90  # pixels of a thumbnail
LONGEST = 320  # pixels of the side of a frame that is looked at
COLUMNS = 2  # of candidates
GAP = 4
MARGIN = 44  # for the number
TITLE = 28
QUALITY = 85
GROUND = "white"
INK = "black"
WARNING = "firebrick"


def draw_sheet(title: str, shown: Sequence[Shown], num_pictures: int) -> Image.Image:
    """Candidates from top to bottom, in two columns, each with its number and its pictures.

    What is wrong with a candidate stands under its number.
    """
    width = max((thumbnail_width(one.pictures) for one in shown), default=HEIGHT)
    per_column = -(-len(shown) // COLUMNS)
    column = MARGIN + num_pictures * (width + GAP) + GAP
    size = (column * COLUMNS, TITLE + per_column * (HEIGHT + GAP) + GAP)
    sheet = Image.new("RGB", size, GROUND)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), title, INK, ImageFont.load_default(16))
    for place, one in enumerate(shown):
        left = place // per_column * column
        top = TITLE + place % per_column * (HEIGHT + GAP) + GAP
        label(pen, (left + GAP, top), one.candidate)
        for number, picture in enumerate([] if one.pictures is None else one.pictures):
            thumbnail = Image.fromarray(picture.numpy()).resize((width, HEIGHT))
            sheet.paste(thumbnail, (left + MARGIN + number * (width + GAP), top))
    return sheet


def thumbnail_width(pictures: Tensor | None) -> int:
    """In proportion to the height of a thumbnail."""
    if pictures is None:
        return HEIGHT
    height, width = pictures.shape[1:3]
    return max(round(HEIGHT * width / height), 1)


def label(pen: ImageDraw.ImageDraw, at: tuple[int, int], candidate: Candidate) -> None:
    left, top = at
    pen.text((left, top), str(candidate.number), INK, ImageFont.load_default(22))
    if candidate.fault:
        pen.text((left, top + 32), candidate.fault, WARNING, ImageFont.load_default(9))


def write_sheet(path: Path, title: str, shown: Sequence[Shown], num_pictures: int) -> None:
    """A .jpg; the whole file or none."""
    with atomic_file(path) as file:
        draw_sheet(title, shown, num_pictures).save(file, "JPEG", quality=QUALITY)
