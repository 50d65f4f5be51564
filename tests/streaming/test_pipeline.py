"""The pipeline of diffusers for a student: the session's bits, with Wan's classes at tiny size."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from tiny_wan import HEIGHT, RECIPE, SIZES, WIDTH, save_wan_folder, tiny_parts, tiny_student

from selfforcing_dfd import rng
from selfforcing_dfd.models.hub import HubError
from selfforcing_dfd.models.identity import Recipe, TrainingData, mark
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.streaming.parts import LoadError
from selfforcing_dfd.streaming.pipeline import CausalWanPipeline, export_scheduler, prompt_seeds
from selfforcing_dfd.streaming.session import StreamSession, StreamSettings

PROMPT = "A red Disc moves left"  # capitals: a rebuilt tokenizer would not fold them
SIZE = {"height": HEIGHT, "width": WIDTH}


def make_pipeline(recipe: Recipe = RECIPE) -> CausalWanPipeline:
    made = CausalWanPipeline(tiny_student(recipe=recipe), *tiny_parts(), export_scheduler(recipe))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def pipe() -> CausalWanPipeline:
    return make_pipeline()


@pytest.fixture(scope="module")
def clip(pipe: CausalWanPipeline) -> torch.Tensor:
    """Two chunks, the length of the student's training clips."""
    return pipe(PROMPT, num_frames=21, seed=5, output_type="uint8", **SIZE).frames


@pytest.fixture(scope="module")
def export(pipe: CausalWanPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "my-student"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wan_folder(tmp_path_factory.mktemp("Wan2.1-T2V-1.3B-Diffusers"))


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


def test_the_usual_clip_is_the_training_clip(tmp_path):
    """Catches a size and a length that are typed in instead of taken from the student."""
    student = tiny_student()
    mark(student, "causal_student", RECIPE, TrainingData("wan-vae-0", "umt5-0", (2, 4)))
    pipe = CausalWanPipeline(student, *tiny_parts(), export_scheduler(RECIPE))
    pipe.set_progress_bar_config(disable=True)
    assert pipe(PROMPT, seed=5, output_type="uint8").frames.shape == (1, 21, 16, 32, 3)
    assert pipe.stream_model(height=32).video_size == (32, 32)
    pipe.save_pretrained(tmp_path / "export")
    assert "Trained for 32 x 16 pixels" in (tmp_path / "export" / "README.md").read_text()


def test_a_student_of_the_tiny_world_gets_no_wan_vae(wan, tmp_path):
    """Catches an export whose VAE shows noise: the tiny world's latents have Wan's shape."""
    student = tiny_student()
    mark(student, "causal_student", RECIPE, TrainingData("tiny-codec-1", "tiny-text-2", (8, 8)))
    student.save_pretrained(tmp_path / "student")
    with pytest.raises(LoadError, match=r"latents of the tiny world \(tiny-codec-1\)"):
        CausalWanPipeline.from_pretrained(wan, student=tmp_path / "student")


def test_an_export_comes_back_to_the_bit(export, clip):
    """Catches weights, recipe or tokenizer changed by a save."""
    again = CausalWanPipeline.from_pretrained(export)
    again.set_progress_bar_config(disable=True)
    assert again.recipe == RECIPE
    assert torch.equal(
        again(PROMPT, num_frames=21, seed=5, output_type="uint8", **SIZE).frames, clip
    )
    assert type(again.scheduler) is FlowMatchEulerDiscreteScheduler


def test_dtypes_are_those_asked_for(export):
    """Catches torch_dtype that reaches some parts only."""
    half = CausalWanPipeline.from_pretrained(export, dtype=torch.bfloat16)
    parts = (half.transformer, half.vae, half.text_encoder)
    assert {parameter.dtype for part in parts for parameter in part.parameters()} == {
        torch.bfloat16
    }
    mixed = CausalWanPipeline.from_pretrained(
        export, dtype={"transformer": torch.float16, "default": torch.float32}
    )
    assert (mixed.transformer.dtype, mixed.vae.dtype) == (torch.float16, torch.float32)


def test_strangers_read_the_parts(export):
    """Catches an export that needs this package to be opened at all."""
    twin = WanTransformer3DModel.from_pretrained(export, subfolder="transformer")
    wanted = tiny_student().state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in twin.state_dict().items())
    AutoencoderKLWan.from_pretrained(export, subfolder="vae")
    index = json.loads((export / "model_index.json").read_text())
    assert index["transformer"] == ["selfforcing_dfd.models.wan", "WanTransformer"]
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]


def test_the_exported_scheduler_takes_the_students_steps(export):
    """Catches a shift applied twice, or not at all, by whoever samples with diffusers' own loop."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(export, subfolder="scheduler")
    scheduler.set_timesteps(sigmas=[timestep / 1000 for timestep in RECIPE.ladder])
    assert scheduler.sigmas[:-1].tolist() == pytest.approx(RECIPE.sigmas, abs=1e-7)  # float32 there


def test_wans_repository_is_never_a_student(wan):
    """Catches the bidirectional transformer, which diffusers would load here without a word."""
    with pytest.raises(HubError, match=r"bidirectional.*student=PATH"):
        CausalWanPipeline.from_pretrained(wan)


def test_a_teacher_handed_in_is_refused(wan, pipe):
    """Catches the way around `from_pretrained`."""
    theirs: Any = WanTransformer3DModel.from_pretrained(wan, subfolder="transformer")
    unmarked = WanTransformer(**SIZES)
    for transformer, message in ((theirs, "bidirectional"), (unmarked, "does not say whether")):
        with pytest.raises(HubError, match=message):
            CausalWanPipeline(
                transformer, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler
            )


def test_wans_repository_with_a_student_is_the_export(wan, export, clip, tmp_path):
    """Catches a student that is loaded and not used, and a demand for parts that are not needed."""
    bare = shutil.copytree(
        wan, tmp_path / "bare", ignore=shutil.ignore_patterns("transformer", "scheduler")
    )
    mixed = CausalWanPipeline.from_pretrained(bare, student=export)
    mixed.set_progress_bar_config(disable=True)
    assert isinstance(mixed.transformer, WanTransformer)
    assert isinstance(mixed.scheduler, FlowMatchEulerDiscreteScheduler)
    assert torch.equal(
        mixed(PROMPT, num_frames=21, seed=5, output_type="uint8", **SIZE).frames, clip
    )


def test_an_adapter_changes_the_clip(export, clip, tmp_path):
    """Catches an adapter without effect.

    It must change the text's keys and values too, which are computed once.
    """
    adapted = make_pipeline()
    names = [f"transformer.blocks.0.attn2.to_v.lora_{half}.weight" for half in "AB"]
    tensors = {
        name: 0.2 * rng.normal(shape, 0, name)
        for name, shape in zip(names, ((2, 128), (128, 2)), strict=True)
    }
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    adapted.load_lora_weights(tmp_path)
    assert not torch.equal(
        adapted(PROMPT, num_frames=9, seed=5, output_type="uint8", **SIZE).frames, clip[:, :9]
    )
    adapted.transformer.disable_adapters()
    assert torch.equal(
        adapted(PROMPT, num_frames=9, seed=5, output_type="uint8", **SIZE).frames, clip[:, :9]
    )


def test_missing_parts_are_listed_with_their_commands(export, tmp_path):
    """Catches the first of many errors, each found after minutes of loading."""
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "transformer").symlink_to(export / "transformer")
    with pytest.raises(LoadError) as error:
        CausalWanPipeline.from_pretrained(tmp_path / "half")
    for part in ("vae", "text_encoder", "tokenizer"):
        assert (
            f"hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --include '{part}/*' --local-dir"
            in str(error.value)
        )


def test_pushing_waits_for_the_card(pipe, tmp_path):
    """Catches a repository whose card diffusers has replaced by an empty one."""
    with pytest.raises(ValueError, match="hf upload"):
        pipe.save_pretrained(tmp_path, push_to_hub=True)


def test_the_card_says_what_the_export_is(export):
    """Catches metadata that the hub cannot read, and numbers of another model."""
    card = ModelCard.load(export / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert (card.data.pipeline_tag, card.data.library_name) == ("text-to-video", "diffusers")
    assert "streaming" in card.data.tags
    assert "# my-student" in card.text
    for row in (
        "| ladder before the shift | 1000, 500 |",
        "| sigmas | 1, 0.75 |",
        "21 video frames",
    ):
        assert row in card.text
