"""What a reader of a benchmark wants first: five lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from selfforcing_dfd.benchmark.statistics import MEGABYTE


def headline(result: dict[str, Any]) -> list[str]:
    """Pace, chunks, first frame, prompt to picture, memory: a line each.

    One more where diffusers' loop was timed too.
    """
    chunk = result["chunk_latency_ms"]
    photon = result["prompt_to_photon_ms"]
    kind, peak_bytes = peak_memory(result)
    shown = "not measured"
    if photon is not None:
        shown = f"p50 {time_of(photon['p50'])}, longest {time_of(photon['max'])}"
    return [
        f"frames a second    {rate_of(result['steady_fps_with_vae'])} with the "
        f"{decoder_of(result)}, {rate_of(result['dit_only_fps'])} without",
        f"a chunk            p50 {time_of(chunk['p50'])}, p99 {time_of(chunk['p99'])}",
        f"first frame        {time_of(result['ttff_warm_ms'])} from the prompt, "
        f"{time_of(result['ttff_cached_ms'])} with a cached one, "
        f"{time_of(result['ttff_cold_ms'])} cold",
        f"prompt to picture  {shown}",
        f"memory             {size_of(peak_bytes)} at most ({kind})",
        *baseline_line(result.get("baseline"), decoder_of(result)),
    ]


def decoder_of(result: dict[str, Any]) -> str:
    """What made the pictures whose pace is stated."""
    return "VAE" if result["small_decoder"] is None else "small decoder"


def baseline_line(baseline: dict[str, Any] | None, decoder: str = "VAE") -> Iterator[str]:
    """A clip by diffusers' loop and by the stream, first frames included; nothing without one.

    decoder: the stream's. diffusers has the VAE.
    """
    if baseline is not None:
        ours = baseline["stream"]
        theirs = baseline["diffusers"]
        yield (
            f"diffusers' loop    {rate_of(theirs['fps'])} frames a second of a clip of "
            f"{baseline['video_frames']}, first frame {time_of(theirs['first_frame_ms'])}; "
            f"the stream with the {decoder} {rate_of(ours['fps'])}, "
            f"{time_of(ours['first_frame_ms'])}"
        )


def figures(result: dict[str, Any]) -> Iterator[tuple[str, float | None, bool]]:
    """The headline's figures for a comparison: name, value, whether more is better."""
    photon = result["prompt_to_photon_ms"] or {}
    yield "frames a second, decoder included", result["steady_fps_with_vae"], True
    yield "frames a second without it", result["dit_only_fps"], True
    yield "a chunk, p50 (ms)", result["chunk_latency_ms"]["p50"], False
    yield "a chunk, p99 (ms)", result["chunk_latency_ms"]["p99"], False
    yield "first frame, warm (ms)", result["ttff_warm_ms"], False
    yield "first frame, cached prompt (ms)", result["ttff_cached_ms"], False
    yield "prompt to picture, p50 (ms)", photon.get("p50"), False
    yield "memory at most (MB)", peak_memory(result)[1] / MEGABYTE, False


def peak_memory(result: dict[str, Any]) -> tuple[str, int]:
    """What the peak counts, and its bytes: of a GPU what torch reserved, of a CPU the process."""
    peaks = result["peak_memory_bytes"]
    kind = "reserved" if "reserved" in peaks else "resident"
    return f"{kind} bytes", peaks[kind]


def rate_of(fps: float) -> str:
    return f"{fps:.1f}" if fps < 100 else f"{fps:.0f}"


def time_of(ms: float) -> str:
    """`27.4 ms`, `351 ms`, `2.10 s`."""
    if ms >= 1000:
        return f"{ms / 1000:.2f} s"
    return f"{ms:.1f} ms" if ms < 100 else f"{ms:.0f} ms"


def size_of(num_bytes: float) -> str:
    """`520 MB`, `12.6 GB`."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / MEGABYTE:.0f} MB"
