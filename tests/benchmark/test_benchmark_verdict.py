"""Two results side by side: what differs, what is better, and what cannot be told from noise."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from selfforcing_dfd.benchmark.table import rows
from selfforcing_dfd.benchmark.verdict import (
    comparison,
    differences,
    judged,
    margin_of,
    ratios,
    verdict,
)
from selfforcing_dfd.cli.main import main


def result(
    fps: float = 30.0, std: float = 2.0, waited: float | None = None, **facts: Any
) -> dict[str, Any]:
    """A result of 100 chunks of 12 frames, with other facts of its environment; a GPU's by default.

    std: of the means of the run's ten parts, in ms. waited: share of the time without a core.
    """
    wall = 12_000 / fps
    split = {"text": 1.0, "noise": 2.0, "dit": 80.0, "vae": 20.0, "copy_and_rest": 2.0}
    times = {"p50": wall, "p95": wall, "p99": wall + 3 * std, "max": wall + 4 * std}
    environment = {"device": "GPU", "cuda": "13.0", "threads": 8, "git": "abc", "ladder": [1.0]}
    use = {"tflops_per_s": 100.0, "mfu": 0.1}
    return {
        "environment": {**environment, **facts},
        "num_steady_chunks": 100,
        "small_decoder": None,
        "interval_parts_ms": [wall - std, wall + std] * 5,
        "processor_ms_per_frame": 1000 / fps,
        "waited_share": waited,
        "steady_fps_with_vae": fps,
        "dit_only_fps": 1.5 * fps,
        "dit_only_pass_fps": None,
        "playback_fps": 16.0,
        "rtf": 16 / fps,
        "deadline_miss_rate": 0.0,
        "min_buffer_ms": 0.0,
        "chunk_latency_ms": times,
        "first_frame_in_chunk_ms": times,
        "chunk_interval_ms": times,
        "frame_latency_ms": times,
        "jitter_ms": {"std": std, "p99_minus_p50": 3 * std},
        "prompt_to_photon_ms": {"p50": 400.0, "p95": 500.0, "max": 600.0},
        "ttff_warm_ms": 105.0,
        "ttff_cached_ms": 101.0,
        "ttff_cold_ms": 2105.0,
        "ttfc_warm_ms": 300.0,
        "ttfc_cached_ms": 290.0,
        "ttfc_cold_ms": 3000.0,
        "ttff_split_warm_ms": split,
        "ttff_split_cached_ms": split,
        "ttff_split_cold_ms": {**split, "dit": 2080.0},
        "peak_memory_bytes": {"reserved": 12_000_000_000, "allocated": 11_000_000_000},
        "mem_growth_mb_per_1k_chunks": 0.0,
        "syncs_per_chunk": 1.0,
        "kernels_per_chunk": 5000,
        "cpu_launch_ms": 30.0,
        "flops_per_chunk": {"denoise": 4, "commit": 1, "decode": 1, "total": 6},
        "utilisation": {"chunk": use, "dit": use, "vae": use},
        "stages_ms": {"noise": 1.0, "wall": wall},
    }


def test_the_faster_one_is_named_and_its_figures_are_better():
    """Catches an inverted ratio, and times for which less is taken for worse."""
    before = result(30.0)
    after = result(36.0, git="def")
    assert verdict(before, after).startswith("verdict: the second is faster: 1.200 times the")
    assert verdict(after, before).startswith("verdict: the second is slower: 0.833 times the")
    words = {name: word for name, (_, _, word) in judged(before, after).items()}
    assert words["frames a second, decoder included"] == words["a chunk, p50 (ms)"] == "better"
    assert words["first frame, warm (ms)"] == "equal"
    assert judged(after, before)["a chunk, p50 (ms)"][2] == "worse"
    assert judged(after, before)["a chunk, p99 (ms)"][2] == ""  # a few chunks decide a tail


def test_what_noise_can_make_is_no_difference():
    """Catches a winner of two runs of one program, where paces change within a run or between two.

    Ten parts that are a sixth of their mean from it: their mean is known to 5.6 %.
    """
    assert "equally fast" in verdict(result(30.0), result(30.5))
    uneven = result(30.0, std=400 / 6)
    assert margin_of(uneven, uneven) == pytest.approx(3 * 2**0.5 / 6 / 9**0.5)
    assert "equally fast" in verdict(uneven, result(36.0, std=400 / 6))
    assert "slower" in verdict(uneven, result(20.0, std=400 / 6))
    on_cpu = {"cuda": None, "waited": 0.01}
    assert "equally fast" in verdict(result(30.0, **on_cpu), result(31.0, **on_cpu))
    assert "faster" in verdict(result(30.0, **on_cpu), result(32.0, **on_cpu))
    assert "faster" in verdict(result(30.0), result(31.0))  # a GPU


def test_a_busy_cpu_is_not_compared_by_its_clock():
    """Catches a run taken for slow since others had the cores: 15 FPS and 30 by the same work."""
    quiet = result(30.0, cuda=None, threads=1, waited=0.0)
    busy = {**result(15.0, cuda=None, threads=1, waited=0.5), "processor_ms_per_frame": 35.0}
    said = verdict(quiet, busy)
    assert said.startswith("verdict: equally fast: 0.952 times the frames in the same processor")
    slow = {**busy, "processor_ms_per_frame": 50.0}
    assert verdict(quiet, slow).startswith("verdict: the second is slower: 0.667 times the frames")
    words = {name: word for name, (_, _, word) in judged(quiet, busy).items()}
    assert words["frames a second, decoder included"] == words["first frame, warm (ms)"] == ""
    assert words["memory at most (MB)"] == "equal"
    many = [result(fps, cuda=None, waited=share) for fps, share in ((30.0, 0.01), (15.0, 0.5))]
    assert verdict(*many).startswith(
        "verdict: none, since the machine was busy: the first waited 1% of its time for a core, "
        "the second 50%"
    )
    # what a GPU's host waits for does not count
    assert "faster" in verdict(result(30.0, waited=0.5), result(36.0, waited=0.5))


def test_other_steps_are_compared_and_named():
    """Catches two steps against four that get no verdict, or one that hides what differs."""
    said = verdict(result(30.0), result(45.0, ladder=[1.0, 0.5]))
    assert said == (
        "verdict: the second is faster: 1.500 times the frames a second (± 2%), with other work: "
        "ladder"
    )


def test_a_small_decoder_shows_its_quality():
    """Catches a pace gained by another picture, without a word about the picture."""
    fidelity = {"psnr_db": 33.3, "flicker": 1.5, "change": 2.0, "video_frames": 21}
    small = {**result(45.0), "small_decoder": {"name": "small", "fidelity": fidelity}}
    text = comparison(result(30.0), small, ("a", "b"))
    assert "small decoder of the second: against the full decode" in text
    assert "PSNR 33.3 dB, flicker 1.50" in text
    assert "small decoder of the first" not in text


def test_another_machine_gets_no_verdict():
    """Catches two machines taken for two versions; what a change may differ in is named only."""
    ours = result(30.0)
    theirs = result(60.0, threads=16, git="def")
    assert verdict(ours, theirs).startswith(
        "verdict: none, since the two cannot be compared: other threads; "
    )
    assert differences(ours, theirs) == [
        "warning: threads differs: 8 and 16",
        "git differs: abc and def",
    ]
    assert differences(ours, ours) == []


def test_cold_parts_stand_beside_cold_ones():
    """Catches rows of equal names, of which the last one's value stands beside both."""
    names = [name for name, *_ in rows(result())]
    assert len(set(names)) == len(names)
    slow = result()
    slow["ttff_split_cold_ms"] = {**slow["ttff_split_cold_ms"], "dit": 20_800.0}
    found = ratios(result(), slow)
    assert found["  cold dit"] == pytest.approx(10)
    assert found["  warm dit"] == 1.0
    assert set(ratios(slow, slow).values()) == {1.0}


def test_a_figure_that_one_did_not_measure_is_left_out():
    """Catches a comparison that ends in a TypeError without prompt trials."""
    bare = {**result(), "prompt_to_photon_ms": None}
    assert "prompt to picture" not in comparison(result(), bare, ("a", "b"))


def test_the_command_compares_files(tmp_path: Path):
    """Catches a verdict that is printed and not in the JSON, or the other way round."""
    files = []
    for name, fps in (("a", 30.0), ("b", 36.0)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(result(fps)))
        files.append(str(path))
    out = io.StringIO()
    with redirect_stdout(out):
        assert main(["benchmark", "--compare", *files]) == 0
    *_, said, line = out.getvalue().splitlines()
    answer = json.loads(line)
    assert said == answer["verdict"] == verdict(result(30.0), result(36.0))
    assert answer["ratios"]["real-time factor at 16 fps"] == pytest.approx(30 / 36)


class ReaderLeft(io.StringIO):
    """A pipe that nobody reads any more."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("stdout", [None, ReaderLeft()], ids=["closed", "left"])
def test_a_result_is_kept_where_nobody_reads(
    stdout: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Catches minutes of measuring that are lost with the reader of a pipe, and a crash at None."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps(result()))
    out = tmp_path / "answer.json"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        status = main(["benchmark", "--compare", str(path), str(path), "--out", str(out)])
    assert "equally fast" in json.loads(out.read_text())["verdict"]
    assert (status == 0) is (stdout is None)
