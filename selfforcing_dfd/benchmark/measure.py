"""Runs a stream and times it.

A frame is ready when it is uint8 in host memory. Times between frames are taken by the host's
clock, times on the device by events in its queue, so measuring makes nothing wait. Statistics are
of the steady state: chunks that see a full window and sink, after a first run with every shape. The
ramp before it is reported as well.
"""

from __future__ import annotations

import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from selfforcing_dfd import rng
from selfforcing_dfd.benchmark.flops import ChunkFlops, chunk_flops, utilisation
from selfforcing_dfd.benchmark.statistics import (
    Recording,
    certainty,
    first_frames,
    stage_breakdown,
    steady_state,
    summary,
)
from selfforcing_dfd.benchmark.timed import NoCodec, TimedCodec, timed_calls
from selfforcing_dfd.codecs.text_ahead import TextAhead
from selfforcing_dfd.common import UserError, peak_resident_bytes, resident_bytes
from selfforcing_dfd.models.attention_choice import wait_for
from selfforcing_dfd.processes.processor import processor_time
from selfforcing_dfd.streaming.latency import StageClock
from selfforcing_dfd.streaming.session import StreamModel, StreamSession, StreamSettings

NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    num_chunks: of the steady state; a p99 needs 200 and more. num_warmup: chunks of the first run,
    at least one more than the ramp. num_restarts: new streams for the warm time to the first frame.
    num_checked: chunks that are watched for device syncs and kernels, apart from the timing.
    Raises UserError for counts and rates that measure nothing.
    """

    num_chunks: int = 300
    num_warmup: int = 10
    num_restarts: int = 5
    num_prompt_trials: int = 20
    num_checked: int = 5
    playback_fps: float = 16.0
    buffer_chunks: float = 1.0
    peak_tflops: float | None = None
    dit_only: bool = False

    def __post_init__(self) -> None:
        counts = {"num_chunks": self.num_chunks, "num_restarts": self.num_restarts}
        for name, value in counts.items():
            if value < 1:
                raise UserError(f"{name} is {value}; at least 1 must be measured")
        if self.num_warmup < 0 or self.num_prompt_trials < 0:
            raise UserError(
                f"num_warmup is {self.num_warmup} and num_prompt_trials {self.num_prompt_trials}; "
                "want 0 or more"
            )
        if not self.playback_fps > 0:
            raise UserError(
                f"playback_fps is {self.playback_fps}; fps must be positive, such as 16"
            )


@dataclass(slots=True)
class Bench:
    """One session of a model whose decoder and calls are timed."""

    model: StreamModel
    settings: StreamSettings
    prompts: tuple[str, str]
    plan: Plan
    # of the student's device, of the codec's
    clocks: tuple[StageClock, StageClock] = field(init=False)
    text: TextAhead = field(init=False)

    def __post_init__(self) -> None:
        self.text = TextAhead(self.model.text)
        decode_device = self.model.decode_device or self.model.device
        self.clocks = (StageClock(self.model.device), StageClock(decode_device))

    @property
    def ramp(self) -> int:
        """Chunks before the first one that overwrites another."""
        return (self.settings.sink_frames + self.settings.window_frames) // self.model.chunk_frames

    def start(self) -> tuple[StreamSession, dict[str, Any]]:
        """A session and its first chunk, timed from the call that makes it."""
        started = time.perf_counter()
        codec = TimedCodec(self.model.codec, self.clocks[1])
        model = replace(self.model, codec=codec, text=self.text)
        session = StreamSession(model, self.prompts[0], self.settings, model.grey())
        return session, self._first_frame(session, started)

    def restart(self, session: StreamSession, prompt: str) -> dict[str, Any]:
        """A new stream's first chunk, on a device that has done what the one before left it."""
        wait_for(self.model.device)  # its commit pass goes on after its frames have come
        started = time.perf_counter()
        session.reset(prompt)
        return self._first_frame(session, started)

    def restarts(self, session: StreamSession) -> dict[str, Any]:
        """Warm first frames of new streams: their text encoded, and then known already."""
        encoded = [
            self.restart(session, self.prompts[i % 2]) for i in range(self.plan.num_restarts)
        ]
        self.text.prefetch(self.prompts)
        known = [self.restart(session, self.prompts[i % 2]) for i in range(self.plan.num_restarts)]
        self.text.known.clear()
        return {"warm": encoded, "cached": known}

    def _first_frame(self, session: StreamSession, started: float) -> dict[str, Any]:
        self._take()
        before_ms = 1000 * (time.perf_counter() - started)
        chunk = session.next_chunk()
        stages = chunk.timings.stages_ms | self._take()
        total = before_ms + chunk.timings.first_frame_ms
        split = {
            "text": stages.get("text", 0.0),
            "noise": stages.get("noise", 0.0),
            "dit": stages.get("denoise", 0.0),
            "vae": stages.get("vae_first", 0.0),
        }
        split["copy_and_rest"] = total - sum(split.values())
        return {
            "ttff_ms": total,
            "ttfc_ms": before_ms + chunk.timings.total_ms,
            "ttff_split_ms": split,
        }

    def run(self, session: StreamSession, num_chunks: int) -> Recording:
        """Record the ramp and then num_chunks steady chunks."""
        recording = Recording(max(self.ramp - session.chunk_index, 1))
        begun = processor_time()
        for number in range(recording.steady + num_chunks):
            if number == recording.steady:
                begun = processor_time()
            chunk = session.next_chunk()
            ready = time.perf_counter()
            recording.add(
                ready,
                chunk.timings.total_ms,
                chunk.timings.first_frame_ms,
                chunk.frames.shape[0],
                memory_now(self.model.device),
            )
            recording.add_stages(chunk.timings.stages_ms | self._take())
        recording.processor = processor_time() - begun
        return recording

    def prompt_to_photon_ms(self, session: StreamSession) -> list[float]:
        """Latency from a prompt at a random moment of a chunk to the first frame made under it.

        Prompts change at chunk boundaries, so the latency is the rest of the running chunk,
        `set_prompt`, and the next chunk to its first frame.
        """
        shape = (self.plan.num_prompt_trials,)
        phases = rng.uniform(shape, self.settings.seed, "moment of a wish").tolist()
        waits = []
        for trial, phase in enumerate(phases):
            started = time.perf_counter()
            session.next_chunk()
            wished = started + phase * (time.perf_counter() - started)
            session.set_prompt(self.prompts[(trial + 1) % 2])
            waited = time.perf_counter() - wished
            waits.append(1000 * waited + session.next_chunk().timings.first_frame_ms)
        return waits

    def _take(self) -> dict[str, float]:
        one, other = (clock.take() for clock in self.clocks)
        return one | other


def measure(
    model: StreamModel, settings: StreamSettings, prompts: tuple[str, str], plan: Plan
) -> dict[str, Any]:
    """All figures of the benchmark, as plain numbers for JSON; None is what was not measured.

    The peak of a GPU's memory counts from here, so it includes weights but not what loading them
    needed. A cold start is one only in the first call of a process.
    """
    device = model.device
    used_before = device_used(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    bench = Bench(model, settings, prompts, plan)
    calls: AbstractContextManager[None] = nullcontext()
    if model.calls != "graph":  # a replayed graph calls no module, and must not hold our marks
        calls = timed_calls(model.student, bench.clocks[0], model.ladder, model.first_ladder)
    with calls:
        session, cold = bench.start()
        for _ in range(max(plan.num_warmup, bench.ramp + 1)):
            session.next_chunk()
        starts = bench.restarts(session)
        session.reset(prompts[0])
        recording = bench.run(session, plan.num_chunks)
        waits = bench.prompt_to_photon_ms(session)
    checks = watched_chunks(session, plan.num_checked)
    flops = chunk_flops(model, settings, model.text.encode([prompts[0]]).shape[1])
    return {
        "num_steady_chunks": plan.num_chunks,
        **first_frames(cold, **starts),
        **steady_state(recording, plan.playback_fps, plan.buffer_chunks),
        **certainty(recording),
        "prompt_to_photon_ms": {"trials": len(waits), "mode": settings.on_prompt, **summary(waits)}
        if waits
        else None,
        "peak_memory_bytes": peak_memory(device, used_before),
        **checks,
        **work_done(recording, flops, plan),
        "stages_ms": stage_breakdown(recording),
        "ramp_latency_ms": list(recording.latency_ms[: bench.ramp + 3]),
        **separate_runs(model, settings, prompts, plan, recording),
    }


def work_done(recording: Recording, flops: ChunkFlops, plan: Plan) -> dict[str, Any]:
    """Operations of a steady chunk, and their rates: by the wall clock, and by stage."""
    num_chunks = len(recording.intervals_ms)
    stages = recording.stages_ms
    dit_ms = (stages.get("denoise", 0.0) + stages.get("commit", 0.0)) / num_chunks
    vae_ms = (stages.get("vae", 0.0) + stages.get("vae_first", 0.0)) / num_chunks
    frames_per_chunk = sum(recording.num_frames[recording.steady :]) / num_chunks
    return {
        "dit_only_fps": 1000 * frames_per_chunk / dit_ms,
        "flops_per_chunk": flops.as_dict(),
        "peak_tflops": plan.peak_tflops,
        "utilisation": {
            "chunk": utilisation(
                flops.total, 1000 * recording.wall_s / num_chunks, plan.peak_tflops
            ),
            "dit": utilisation(flops.dit, dit_ms, plan.peak_tflops),
            "vae": utilisation(flops.decode, vae_ms, plan.peak_tflops),
        },
    }


def separate_runs(
    model: StreamModel,
    settings: StreamSettings,
    prompts: tuple[str, str],
    plan: Plan,
    recording: Recording,
) -> dict[str, Any]:
    """Figures of a stream that decodes nothing, where the plan asks for it.

    decode_exposed_ms: how much shorter the time between chunks is without decoding.
    """
    results: dict[str, Any] = {"dit_only_pass_fps": None, "decode_exposed_ms": None}
    if plan.dit_only:
        bare = Bench(replace(model, codec=NoCodec(model.codec)), settings, prompts, plan)
        alone = bare.run(bare.start()[0], plan.num_chunks)
        results["dit_only_pass_fps"] = alone.fps
        results["decode_exposed_ms"] = 1000 * (recording.wall_s - alone.wall_s) / plan.num_chunks
    return results


def watched_chunks(session: StreamSession, num_chunks: int) -> dict[str, Any]:
    """Waits for the device, kernels, and the host's time in launching them, for each chunk."""
    if session.model.device.type != "cuda":
        return dict.fromkeys(
            ("syncs_per_chunk", "kernels_per_chunk", "cpu_launch_ms"), NOT_APPLICABLE
        )
    torch.cuda.synchronize(session.model.device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(num_chunks):
                session.next_chunk()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    num_syncs = sum("synchroniz" in str(warning.message) for warning in caught)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as result:
        session.next_chunk()
        torch.cuda.synchronize(session.model.device)
    events = result.key_averages()
    launches = [event for event in events if "LaunchKernel" in event.key]
    return {
        "syncs_per_chunk": num_syncs / num_chunks,
        "kernels_per_chunk": sum(
            event.count for event in events if event.device_type == DeviceType.CUDA
        ),
        "cpu_launch_ms": sum(event.self_cpu_time_total for event in launches) / 1000,
    }


def memory_now(device: torch.device) -> int:
    """Bytes in use: allocated on a GPU, resident on a CPU. Does not wait for the device."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def peak_memory(device: torch.device, used_before: int) -> dict[str, int]:
    """Bytes. device_used_growth: what any process has taken of the device since the start."""
    if device.type != "cuda":
        return {"resident": peak_resident_bytes()}
    return {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
        "device_used_growth": device_used(device) - used_before,
    }


def device_used(device: torch.device) -> int:
    """Bytes of a GPU that are in use by any process."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free
