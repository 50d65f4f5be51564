"""Stage `profile`: where a chunk's time goes on the device, kernel by kernel."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.record import Machine, Record
from benchmarks.gpu.timing import wait
from selfforcing_dfd.streaming.random_model import random_stream_model
from selfforcing_dfd.streaming.session import StreamModel, StreamSession, StreamSettings

WARM_CHUNKS = 6
MOST_KERNELS = 25
LONGEST_NAME = 100


def measure(record: Record) -> None:
    for way in ("plain", "compiled"):
        record.row(f"a chunk, {way}", partial(chunk_of, record.machine, way))


def model_of(machine: Machine) -> StreamModel:
    size = "wan-tiny" if machine.small else "wan1.3b"
    return random_stream_model(size, str(machine.device))


def chunk_of(machine: Machine, way: str) -> dict[str, Any]:
    """A chunk of the steady state: its kernels by their time, and the host's time to queue it."""
    torch._dynamo.reset()
    model = model_of(machine)
    if machine.on_gpu:
        model.student.set_attention("sdpa")
    if way == "compiled":
        model.compile(**machine.compiler())
    session = StreamSession(model, "a disc moves", StreamSettings())
    started = time.perf_counter()
    for _ in range(WARM_CHUNKS):
        session.next_chunk()
    wait(machine.device)
    warm_s = time.perf_counter() - started
    activities = [ProfilerActivity.CPU]
    if machine.on_gpu:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as result:
        session.next_chunk()
        wait(machine.device)
    return {"warm-up, s": warm_s, **summary(result.key_averages(), machine)}


def summary(events: Any, machine: Machine) -> dict[str, Any]:
    """Kernels on a GPU; on a CPU operators, by their own time."""
    ran = [event for event in events if event.device_type == DeviceType.CUDA]
    if not machine.on_gpu:
        ran = list(events)

    def own_ms(event: Any) -> float:
        time_us = event.self_device_time_total if machine.on_gpu else event.self_cpu_time_total
        return float(time_us) / 1000

    ran.sort(key=own_ms, reverse=True)
    launches = [event for event in events if "LaunchKernel" in event.key]
    longest = ran[:MOST_KERNELS]
    number = sum(event.count for event in ran)
    return {
        "kernels": number,
        "device ms": sum(map(own_ms, ran)),
        "launches on the host, ms": sum(each.self_cpu_time_total for each in launches) / 1000,
        "longest": [[each.key[:LONGEST_NAME], each.count, own_ms(each)] for each in longest],
    }
