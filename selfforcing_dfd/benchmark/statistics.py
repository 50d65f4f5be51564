"""The benchmark's arithmetic on raw samples: no clocks. Rates are a count over a time."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from selfforcing_dfd.processes.processor import ProcessorTime

MEGABYTE = 1e6
NUM_PARTS = 10
"""Of the steady state: how far their paces are apart says how well the mean is known."""


def summary(samples: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99, interpolated between the nearest samples, and the maximum."""
    p50, p95, p99 = np.percentile(samples, (50, 95, 99)).tolist()
    return {"p50": p50, "p95": p95, "p99": p99, "max": max(samples)}


def jitter(intervals: Sequence[float]) -> dict[str, float]:
    """How uneven intervals are: standard deviation of the samples, and the tail."""
    tail = summary(intervals)
    return {"std": float(np.std(intervals)), "p99_minus_p50": tail["p99"] - tail["p50"]}


@dataclass(frozen=True, slots=True)
class Playout:
    """What a player sees that shows frames at a fixed rate.

    miss_rate: fraction of video frames that are ready after their turn. min_buffer_ms: the smallest
    start-up delay without a miss. It grows with the stream's length where the stream is slower than
    playback.
    """

    miss_rate: float
    min_buffer_ms: float


def playout(
    ready_s: Sequence[float], frames: Sequence[int], playback_fps: float, buffer_chunks: float = 1
) -> Playout:
    """Plays chunks of frames[i] video frames, each ready as a whole at ready_s[i] (any clock).

    Playback begins `buffer_chunks` chunks of playing time after the first chunk is ready.
    """
    delay_s = buffer_chunks * frames[0] / playback_fps
    shown = 0
    num_missed = 0
    longest = 0.0
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
    slope, _ = np.polyfit(np.arange(len(values)), values, deg=1)
    return 1000 * float(slope)


@dataclass(slots=True)
class Recording:
    """A run, chunk by chunk, in flat arrays, so that recording does not look like growth.

    stages_ms are sums from chunk `steady` on, and so is the processor's time.
    """

    steady: int  # index of the first steady chunk, at least 1
    ready_s: array[float] = field(default_factory=lambda: array("d"))
    latency_ms: array[float] = field(default_factory=lambda: array("d"))
    first_frame_ms: array[float] = field(default_factory=lambda: array("d"))
    num_frames: array[int] = field(default_factory=lambda: array("q"))
    memory_bytes: array[int] = field(default_factory=lambda: array("q"))
    stages_ms: dict[str, float] = field(default_factory=dict)
    processor: ProcessorTime | None = None

    def add(
        self,
        ready_s: float,
        latency_ms: float,
        first_frame_ms: float,
        num_frames: int,
        memory_bytes: int,
    ) -> None:
        """The next chunk: when its last frame was ready, and time to its last and first frame."""
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
        """Between ready times of neighbouring chunks; the first begins at the ramp's last chunk."""
        times = self.ready_s[self.steady - 1 :]
        return [1000 * (after - before) for before, after in pairwise(times)]

    @property
    def wall_s(self) -> float:
        """The whole time in which the steady chunks were made."""
        return self.ready_s[-1] - self.ready_s[self.steady - 1]

    @property
    def fps(self) -> float:
        """Video frames of the steady chunks over the wall time in which they were made."""
        return sum(self.num_frames[self.steady :]) / self.wall_s


def first_frames(
    cold: dict[str, Any], warm: list[dict[str, Any]], cached: list[dict[str, Any]]
) -> dict[str, Any]:
    """The cold start, and the warm starts with the median time from the prompt to the first frame.

    warm: the text encoder runs. cached: the prompt's text is known.
    """
    result: dict[str, Any] = {}
    for kind, trial in (("cold", cold), ("warm", middle(warm)), ("cached", middle(cached))):
        for name in ("ttff", "ttfc", "ttff_split"):
            result[f"{name}_{kind}_ms"] = trial[f"{name}_ms"]
    return {**result, "ttff_warm_trials_ms": [trial["ttff_ms"] for trial in warm]}


def middle(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """The trial with the median time to the first frame."""
    return sorted(trials, key=lambda trial: trial["ttff_ms"])[(len(trials) - 1) // 2]


def steady_state(recording: Recording, playback_fps: float, buffer_chunks: float) -> dict[str, Any]:
    """Latency, pace and memory of the steady chunks."""
    steady = recording.steady
    intervals = recording.intervals_ms
    frames = recording.num_frames[steady:]
    shown = playout(recording.ready_s[steady:], frames, playback_fps, buffer_chunks)
    per_frame = [interval / n for interval, n in zip(intervals, frames, strict=True)]
    growth = growth_per_thousand(recording.memory_bytes[steady:]) / MEGABYTE
    return {
        "chunk_latency_ms": summary(recording.latency_ms[steady:]),
        "first_frame_in_chunk_ms": summary(recording.first_frame_ms[steady:]),
        "chunk_interval_ms": summary(intervals),
        "frame_latency_ms": summary(per_frame),
        "jitter_ms": jitter(intervals),
        "steady_fps_with_vae": recording.fps,
        "playback_fps": playback_fps,
        # wall seconds for a second of video: below 1 is faster than playback
        "rtf": playback_fps / recording.fps,
        "deadline_miss_rate": shown.miss_rate,
        "deadline_buffer_chunks": buffer_chunks,
        "min_buffer_ms": shown.min_buffer_ms,
        "mem_growth_mb_per_1k_chunks": growth,
    }


def certainty(recording: Recording) -> dict[str, Any]:
    """How well the pace is known.

    interval_parts_ms: mean intervals of the steady state's parts, in order; neighbouring chunks are
    slow together, so the spread of single ones says too little. processor_ms_per_frame: time of all
    threads for a video frame. waited_share: of the time the run was ready and had no core.
    """
    intervals = recording.intervals_ms
    parts = np.array_split(intervals, min(NUM_PARTS, len(intervals)))
    found: dict[str, Any] = {
        "interval_parts_ms": [float(part.mean()) for part in parts],
        "processor_ms_per_frame": None,
        "waited_share": None,
    }
    took = recording.processor
    if took is not None:
        num_frames = sum(recording.num_frames[recording.steady :])
        found["processor_ms_per_frame"] = 1000 * took.busy_s / num_frames
        found["waited_share"] = took.waited_share
    return found


def stage_breakdown(recording: Recording) -> dict[str, float]:
    """Mean milliseconds of a steady chunk, by stage; they add up to the mean time between chunks.

    denoise_rest: denoising without the network's calls (ring, sigma algebra); commit_rest likewise.
    convert_and_copy: what follows the VAE (uint8, copy to the host). unattributed: time outside of
    all stages; negative where stages overlap.
    """
    num_chunks = len(recording.intervals_ms)
    mean = {name: total / num_chunks for name, total in recording.stages_ms.items()}
    steps = {name: mean[name] for name in sorted(mean) if name.startswith("dit_step_")}
    vae = mean.get("vae", 0.0) + mean.get("vae_first", 0.0)
    commit_pass = mean.get("commit_pass", 0.0)
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
