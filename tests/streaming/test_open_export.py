"""Exports in diffusers' own hands: `pipeline.py` makes what our own code makes."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipeline import PROMPT, make_pipeline
from tiny_wan import HEIGHT, RECIPE, WIDTH

from selfforcing_dfd import rng
from selfforcing_dfd.context import Conditioning, KVCache
from selfforcing_dfd.rollout import plan_chunks, rollout
from selfforcing_dfd.streaming import for_diffusers
from selfforcing_dfd.streaming.export import save_tiny
from selfforcing_dfd.streaming.load import (
    TINY_STUDENT,
    load_stream_model,
    student_recipe,
    tiny_codec_file,
)
from selfforcing_dfd.streaming.pipeline import CausalWanPipeline
from selfforcing_dfd.weights.card import ModelFacts

pytestmark = pytest.mark.usefixtures("modules_cache")


def opened(folder: Path, name: str = "pipeline") -> Any:
    """As a stranger opens it. The pipeline's class is the one in the folder's file."""
    pipe: Any = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=name, trust_remote_code=True
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def our_latents(student: Any, noise: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """[B, C, F, h, w] by the rollout that training and streaming share."""
    recipe = student_recipe(student)
    chunks = plan_chunks(noise.shape[3], recipe.chunk_frames)
    draws = noise.transpose(2, 3)
    made = rollout(
        student,
        draws,
        Conditioning(text),
        KVCache(),
        recipe.sigmas,
        chunks,
        first_ladder=recipe.first_sigmas,
        commits=recipe.commits,
    )
    return made.x0.transpose(1, 2)


FEWER = {"first_ladder": (1000.0, 750.0, 500.0), "context": "last_step"}


@pytest.mark.parametrize(
    "changes", [{}, {"noise": "kept"}, FEWER], ids=["fresh", "kept", "fewer passes"]
)
def test_a_stranger_makes_the_same_clip(tmp_path, changes):
    """Catches a past, positions, ladder or noise that `pipeline.py` treats otherwise than we do."""
    recipe = dataclasses.replace(RECIPE, **changes)
    ours = make_pipeline(recipe)
    ours.save_pretrained(tmp_path)
    theirs = opened(tmp_path)
    assert type(theirs.transformer).__module__.startswith("diffusers.")
    draws = 1 if recipe.keeps_noise else max(len(recipe.ladder), len(recipe.first_ladder or ()))
    noise = rng.normal((draws, 1, 16, 6, HEIGHT // 8, WIDTH // 8), 0, "noise")
    found = theirs(PROMPT, noise=noise, output_type="latent").frames
    text = ours.stream_model(HEIGHT, WIDTH).text.encode([PROMPT])
    expected = our_latents(ours.transformer, noise, text)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    codec = ours.stream_model(HEIGHT, WIDTH).codec
    video = codec.start_decoding().decode(expected.transpose(1, 2))
    shown = theirs(PROMPT, noise=noise).frames
    torch.testing.assert_close(torch.from_numpy(shown), video, atol=1e-3, rtol=0)


def test_the_file_needs_nothing_of_ours():
    """Catches an import that a stranger does not have."""
    tree = ast.parse(Path(for_diffusers.__file__).read_text())
    named = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    named |= {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    libraries = {str(name).split(".")[0] for name in named}
    assert libraries == {"__future__", "dataclasses", "typing", "torch", "diffusers"}


def test_more_than_a_training_clip_is_refused(tmp_path):
    """Catches a clip beyond the length at which the student has seen all of its past."""
    make_pipeline().save_pretrained(tmp_path)
    theirs = opened(tmp_path)
    with pytest.raises(ValueError, match="num_frames is 22; this pipeline makes 1 to 21"):
        theirs(PROMPT, num_frames=22, height=HEIGHT, width=WIDTH)
    generator = torch.Generator().manual_seed(1)
    clip = theirs(PROMPT, num_frames=10, height=HEIGHT, width=WIDTH, generator=generator).frames
    assert clip.shape == (1, 10, HEIGHT, WIDTH, 3)
    again = CausalWanPipeline.from_pretrained(tmp_path)
    assert again.recipe == RECIPE, "our own class still reads it"


def test_the_tiny_students_export_is_opened_too(tmp_path):
    """Catches words, codec or steps of the tiny world that get lost in an export."""
    save_tiny(TINY_STUDENT, tmp_path, torch.float32, ModelFacts("tiny", base_model=""))
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    assert load_stream_model(checkpoint=str(weights), device="cpu").keeps_noise
    assert tiny_codec_file(weights).parent == weights.parent
    theirs = opened(tmp_path, "tiny_pipeline")
    assert type(theirs.transformer).__module__.startswith("diffusers.")
    model = load_stream_model(checkpoint=str(TINY_STUDENT), device="cpu")
    noise = rng.normal((1, 1, 16, 6, 8, 8), 0, "noise")
    expected = our_latents(model.student, noise, model.text.encode(["a cross moves"]))
    video = model.codec.start_decoding().decode(expected.transpose(1, 2)).clamp(0, 1)
    found = torch.from_numpy(theirs("a cross moves", noise=noise).frames)
    torch.testing.assert_close(found, video, atol=2e-3, rtol=0)
    card = (tmp_path / "README.md").read_text()
    assert "Trained for 64 x 64 pixels" in card
    assert "base_model" not in card
    assert "Wan-AI" not in card
