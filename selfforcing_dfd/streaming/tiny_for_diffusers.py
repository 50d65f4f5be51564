"""Pipeline of an exported student of the tiny world. In an export: `tiny_pipeline.py`.

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(
        "FOLDER", custom_pipeline="tiny_pipeline", trust_remote_code=True
    )
    clip = pipe("a disc moves").frames[0]

diffusers loads it. The tiny world's words and codec are in selfforcing_dfd, which must be
installed.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from torch import Tensor

from selfforcing_dfd.streaming.for_diffusers import Student, noise_for, num_latent_frames
from selfforcing_dfd.tiny.codec import SPACE
from selfforcing_dfd.tiny.text import TinyText
from selfforcing_dfd.tiny.world import SIDE


class TinyStudentPipeline(DiffusionPipeline):
    """transformer: diffusers' WanTransformer3DModel. codec: `tiny_codec_for_diffusers`."""

    # of DiffusionPipeline, said again for type checkers
    transformer: Any
    codec: Any
    register_modules: Any
    _execution_device: Any

    def __init__(self, transformer: Any, codec: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, codec=codec)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_frames: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Any:
        """A clip for each prompt: frames, np float32 [B, T, H, W, 3] in [0, 1].

        noise: [draws, B, C, F, h, w], to be used in place of drawn noise.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        device = self._execution_device
        config = self.transformer.config
        student = Student(self.transformer, TinyText(config.text_dim).encode(prompts).to(device))
        if noise is None:
            frames = num_latent_frames(num_frames, student.recipe)
            side = SIDE // SPACE
            shape = (student.num_draws, len(prompts), config.in_channels, frames, side, side)
            noise = noise_for(shape, device, generator)
        latents = student.make(noise).transpose(1, 2)
        video = self.codec.decode(latents)[:, :num_frames]
        return WanPipelineOutput(frames=video.cpu().numpy())
