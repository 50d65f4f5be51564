"""The stages of a day on a GPU, in the order in which they are worth most."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.gpu import decoders, kernels, probe, profiles, streams, training, unit
from benchmarks.gpu.record import Record

STAGES: dict[str, Callable[[Record], None]] = {
    "probe": probe.measure,
    "stream-goals": streams.stage_of("stream-goals"),
    "tests": unit.measure,
    "kernels": kernels.measure,
    "train": training.measure,
    "decoder": decoders.measure,
    "profile": profiles.measure,
    "stream-more": streams.stage_of("stream-more"),
    "stream-flash": streams.stage_of("stream-flash"),
    "train-compile": training.measure_compiled,
    "final": streams.final,
}
LIMIT_S = 540
"""A stage begins no row later than this, and ends running ones: a call may take ten minutes."""
