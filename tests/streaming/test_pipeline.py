"""Calls of the pipeline: the same bits as the session, with Wan's classes at tiny size."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tiny_pipeline import PROMPT, SIZE, make_pipeline
from tiny_wan import HEIGHT, RECIPE, WIDTH

from selfforcing_dfd.streaming.pipeline import CausalWanPipeline, prompt_seeds
from selfforcing_dfd.streaming.session import StreamSession, StreamSettings


def session_frames(pipe: CausalWanPipeline, settings: StreamSettings, chunks: int) -> torch.Tensor:
    session = StreamSession(pipe.stream_model(HEIGHT, WIDTH), PROMPT, settings)
    return torch.cat([session.next_chunk().frames for _ in range(chunks)])


def test_a_call_is_the_session(pipe, clip):
    """Catches a second rollout that differs from the streaming one, and another window."""
    settings = StreamSettings(seed=5, sink_frames=0, window_frames=6, positions="absolute")
    assert torch.equal(clip[0], session_frames(pipe, settings, 2))
    assert clip.shape == (1, 21, HEIGHT, WIDTH, 3)


def test_a_longer_clip_is_the_endless_stream(pipe):
    """Catches a window longer than in training.

    Five chunks are fifteen latent frames, of which K = 12 are seen.
    """
    long = pipe(PROMPT, num_frames=57, seed=5, output_type="uint8", **SIZE).frames[0]
    assert torch.equal(
        long,
        torch.cat([chunk.frames for chunk in pipe.stream(PROMPT, num_chunks=5, seed=5, **SIZE)]),
    )


def test_a_clip_of_the_training_length_sees_all_of_its_past():
    """Catches a window shorter than in training.

    The same clip as above, with one setting changed.
    """
    pipe = make_pipeline(dataclasses.replace(RECIPE, frames=15))
    clip = pipe(PROMPT, num_frames=57, seed=5, output_type="uint8", **SIZE).frames[0]
    settings = StreamSettings(seed=5, sink_frames=0, window_frames=15, positions="absolute")
    assert torch.equal(clip, session_frames(pipe, settings, 5))
    assert not torch.equal(clip, session_frames(pipe, StreamSettings(seed=5), 5))


@pytest.mark.parametrize("num_frames", [1, 9, 10, 20])
def test_any_number_of_video_frames_is_a_beginning(pipe, clip, num_frames):
    """Catches counts that are rounded, and a clip that depends on where a chunk is cut."""
    part = pipe(PROMPT, num_frames=num_frames, seed=5, output_type="uint8", **SIZE).frames
    assert torch.equal(part, clip[:, :num_frames])


def test_output_types_are_one_video(pipe, clip):
    """Catches channels in the wrong place, values outside [0, 1], and rounding between types."""
    made = {
        kind: pipe(PROMPT, num_frames=9, seed=5, output_type=kind, **SIZE).frames
        for kind in ("np", "pt", "pil")
    }
    wanted = clip[:, :9].numpy()
    assert made["np"].dtype == np.float32
    assert np.array_equal(np.round(made["np"] * 255), wanted)
    assert np.array_equal((made["pt"] * 255).round().permute(0, 1, 3, 4, 2).numpy(), wanted)
    assert np.array_equal(np.stack([np.asarray(frame) for frame in made["pil"][0]]), wanted[0])
    (plain,) = pipe(PROMPT, num_frames=9, seed=5, return_dict=False, **SIZE)
    assert np.array_equal(plain, made["np"])


def test_prompts_of_a_list_are_each_alone(pipe, clip):
    """Catches prompts that share noise or depend on each other.

    A prompt's place in the list changes its seed only.
    """
    both = pipe(["a blue cross", PROMPT], num_frames=9, seed=4, output_type="uint8", **SIZE).frames
    assert torch.equal(both[1], clip[0, :9])
    assert not torch.equal(both[0], both[1])


def test_a_generator_names_its_video():
    """Catches a generator that is ignored, and one whose second call repeats the first.

    In diffusers the second call never does.
    """
    one, other = (torch.Generator().manual_seed(3) for _ in range(2))
    first = prompt_seeds(2, None, one)
    assert first == prompt_seeds(2, None, other)
    assert len({*first, *prompt_seeds(2, None, one)}) == 4
    assert (
        prompt_seeds(2, None, [torch.Generator().manual_seed(3) for _ in range(2)])
        == [first[0]] * 2
    )
    torch.manual_seed(0)
    unasked = prompt_seeds(1, None, None)
    assert unasked != prompt_seeds(1, None, None)
    torch.manual_seed(0)
    assert unasked == prompt_seeds(1, None, None)


def test_a_generator_reaches_the_noise(pipe):
    """Catches seeds that are drawn and then not used."""
    videos = [
        pipe(
            PROMPT,
            num_frames=9,
            generator=torch.Generator().manual_seed(seed),
            output_type="uint8",
            **SIZE,
        ).frames
        for seed in (3, 3, 4)
    ]
    assert torch.equal(videos[0], videos[1])
    assert not torch.equal(videos[0], videos[2])


def test_the_callback_sees_chunks_and_can_end_the_call(pipe, clip):
    """Catches a callback that is called too late to stop anything."""
    seen = []

    def callback(caller: CausalWanPipeline, chunk: Any) -> None:
        seen.append(chunk.chunk_index)
        caller._interrupt = True

    made = pipe(
        PROMPT, 21, seed=5, output_type="uint8", callback_on_chunk_end=callback, **SIZE
    ).frames
    assert seen == [0]
    assert torch.equal(made, clip[:, :9])
    assert len(pipe(PROMPT, 21, seed=5, output_type="uint8", **SIZE).frames[0]) == 21, (
        "the next call is whole again"
    )


def test_progress_counts_chunks(pipe, monkeypatch):
    """Catches a bar that never ends, or counts something that the user cannot see."""
    bars = []
    monkeypatch.setattr(
        pipe, "progress_bar", lambda **options: bars.append(Bar(**options)) or bars[-1]
    )
    pipe([PROMPT, PROMPT], num_frames=10, seed=0, **SIZE)
    assert [(bar.total, bar.count) for bar in bars] == [(4, 4)]


class Bar:
    def __init__(self, total: int):
        self.total = total
        self.count = 0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self) -> None:
        self.count += 1


def test_a_stream_has_no_end_and_takes_prompts(pipe):
    """Catches a stream that stops by itself, and a prompt that does not arrive."""
    plain, changed = (pipe.stream(PROMPT, seed=1, **SIZE) for _ in range(2))
    assert isinstance(plain, Iterator)
    next(changed)
    changed.set_prompt("a blue cross", "flush")
    one, two = (
        list(itertools.islice(stream, count)) for stream, count in ((plain, 3), (changed, 2))
    )
    assert changed.session.prompt == "a blue cross"
    assert not torch.equal(one[1].frames, two[0].frames)
    assert [len(chunk.frames) for chunk in one] == [9, 12, 12]


def test_a_stream_goes_on_from_a_clip(pipe, clip):
    """Catches a context that is dropped on its way."""
    stream = pipe.stream(PROMPT, 1, seed=1, context=clip[0, :9].float() / 255, **SIZE)
    assert len(stream.session.context_frames) == 9
    assert [len(chunk.frames) for chunk in stream] == [12]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 40}, "height is 40; the model needs multiples of 16: use 32 or 48"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"output_type": "mp4"}, "use one of np, pt, pil, uint8"),
        ({"seed": 1, "generator": torch.Generator()}, "both seed and generator"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 prompts"),
        ({"num_inference_steps": 50}, "distilled to 2 steps, its ladder; leave num_inference"),
        ({"guidance_scale": 5.0}, "guidance was distilled into this student's weights"),
        ({"negative_prompt": "blurry"}, "negative_prompt acts through guidance"),
    ],
)
def test_mistakes_are_explained(pipe, arguments, message):
    """Catches tracebacks from the depths."""
    with pytest.raises(ValueError, match=message):
        pipe(PROMPT, **{**SIZE, **arguments})


def test_the_students_own_steps_and_guidance_are_accepted(pipe, clip):
    """Catches a refusal of values that change nothing, as a loop over pipelines passes them."""
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "negative_prompt": ""}
    made = pipe(PROMPT, num_frames=9, seed=5, output_type="uint8", **SIZE, **options).frames
    assert torch.equal(made, clip[:, :9])
