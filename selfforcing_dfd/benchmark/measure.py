"""Runs a stream and times it. What is measured, in which order, and what each figure means.

A frame is ready when it is uint8 in host memory. Times between frames are the host's clock; times
on the device are events on its own queue, so nothing waits for the sake of being measured.
Statistics are of the steady state: chunks that see a full window and sink, after a first run has
gone through every shape. That ramp is reported beside them.
"""

from __future__ import annotations

import resource
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from selfforcing_dfd import rng
from selfforcing_dfd.benchmark.flops import ChunkFlops, chunk_flops, utilisation
from selfforcing_dfd.benchmark.statistics import (
    Recording,
    first_frames,
    stage_breakdown,
    steady_state,
    summary,
)
from selfforcing_dfd.codecs.protocol import Decoder, Encoder, StreamingCodec
from selfforcing_dfd.rollout import Ladder
from selfforcing_dfd.streaming.latency import StageClock
from selfforcing_dfd.streaming.session import StreamModel, StreamSession, StreamSettings

NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured. num_chunks: of the steady state; 200 and more for a p99 that means
    something.

    num_warmup: chunks of the first run, at least one more than the ramp; num_restarts: new streams
    for the warm time to the first frame; num_checked: chunks that are watched for device syncs and
    kernels, apart from the timing.
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
        for name, value in (("num_chunks", self.num_chunks), ("num_restarts", self.num_restarts)):
            if value < 1:
                raise ValueError(f"{name} is {value}; at least 1 must be measured")
        if self.num_warmup < 0 or self.num_prompt_trials < 0 or self.playback_fps <= 0:
            raise ValueError(
                f"num_warmup {self.num_warmup}, num_prompt_trials {self.num_prompt_trials}, playback_fps "
                f"{self.playback_fps}; counts must not be negative and fps must be positive"
            )


@dataclass(slots=True)
class TimedDecoder:
    """A decoder whose calls are stages of a clock: `vae_first` for a video's first one, then `vae`."""

    decoder: Decoder
    clock: StageClock
    begun: bool = False

    def decode(self, latents: Tensor) -> Tensor:
        name, self.begun = "vae" if self.begun else "vae_first", True
        with self.clock.stage(name):
            return self.decoder.decode(latents)

    def clone(self) -> TimedDecoder:
        return TimedDecoder(self.decoder.clone(), self.clock, self.begun)


@dataclass(frozen=True, slots=True)
class TimedCodec:
    """A codec whose decoders are timed."""

    codec: StreamingCodec
    clock: StageClock

    @property
    def channels(self) -> int:
        return self.codec.channels

    @property
    def strides(self) -> tuple[int, int, int]:
        return self.codec.strides

    def start_decoding(self) -> Decoder:
        return TimedDecoder(self.codec.start_decoding(), self.clock)

    def start_encoding(self) -> Encoder:
        return self.codec.start_encoding()


@dataclass(frozen=True, slots=True)
class NoDecoder:
    """Frames of one pixel without any work: what is left of a chunk is the DiT."""

    time_stride: int

    def decode(self, latents: Tensor) -> Tensor:
        return latents.new_zeros(latents.shape[0], latents.shape[1] * self.time_stride, 1, 1, 3)

    def clone(self) -> NoDecoder:
        return self


@dataclass(frozen=True, slots=True)
class NoCodec:
    """A codec that decodes nothing."""

    codec: StreamingCodec

    @property
    def channels(self) -> int:
        return self.codec.channels

    @property
    def strides(self) -> tuple[int, int, int]:
        return self.codec.strides

    def start_decoding(self) -> Decoder:
        return NoDecoder(self.strides[0])

    def start_encoding(self) -> Encoder:
        return self.codec.start_encoding()


@contextmanager
def timed_calls(student: nn.Module, clock: StageClock, ladder: Ladder) -> Iterator[None]:
    """Each call of the student is a stage while this lasts: `dit_step_1` and so on, `commit_pass`,
    or `merged_step`.
    """
    running: list[AbstractContextManager[None]] = []

    def begin(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        stage = clock.stage(call_name(inputs[1], ladder))
        stage.__enter__()
        running.append(stage)

    def end(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        running.pop().__exit__(None, None, None)

    hooks = (student.register_forward_pre_hook(begin), student.register_forward_hook(end))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def call_name(sigma: Tensor | float, ladder: Ladder) -> str:
    """Sigma is a tensor only where clean and noisy latent frames go through the network together."""
    if isinstance(sigma, Tensor):
        return "merged_step"
    return f"dit_step_{ladder.index(sigma) + 1}" if sigma in ladder else "commit_pass"


@dataclass(slots=True)
class Bench:
    """One session of a model whose decoder and calls are timed."""

    model: StreamModel
    settings: StreamSettings
    prompts: tuple[str, str]
    plan: Plan
    # of the student's device, of the codec's
    clocks: tuple[StageClock, StageClock] = field(init=False)

    def __post_init__(self) -> None:
        decode_device = self.model.decode_device or self.model.device
        self.clocks = (StageClock(self.model.device), StageClock(decode_device))

    @property
    def ramp(self) -> int:
        """Chunks before the first that must forget one."""
        return (self.settings.sink_frames + self.settings.window_frames) // self.model.chunk_frames

    def start(self) -> tuple[StreamSession, dict[str, Any]]:
        """A session and its first chunk, timed from the call that makes it."""
        begun = time.perf_counter()
        model = replace(self.model, codec=TimedCodec(self.model.codec, self.clocks[1]))
        session = StreamSession(model, self.prompts[0], self.settings)
        return session, self._first_frame(session, begun)

    def restart(self, session: StreamSession, prompt: str) -> dict[str, Any]:
        begun = time.perf_counter()
        session.reset(prompt)
        return self._first_frame(session, begun)

    def _first_frame(self, session: StreamSession, begun: float) -> dict[str, Any]:
        self._take()
        before_ms = 1000 * (time.perf_counter() - begun)
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
        """The next chunks of a session, all counted as steady but those of its ramp."""
        recording = Recording(max(self.ramp - session.chunk_index, 1))
        for _ in range(recording.steady + num_chunks):
            chunk = session.next_chunk()
            ready = time.perf_counter()
            memory = memory_now(self.model.device)
            recording.add(
                ready,
                chunk.timings.total_ms,
                chunk.timings.first_frame_ms,
                chunk.frames.shape[0],
                memory,
            )
            recording.add_stages(chunk.timings.stages_ms | self._take())
        return recording

    def prompt_to_photon_ms(self, session: StreamSession) -> list[float]:
        """From the wish for another prompt, at a random moment of a chunk, to the first frame made
        under it.

        Prompts change at chunk boundaries: the wish waits for the rest of its chunk, then comes
        what `set_prompt` and the next chunk take to their first frame.
        """
        phases = rng.uniform(
            (self.plan.num_prompt_trials,), self.settings.seed, "moment of a wish"
        ).tolist()
        waits = []
        for trial, phase in enumerate(phases):
            begun = time.perf_counter()
            session.next_chunk()
            wished = begun + phase * (time.perf_counter() - begun)
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
    """Everything in section 5.1 of the specification, as plain numbers for JSON; None is what was
    not measured.

    Takes the memory's peak from here on: weights, but not what loading them needed. Call it once in
    a fresh process for a cold start that is one.
    """
    device, used_before = model.device, device_used(model.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    bench = Bench(model, settings, prompts, plan)
    with timed_calls(model.student, bench.clocks[0], model.ladder):
        session, cold = bench.start()
        for _ in range(max(plan.num_warmup, bench.ramp + 1)):
            session.next_chunk()
        warm = [bench.restart(session, prompts[i % 2]) for i in range(plan.num_restarts)]
        session.reset(prompts[0])
        recording = bench.run(session, plan.num_chunks)
        waits = bench.prompt_to_photon_ms(session)
    checks = watched_chunks(session, plan.num_checked)
    flops = chunk_flops(model, settings, model.text.encode([prompts[0]]).shape[1])
    return {
        "num_steady_chunks": plan.num_chunks,
        **first_frames(cold, warm),
        **steady_state(recording, plan.playback_fps, plan.buffer_chunks),
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
    """Operations of a steady chunk and the rates they are done at: against the wall clock, and by
    stage.
    """
    num_chunks, stages = len(recording.intervals_ms), recording.stages_ms
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
    """What is measured only where it is asked for: a stream that decodes nothing, and the naive
    cache in turn with ours.

    decode_exposed_ms: by how much the time between chunks shrinks where nothing is decoded.
    """
    results: dict[str, Any] = {"dit_only_pass_fps": None, "decode_exposed_ms": None}
    if plan.dit_only:
        bare = Bench(replace(model, codec=NoCodec(model.codec)), settings, prompts, plan)
        alone = bare.run(bare.start()[0], plan.num_chunks)
        results["dit_only_pass_fps"] = alone.fps
        results["decode_exposed_ms"] = 1000 * (recording.wall_s - alone.wall_s) / plan.num_chunks
    return results


def watched_chunks(session: StreamSession, num_chunks: int) -> dict[str, Any]:
    """Per chunk: waits for the device, kernels, and the host's time in launching them; apart from
    the timed chunks.
    """
    if session.model.device.type != "cuda":
        return dict.fromkeys(
            ("syncs_per_chunk", "kernels_per_chunk", "cpu_launch_ms"), NOT_APPLICABLE
        )
    torch.cuda.synchronize()
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
        torch.cuda.synchronize()
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
    """Bytes in use: allocated on a GPU, resident on a CPU (on systems without /proc its peak).
    Nobody waits.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = Path("/proc/self/statm")
    return (
        int(pages.read_text().split()[1]) * resource.getpagesize()
        if pages.exists()
        else resident_peak()
    )


def resident_peak() -> int:
    """Most bytes that this process has had in memory, loading included; the unit is the system's."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def peak_memory(device: torch.device, used_before: int) -> dict[str, int]:
    """Bytes. device_used_growth is all that the device has given to anybody since the measurement
    began.
    """
    if device.type != "cuda":
        return {"resident": resident_peak()}
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
