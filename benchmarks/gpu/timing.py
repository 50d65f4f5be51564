"""How long a call takes on a device."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch

REPEATS = 20
WARM = 4
CPU_REPEATS = 2
CPU_WARM = 1
CACHE_BYTES = 256 * 2**20
"""Several times a GPU's L2 cache. A stream reads its weights and its past from memory, so a call
that finds them in the cache would look faster than it is."""


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(
    call: Callable[[], object], device: torch.device, repeats: int = REPEATS, warm: int = WARM
) -> float:
    """The median of single calls after some that warm up; by events in the queue on a GPU."""
    if device.type != "cuda":
        repeats = CPU_REPEATS
        warm = CPU_WARM
    for _ in range(warm):
        call()
    wait(device)
    if device.type != "cuda":
        return statistics.median(one_call(call) for _ in range(repeats))
    return statistics.median(queued_calls(call, device, repeats))


def one_call(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)


def queued_calls(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Milliseconds of calls that are queued behind one another, with an empty cache before each.

    Emptying it takes the device longer than most calls take the host, and nothing waits before the
    last call. So the device does not idle between a call's two events, which would count the host's
    time in it as the device's.
    """
    cache = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device)
    marks = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
    for begin, end in marks:
        cache.zero_()
        begin.record()
        call()
        end.record()
    wait(device)
    return [begin.elapsed_time(end) for begin, end in marks]


def rate(flops: float, ms: float) -> dict[str, float]:
    """Milliseconds and TFLOP/s of a call of so many operations."""
    return {"ms": round(ms, 4), "tflops_per_s": round(flops / ms / 1e9, 2)}


def peak_gb(device: torch.device) -> float | None:
    """What torch had allocated of a GPU at most since the last `forget_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def forget_peak(device: torch.device) -> None:
    """Also give back what an earlier measurement left behind."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
