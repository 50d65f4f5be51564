"""The follow test: does a clip go on as its real first chunk began?

Each generated clip begins with the first chunk of a real one. A student that only copies what it
sees, and moves at its own habitual speed in its own direction, looks well in free samples; here it
fails. All shares are of all clips, so a chunk that shows nothing valid has not followed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selfforcing_dfd.tiny.bootstrap import Resamples, Score
from selfforcing_dfd.tiny.readout import MIN_SPEED, Reading
from selfforcing_dfd.tiny.world import SPEEDS

# how far a chunk's speed may be off, as a share of the real one's; the classes are a factor 2 apart
SPEED_TOLERANCE = 0.25


def compare_with_real(generated: Reading, real: Reading, seed: int = 0) -> dict[str, Score]:
    """Scores of clips whose first chunk is real, against the real clips they were taken from.

    Both are read with the same chunks and go through the same codec. seed: of the bootstrap.

    follow: share of later chunks that go on: valid, in the real direction and hue, at the real
    speed within SPEED_TOLERANCE. follow_direction, follow_hue: shares of later chunks.
    follow_speed: mean generated speed / mean real speed, over valid later chunks;
    follow_speed_slowly and so on: of one class of real speed. follow_jump_px: pixels from where the
    chunk before leads to where a chunk begins. An ending _1, _2 and so on: of that chunk alone.
    Raises ValueError for unequal sets and for clips of a single chunk.
    """
    if generated.speed_by_chunk.shape != real.speed_by_chunk.shape:
        raise ValueError(
            f"generated clips and chunks are {list(generated.speed_by_chunk.shape)}, real ones "
            f"{list(real.speed_by_chunk.shape)}; read the same clips with the same chunks"
        )
    num_clips, num_chunks = real.speed_by_chunk.shape
    if num_chunks < 2:
        raise ValueError("clips of a single chunk have nothing that follows; use longer ones")
    every = Resamples.draw(num_clips, seed)
    scores = _scores(generated, real, slice(1, None), every, "")
    for speed, name in enumerate(SPEEDS):
        of_class = every.only(real.speed.cpu() == speed)
        ratio = _speed_ratio(generated, real, slice(1, None), of_class)
        scores[f"follow_speed_{name}"] = ratio
    for chunk in range(1, num_chunks):
        scores |= _scores(generated, real, slice(chunk, chunk + 1), every, f"_{chunk}")
    return scores


def _scores(
    generated: Reading, real: Reading, chunks: slice, every: Resamples, ending: str
) -> dict[str, Score]:
    """The scores over these chunks, all of them later ones."""
    valid = generated.valid_by_chunk[:, chunks]
    speed = generated.speed_by_chunk[:, chunks]
    real_speed = real.speed_by_chunk[:, chunks]
    moves = valid & (speed >= MIN_SPEED)
    direction = moves & (generated.direction_by_chunk[:, chunks] == real.direction[:, None])
    hue = valid & (generated.hue_by_chunk[:, chunks] == real.hue[:, None])
    in_step = (speed - real_speed).abs() <= SPEED_TOLERANCE * real_speed
    first = chunks.start - 1
    last = None if chunks.stop is None else chunks.stop - 1
    jumps = generated.seam_jumps[:, first:last]
    return {
        f"follow{ending}": _share(direction & hue & in_step, every),
        f"follow_direction{ending}": _share(direction, every),
        f"follow_hue{ending}": _share(hue, every),
        f"follow_speed{ending}": _speed_ratio(generated, real, chunks, every),
        f"follow_jump_px{ending}": every.score(every.mean(jumps.mean(dim=1).cpu()), 0),
    }


def _share(which: Tensor, every: Resamples) -> Score:
    return every.score(every.mean(which.double().mean(dim=1).cpu()), 0, 1)


def _speed_ratio(generated: Reading, real: Reading, chunks: slice, clips: Resamples) -> Score:
    """Mean generated speed over mean real speed, of the valid chunks of these clips."""
    valid = generated.valid_by_chunk[:, chunks]
    sums = []
    for reading in (generated, real):
        speed = torch.where(valid, reading.speed_by_chunk[:, chunks], 0)
        sums.append(clips.counts @ speed.double().sum(dim=1).cpu())
    return clips.score(sums[0] / sums[1], 0)
