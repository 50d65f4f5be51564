"""Wan2.1's transformer, one class for student, teacher and fake score.

Parameter names are those of diffusers' `WanTransformer3DModel`, so its checkpoints load unchanged.
What differs is the interface: sigma per latent frame, explicit context in, keys and values out.
Without context it is bidirectional over the frames it gets; with context it is causal by chunk.
There are no attention masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, silu

from selfforcing_dfd.context import (
    WHOLE_CLIP,
    Attention,
    ChunkKV,
    Conditioning,
    Context,
    NetworkOutput,
)
from selfforcing_dfd.flow import expand_sigma
from selfforcing_dfd.models.attention import attend, installed_kernels, load_kernel, select_kernel
from selfforcing_dfd.models.hub import HubMixin
from selfforcing_dfd.models.rope import positions_rotary, rotate


def full_precision(x: Tensor) -> Tensor:
    """Half types as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class ParameterFreeNorm(nn.Module):
    """LayerNorm without weights, computed in float32 at least."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(full_precision(x), (self.dim,), eps=self.eps)


class Modulation(NamedTuple):
    """What a noise level does to one block, each [B or 1, F or 1, D]; scales are factors, one
    included.
    """

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor


class NoiseLevel(NamedTuple):
    """What a noise level does to the whole network: per block its modulation, and the head's
    (shift, scale).
    """

    blocks: tuple[Tensor | Modulation, ...]
    head: tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class PreparedConditioning(Conditioning):
    """Conditioning with what every call of one network would compute again, made by `prepare`.

    text_kv: per block the (k, v) of cross-attention. noise_levels: by sigma.
    """

    text_kv: tuple[tuple[Tensor, Tensor], ...]
    noise_levels: Mapping[float, NoiseLevel]


class WanAttention(nn.Module):
    """Projections with RMS-normed queries and keys (over all heads jointly); the caller decides who
    attends to whom.
    """

    def __init__(self, dim: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q, self.norm_k = (nn.RMSNorm(dim, eps) for _ in range(2))

    def queries(self, x: Tensor) -> Tensor:
        return self.norm_q(self.to_q(x)).unflatten(-1, (self.heads, -1))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.norm_k(self.to_k(x)), self.to_v(x)
        return k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))

    def output(self, attended: Tensor) -> Tensor:
        return self.to_out[0](attended.flatten(2))


class GeluProjection(nn.Module):
    """Linear, then GELU in its tanh form."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Two layers; index 1 is the dropout that Wan does not use, kept so that names match."""

    def __init__(self, dim: int, inner_dim: int):
        super().__init__()
        self.net = nn.Sequential(
            GeluProjection(dim, inner_dim), nn.Identity(), nn.Linear(inner_dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class WanBlock(nn.Module):
    """Self-attention, text cross-attention, feed-forward; the first and last modulated by sigma per
    latent frame.
    """

    def __init__(self, dim: int, ffn_dim: int, heads: int, eps: float):
        super().__init__()
        self.norm1, self.norm3 = ParameterFreeNorm(dim, eps), ParameterFreeNorm(dim, eps)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.attn1, self.attn2 = WanAttention(dim, heads, eps), WanAttention(dim, heads, eps)
        self.ffn = FeedForward(dim, ffn_dim)
        self.attend: Attention = attend
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: Tensor,
        text: Tensor | tuple[Tensor, Tensor],
        modulation: Tensor | Modulation,
        rotary: tuple[Tensor, Tensor],
        context: Context,
        layer: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x: [B, F * tokens, D]; text: [B, L, D], or its keys and values; modulation: [B, F, 6, D]
        -> (x, keys, values).
        """
        text_k, text_v = self.attn2.keys_values(text) if isinstance(text, Tensor) else text
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(modulation)
        q, k, v = self.before_attention(x, shift1, scale1, *rotary)
        attended = context.attend(self.attend, layer, q, k, v)
        return self.after_attention(x, attended, gate1, shift2, scale2, gate2, text_k, text_v), k, v

    def modulation(self, embedding: Tensor | Modulation) -> Modulation:
        """This block's of a noise level's embedding [B, F, 6, D], if it has not been worked out."""
        if isinstance(embedding, Modulation):
            return embedding
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.scale_shift_table[:, None] + embedding
        ).unbind(2)
        return Modulation(shift1, 1 + scale1, gate1, shift2, 1 + scale2, gate2)

    def before_attention(
        self, x: Tensor, shift: Tensor, scale: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, each [B, F * tokens, heads, d]."""
        normed = modulate(self.norm1(x), scale, shift).type_as(x)
        q, (k, v) = self.attn1.queries(normed), self.attn1.keys_values(normed)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def after_attention(
        self,
        x: Tensor,
        attended: Tensor,
        gate1: Tensor,
        shift: Tensor,
        scale: Tensor,
        gate2: Tensor,
        text_k: Tensor,
        text_v: Tensor,
    ) -> Tensor:
        """The rest of the block: attended is self-attention's [B, F * tokens, heads, d]."""
        x = add_gated(x, self.attn1.output(attended), gate1)
        x = x + self.attn2.output(self.attend(self.attn2.queries(self.norm2(x)), text_k, text_v))
        return add_gated(x, self.ffn(modulate(self.norm3(x), scale, shift).type_as(x)), gate2)


def sigma_per_frame(sigma: Tensor | float, x_t: Tensor) -> Tensor:
    """Sigma [B] or [B, F] as [B, F], which is what the network is told; a number as [1, 1] in
    float64, good for all.
    """
    if isinstance(sigma, Tensor):
        return expand_sigma(sigma, x_t)[..., 0, 0, 0].expand(x_t.shape[:2])
    return torch.full((1, 1), sigma, dtype=torch.float64, device=x_t.device)


def add_gated(x: Tensor, y: Tensor, values: Tensor) -> Tensor:
    """x + y * values in float32 at least; x, y: [B, F * tokens, D]; values: [B, F, D], one for each
    latent frame's tokens.

    Where values are the same for all latent frames, [1, 1, D] will do.
    """
    frames = (values.shape[1], -1)
    sums = torch.addcmul(
        full_precision(x).unflatten(1, frames), y.unflatten(1, frames), values[:, :, None]
    )
    return sums.flatten(1, 2).type_as(x)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x [B, F * tokens, D] times scale plus shift; scale, shift: [B, F, D], or [1, 1, D] where they
    are the same.
    """
    return torch.addcmul(
        shift[:, :, None], x.unflatten(1, (scale.shape[1], -1)), scale[:, :, None]
    ).flatten(1, 2)


class TwoLayers(nn.Module):
    """linear_1, an activation, linear_2: Wan's time and text embedders."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(in_dim, dim), nn.Linear(dim, dim)


class ConditionEmbedder(nn.Module):
    """Noise level and text as the blocks want them."""

    def __init__(self, dim: int, freq_dim: int, text_dim: int):
        super().__init__()
        self.freq_dim = freq_dim
        self.time_embedder = TwoLayers(freq_dim, dim)
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = TwoLayers(text_dim, dim)

    def time(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """sigma [B, F] -> (embedding [B, F, D], modulation [B, F, 6, D])."""
        features = sinusoid(1000 * sigma.double(), self.freq_dim).to(
            self.time_embedder.linear_1.weight.dtype
        )
        embedding = self.time_embedder.linear_2(silu(self.time_embedder.linear_1(features)))
        return embedding, self.time_proj(silu(embedding)).unflatten(-1, (6, -1))

    def text(self, text: Tensor) -> Tensor:
        """[B, L, D_text] -> [B, L, D]; padding is attended to, as in Wan."""
        return self.text_embedder.linear_2(
            gelu(self.text_embedder.linear_1(text), approximate="tanh")
        )


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """[...] -> [..., dim]: cosines, then sines, of timestep * 10000^(-k / (dim / 2)); float64."""
    frequency = 10000 ** -(
        torch.arange(dim // 2, dtype=torch.float64, device=timestep.device) / (dim // 2)
    )
    angle = timestep[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class WanTransformer(HubMixin, ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """Flow-predicting transformer over latents [B, F, C, H, W]."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ["WanBlock"]  # type: ignore[assignment]
    _repeated_blocks = ["WanBlock"]

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 12,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 8960,
        num_layers: int = 30,
        eps: float = 1e-6,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.head_dim, self.patch = (
            attention_head_dim,
            (patch_size[0], patch_size[1], patch_size[2]),
        )
        self.patch_embedding = nn.Conv3d(in_channels, dim, self.patch, stride=self.patch)
        self.condition_embedder = ConditionEmbedder(dim, freq_dim, text_dim)
        self.blocks = nn.ModuleList(
            WanBlock(dim, ffn_dim, num_attention_heads, eps) for _ in range(num_layers)
        )
        self.norm_out = ParameterFreeNorm(dim, eps)
        self.proj_out = nn.Linear(dim, out_channels * self.patch[0] * self.patch[1] * self.patch[2])
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.gradient_checkpointing = False
        self.attention_backend = "sdpa"

    def set_attention(self, name: str = "auto") -> str:
        """Choose the attention kernel for where the weights now are: auto, sdpa, fa2, fa3 or fa4;
        which it is.

        Until this is called it is torch's SDPA. Raises AttentionError for a kernel that cannot run
        here.
        """
        weight = self.patch_embedding.weight
        capability = torch.cuda.get_device_capability(weight.device) if weight.is_cuda else None
        self.attention_backend = select_kernel(
            capability, weight.dtype, self.head_dim, installed_kernels(), name
        )
        for block in self.wan_blocks():
            block.attend = load_kernel(self.attention_backend, weight.device)
        return self.attention_backend

    def compile_blocks(self, **options: Any) -> None:
        """torch.compile what lies between attentions, in every block; attention itself stays as it
        is.

        So a ring's slots are no part of what is compiled: one program a shape serves every chunk.
        The first calls of each shape compile, for seconds to minutes.
        """
        for block in self.wan_blocks():
            for name in ("before_attention", "after_attention"):
                setattr(block, name, torch.compile(getattr(block, name), dynamic=False, **options))

    def forward(
        self,
        x_t: Tensor,
        sigma: Tensor | float,
        conditioning: Conditioning,
        context: Context | None = None,
    ) -> NetworkOutput:
        """Flow at x_t [B, F, C, H, W] for noise level sigma ([B], [B, F] or one number), seen from
        the given past.

        Raises ValueError when H or W is no multiple of the patch.
        """
        context = context or WHOLE_CLIP
        tokens, grid = self.patchify(x_t)
        level = self.level_of(sigma, x_t, conditioning)
        text = self.text_of(conditioning)
        precision = full_precision(tokens).dtype
        rotary = positions_rotary(
            context.next_frame, *grid, self.head_dim, tokens.device, precision
        )
        layers = []
        for layer, block in enumerate(self.blocks):
            tokens, k, v = self.run_block(
                block, tokens, text[layer], level.blocks[layer], rotary, context, layer
            )
            layers += [(k, v)] if context.wants_kv else []
        shift, scale = level.head
        tokens = modulate(self.norm_out(tokens), scale, shift).type_as(tokens)
        return NetworkOutput(
            self.unpatchify(self.proj_out(tokens), grid), ChunkKV(x_t.shape[1], tuple(layers))
        )

    def wan_blocks(self) -> tuple[WanBlock, ...]:
        return tuple(block for block in self.blocks if isinstance(block, WanBlock))

    def text_of(self, conditioning: Conditioning) -> tuple[Tensor | tuple[Tensor, Tensor], ...]:
        """For each block the embedded text, or its keys and values where they were prepared."""
        if isinstance(conditioning, PreparedConditioning):
            return conditioning.text_kv
        return (self.embed_text(conditioning),) * len(self.blocks)

    def embed_text(self, conditioning: Conditioning) -> Tensor:
        """[B, L, D], which every block makes its own keys and values of."""
        return self.condition_embedder.text(conditioning.text.type_as(self.patch_embedding.weight))

    def level_of(
        self, sigma: Tensor | float, x_t: Tensor, conditioning: Conditioning
    ) -> NoiseLevel:
        """What sigma does to every block; of a number that `prepare` was told, what it found."""
        if isinstance(conditioning, PreparedConditioning) and not isinstance(sigma, Tensor):
            if sigma in conditioning.noise_levels:
                return conditioning.noise_levels[sigma]
        embedding, modulation = self.condition_embedder.time(sigma_per_frame(sigma, x_t))
        shift, scale = (self.scale_shift_table[:, None] + embedding[:, :, None]).unbind(2)
        return NoiseLevel((modulation,) * len(self.blocks), (shift, 1 + scale))

    def prepare(
        self, conditioning: Conditioning, sigmas: tuple[float, ...] = ()
    ) -> PreparedConditioning:
        """The same conditioning, with the text's K/V and these noise levels computed once."""
        text = self.embed_text(conditioning)
        noise_levels = {}
        for sigma in sigmas:
            (embedding, *_), head = self.level_of(sigma, text, Conditioning(conditioning.text))
            modulations = tuple(block.modulation(embedding) for block in self.wan_blocks())
            noise_levels[sigma] = NoiseLevel(modulations, head)
        text_kv = tuple(block.attn2.keys_values(text) for block in self.wan_blocks())
        return PreparedConditioning(conditioning.text, text_kv, noise_levels)

    def run_block(self, block: nn.Module, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """One block, re-computed in the backward pass when gradient checkpointing is on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *inputs)  # type: ignore[misc]
        return block(*inputs)

    def patchify(self, x_t: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """[B, F, C, H, W] -> tokens [B, F * rows * columns, D] and the grid (F, rows, columns)."""
        frames, _, height, width = x_t.shape[1:]
        if frames % self.patch[0] or height % self.patch[1] or width % self.patch[2]:
            raise ValueError(
                f"latents are {tuple(x_t.shape)} [B, F, C, H, W]; F, H, W must be multiples of the patch {self.patch}: "
                f"encode the video at a height and width divisible by {8 * self.patch[1]}"
            )
        embedded = self.patch_embedding(x_t.transpose(1, 2).type_as(self.patch_embedding.weight))
        grid = (embedded.shape[2], embedded.shape[3], embedded.shape[4])
        # one layout for all blocks: one program
        return embedded.flatten(2).transpose(1, 2).contiguous(), grid

    def unpatchify(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Inverse of `patchify` for the network's output; the channel is the fastest index of a
        token's values.
        """
        (frames, rows, columns), (pf, ph, pw) = grid, self.patch
        x = tokens.unflatten(2, (pf, ph, pw, -1)).unflatten(1, grid)
        x = x.permute(0, 1, 4, 7, 2, 5, 3, 6)  # B, F, pf, C, rows, ph, columns, pw
        return x.reshape(tokens.shape[0], frames * pf, -1, rows * ph, columns * pw)

    def init_weights(self, generator: torch.Generator) -> None:
        """Wan's own initialisation for training from nothing: Xavier projections, small embedders,
        a zero head.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "embedder" in name:
                nn.init.normal_(parameter, std=0.02, generator=generator)
            elif name == "proj_out.weight":
                nn.init.zeros_(parameter)
            elif "scale_shift_table" in name:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
            elif parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter.flatten(1), generator=generator)
