"""A benchmark's result in words and numbers: where it was measured, and every figure."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from selfforcing_dfd.benchmark.statistics import MEGABYTE
from selfforcing_dfd.codecs.fidelity import Fidelity
from selfforcing_dfd.common import UserError
from selfforcing_dfd.streaming.model import passes_in_words
from selfforcing_dfd.streaming.session import StreamModel, StreamSettings

FEW_CHUNKS = 200
BUSY = 0.05
"""Share of the time without a core from which on a pace says more of others than of this run."""
WIDTH = 40  # of the first column
Number = float | None


def environment(model: StreamModel, settings: StreamSettings, **choices: Any) -> dict[str, Any]:
    """Machine, versions, and what the figures depend on.

    choices: what only the caller knows, such as the weights.
    """
    device = model.device
    height, width = model.video_size
    return {
        **device_facts(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "visible_frames": settings.sink_frames + settings.window_frames,
        "sink_frames": settings.sink_frames,
        "window_frames": settings.window_frames,
        "positions": settings.positions,
        "attention": model.student.attention.name,
        "chunk_frames": model.chunk_frames,
        "ladder": list(model.ladder),
        "first_ladder": list(model.first_ladder or model.ladder),
        "commits": model.commits,
        "resolution": f"{width}x{height}",
        "parameters": sum(parameter.numel() for parameter in model.student.parameters()),
        "codec": type(model.codec).__name__,
        "git": git_commit(),
        **choices,
    }


def device_facts(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"device": cpu_name(), "driver": None, "cuda": None, "cudnn": None}
    return {
        "device": torch.cuda.get_device_name(device),
        "driver": gpu_facts(device),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def cpu_name() -> str:
    """As the kernel gives it on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu_facts(device: torch.device) -> str | None:
    """Driver, clock of the SMs and power limit, as nvidia-smi gives them; None without it."""
    query = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.sm,power.limit",
        "--format=csv,noheader",
    ]
    answer = output_of([*query, f"--id={device.index or 0}"])
    return answer or None


def git_commit() -> str | None:
    """The commit of the running code, with a + where files differ; None outside of a repository."""
    here = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent)]
    commit = output_of([*here, "rev-parse", "--short", "HEAD"])
    if not commit:
        return None
    differs = output_of([*here, "status", "--porcelain"])
    return f"{commit}+" if differs else commit


def output_of(command: list[str]) -> str:
    """What a program writes; nothing where it fails or does not exist."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def rows(result: dict[str, Any]) -> Iterator[tuple[str, Number, str]]:
    """Name, value and unit of each row of a table; every name once. None: not measured."""
    yield from start_rows(result)
    yield from pace_rows(result)
    yield from memory_rows(result)
    yield from work_rows(result)
    yield from baseline_rows(result.get("baseline") or {})
    for name, value in result["stages_ms"].items():
        yield f"stage {name}", value, "ms"


def start_rows(result: dict[str, Any]) -> Iterator[tuple[str, Number, str]]:
    for kind in ("cold", "warm", "cached"):
        yield f"time to first frame, {kind}", result[f"ttff_{kind}_ms"], "ms"
        for name, value in result[f"ttff_split_{kind}_ms"].items():
            yield f"  {kind} {name.replace('_', ' ')}", value, "ms"
        yield f"time to first chunk, {kind}", result[f"ttfc_{kind}_ms"], "ms"


def pace_rows(result: dict[str, Any]) -> Iterator[tuple[str, Number, str]]:
    for name in ("chunk_latency", "first_frame_in_chunk", "chunk_interval", "frame_latency"):
        for key, value in result[f"{name}_ms"].items():
            yield f"{name.replace('_', ' ')} {key}", value, "ms"
    yield "processor time of a frame", result["processor_ms_per_frame"], "ms"
    waited = result["waited_share"]
    yield "waited for a core", None if waited is None else 100 * waited, "%"
    yield "jitter of the interval, std", result["jitter_ms"]["std"], "ms"
    yield "jitter of the interval, p99 - p50", result["jitter_ms"]["p99_minus_p50"], "ms"
    yield "steady FPS, decoder included", result["steady_fps_with_vae"], "fps"
    yield "DiT-only FPS, from the stages", result["dit_only_fps"], "fps"
    yield "DiT-only FPS, own pass", result["dit_only_pass_fps"], "fps"
    yield f"real-time factor at {result['playback_fps']:g} fps", result["rtf"], ""
    yield "deadline misses", 100 * result["deadline_miss_rate"], "%"
    yield "smallest start-up buffer", result["min_buffer_ms"], "ms"
    photon = result["prompt_to_photon_ms"] or {}
    for key in ("p50", "p95", "max"):
        yield f"prompt to photon {key}", photon.get(key), "ms"


def memory_rows(result: dict[str, Any]) -> Iterator[tuple[str, Number, str]]:
    for kind, value in result["peak_memory_bytes"].items():
        yield f"peak memory, {kind}", value / MEGABYTE, "MB"
    yield "memory growth per 1,000 chunks", result["mem_growth_mb_per_1k_chunks"], "MB"


def work_rows(result: dict[str, Any]) -> Iterator[tuple[str, Number, str]]:
    for name in ("syncs_per_chunk", "kernels_per_chunk", "cpu_launch_ms"):
        value = result[name]
        yield name.replace("_", " "), None if isinstance(value, str) else value, ""
    for part, flops in result["flops_per_chunk"].items():
        yield f"GFLOP per chunk, {part}", flops / 1e9, ""
    for part, use in result["utilisation"].items():
        yield f"TFLOP/s, {part}", use["tflops_per_s"], ""
        yield f"MFU, {part}", None if use["mfu"] is None else 100 * use["mfu"], "%"


def baseline_rows(baseline: dict[str, Any]) -> Iterator[tuple[str, Number, str]]:
    """A clip from its first frame to its last, by the stream and by diffusers' loop."""
    for side in ("stream", "diffusers"):
        figures = baseline.get(side, {})
        yield f"clip by {side}, FPS", figures.get("fps"), "fps"
        yield f"clip by {side}, first frame", figures.get("first_frame_ms"), "ms"


def table(result: dict[str, Any]) -> str:
    """All that was measured, a line each."""
    lines = []
    for name, value, unit in rows(result):
        if value is not None:
            lines.append(f"{name:<{WIDTH}} {shown(value):>12} {unit}".rstrip())
    ramp = "  ".join(f"{latency:.1f}" for latency in result["ramp_latency_ms"])
    lines.append(f"chunk latency from chunk 0 on (ms): {ramp}")
    return "\n".join(lines)


def environment_lines(result: dict[str, Any]) -> list[str]:
    facts = result["environment"]
    passes = passes_in_words(facts["ladder"], facts["first_ladder"], facts["commits"])
    return [
        f"{facts['size']} ({facts['parameters'] / 1e6:.1f} M parameters, {facts['weights']} "
        f"weights), {facts['resolution']}, {facts['dtype']}, {facts['device']}, "
        f"{facts['threads']} threads, torch {facts['torch']}",
        f"K = {facts['visible_frames']} latent frames (sink {facts['sink_frames']} + window "
        f"{facts['window_frames']}), {facts['positions']}, {passes}, "
        f"{facts['codec']}, attention {facts['attention']}, compile {facts['compile']}",
        f"steady state: {result['num_steady_chunks']} chunks after the ramp",
    ]


def remarks(result: dict[str, Any]) -> Iterator[str]:
    """Notes that a reader of the figures needs."""
    num_chunks = result["num_steady_chunks"]
    if result["environment"]["weights"] == "random":
        yield "note: the weights are random; the times are real, the pictures are noise"
    decoder = result["small_decoder"]
    if decoder is not None:
        yield f"note: small decoder {decoder['name']}: {fidelity_of(decoder['fidelity'])}"
    waited = result["waited_share"]
    if waited is not None and waited > BUSY:
        yield f"note: the machine was busy: {waited:.0%} of the time this waited for a core"
    if num_chunks < FEW_CHUNKS:
        yield (
            f"note: {num_chunks} chunks are few; p99 needs {FEW_CHUNKS} to be more than the slowest"
        )
    if result["environment"]["cuda"] and result["peak_tflops"] is None:
        yield "note: no MFU, since no peak is known; give --peak-tflops"


def fidelity_of(found: dict[str, Any] | None) -> str:
    """How far a small decoder is from the full one, in words."""
    if found is None:
        return "not compared with the full one, since weights are random"
    return str(Fidelity(**{**found, "psnr_db": found["psnr_db"] or math.inf}))


def shown(value: float) -> str:
    """A figure with three or four significant digits, without an exponent."""
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.{3 if abs(value) < 1 else 2 if abs(value) < 100 else 1}f}"


def pairs(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[float, float, str]]:
    """Both values and the unit of every row that both results have, by its name."""
    others = {name: value for name, value, _ in rows(second)}
    found = {}
    for name, value, unit in rows(first):
        other = others.get(name)
        if value is not None and other is not None:
            found[name] = (value, other, unit)
    return found


def read_result(path: Path) -> dict[str, Any]:
    """A result from a file that --out wrote, or from saved output, whose last line it is.

    Raises UserError for anything else.
    """
    lines = path.read_text().strip().splitlines()
    try:
        result = json.loads(lines[-1])
        deque(rows(result), maxlen=0)  # every figure is there
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} holds no benchmark result; want a file written with --out by this version"
        ) from error
    return result
