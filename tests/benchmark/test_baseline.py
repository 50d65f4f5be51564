"""A clip by diffusers' own loop beside the stream's."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from selfforcing_dfd import rng
from selfforcing_dfd.benchmark import baseline
from selfforcing_dfd.benchmark.baseline import ClipTime, diffusers_pipeline, figures
from selfforcing_dfd.benchmark.headline import baseline_line
from selfforcing_dfd.benchmark.table import baseline_rows
from selfforcing_dfd.cli.main import main
from selfforcing_dfd.context import Conditioning
from selfforcing_dfd.models.identity import SELF_FORCING
from selfforcing_dfd.streaming.random_model import random_stream_model
from selfforcing_dfd.streaming.session import StreamModel, StreamSettings


@pytest.fixture(scope="module")
def plain() -> StreamModel:
    return random_stream_model("wan-tiny", "cpu")


def test_diffusers_has_the_same_network_and_vae(plain: StreamModel):
    """Catches a comparison with other weights, other sizes, or rotary tables left on meta.

    float32: sums in another order differ by 1e-6 of the flow.
    """
    pipeline = diffusers_pipeline(plain)
    x = rng.normal((1, 3, 16, 4, 6), 0, "x").float()
    text = rng.normal((1, 8, 32), 0, "text").float()
    with torch.no_grad():
        ours = plain.student(x, 0.5, Conditioning(text)).flow
        theirs = pipeline.transformer(
            x.transpose(1, 2), torch.tensor([500.0]), text, return_dict=False
        )[0].transpose(1, 2)
    assert (ours - theirs).norm() / ours.norm() < 1e-5
    assert pipeline.vae is plain.codec.vae  # type: ignore[attr-defined]


def test_both_make_one_clip_with_the_same_steps(
    plain: StreamModel, monkeypatch: pytest.MonkeyPatch
):
    """Catches guidance that doubles diffusers' passes, another number of frames, a cold trial."""
    monkeypatch.setattr(baseline, "SELF_FORCING", replace(SELF_FORCING, frames=6))
    made: list[int] = []
    calls: list[Any] = []
    whole = baseline.diffusers_pipeline

    def watched(model: StreamModel) -> Any:
        pipeline = whole(model)
        pipeline.transformer.register_forward_hook(lambda *_: calls.append("transformer"))
        show = pipeline.video_processor.postprocess_video

        def counted(video: torch.Tensor, **options: Any) -> Any:
            made.append(video.shape[2])
            return show(video, **options)

        pipeline.video_processor.postprocess_video = counted
        return pipeline

    monkeypatch.setattr(baseline, "diffusers_pipeline", watched)
    streamed: list[str] = []
    hook = plain.student.register_forward_hook(lambda *_: streamed.append("student"))
    result = baseline.compare_with_diffusers(plain, plain, StreamSettings(), compiled=False)
    hook.remove()
    clips = baseline.TRIALS + 1
    assert made == [21] * clips
    assert len(calls) == 4 * clips
    # two chunks of four steps; the second chunk commits the first one
    assert len(streamed) == (2 * 4 + 1) * clips
    assert (result["video_frames"], result["steps"]) == (21, 4)
    assert result["scheduler"] == "UniPCMultistepScheduler"
    for side in ("stream", "diffusers"):
        assert result[side]["fps"] == pytest.approx(21 / result[side]["clip_s"])
    assert result["stream"]["first_frame_ms"] < 1000 * result["stream"]["clip_s"]
    assert result["diffusers"]["first_frame_ms"] == 1000 * result["diffusers"]["clip_s"]


def test_medians_of_clips():
    """Catches a mean, which one slow clip moves, and milliseconds taken for seconds."""
    times = [ClipTime(0.1, 2.0), ClipTime(0.2, 4.0), ClipTime(0.3, 50.0)]
    assert figures(times, 80) == {"clip_s": 4.0, "fps": 20.0, "first_frame_ms": 200.0}


def test_a_line_and_rows_say_who_made_the_clip():
    """Catches figures of the two that change places."""
    result = {
        "video_frames": 81,
        "stream": {"fps": 20.0, "first_frame_ms": 150.0},
        "diffusers": {"fps": 8.0, "first_frame_ms": 9000.0},
    }
    (line,) = baseline_line(result)
    assert "8.0 frames a second of a clip of 81, first frame 9.00 s" in line
    assert line.endswith("the stream with the VAE 20.0, 150 ms")
    assert "the stream with the small decoder" in next(baseline_line(result, "small decoder"))
    rows = {name: value for name, value, _ in baseline_rows(result)}
    assert rows["clip by stream, FPS"] == 20.0
    assert rows["clip by diffusers, first frame"] == 9000.0
    assert set(dict.fromkeys(value for _, value, _ in baseline_rows({}))) == {None}
    assert list(baseline_line(None)) == []


def test_the_tiny_world_has_no_loop_of_diffusers(capsys: pytest.CaptureFixture[str]):
    """Catches minutes of measuring before an option is refused."""
    assert main(["benchmark", "--quick", "--baseline", "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert "add --random-weights wan1.3b" in captured.err
    assert captured.out == ""


def test_the_command_adds_it_to_the_result(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Catches an option without effect, and other steps or another dtype."""
    monkeypatch.setattr(baseline, "SELF_FORCING", replace(SELF_FORCING, frames=3))
    monkeypatch.setattr(baseline, "TRIALS", 1)
    sides: list[tuple[int, torch.dtype]] = []
    make = baseline.pipeline_clip

    def watched(pipeline: Any, plain: StreamModel, *rest: Any) -> ClipTime:
        sides.append((len(plain.ladder), plain.dtype))
        return make(pipeline, plain, *rest)

    monkeypatch.setattr(baseline, "pipeline_clip", watched)
    options = "--random-weights wan-tiny --chunks 1 --warmup 0 --prompt-trials 0 --window 3"
    words = [*options.split(), "--sink", "3", "--ladder", "1000,500", "--dtype", "bfloat16"]
    assert main(["benchmark", *words, "--baseline", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1])["baseline"]["video_frames"] == 9
    assert sides == [(2, torch.bfloat16)] * 2
    assert "diffusers' loop" in printed
