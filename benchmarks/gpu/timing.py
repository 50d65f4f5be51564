"""How long a call takes on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

REPEATS = 20
WARM = 4
CPU_REPEATS = 2
CPU_WARM = 1


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
    return statistics.median(one_call(call, device) for _ in range(repeats))


def one_call(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - started)
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    elapsed: float = begin.elapsed_time(end)
    return elapsed


def rate(flops: float, ms: float) -> dict[str, float]:
    """Milliseconds and TFLOP/s of a call of so many operations."""
    return {"ms": round(ms, 4), "tflops_per_s": round(flops / ms / 1e9, 2)}


def peak_gb(device: torch.device) -> float | None:
    """What torch had allocated of a GPU at most since the last `forget_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
