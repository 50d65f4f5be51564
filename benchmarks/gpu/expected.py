"""What was predicted before anything ran on a GPU, and what is wanted.

Predictions come from counted operations and bytes, and from rates that others report for Hopper:
matrix products 620 TFLOP/s, self-attention 550, cross-attention 350, convolutions 390, elementwise
work 3.7 TB/s. They were written down before any measurement and are not changed after one.
"""

from __future__ import annotations

from dataclasses import dataclass

CONDITIONS = (
    "One H200, Wan2.1 1.3B with random weights, 480x832, bfloat16, chunks of 3 latent frames, "
    "K = 12 (sink 3 + window 9), 4 steps and a commit pass, Wan's VAE, 12 video frames a chunk; "
    "a row says what differs."
)


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: what, where its measurement lies, what was predicted and what is wanted.

    path: keys from a row's value down. factor: from the stored unit to the shown one.
    """

    what: str
    unit: str
    stage: str
    row: str
    path: tuple[str, ...]
    predicted: str = ""
    goal: str = ""
    factor: float = 1.0


FPS = ("steady_fps_with_vae",)
TABLES: dict[str, tuple[Figure, ...]] = {
    "Frames a second of a stream": (
        Figure("as it is", "FPS", "stream-plain", "bf16", FPS, "24, VAE as it was"),
        Figure(
            "without decoding",
            "FPS",
            "stream-plain",
            "bf16, without the VAE",
            ("dit_only_pass_fps",),
            "38",
        ),
        Figure("kernel as measured", "FPS", "stream-plain", "bf16, measured kernel", FPS),
        Figure(
            "`--compile`", "FPS", "stream-compile", "compiled", FPS, "30; 26.5, VAE as it was", "30"
        ),
        Figure(
            "`--compile`, without decoding",
            "FPS",
            "stream-compile",
            "compiled, without the VAE",
            ("dit_only_pass_fps",),
            "45",
        ),
        Figure(
            "`--compile`, K = 9",
            "FPS",
            "stream-compile",
            "compiled, K = 9",
            FPS,
            "29, VAE as it was",
        ),
        Figure(
            "`--compile`, K = 24",
            "FPS",
            "stream-compile",
            "compiled, K = 24",
            FPS,
            "20, VAE as it was",
            "28",
        ),
        *(
            Figure(f"`--compile`, {name}", "FPS", "stream-flash", f"compiled, {name}", FPS)
            for name in ("fa2", "fa3", "fa4")
        ),
        Figure("`--compile --fp8`", "FPS", "stream-fp8", "compiled, FP8 linears", FPS, "34", ""),
        Figure(
            "`--compile --fp8`, FP8 attention",
            "FPS",
            "stream-fp8",
            "compiled, FP8 linears and attention",
            FPS,
            "39.5",
            "40",
        ),
        Figure("2 steps", "FPS", "stream-fewer", "compiled, 2 steps", FPS, "42", "42"),
        Figure(
            "2 steps, FP8 linears and attention",
            "FPS",
            "stream-fewer",
            "compiled, 2 steps, FP8 linears and attention",
            FPS,
            "51.5",
            "50",
        ),
        Figure("small decoder", "FPS", "stream-small", "compiled, small decoder", FPS, "42", "42"),
        Figure(
            "small decoder, FP8 linears and attention",
            "FPS",
            "stream-small",
            "compiled, small decoder, FP8 linears and attention",
            FPS,
            "61",
            "60",
        ),
        Figure(
            "`--compile`, CUDA graph",
            "FPS",
            "stream-graph",
            "compiled, CUDA graph",
            FPS,
            "1 to 3 % more than without",
        ),
        Figure("best setting, 200 chunks", "FPS", "final", "best", FPS),
    ),
    "First frame, memory and chunks": (
        Figure(
            "warm first frame, the prompt cached",
            "ms",
            "stream-first",
            "compiled, UMT5",
            ("ttff_cached_ms",),
            "127 to 160",
            "125",
        ),
        Figure(
            "warm first frame, UMT5 included",
            "ms",
            "stream-first",
            "compiled, UMT5",
            ("ttff_warm_ms",),
            "155 to 190",
            "160",
        ),
        Figure("a chunk, p99", "ms", "stream-compile", "compiled", ("chunk_latency_ms", "p99")),
        Figure(
            "memory that torch reserves",
            "GB",
            "stream-plain",
            "bf16",
            ("peak_memory_bytes", "reserved"),
            "12 to 13; 2 more since the VAE has rooms",
            factor=1e-9,
        ),
        Figure(
            "memory with UMT5 and `--offload`",
            "GB",
            "stream-first",
            "compiled, UMT5, offload",
            ("peak_memory_bytes", "reserved"),
            goal="24",
            factor=1e-9,
        ),
        Figure(
            "one call of the DiT, as it is",
            "ms",
            "stream-plain",
            "bf16",
            ("stages_ms", "dit_step_2"),
            "62.4",
        ),
        Figure(
            "one call of the DiT, `--compile`",
            "ms",
            "stream-compile",
            "compiled",
            ("stages_ms", "dit_step_2"),
            "53.6",
        ),
        Figure("kernels of a chunk, as it is", "", "profile", "a chunk, plain", ("kernels",), ""),
        Figure("kernels of a chunk, `--compile`", "", "profile", "a chunk, compiled", ("kernels",)),
    ),
    "Against diffusers' own loop, a clip of 81 frames": (
        *(
            Figure(f"{side}{words}", unit, stage, row, ("baseline", side, key))
            for stage, row, words in (
                ("stream-plain", "bf16, beside diffusers' loop", ""),
                ("stream-compile", "compiled, beside diffusers' loop", ", `--compile`"),
            )
            for side in ("stream", "diffusers")
            for key, unit in (("fps", "FPS"), ("first_frame_ms", "ms to the first frame"))
        ),
    ),
    "A latent frame of Wan's VAE": (
        *(
            Figure(
                f"{layout}, {way}",
                "ms",
                "decoder",
                f"bfloat16, {layout}, {way}",
                ("ms",),
                predicted,
            )
            for layout, way, predicted in (
                ("channels_last", "plain", "60, as it was"),
                ("channels_last", "compiled", "41"),
                ("contiguous", "plain", ""),
                ("contiguous", "compiled", ""),
            )
        ),
        Figure("diffusers' own", "ms", "decoder", "bfloat16, diffusers", ("ms",)),
    ),
    "Attention, 3 latent frames over 12": (
        *(
            Figure(name, "ms", "kernels", f"{name}, 3 frames over 12 frames", ("ms",), predicted)
            for name, predicted in (
                ("sdpa", ".98 at 550 TFLOP/s"),
                ("sdpa-flash", "about twice that"),
                ("fa2", ""),
                ("fa3", "as sdpa"),
                ("fa4", "as fa3"),
                ("fa3-fp8", ".63 at 850 TFLOP/s"),
            )
        ),
    ),
    "Training, one clip, `configs/wan1.3b/dfd_ar.yaml`": (
        *(
            Figure(
                f"{turn} turn{words}", "s", stage, f"{turn} turn", ("micro-batch, s",), predicted
            )
            for stage, words in (("train", ""), ("train-compile", ", compiled"))
            for turn, predicted in (
                ("fake", "3.8" if not words else "12 % less"),
                ("student", "4.9" if not words else "12 % less"),
            )
        ),
        Figure(
            "student turn, rate with what is made again",
            "TFLOP/s",
            "train",
            "student turn",
            ("TFLOP/s, with what is made again",),
            "470",
        ),
        *(
            Figure(
                f"peak memory of the {turn} turn over what `--dry-run` says",
                "",
                "train",
                f"{turn} turn",
                ("measured over estimated",),
                "1",
            )
            for turn in ("fake", "student")
        ),
        Figure(
            "peak memory of the student turn", "GB", "train", "student turn", ("peak GB",), "62"
        ),
    ),
    "The machine": (
        Figure("a copy on the device", "TB/s", "probe", "copy", ("TB_per_s",), "4.3"),
        Figure(
            "bf16, 4680 x 1536 x 8960",
            "TFLOP/s",
            "probe",
            "bf16 4680x1536x8960",
            ("tflops_per_s",),
            "620",
        ),
        Figure(
            "FP8 by rows, fast accumulation",
            "TFLOP/s",
            "probe",
            "fp8 4680x1536x8960, fast accumulation on",
            ("tflops_per_s",),
        ),
        Figure(
            "FP8 by rows, without",
            "TFLOP/s",
            "probe",
            "fp8 4680x1536x8960, fast accumulation off",
            ("tflops_per_s",),
        ),
    ),
}
