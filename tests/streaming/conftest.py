"""A tiny pipeline, one clip of it, its export, and a folder of Wan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_pipeline import PROMPT, SIZE, make_pipeline
from tiny_wan import save_wan_folder

from selfforcing_dfd.streaming.pipeline import CausalWanPipeline


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
