"""Two results side by side: what differs, what is better, and what cannot be told from noise."""

from __future__ import annotations

import io
import json
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


def result(fps: float = 30.0, std: float = 2.0, **facts: Any) -> dict[str, Any]:
    """A result of 100 chunks of 12 frames, std in ms, with other facts of its environment."""
    wall = 12_000 / fps
    split = {"text": 1.0, "noise": 2.0, "dit": 80.0, "vae": 20.0, "copy_and_rest": 2.0}
    times = {"p50": wall, "p95": wall, "p99": wall + 3 * std, "max": wall + 4 * std}
    environment = {"device": "GPU", "threads": 8, "git": "abc", "compile": False, "ladder": [1.0]}
    use = {"tflops_per_s": 100.0, "mfu": 0.1}
    return {
        "environment": {**environment, **facts},
        "num_steady_chunks": 100,
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
    assert words["frames a second, VAE included"] == words["a chunk, p50 (ms)"] == "better"
    assert words["first frame, warm (ms)"] == "equal"
    assert judged(after, before)["a chunk, p99 (ms)"][2] == "worse"


def test_what_noise_can_make_is_no_difference():
    """Catches a winner of two runs of one program, on a quiet machine and on a busy one.

    On the busy one intervals spread by half their mean: 100 chunks tell a pace to 5 %.
    """
    assert "equally fast" in verdict(result(30.0), result(30.5))
    busy = result(30.0, std=200.0)
    assert margin_of(busy, busy) == pytest.approx(3 * 2**0.5 * 0.05)
    assert "equally fast" in verdict(busy, result(35.0, std=200.0))
    assert "slower" in verdict(busy, result(20.0, std=200.0))


def test_other_work_gets_no_verdict():
    """Catches two machines taken for two versions; what a change may differ in is named only."""
    ours = result(30.0)
    theirs = result(60.0, threads=16, git="def")
    assert verdict(ours, theirs).startswith("verdict: none, since the two did not do the same work")
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
