"""Saving and loading the pipeline: exports, adapters, dtypes, model cards, refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from tiny_pipeline import PROMPT, SIZE, make_pipeline
from tiny_wan import RECIPE, SIZES, tiny_parts, tiny_student

from selfforcing_dfd import rng
from selfforcing_dfd.models.hub import HubError
from selfforcing_dfd.models.identity import TrainingData, mark
from selfforcing_dfd.models.wan import WanTransformer
from selfforcing_dfd.streaming.load_wan import load_wan_model
from selfforcing_dfd.streaming.parts import LoadError
from selfforcing_dfd.streaming.pipeline import CausalWanPipeline, export_scheduler


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
    assert index["transformer"] == ["diffusers", "WanTransformer3DModel"]
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


def test_a_student_that_keeps_its_noise_says_so_to_everybody(wan, tmp_path):
    """Catches fresh noise in a stream, in the pipeline or in diffusers' own scheduler."""
    kept = dataclasses.replace(RECIPE, noise="kept")
    student = tiny_student()
    mark(student, "causal_student", kept, TrainingData("wan-vae-0", "umt5-0", (2, 4)))
    student.save_pretrained(tmp_path / "student")
    pipe = CausalWanPipeline.from_pretrained(wan, student=tmp_path / "student")
    assert pipe.stream_model().keeps_noise
    assert not pipe.scheduler.config.stochastic_sampling
    assert load_wan_model(wan, str(tmp_path / "student")).keeps_noise
    assert export_scheduler(RECIPE).config.stochastic_sampling
