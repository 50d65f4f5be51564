"""The stages of a day on a GPU, in the order in which they are worth most."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.gpu import decoders, kernels, probe, profiles, streams, training, unit
from benchmarks.gpu.record import Record

STAGES: dict[str, Callable[[Record], None]] = {
    "probe": probe.measure,
    "tests": unit.measure,
    **{name: streams.stage_of(name) for name in ("stream-plain", "stream-compile")},
    "decoder": decoders.measure,
    "kernels": kernels.measure,
    "profile": profiles.measure,
    "train": training.measure,
    "train-compile": training.measure_compiled,
    **{
        name: streams.stage_of(name)
        for name in streams.GROUPS
        if name not in ("stream-plain", "stream-compile")
    },
    "final": streams.final,
}
LIMIT_S = 540
"""A stage begins no row later than this, and ends running ones: a call may take ten minutes."""
