"""The benchmark's arithmetic on raw samples. No clocks; rates are always a count over a time, never
a mean of rates.
"""

from __future__ import annotations

import statistics
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

MEGABYTE = 1e6


def percentile(samples: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest of the sorted samples; 0 is the smallest and 100
    the largest.

    Raises ValueError without samples, or for a percent outside [0, 100].
    """
    if not samples or not 0 <= percent <= 100:
        raise ValueError(
            f"percentile {percent} of {len(samples)} samples; want one sample at least and 0 to 100"
        )
    ordered = sorted(samples)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def summary(samples: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 and max."""
    return {
        **{f"p{percent}": percentile(samples, percent) for percent in (50, 95, 99)},
        "max": max(samples),
    }


def jitter(intervals: Sequence[float]) -> dict[str, float]:
    """How uneven intervals are: their standard deviation about the mean (of the samples, not an
    estimate), and the tail.
    """
    tail = percentile(intervals, 99) - percentile(intervals, 50)
    return {"std": statistics.pstdev(intervals), "p99_minus_p50": tail}


def frames_per_second(frames: Sequence[int], wall_s: float) -> float:
    """All video frames over the whole wall time in which they were made. Raises ValueError for no
    time.
    """
    if wall_s <= 0:
        raise ValueError(
            f"{sum(frames)} video frames in {wall_s} s; the wall time must be positive"
        )
    return sum(frames) / wall_s


def real_time_factor(playback_fps: float, fps: float) -> float:
    """Wall seconds for a second of video; below 1 is faster than playback."""
    return playback_fps / fps


@dataclass(frozen=True, slots=True)
class Playout:
    """How a player fares that shows frames at a fixed rate.

    miss_rate: fraction of video frames that are ready after their turn. min_buffer_ms: the smallest
    start-up delay with which none is; where a stream is slower than playback it grows with the
    stream's length.
    """

    miss_rate: float
    min_buffer_ms: float


def playout(
    ready_s: Sequence[float], frames: Sequence[int], playback_fps: float, buffer_chunks: float = 1
) -> Playout:
    """Chunk i of frames[i] video frames is ready as a whole at ready_s[i], any clock; the first one
    starts the player.

    Playback begins `buffer_chunks` chunks of playing time after that. One pass over the ready
    times.
    """
    delay_s = buffer_chunks * frames[0] / playback_fps
    shown, num_missed, longest = 0, 0, 0.0
    for ready, count in zip(ready_s, frames, strict=True):
        lateness = [ready - ready_s[0] - (shown + i) / playback_fps for i in range(count)]
        # a nanosecond: sums of floats are not exact
        num_missed += sum(late > delay_s + 1e-9 for late in lateness)
        longest = max(longest, *lateness)
        shown += count
    return Playout(num_missed / shown, 1000 * longest)


def growth_per_thousand(values: Sequence[float]) -> float:
    """Least-squares slope of values[i] over i, times 1,000. One value does not grow."""
    if len(values) < 2:
        return 0.0
    return 1000 * statistics.linear_regression(range(len(values)), values).slope


@dataclass(slots=True)
class Recording:
    """A run, chunk by chunk. Flat arrays, so that recording does not look like growth; stages are
    sums from `steady` on.
    """

    steady: int  # index of the first steady chunk, at least 1
    ready_s: array[float] = field(default_factory=lambda: array("d"))
    latency_ms: array[float] = field(default_factory=lambda: array("d"))
    first_frame_ms: array[float] = field(default_factory=lambda: array("d"))
    num_frames: array[int] = field(default_factory=lambda: array("q"))
    memory_bytes: array[int] = field(default_factory=lambda: array("q"))
    stages_ms: dict[str, float] = field(default_factory=dict)

    def add(
        self,
        ready_s: float,
        latency_ms: float,
        first_frame_ms: float,
        num_frames: int,
        memory_bytes: int,
    ) -> None:
        """The next chunk: when its last frame was ready, and how long its work took to its last and
        first frame.
        """
        self.ready_s.append(ready_s)
        self.latency_ms.append(latency_ms)
        self.first_frame_ms.append(first_frame_ms)
        self.num_frames.append(num_frames)
        self.memory_bytes.append(memory_bytes)

    def add_stages(self, stages_ms: dict[str, float]) -> None:
        """Times that became known with the newest chunk."""
        if len(self.ready_s) <= self.steady:
            return
        for name, value in stages_ms.items():
            self.stages_ms[name] = self.stages_ms.get(name, 0.0) + value

    @property
    def intervals_ms(self) -> list[float]:
        """Between the ready times of neighbouring chunks; the first is from the last chunk of the
        ramp.
        """
        times = self.ready_s[self.steady - 1 :]
        return [1000 * (after - before) for before, after in pairwise(times)]

    @property
    def wall_s(self) -> float:
        """The whole time in which the steady chunks were made."""
        return self.ready_s[-1] - self.ready_s[self.steady - 1]

    @property
    def fps(self) -> float:
        return frames_per_second(self.num_frames[self.steady :], self.wall_s)


def first_frames(cold: dict[str, Any], warm: list[dict[str, Any]]) -> dict[str, Any]:
    """The cold start, and the warm one whose time to the first frame is the median of the trials
    (of two, the faster).
    """
    middle = sorted(warm, key=lambda trial: trial["ttff_ms"])[(len(warm) - 1) // 2]
    of_each = {
        f"{name}_{kind}_ms": trial[f"{name}_ms"]
        for kind, trial in (("cold", cold), ("warm", middle))
        for name in ("ttff", "ttfc", "ttff_split")
    }
    return {**of_each, "ttff_warm_trials_ms": [trial["ttff_ms"] for trial in warm]}


def steady_state(recording: Recording, playback_fps: float, buffer_chunks: float) -> dict[str, Any]:
    """Latency, pace and memory of the steady chunks."""
    steady, intervals = recording.steady, recording.intervals_ms
    frames = recording.num_frames[steady:]
    shown = playout(recording.ready_s[steady:], frames, playback_fps, buffer_chunks)
    return {
        "chunk_latency_ms": summary(recording.latency_ms[steady:]),
        "first_frame_in_chunk_ms": summary(recording.first_frame_ms[steady:]),
        "chunk_interval_ms": summary(intervals),
        "frame_latency_ms": summary(
            [interval / n for interval, n in zip(intervals, frames, strict=True)]
        ),
        "jitter_ms": jitter(intervals),
        "steady_fps_with_vae": recording.fps,
        "playback_fps": playback_fps,
        "rtf": real_time_factor(playback_fps, recording.fps),
        "deadline_miss_rate": shown.miss_rate,
        "deadline_buffer_chunks": buffer_chunks,
        "min_buffer_ms": shown.min_buffer_ms,
        "mem_growth_mb_per_1k_chunks": growth_per_thousand(recording.memory_bytes[steady:])
        / MEGABYTE,
    }


def stage_breakdown(recording: Recording) -> dict[str, float]:
    """Mean milliseconds of a steady chunk, by stage; they add up to the mean time between chunks.

    denoise_rest is what denoising takes beside the network's calls (ring, sigma algebra),
    commit_rest likewise, and convert_and_copy what follows the VAE (uint8, copy to the host).
    unattributed is time outside of all stages; it is negative where stages overlap.
    """
    num_chunks, stages = len(recording.intervals_ms), recording.stages_ms
    mean = {name: total / num_chunks for name, total in stages.items()}
    steps = {
        name: mean[name] for name in sorted(mean) if name.startswith(("dit_step_", "merged_step"))
    }
    vae, commit_pass = (
        mean.get("vae", 0.0) + mean.get("vae_first", 0.0),
        mean.get("commit_pass", 0.0),
    )
    parts = {
        "text": mean.get("text", 0.0),
        "noise": mean.get("noise", 0.0),
        **steps,
        "denoise_rest": mean.get("denoise", 0.0) - sum(steps.values()),
        "commit_pass": commit_pass,
        "commit_rest": mean.get("commit", 0.0) - commit_pass,
        "vae_decode": vae,
        "convert_and_copy": mean.get("decode", 0.0) - vae,
    }
    wall = 1000 * recording.wall_s / num_chunks
    return {**parts, "unattributed": wall - sum(parts.values()), "wall": wall}
