"""The benchmark's command line on the shipped tiny student."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LADDER, tiny_network

from selfforcing_dfd import rng
from selfforcing_dfd.benchmark.headline import headline, rate_of
from selfforcing_dfd.benchmark.measure import Bench, Plan, measure
from selfforcing_dfd.benchmark.page import render
from selfforcing_dfd.benchmark.statistics import Recording, certainty, stage_breakdown, steady_state
from selfforcing_dfd.benchmark.table import read_result
from selfforcing_dfd.benchmark.timed import timed_calls
from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import EXIT_USER_ERROR
from selfforcing_dfd.streaming.session import StreamModel, StreamSession, StreamSettings
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.text import TinyText

KEYS = {
    "environment": {
        "device",
        "threads",
        "torch",
        "cuda",
        "cudnn",
        "driver",
        "dtype",
        "attention",
        "visible_frames",
    }
    | {
        "sink_frames",
        "window_frames",
        "positions",
        "ladder",
        "resolution",
        "compile",
        "weights",
        "git",
        "size",
    },
    "ttff_split_cold_ms": {"text", "noise", "dit", "vae", "copy_and_rest"},
    "ttff_split_cached_ms": {"text", "noise", "dit", "vae", "copy_and_rest"},
    "ttff_split_warm_ms": {"text", "noise", "dit", "vae", "copy_and_rest"},
    "chunk_latency_ms": {"p50", "p95", "p99", "max"},
    "chunk_interval_ms": {"p50", "p95", "p99"},
    "frame_latency_ms": {"p50"},
    "first_frame_in_chunk_ms": {"p50"},
    "jitter_ms": {"std", "p99_minus_p50"},
    "prompt_to_photon_ms": {"trials", "mode", "p50", "max"},
    "flops_per_chunk": {"denoise", "commit", "decode", "total"},
    "utilisation": {"chunk", "dit", "vae"},
    "stages_ms": {
        "noise",
        "dit_step_1",
        "dit_step_4",
        "commit_pass",
        "vae_decode",
        "convert_and_copy",
        "unattributed",
    },
    "peak_memory_bytes": {"resident"},
}
PLAIN = {
    "ttff_cold_ms",
    "ttff_warm_ms",
    "ttff_cached_ms",
    "ttfc_cold_ms",
    "ttfc_warm_ms",
    "num_steady_chunks",
    "steady_fps_with_vae",
    "dit_only_fps",
    "dit_only_pass_fps",
    "decode_exposed_ms",
    "rtf",
    "playback_fps",
    "deadline_miss_rate",
    "min_buffer_ms",
    "interval_parts_ms",
    "processor_ms_per_frame",
    "waited_share",
    "mem_growth_mb_per_1k_chunks",
    "syncs_per_chunk",
    "kernels_per_chunk",
    "cpu_launch_ms",
    "peak_tflops",
    "ramp_latency_ms",
}


def run(*arguments: str) -> tuple[int, str, str]:
    """The program in this process, where torch is imported already: status, stdout, stderr."""
    out = io.StringIO()
    err = io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(["benchmark", *arguments])
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[str, Path]:
    """What one quick run of everything printed, and the file that it wrote."""
    out = tmp_path_factory.mktemp("benchmark") / "result.json"
    options = (
        "--quick",
        "--chunks",
        "3",
        "--warmup",
        "0",
        "--device",
        "cpu",
        "--sink",
        "3",
        "--window",
        "3",
    )
    extras = ("--dit-only", "--peak-tflops", "0.5", "--out", str(out))
    status, printed, complaint = run(*options, *extras)
    assert status == 0, complaint
    return printed, out


def test_a_run_ends_with_one_line_of_json(quick):
    """Catches a log line after the result, a result over several lines, and NaN.

    JSON has no NaN.
    """
    printed, out = quick
    assert json.loads(printed.splitlines()[-1], parse_constant=pytest.fail) == json.loads(
        out.read_text()
    )


def test_everything_that_was_asked_for_is_in_the_result(quick):
    """Catches a metric of the specification that is not reported."""
    result = read_result(quick[1])
    assert set(KEYS) | PLAIN <= set(result)
    assert {
        name: keys - set(result[name]) for name, keys in KEYS.items() if keys - set(result[name])
    } == {}


def test_the_figures_fit_together(quick):
    """Catches units off by a thousand, a mix of video and latent frames, and a wrong breakdown."""
    result = read_result(quick[1])
    stages = dict(result["stages_ms"])
    wall = stages.pop("wall")
    assert sum(stages.values()) == pytest.approx(wall)
    # one thread or more ran while a frame was made, and no longer than all of them could
    most = 1000 / result["steady_fps_with_vae"] * result["environment"]["threads"]
    assert 0 < result["processor_ms_per_frame"] < 1.1 * most
    assert 0 <= result["waited_share"] < 1
    assert sum(result["interval_parts_ms"]) / 3 == pytest.approx(wall)
    # three latent frames are 12 video frames
    assert result["steady_fps_with_vae"] == pytest.approx(12 * 1000 / wall)
    assert result["rtf"] == pytest.approx(16 / result["steady_fps_with_vae"])
    assert result["dit_only_fps"] > result["steady_fps_with_vae"]
    assert sum(result["ttff_split_warm_ms"].values()) == pytest.approx(result["ttff_warm_ms"])
    assert all(part > 0 for part in result["ttff_split_warm_ms"].values())
    rate = result["flops_per_chunk"]["total"] / (wall / 1000) / 1e12
    assert result["utilisation"]["chunk"]["mfu"] == pytest.approx(rate / 0.5)
    assert len(result["ramp_latency_ms"]) == 6 // 3 + 3  # chunk 0 to K / 3 + 2


def test_five_lines_come_first(quick):
    """Catches figures that do not say what they include, and a table that nobody reads."""
    result = read_result(quick[1])
    lines = headline(result)
    assert len(lines) == 5
    assert "\n".join(lines) in quick[0]
    assert rate_of(result["steady_fps_with_vae"]) in lines[0]
    assert "with the small decoder" in headline({**result, "small_decoder": {}})[0]
    for words in ("with the VAE", "K = 6", "trained weights", "p99 needs 200"):
        assert words in quick[0]
    assert len(quick[0].splitlines()) < 15


def test_a_page_with_bars_lies_beside_the_json(quick):
    """Catches a stage without a bar, a bar that leaves the page, and text taken for HTML."""
    result = read_result(quick[1])
    page = quick[1].with_suffix(".html").read_text()
    assert f"wrote {quick[1].with_suffix('.html')}" in quick[0]
    for name in result["stages_ms"]:
        assert name == "wall" or f"<td>{name.replace('_', ' ')}</td>" in page
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", page)]
    assert len(widths) > 20
    for part in ("denoise rest", "unattributed"):  # what is left of a stage has its own colour
        assert re.search(rf'<td>{part}</td>\s*<td><div class="track"><div class="bar rest"', page)
    assert max(widths) == 100
    odd = {**result, "environment": {**result["environment"], "device": "<b>GPU</b>"}}
    assert "&lt;b&gt;GPU" in render(odd)


def test_fast_variants_say_what_they_are():
    """Catches options that are taken and not used: 8-bit layers, a decoder elsewhere, groups.

    More blocks of a group than there are would save nothing, which only a model that is asked says.
    """
    extras = ("--fp8", "--vae-device", "cpu", "--chunks", "3", "--threads", "1", "--offload", "2")
    status, printed, complaint = run("--quick", "--device", "cpu", *extras)
    assert status == 0, complaint
    result = json.loads(printed.splitlines()[-1])
    assert result["environment"]["fp8"]
    assert result["environment"]["offload"] == 2
    status, _, complaint = run("--quick", "--device", "cpu", "--offload", "3")
    assert status == EXIT_USER_ERROR
    assert "use smaller groups" in complaint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--random-weights", "huge"), "invalid choice: 'huge'"),
        (("--dtype", "int8"), "invalid choice: 'int8'"),
        (("--settings", "slow"), "no stream settings 'slow'"),
        (("--window", "4", "--quick"), "use 3 or 6"),
        (("--size", "100x64"), "multiples of 16"),
        (("--chunks", "0"), "want a whole number of at least 1"),
        (("--fps", "0"), "fps must be positive"),
        (("--out", "a.html"), "--out names the JSON"),
        (("--out", "nowhere/a.json"), "nowhere does not exist"),
        (("--out", "."), "is a folder"),
        (("--attention", "fa3"), "needs a CUDA device"),
        (("--random-weights", "tiny", "--weights", "x"), "goes without --run and --weights"),
    ],
)
def test_errors_say_what_to_do(arguments, message):
    """Catches a traceback, and an answer on stdout that a script would take for a result."""
    status, printed, complaint = run(*arguments, "--device", "cpu")
    assert status == 2
    assert complaint.startswith("error: ")
    assert message in complaint
    assert printed == ""


@pytest.mark.parametrize("content", ["", "not json", "[1, 2]", '{"environment": {}}'])
def test_a_file_without_a_result_is_refused(content, tmp_path):
    """Catches a comparison with a file of something else, which ends in a KeyError."""
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="holds no benchmark result"):
        read_result(path)


@pytest.fixture(scope="module")
def model() -> StreamModel:
    """Two layers on 4 x 6 latents."""
    codec = TinyCodec(rng.normal((192, 16), 0, "first"), rng.normal((768, 16), 0, "rest"), 1.0)
    network = tiny_network(dtype=torch.float32, in_channels=16, out_channels=16).requires_grad_(
        False
    )
    return StreamModel(network, codec, TinyText(12), LADDER, 3, (4, 6))


def test_timing_does_not_change_the_video(model):
    """Catches a timed decoder that drops a frame or forgets its state, and hooks that stay."""
    settings = StreamSettings(sink_frames=0, window_frames=6)
    bench = Bench(model, settings, ("a", "b"), Plan())
    with timed_calls(model.student, bench.clocks[0], model.ladder):
        timed, _ = bench.start()
        frames = [timed.next_chunk().frames for _ in range(3)]
    plain = StreamSession(model, "a", settings)
    plain.next_chunk()
    assert all(torch.equal(chunk, plain.next_chunk().frames) for chunk in frames)
    assert not model.student._forward_hooks
    assert not model.student._forward_pre_hooks


def test_every_call_of_the_network_is_a_stage(model):
    """Catches a step that is not counted, or a commit counted as a step.

    A chunk has four steps and one commit.
    """
    bench = Bench(model, StreamSettings(sink_frames=0, window_frames=6), ("a", "b"), Plan())
    with timed_calls(model.student, bench.clocks[0], model.ladder):
        session, _ = bench.start()
        recording = bench.run(session, 2)
    breakdown = stage_breakdown(recording)
    assert [name for name in breakdown if name.startswith(("dit_step", "merged"))] == [
        f"dit_step_{i}" for i in range(1, 5)
    ]
    for name in ("dit_step_1", "commit_pass", "vae_decode", "noise", "convert_and_copy"):
        assert breakdown[name] > 0
    assert recording.stages_ms["denoise"] >= sum(
        recording.stages_ms[f"dit_step_{i}"] for i in range(1, 5)
    )


def test_the_ramp_is_no_part_of_the_steady_state(model):
    """Catches cheap first chunks in the median.

    K = 9 is full at the third chunk; each later chunk forgets one.
    """
    bench = Bench(model, StreamSettings(sink_frames=3, window_frames=6), ("a", "b"), Plan())
    session = StreamSession(model, "a", bench.settings)
    recording = bench.run(session, 2)
    assert (recording.steady, len(recording.ready_s), len(recording.intervals_ms)) == (3, 5, 2)
    assert list(recording.num_frames) == [9, 12, 12, 12, 12]
    # the processor's time is that of the last two chunks, which the last four contain
    assert recording.processor is not None
    assert 0 < recording.processor.wall_s < recording.ready_s[-1] - recording.ready_s[0]
    assert len(bench.run(session, 2).ready_s) == 3  # one more, where the first interval begins


def test_a_wish_is_answered_by_the_next_chunk(model):
    """Catches a latency that is measured from the end of a chunk.

    It is at least as long as the next chunk and at most as long as two. The new prompt must be in
    use, or the first frame would not be one made under it.
    """
    bench = Bench(model, StreamSettings(), ("a", "b"), Plan(num_prompt_trials=3))
    session, _ = bench.start()
    waits = bench.prompt_to_photon_ms(session)
    assert session.prompt == "b"
    assert session.chunk_index == 1 + 2 * 3
    assert all(wait > 0 for wait in waits)


def test_a_peak_is_never_made_up(model):
    """Catches an MFU on a device without a stated peak."""
    result = measure(
        model, StreamSettings(), ("a", "b"), Plan(num_chunks=1, num_restarts=1, num_prompt_trials=0)
    )
    assert {use["mfu"] for use in result["utilisation"].values()} == {None}
    assert result["prompt_to_photon_ms"] is None
    assert result["syncs_per_chunk"] == "not applicable"


def recorded(ready_s: list[float], stages: list[dict[str, float]]) -> Recording:
    """Chunks of twelve frames that took 100 ms each and 80 ms to their first frame."""
    recording = Recording(steady=2)
    for ready, parts in zip(ready_s, stages, strict=True):
        recording.add(ready, 100.0, 80.0, 12, 10**6)
        recording.add_stages(parts)
    return recording


def test_only_steady_chunks_count_in_sums_and_pace():
    """Catches the first chunks in the sums.

    Four chunks, steady from the third: 24 frames in the three seconds after the second.
    """
    recording = recorded(
        [0.0, 1.0, 2.0, 4.0], [{"noise": 99.0}, {"noise": 99.0}, {"noise": 3.0}, {"noise": 5.0}]
    )
    assert recording.intervals_ms == [1000.0, 2000.0]
    result = steady_state(recording, playback_fps=16, buffer_chunks=1)
    assert result["steady_fps_with_vae"] == 8.0
    assert result["rtf"] == 2.0
    assert result["frame_latency_ms"]["max"] == pytest.approx(2000 / 12)
    assert stage_breakdown(recording)["noise"] == 4.0
    assert certainty(recording)["interval_parts_ms"] == [1000.0, 2000.0]
    assert stage_breakdown(recording)["unattributed"] == 1500.0 - 4.0


def test_the_parts_of_a_stage_are_taken_out_of_it():
    """Catches time that is shown twice.

    Steps lie within denoising, the VAE within decoding, the pass within the commit.
    """
    parts: dict[str, Any] = {
        "denoise": 50.0,
        "dit_step_1": 20.0,
        "dit_step_2": 25.0,
        "commit": 12.0,
    }
    parts |= {"commit_pass": 11.0, "decode": 30.0, "vae": 28.0}
    breakdown = stage_breakdown(recorded([0.0, 1.0, 1.1], [{}, {}, parts]))
    assert breakdown["denoise_rest"] == 5.0
    assert breakdown["commit_rest"] == 1.0
    assert breakdown["convert_and_copy"] == 2.0
    assert breakdown["unattributed"] == pytest.approx(100 - 92)
