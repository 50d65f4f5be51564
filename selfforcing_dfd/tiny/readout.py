"""Read a tiny-world clip back from its pixels.

Every factor is fitted, the clip is drawn again, and the difference shows how much that explains.

The background is the median pixel. Provisional colour and coverage give the shape's centre by the
phase of the first Fourier mode, which is exact on a torus; templates drawn at that centre give
shape and size; their insides give the colour, so that noise cannot select the pixels it biases. The
track is a straight line in time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from selfforcing_dfd.tiny.codec import TIME
from selfforcing_dfd.tiny.world import HEADINGS, HUES, SHAPES, SIDE, SIZES, SPEED_PX, coverage, mode

# re-rendering explains at least half of what the clip shows over its background
MIN_EXPLAINED = 0.5
# What a clip must show for its direction to mean something. Half of the slowest class's speed, in
# pixels a video frame; and degrees off an axis, where 45 would be halfway between two directions.
# Of 256 clips of the data, once through the codec, the slowest has .49 and the most oblique .4.
MIN_SPEED = float(SPEED_PX.min()) / 2
MAX_OFF_AXIS = 25.0
CHUNK = 3  # latent frames

_BATCH = 8  # clips read at once, so that the working set stays in cache
# pixels of a video frame that give its provisional colour; the smallest shape covers about 300
_NUM_FARTHEST = 24
_FAINT = 0.2  # coverage below this is noise to the centroid
_INSIDE = 0.9  # template coverage from which a pixel counts as the shape's own colour
_STRIDE = 4  # every how many video frames shape and size are compared, and chunks drawn again
_TINY = 1e-6


@dataclass(frozen=True, slots=True)
class Reading:
    """What B clips show, each field a tensor over the clips.

    The factors of an invalid clip mean nothing, but are finite.
    """

    shape: Tensor  # indices into world.SHAPES, HUES, DIRECTIONS, SPEEDS, SIZES
    hue: Tensor
    direction: Tensor
    speed: Tensor
    size: Tensor
    speed_px: Tensor  # pixels per video frame
    off_axis: Tensor  # degrees between the motion and its direction, 0 to 45
    saturation: Tensor  # HSV saturation of the shape's colour
    contrast: Tensor  # distance in RGB between shape and background
    jitter: Tensor  # pixels, root mean square distance of the centre from the straight track
    psnr: Tensor  # dB, of the clip against its re-rendering
    explained: Tensor  # 1 - |clip - re-rendering|^2 / |re-rendering - background|^2
    valid: Tensor  # bool: explained >= MIN_EXPLAINED
    saturation_by_chunk: Tensor  # [B, chunks]
    contrast_by_chunk: Tensor  # [B, chunks]
    # each chunk by itself, [B, chunks]: its own straight track, its own colour
    speed_by_chunk: Tensor  # pixels per video frame
    direction_by_chunk: Tensor  # indices
    hue_by_chunk: Tensor  # indices
    valid_by_chunk: Tensor  # bool
    # [B, chunks - 1], pixels between the places to which two chunks' tracks lead where they meet
    seam_jumps: Tensor
    # pixels, departure from the mean step into a chunk, less that into its later latent frames
    seam_excess: Tensor
    pixels: Tensor  # [B, n], a fixed sparse sample of the clip's pixels, for the spread over clips

    @classmethod
    def join(cls, parts: Sequence[Reading]) -> Reading:
        """The clips of all parts, in order."""
        joined = {}
        for field in fields(cls):
            joined[field.name] = torch.cat([getattr(part, field.name) for part in parts])
        return cls(**joined)

    def __len__(self) -> int:
        return len(self.valid)

    @property
    def moving(self) -> Tensor:
        """Clips that have a direction [B], bool: valid, fast enough and along an axis.

        Without it, standing still would be the way to win: a frozen shape that drifts .02 pixels a
        video frame has some direction, and in many clips every direction.
        """
        return self.valid & (self.speed_px >= MIN_SPEED) & (self.off_axis <= MAX_OFF_AXIS)

    @property
    def mode(self) -> Tensor:
        """Index into world.MODE_PRIOR [B]; only moving clips are in a mode."""
        return mode(self.hue, self.direction, self.speed)


def read(videos: Tensor, chunk: int = CHUNK) -> Reading:
    """Read clips [B, T, 64, 64, 3], float; values outside [0, 1] are clipped, as a screen would.

    chunk: latent frames generated together, for the per-chunk readings; the first chunk has 1 + 4
    (chunk - 1) video frames, later ones 4 chunk. Raises ValueError for other shapes and for pixels
    that are not finite.
    """
    if (
        videos.ndim != 5
        or videos.shape[1] < 2
        or tuple(videos.shape[2:]) != (SIDE, SIDE, 3)
        or not len(videos)
    ):
        raise ValueError(
            f"videos are {list(videos.shape)}, "
            f"want [B, T, {SIDE}, {SIDE}, 3] with B >= 1 and T >= 2"
        )
    if not videos.is_floating_point():
        raise ValueError(f"videos are {videos.dtype}, want float in [0, 1]; divide uint8 by 255")
    parts = [_read_batch(part, chunk) for part in videos.split(_BATCH)]
    return Reading.join(parts)


def chunk_starts(num_frames: int, chunk: int = CHUNK) -> list[int]:
    """First video frame of every chunk: 0, 9, 21, ... for chunks of 3 latent frames."""
    return [0, *range(1 + TIME * (chunk - 1), num_frames, TIME * chunk)]


def _read_batch(videos: Tensor, chunk: int) -> Reading:
    finite = videos.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        raise ValueError(
            f"{int((~finite).sum())} of {len(videos)} clips have pixels that are not finite"
        )
    video = videos.float().clamp(0, 1)
    background = video[:, ::4, ::2, ::2].flatten(1, 3).median(dim=1).values  # [B, 3]
    shown = (video - background[:, None, None, None]).flatten(2, 3)  # [B, T, pixels, 3]
    along = _along(shown, _provisional_colour(shown))
    centres = centroids(along)
    start, step, jitter = fit_line(centres)
    shape, size = _best_template(along, centres)
    alpha = coverage(shape, size, centres).flatten(2)
    by_frame, weight = _inside_colour(shown, alpha)
    colour = _weighted(by_frame, weight)
    starts = chunk_starts(video.shape[1], chunk)
    straight = (
        start[:, None] + step[:, None] * torch.arange(video.shape[1], device=video.device)[:, None]
    )
    psnr, explained = _explain(shown, coverage(shape, size, straight).flatten(2), colour)
    hue, saturation = hue_and_saturation(background + colour)
    speed_px, direction, off_axis = _motion(step)
    return Reading(
        shape=shape,
        hue=hue,
        direction=direction,
        speed=(speed_px[:, None] - SPEED_PX.to(step)).abs().argmin(dim=-1),
        size=size,
        speed_px=speed_px,
        off_axis=off_axis,
        saturation=saturation,
        contrast=colour.norm(dim=-1),
        jitter=jitter,
        psnr=psnr,
        explained=explained,
        valid=explained >= MIN_EXPLAINED,
        seam_excess=_seam_excess(centres, step, starts[1:]),
        pixels=video[:, :: max(1, video.shape[1] // 2), 2::4, 2::4].flatten(1),
        **_appearance_by_chunk(shown, alpha, by_frame, weight, background, starts),
        **_motion_by_chunk(centres, starts),
    )


def _motion(step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Steps [..., 2] as speed in pixels, direction (index), and degrees off that direction."""
    along_headings = step @ HEADINGS.to(step).T
    ahead, direction = along_headings.max(dim=-1)
    aside = (step.square().sum(dim=-1) - ahead.square()).clamp_min(0).sqrt()
    return step.norm(dim=-1), direction, torch.rad2deg(torch.atan2(aside, ahead))


def _motion_by_chunk(centres: Tensor, starts: Sequence[int]) -> dict[str, Tensor]:
    """Speed, direction and the jumps at seams, by a straight track through each chunk."""
    steps = []
    jumps = []
    leads_to = None
    for part in centres.tensor_split(list(starts[1:]), dim=1):
        start, step, _ = fit_line(part)
        if leads_to is not None:
            jumps.append((start - leads_to).norm(dim=-1))
        leads_to = start + part.shape[1] * step
        steps.append(step)
    speed, direction, _ = _motion(torch.stack(steps, dim=1))
    none = centres.new_zeros(len(centres), 0)
    return {
        "speed_by_chunk": speed,
        "direction_by_chunk": direction,
        "seam_jumps": torch.stack(jumps, dim=1) if jumps else none,
    }


def _appearance_by_chunk(
    shown: Tensor,
    alpha: Tensor,
    by_frame: Tensor,
    weight: Tensor,
    background: Tensor,
    starts: Sequence[int],
) -> dict[str, Tensor]:
    """Colour of every chunk, and whether the shape at its measured place explains the chunk.

    alpha: coverage [B, T, pixels] at the measured centres.
    """
    columns: dict[str, list[Tensor]] = {
        "hue_by_chunk": [],
        "saturation_by_chunk": [],
        "contrast_by_chunk": [],
        "valid_by_chunk": [],
    }
    for start, end in itertools.pairwise([*starts, shown.shape[1]]):
        chunk = slice(start, end)
        colour = _weighted(by_frame[:, chunk], weight[:, chunk])
        hue, saturation = hue_and_saturation(background + colour)
        sparse = slice(start, end, _STRIDE)
        _, explained = _explain(shown[:, sparse], alpha[:, sparse], colour)
        columns["hue_by_chunk"].append(hue)
        columns["saturation_by_chunk"].append(saturation)
        columns["contrast_by_chunk"].append(colour.norm(dim=-1))
        columns["valid_by_chunk"].append(explained >= MIN_EXPLAINED)
    return {name: torch.stack(values, dim=1) for name, values in columns.items()}


def _provisional_colour(shown: Tensor) -> Tensor:
    """Colour over the background [B, 3].

    It is the median over video frames of the mean of each one's farthest pixels.
    """
    farthest = shown.square().sum(dim=-1).topk(_NUM_FARTHEST, dim=-1, sorted=False).indices
    return (
        shown.gather(2, farthest[..., None].expand(-1, -1, -1, 3)).mean(dim=2).median(dim=1).values
    )


def _along(shown: Tensor, colour: Tensor) -> Tensor:
    """How far each pixel lies from the background (0) towards the colour (1), [B, T, pixels]."""
    unit = colour / colour.square().sum(dim=-1, keepdim=True).clamp_min(_TINY)
    return torch.einsum("btpc,bc->btp", shown, unit)


def centroids(along: Tensor) -> Tensor:
    """Circular centre of the shape, [B, T, 2] (x, y) in pixels, unwrapped in time.

    along: [B, T, pixels], 0 for the background and 1 for the shape.
    """
    alpha = along.clamp(0, 1.2).where(along > _FAINT, 0).unflatten(-1, (SIDE, SIDE))
    # over y for x, over x for y
    profiles = torch.stack([alpha.sum(dim=-2), alpha.sum(dim=-1)], dim=2)
    angles = 2 * math.pi * torch.arange(SIDE, device=along.device) / SIDE
    phase = torch.atan2(profiles @ angles.sin(), profiles @ angles.cos())
    turn = (phase.diff(dim=1) + math.pi) % (2 * math.pi) - math.pi
    phase = torch.cat([phase[:, :1], phase[:, :1] + turn.cumsum(dim=1)], dim=1)
    return phase * SIDE / (2 * math.pi) + 0.5


def fit_line(centres: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least-squares line through tracks [B, T, 2].

    Returns the centre at video frame 0 [B, 2], the step [B, 2] and the rms distance [B].
    """
    time = torch.arange(centres.shape[1], device=centres.device, dtype=centres.dtype)
    time = time - time.mean()
    mean = centres.mean(dim=1)
    spread = time.square().sum().clamp_min(_TINY)  # a single video frame has no step
    step = torch.einsum("t,btc->bc", time, centres - mean[:, None]) / spread
    residual = centres - mean[:, None] - time[:, None] * step[:, None]
    return mean + time[0] * step, step, residual.square().sum(dim=-1).mean(dim=-1).sqrt()


def _best_template(along: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and size [B] whose drawing at the measured centres explains most of `along`."""
    along = along[:, ::_STRIDE]
    centres = centres[:, ::_STRIDE]
    explained = []
    for shape in range(len(SHAPES)):
        for size in range(len(SIZES)):
            shapes, sizes = torch.tensor([shape, size], device=along.device)[:, None].expand(
                -1, len(along)
            )
            template = coverage(shapes, sizes, centres).flatten(2)
            match = (along * template).sum(dim=(1, 2))
            explained.append(match.clamp_min(0).square() / template.square().sum(dim=(1, 2)))
    best = torch.stack(explained, dim=-1).argmax(dim=-1)
    return best // len(SIZES), best % len(SIZES)


def _inside_colour(shown: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the pixels well inside the shape in each video frame.

    Returns the sum of their colours [B, T, 3] and of their coverage [B, T].
    """
    inside = (alpha >= _INSIDE).to(alpha)
    return torch.einsum("btp,btpc->btc", inside, shown), (inside * alpha).sum(dim=-1)


def _weighted(by_frame: Tensor, weight: Tensor) -> Tensor:
    """Colour over the background [B, 3] of a span of video frames."""
    return by_frame.sum(dim=1) / weight.sum(dim=1, keepdim=True).clamp_min(_TINY)


def _explain(shown: Tensor, alpha: Tensor, colour: Tensor) -> tuple[Tensor, Tensor]:
    """PSNR in dB and the explained part of clips.

    alpha: coverage [B, T, pixels] of the shape when drawn again; colour: [B, 3]. The small constant
    makes the explained part of a blank clip 0.
    """
    missed = (
        (shown - alpha[..., None] * colour[:, None, None]).square().sum(dim=-1).mean(dim=(1, 2))
    )
    drawn = alpha.square().mean(dim=(1, 2)) * colour.square().sum(dim=-1)
    psnr = -10 * torch.log10((missed / 3).clamp_min(1e-10))
    return psnr, 1 - (missed + _TINY) / (drawn + _TINY)


def hue_and_saturation(rgb: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest hue (index) and HSV saturation of colours [B, 3]."""
    red, green, blue = rgb.clamp(0, 1).unbind(dim=-1)
    angle = torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)
    hue = (angle / (2 * math.pi) * len(HUES)).round().long() % len(HUES)
    high = rgb.clamp(0, 1).amax(dim=-1)
    return hue, (high - rgb.clamp(0, 1).amin(dim=-1)) / high.clamp_min(_TINY)


def _seam_excess(centres: Tensor, step: Tensor, seams: list[int]) -> Tensor:
    """How much less even the motion is where chunks meet, pixels [B].

    It is the centre's departure from the mean step into a chunk's first latent frame, minus that
    into its later ones. Only first video frames of latent frames are compared, because a codec
    makes small steps between latent frames anywhere.
    """
    within = [frame for frame in range(1 + TIME, centres.shape[1], TIME) if frame not in seams]
    if not seams or not within:
        return torch.zeros_like(centres[:, 0, 0])
    # [B, T - 1]: the step into video frame t + 1
    departure = (centres.diff(dim=1) - step[:, None]).norm(dim=-1)
    into_seams, into_others = (
        departure[:, [frame - 1 for frame in frames]] for frames in (seams, within)
    )
    return into_seams.mean(dim=1) - into_others.mean(dim=1)
