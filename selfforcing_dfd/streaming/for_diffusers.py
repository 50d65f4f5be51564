"""Pipeline of an exported student for diffusers alone. In an export this file is `pipeline.py`.

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(
        "FOLDER", custom_pipeline="pipeline", trust_remote_code=True
    )
    clip = pipe("a red fox walks through snow").frames[0]

It needs torch, diffusers and transformers, and nothing of selfforcing_dfd. It makes clips of at
most the training length. Endless streams, which forget their past, need selfforcing_dfd.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

TIME = 4  # video frames of a latent frame; the first latent frame stands for one
SPACE = 8  # pixels of a latent pixel, in height and in width
SIZE = (480, 832)  # of Wan2.1, where the export does not state the training size
MAX_TOKENS = 512  # of a prompt
CLEAN = 0.0  # the noise level at which a finished chunk is remembered

KeyValue = tuple[Tensor, Tensor]


@dataclass
class Past:
    """What the layers share: the rotary positions of the present chunk."""

    rotary: KeyValue | None = None


@dataclass
class AttentionToPast:
    """Self-attention of a chunk to itself and to the chunks before it: a processor of diffusers.

    remembered: rotated keys and values of earlier chunks. newest: those of the last call.
    """

    past: Past
    remembered: list[KeyValue] = field(default_factory=list)
    newest: KeyValue | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: KeyValue | None = None,
    ) -> Tensor:
        """[B, tokens, D] -> the same. The given rotary_emb begins at frame 0 and is not used."""
        assert self.past.rotary is not None
        heads = (attn.heads, -1)
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, heads)
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, heads)
        value = attn.to_v(hidden_states).unflatten(2, heads)
        query = rotated(query, *self.past.rotary)
        self.newest = (rotated(key, *self.past.rotary), value)
        seen = [*self.remembered, self.newest]
        keys = torch.cat([each for each, _ in seen], dim=1)
        values = torch.cat([each for _, each in seen], dim=1)
        attended = scaled_dot_product_attention(
            query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        )
        projection, dropout = attn.to_out
        return dropout(projection(attended.transpose(1, 2).flatten(2)))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The pairs (x[2j], x[2j + 1]) of [B, tokens, heads, d], turned by their positions."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine = cos[..., 0::2]
    sine = sin[..., 0::2]
    turned = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)
    return turned.flatten(-2).to(x.dtype)


@dataclass
class Student:
    """A causal student: diffusers' Wan transformer that makes one chunk after the other.

    recipe: of its config: ladder, shift, chunk_frames, frames, noise, first_ladder and context.
    """

    transformer: Any  # WanTransformer3DModel
    text: Tensor  # [B, L, D_text], zeros past each prompt's end

    def __post_init__(self) -> None:
        self.recipe = dict(self.transformer.config["recipe"])
        if self.recipe.get("given"):
            raise ValueError(
                "this student begins with a picture, which pipeline.py cannot; use "
                "CausalWanPipeline of selfforcing_dfd"
            )
        self.past = Past()
        self.layers = [AttentionToPast(self.past) for _ in self.transformer.blocks]
        for block, layer in zip(self.transformer.blocks, self.layers, strict=True):
            block.attn1.set_processor(layer)

    def sigmas(self, is_first: bool) -> list[float]:
        """Noise levels of the first chunk's ladder, or of the others', under its shift."""
        shift = self.recipe["shift"]
        ladder = self.recipe["ladder"]
        if is_first and self.recipe.get("first_ladder"):
            ladder = self.recipe["first_ladder"]
        parts = [timestep / 1000 for timestep in ladder]
        return [shift * part / (1 + (shift - 1) * part) for part in parts]

    @property
    def num_draws(self) -> int:
        """Draws of noise that a clip takes: one if the noise is kept, else one a step."""
        if self.recipe["noise"] == "kept":
            return 1
        return max(len(self.sigmas(True)), len(self.sigmas(False)))

    def flow(self, x_t: Tensor, sigma: float) -> Tensor:
        """The flow at x_t [B, C, f, h, w], float32."""
        weight = self.transformer.patch_embedding.weight
        timestep = torch.full((len(x_t),), 1000 * sigma, device=x_t.device)
        found: Tensor = self.transformer(
            x_t.to(weight.dtype), timestep, self.text.to(weight.dtype), return_dict=False
        )[0]
        return found.float()

    def begin_chunk(self, start: int, like: Tensor) -> None:
        """Positions of the chunk at latent frame `start`, of the form of `like` [B, C, f, h, w]."""
        frames, rows, columns = like.shape[2:]
        so_far = like.new_empty(1, 1, start + frames, rows, columns)
        _, patch_rows, patch_columns = self.transformer.config.patch_size
        tokens = frames * (rows // patch_rows) * (columns // patch_columns)
        cos, sin = self.transformer.rope(so_far)
        # of a transformer that is offloaded, the tables may still be on the CPU
        self.past.rotary = (cos[:, -tokens:].to(like.device), sin[:, -tokens:].to(like.device))

    def remember(self, x0: Tensor) -> None:
        """Run the finished chunk once more, clean, and keep its keys and values.

        Or keep those of its last step, where the student was trained so.
        """
        if self.recipe.get("context", "clean") == "clean":
            self.flow(x0, CLEAN)
        for layer in self.layers:
            assert layer.newest is not None
            layer.remembered.append(layer.newest)

    def make(self, noise: Tensor) -> Tensor:
        """Clean latents [B, C, F, h, w] from noise [num_draws, B, C, F, h, w]."""
        made = []
        for start in range(0, noise.shape[3], self.recipe["chunk_frames"]):
            own = noise[:, :, :, start : start + self.recipe["chunk_frames"]]
            self.begin_chunk(start, own[0])
            x0 = self.denoise(own, self.sigmas(start == 0))
            self.remember(x0)
            made.append(x0)
        return torch.cat(made, dim=2)

    def denoise(self, noise: Tensor, levels: list[float]) -> Tensor:
        """One chunk, down a ladder of noise levels."""
        x_t = noise[0]
        x0 = x_t
        for step, sigma in enumerate(levels):
            flow = self.flow(x_t, sigma)
            x0 = x_t - sigma * flow
            if step + 1 < len(levels):
                kept = x_t + (1 - sigma) * flow
                other = kept if len(noise) == 1 else noise[step + 1]
                x_t = (1 - levels[step + 1]) * x0 + levels[step + 1] * other
        return x0


def num_latent_frames(num_frames: int | None, recipe: dict[str, Any]) -> int:
    """Whole chunks that hold these video frames. Raises ValueError beyond the training clips."""
    longest = 1 + TIME * (recipe["frames"] - 1)
    wanted = longest if num_frames is None else num_frames
    if not 1 <= wanted <= longest:
        raise ValueError(
            f"num_frames is {wanted}; this pipeline makes 1 to {longest}, the length of training "
            "clips. Longer videos forget their past: use CausalWanPipeline of selfforcing_dfd"
        )
    chunk = recipe["chunk_frames"]
    latent = 1 + -(-(wanted - 1) // TIME)
    return -(-latent // chunk) * chunk


def noise_for(
    shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Standard normal noise, drawn where the generator is."""
    source = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source).to(device)


class CausalStudentPipeline(WanPipeline):
    """diffusers' parts of Wan2.1 around a causal few-step student."""

    # of WanPipeline, said again for type checkers
    transformer: Any
    vae: Any
    video_processor: Any
    encode_prompt: Any
    _execution_device: Any
    maybe_free_model_hooks: Any

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
    ) -> Any:
        """A clip of num_frames video frames for each prompt; by default as in training.

        noise: [draws, B, C, F, h, w], to be used in place of drawn noise. output_type: np, pt, pil
        or latent. There are no steps, guidance or negative prompt: they belong to the teacher.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        device = self._execution_device
        text, _ = self.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=MAX_TOKENS,
            device=device,
        )
        student = Student(self.transformer, text)
        if noise is None:
            frames = num_latent_frames(num_frames, student.recipe)
            rows, columns = self.latent_size(height, width)
            channels = self.transformer.config.in_channels
            shape = (student.num_draws, len(prompts), channels, frames, rows, columns)
            noise = noise_for(shape, device, generator)
        latents = student.make(noise)
        video: Any = latents
        if output_type != "latent":
            video = self.decode(latents, num_frames, output_type)
        self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=video) if return_dict else (video,)

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Rows and columns of the latents; by default those of the training clips."""
        data = self.transformer.config.get("data") or {}
        rows, columns = data.get("latent_size") or (SIZE[0] // SPACE, SIZE[1] // SPACE)
        if height is not None:
            rows = height // SPACE
        if width is not None:
            columns = width // SPACE
        return rows, columns

    def decode(self, latents: Tensor, num_frames: int | None, output_type: str) -> Any:
        """The first video frames of latents as the transformer has them, normalised."""
        config = self.vae.config
        shape = (1, -1, 1, 1, 1)
        mean = torch.tensor(config.latents_mean, device=latents.device).view(shape)
        deviation = torch.tensor(config.latents_std, device=latents.device).view(shape)
        decoded = self.vae.decode((latents * deviation + mean).to(self.vae.dtype)).sample
        video = decoded[:, :, :num_frames].float()
        return self.video_processor.postprocess_video(video, output_type=output_type)
