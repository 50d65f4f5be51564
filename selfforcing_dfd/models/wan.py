"""Wan2.1's transformer, one class for student, teacher and fake score.

Parameter names are those of diffusers' `WanTransformer3DModel`, so its checkpoints load unchanged.
What differs is the interface: sigma per latent frame, explicit context in, keys and values out.
Without context it is bidirectional over the frames it gets; with context it is causal by chunk.
There are no attention masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from selfforcing_dfd.common import UserError
from selfforcing_dfd.context import WHOLE_CLIP, ChunkKV, Conditioning, Context, NetworkOutput
from selfforcing_dfd.models.adapters import run_adapted
from selfforcing_dfd.models.attention_choice import Choice, Trial, choose_attention
from selfforcing_dfd.models.attention_operator import KernelAttention, SlotContext, Slots
from selfforcing_dfd.models.hub import HubMixin
from selfforcing_dfd.models.layers import (
    ConditionEmbedder,
    FeedForward,
    ParameterFreeNorm,
    WanAttention,
    add_gated,
    full_precision,
    modulate,
    sigma_per_frame,
)
from selfforcing_dfd.models.lora import LoraMixin
from selfforcing_dfd.models.rope import positions_rotary, rotate
from selfforcing_dfd.models.sequence_parallel import SequenceParallel


class Modulation(NamedTuple):
    """A noise level for one block, each [B or 1, F or 1, D]. Scales are factors: 1 is added."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor


class NoiseLevel(NamedTuple):
    """A noise level for the whole network: modulation of each block, (shift, scale) of the head.

    A block's modulation may still be the embedding [B, F, 6, D] that it is computed from.
    """

    blocks: tuple[Tensor | Modulation, ...]
    head: tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class PreparedConditioning(Conditioning):
    """Conditioning with what every call would compute again; made by `WanTransformer.prepare`.

    text_kv: per block the (k, v) of cross-attention. noise_levels: by sigma.
    """

    text_kv: tuple[tuple[Tensor, Tensor], ...]
    noise_levels: Mapping[float, NoiseLevel]


class WanBlock(nn.Module):
    """Self-attention, text cross-attention and feed-forward.

    Self-attention and feed-forward are modulated by the noise level of each latent frame.
    """

    def __init__(self, dim: int, ffn_dim: int, heads: int, eps: float):
        super().__init__()
        self.norm1 = ParameterFreeNorm(dim, eps)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.norm3 = ParameterFreeNorm(dim, eps)
        self.attn1 = WanAttention(dim, heads, eps)
        self.attn2 = WanAttention(dim, heads, eps)
        self.ffn = FeedForward(dim, ffn_dim)
        self.attend = KernelAttention()
        self.is_compiled = False
        self.sequence_parallel: SequenceParallel | None = None  # None: this process has all tokens
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: Tensor,
        text: Tensor | tuple[Tensor, Tensor],
        modulation: Tensor | Modulation,
        rotary: tuple[Tensor, Tensor],
        context: Context,
        layer: int,
        frames: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x: [B, F * tokens, D] -> (x, keys, values). Of a sequence on several processes: its part.

        text: [B, L, D], or its keys and values. modulation: the embedding [B, F, 6, D], or this
        block's. frames: F of the patches. What is not prepared is computed in here and not by the
        caller, so that gradient checkpointing and sharding, which wrap this call, cover it.
        """
        text_k, text_v = self.attn2.keys_values(text) if isinstance(text, Tensor) else text
        modulation = self.modulation(modulation)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        if self.is_compiled and self.sequence_parallel is None and isinstance(context, SlotContext):
            slots = context.slots(layer)
            return self.over_slots(x, (text_k, text_v), modulation, rotary, slots)
        q, k, v = self.before_attention(x, shift1, scale1, *rotary)
        if self.sequence_parallel is None:
            attended = context.attend(self.attend, layer, q, k, v)
        else:
            q, k, v = self.sequence_parallel.split_heads((q, k, v), frames)
            attended = context.attend(self.attend, layer, q, k, v)
            attended = self.sequence_parallel.join_heads(attended, frames)
        return self.after_attention(x, attended, gate1, shift2, scale2, gate2, text_k, text_v), k, v

    def modulation(self, embedding: Tensor | Modulation) -> Modulation:
        """This block's modulation from the embedding [B, F, 6, D], unless it is one already."""
        if isinstance(embedding, Modulation):
            return embedding
        sums = self.scale_shift_table.unsqueeze(1) + embedding
        shift1, scale1, gate1, shift2, scale2, gate2 = sums.unbind(2)
        return Modulation(shift1, 1 + scale1, gate1, shift2, 1 + scale2, gate2)

    def over_slots(
        self,
        x: Tensor,
        text: tuple[Tensor, Tensor],
        modulation: Modulation,
        rotary: tuple[Tensor, Tensor],
        slots: Slots,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The whole block over keys and values in slots: what is compiled for a stream."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        q, k, v = self.before_attention(x, shift1, scale1, *rotary)
        attended = slots.attend(self.attend, q, k, v)
        return self.after_attention(x, attended, gate1, shift2, scale2, gate2, *text), k, v

    def before_attention(
        self, x: Tensor, shift: Tensor, scale: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, each [B, F * tokens, heads, d]."""
        normed = modulate(self.norm1(x), scale, shift).type_as(x)
        q = self.attn1.queries(normed)
        k, v = self.attn1.keys_values(normed)
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
        """The rest of the block. attended: self-attention's output [B, F * tokens, heads, d]."""
        x = add_gated(x, self.attn1.output(attended), gate1)
        x = x + self.attn2.output(self.attend(self.attn2.queries(self.norm2(x)), text_k, text_v))
        return add_gated(x, self.ffn(modulate(self.norm3(x), scale, shift).type_as(x)), gate2)


class WanTransformer(HubMixin, LoraMixin, ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
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
        self.head_dim = attention_head_dim
        self.patch = (patch_size[0], patch_size[1], patch_size[2])
        self.patch_embedding = nn.Conv3d(in_channels, dim, self.patch, stride=self.patch)
        self.condition_embedder = ConditionEmbedder(dim, freq_dim, text_dim)
        self.blocks = nn.ModuleList(
            WanBlock(dim, ffn_dim, num_attention_heads, eps) for _ in range(num_layers)
        )
        self.norm_out = ParameterFreeNorm(dim, eps)
        self.proj_out = nn.Linear(dim, out_channels * self.patch[0] * self.patch[1] * self.patch[2])
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.gradient_checkpointing = False
        self.attention = Choice()
        self.sequence_parallel: SequenceParallel | None = None
        self.adapter = ""  # which adapters work in the present call, see models/adapted.py

    def set_attention(
        self,
        name: str = "auto",
        compute: torch.dtype | None = None,
        lengths: tuple[int, int] | None = None,
    ) -> Choice:
        """Choose the attention kernel for the weights' present device.

        name: auto or a kernel's. compute: the dtype in which the network will run; None is that of
        its weights. lengths: tokens of the queries and keys of a typical call, on which `auto`
        measures the kernels; None: it takes the first that fits. Before the first call it is
        torch's SDPA. Raises AttentionError for a kernel that cannot run here.
        """
        weight = self.patch_embedding.weight
        weight = weight if compute is None else weight.to(compute)
        heads = self.config["num_attention_heads"]
        trial = None if lengths is None else Trial(*lengths, heads, self.head_dim)
        self.attention = choose_attention(weight, self.head_dim, name, trial)
        for block in self.wan_blocks():
            block.attend = self.attention.attention
        return self.attention

    def share_sequence(self, sequence_parallel: SequenceParallel) -> None:
        """From now on each sequence is on all processes of the group, which call together.

        K/V that come out and that are kept have a part of the heads. Raises UserError for a number
        of processes that does not divide the heads.
        """
        sequence_parallel.check_heads(self.config["num_attention_heads"])
        self.sequence_parallel = sequence_parallel
        for block in self.wan_blocks():
            block.sequence_parallel = sequence_parallel

    @property
    def own_heads(self) -> int:
        """Heads of the keys and values on this process."""
        heads: int = self.config["num_attention_heads"]
        return heads // self.sequence_parallel.size if self.sequence_parallel else heads

    def compile_blocks(self, **options: Any) -> None:
        """Compile the blocks: for a stream each as one program, else the code between attentions.

        Attention is one operator, so no kernel is compiled. What moves in a stream, such as slots
        and positions, is in tensors, so one program serves all blocks, steps and chunks. The first
        calls of each shape compile, for seconds to minutes.
        """
        for block in self.wan_blocks():
            for name in ("over_slots", "before_attention", "after_attention"):
                setattr(block, name, torch.compile(getattr(block, name), dynamic=False, **options))
            block.is_compiled = True

    def forward(
        self,
        x_t: Tensor,
        sigma: Tensor | float,
        conditioning: Conditioning,
        context: Context | None = None,
    ) -> NetworkOutput:
        """Flow at x_t [B, F, C, H, W] for noise level sigma: [B], [B, F] or one number.

        Raises UserError when F, H or W is no multiple of the patch.
        """
        context = context or WHOLE_CLIP
        tokens, grid = self.patchify(x_t)
        level = self.level_of(sigma, x_t, conditioning)
        text = self.text_of(conditioning)
        precision = full_precision(tokens).dtype
        rotary = positions_rotary(
            context.next_frame, *grid, self.head_dim, tokens.device, precision
        )
        frames = grid[0]
        if self.sequence_parallel is not None:
            self.sequence_parallel.check_tokens(*grid[1:])
            tokens = self.sequence_parallel.own_tokens(tokens, frames)
            rotary = self.sequence_parallel.own_rotary(rotary, frames)
        layers = []
        for layer, block in enumerate(self.blocks):
            tokens, k, v = self.run_block(
                block, tokens, text[layer], level.blocks[layer], rotary, context, layer, frames
            )
            if context.wants_kv:
                layers.append((k, v))
        shift, scale = level.head
        tokens = modulate(self.norm_out(tokens), scale, shift).type_as(tokens)
        patches = self.proj_out(tokens)
        if self.sequence_parallel is not None:
            patches = self.sequence_parallel.all_tokens(patches, frames)
        flow = self.unpatchify(patches, grid)
        return NetworkOutput(flow, ChunkKV(x_t.shape[1], tuple(layers)))

    def wan_blocks(self) -> tuple[WanBlock, ...]:
        return tuple(block for block in self.blocks if isinstance(block, WanBlock))

    def text_of(self, conditioning: Conditioning) -> tuple[Tensor | tuple[Tensor, Tensor], ...]:
        """For each block the embedded text, or its keys and values where they were prepared."""
        if isinstance(conditioning, PreparedConditioning):
            return conditioning.text_kv
        return (self.embed_text(conditioning),) * len(self.blocks)

    def embed_text(self, conditioning: Conditioning) -> Tensor:
        """The text [B, L, D], of which every block makes its own keys and values."""
        return self.condition_embedder.text(conditioning.text.type_as(self.patch_embedding.weight))

    def level_of(
        self, sigma: Tensor | float, x_t: Tensor, conditioning: Conditioning
    ) -> NoiseLevel:
        """The noise level of sigma; the prepared one where `prepare` was given this number."""
        prepared = (
            conditioning.noise_levels if isinstance(conditioning, PreparedConditioning) else {}
        )
        if not isinstance(sigma, Tensor) and sigma in prepared:
            return prepared[sigma]
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
        """One block; with gradient checkpointing it runs again in the backward pass.

        Then it does so with the adapters that work now.
        """
        run = partial(run_adapted, self.adapter, block) if self.adapter else block
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(run, *inputs)  # type: ignore[misc]
        return run(*inputs)

    def patchify(self, x_t: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """[B, F, C, H, W] -> tokens [B, F * rows * columns, D] and the grid (F, rows, columns)."""
        frames, _, height, width = x_t.shape[1:]
        if frames % self.patch[0] or height % self.patch[1] or width % self.patch[2]:
            raise UserError(
                f"latents are {tuple(x_t.shape)} [B, F, C, H, W]; F, H, W must be multiples of the "
                f"patch {self.patch}: encode the video at a height and width divisible by "
                f"{8 * self.patch[1]}"
            )
        embedded = self.patch_embedding(x_t.transpose(1, 2).type_as(self.patch_embedding.weight))
        grid = (embedded.shape[2], embedded.shape[3], embedded.shape[4])
        # one layout for all blocks: one program
        return embedded.flatten(2).transpose(1, 2).contiguous(), grid

    def unpatchify(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Inverse of `patchify` for the output, whose fastest index in a token is the channel."""
        frames, rows, columns = grid
        pf, ph, pw = self.patch
        x = tokens.unflatten(2, (pf, ph, pw, -1)).unflatten(1, grid)
        x = x.permute(0, 1, 4, 7, 2, 5, 3, 6)  # B, F, pf, C, rows, ph, columns, pw
        return x.reshape(tokens.shape[0], frames * pf, -1, rows * ph, columns * pw)

    def init_weights(self, generator: torch.Generator) -> None:
        """Wan's initialisation for training from nothing: Xavier, small embedders, a zero head."""
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
