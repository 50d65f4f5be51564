"""Wan2.1's transformer, one class for student, teacher and fake score.

`WanNetwork` is all that it computes and needs torch alone. Two classes make it whole:
`models.wan.WanTransformer` with diffusers' methods for loading, saving and adapters, and `PlainWan`
without them, for programs that have to start at once: importing diffusers takes three seconds.

Parameter names are those of diffusers' `WanTransformer3DModel`, so its checkpoints load unchanged.
What differs is the interface: sigma per latent frame, explicit context in, keys and values out.
Without context it is bidirectional over the frames it gets; with context it is causal by chunk.
There are no attention masks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from selfforcing_dfd.common import UserError
from selfforcing_dfd.context import WHOLE_CLIP, ChunkKV, Conditioning, Context, NetworkOutput
from selfforcing_dfd.models.adapters import run_adapted
from selfforcing_dfd.models.attention_choice import Choice, Trial, choose_attention
from selfforcing_dfd.models.block import WanBlock
from selfforcing_dfd.models.identity import KEYS
from selfforcing_dfd.models.layers import (
    ConditionEmbedder,
    ParameterFreeNorm,
    full_precision,
    modulate,
    sigma_per_frame,
    start_values,
)
from selfforcing_dfd.models.offload import BlockGroups
from selfforcing_dfd.models.picture import (
    KeysValues,
    check_picture_sizes,
    conditioning_of,
    picture_in,
    picture_without_content,
    takes_picture,
)
from selfforcing_dfd.models.prepared import Modulation, NoiseLevel, PreparedConditioning
from selfforcing_dfd.models.rope import Placed, positions_rotary
from selfforcing_dfd.models.sequence_parallel import SequenceParallel


class WanNetwork(nn.Module):
    """Flow-predicting transformer over latents [B, F, C, H, W].

    config: WanTransformer's arguments, and notes on role and recipe.
    """

    config: Any
    gradient_checkpointing: bool
    _gradient_checkpointing_func: Any

    def build(self) -> None:
        """Make the layers that the config names.

        Raises PictureError for sizes that no Wan2.1 model has together.
        """
        check_picture_sizes(self.config)
        heads = self.config["num_attention_heads"]
        dim = heads * self.config["attention_head_dim"]
        eps = self.config["eps"]
        patch = self.config["patch_size"]
        self.takes_picture = takes_picture(self.config)
        self.head_dim: int = self.config["attention_head_dim"]
        self.patch: tuple[int, int, int] = (patch[0], patch[1], patch[2])
        self.patch_embedding = nn.Conv3d(
            self.config["in_channels"], dim, self.patch, stride=self.patch
        )
        self.condition_embedder = ConditionEmbedder(
            dim, self.config["freq_dim"], self.config["text_dim"], self.config["image_dim"]
        )
        self.blocks = nn.ModuleList(
            WanBlock(dim, self.config["ffn_dim"], heads, eps, self.takes_picture)
            for _ in range(self.config["num_layers"])
        )
        self.norm_out = ParameterFreeNorm(dim, eps)
        self.proj_out = nn.Linear(dim, self.config["out_channels"] * math.prod(self.patch))
        self.scale_shift_table = nn.Parameter(start_values(1, 2, dim))
        self.gradient_checkpointing = False
        self.attention = Choice()
        self.sequence_parallel: SequenceParallel | None = None
        self.groups: BlockGroups | None = None  # None: all blocks are where the network is
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

    def offload_blocks(self, device: torch.device, group_size: int = 1) -> BlockGroups:
        """From now on the network computes on `device`, which its blocks visit in groups.

        For inference only: blocks on the host are neither trained nor moved by `to`. Raises
        OffloadError where this saves no memory.
        """
        self.groups = BlockGroups(self.wan_blocks(), device, group_size)
        for module in self.children():
            if module is not self.blocks:
                module.to(device)
        self.scale_shift_table.data = self.scale_shift_table.data.to(device)
        return self.groups

    def bring(self, layer: int) -> None:
        """Have a block's weights where it computes, if they are not always there."""
        if self.groups is not None:
            self.groups.need(layer)

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

        Raises UserError when F, H or W is no multiple of the patch, and PictureError where a
        picture is needed and missing.
        """
        context = context or WHOLE_CLIP
        tokens, grid = self.patchify(self.with_picture(x_t, conditioning, context.next_frame))
        level = self.level_of(sigma, x_t, conditioning)
        text = self.text_of(conditioning)
        picture = self.picture_of(conditioning)
        if isinstance(context, Placed):
            rotary = context.rotary
        else:
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
            asked = (text[layer], picture[layer], level.blocks[layer])
            self.bring(layer)
            tokens, k, v = self.run_block(block, tokens, *asked, rotary, context, layer, frames)
            if context.wants_kv:
                layers.append((k, v))
        shift, scale = level.head
        tokens = modulate(self.norm_out(tokens), scale, shift).type_as(tokens)
        patches = self.proj_out(tokens)
        if self.sequence_parallel is not None:
            patches = self.sequence_parallel.all_tokens(patches, frames)
        flow = self.unpatchify(patches, grid)
        return NetworkOutput(flow, ChunkKV(x_t.shape[1], tuple(layers)))

    def without_content(self, x_t: Tensor, text_tokens: int) -> Conditioning:
        """A conditioning of the right shapes for x_t, to count what a call costs."""
        text = x_t.new_empty(len(x_t), text_tokens, self.config["text_dim"])
        picture = picture_without_content(x_t, self.config) if self.takes_picture else None
        return conditioning_of(text, picture)

    def wan_blocks(self) -> tuple[WanBlock, ...]:
        return tuple(block for block in self.blocks if isinstance(block, WanBlock))

    def with_picture(self, x_t: Tensor, conditioning: Conditioning, start: int) -> Tensor:
        """x_t with the picture's channels for its frames, the first of which is the `start`-th."""
        if not self.takes_picture:
            return x_t
        picture = picture_in(conditioning).for_rows(len(x_t))
        return torch.cat([x_t, picture.channels_of(start, x_t.shape[1]).to(x_t)], dim=2)

    def picture_of(self, conditioning: Conditioning) -> tuple[Tensor | KeysValues | None, ...]:
        """For each block the embedded picture, or its keys and values where they were prepared."""
        if isinstance(conditioning, PreparedConditioning):
            return conditioning.picture_kv
        if not self.takes_picture:
            return (None,) * len(self.blocks)
        picture = picture_in(conditioning).for_rows(len(conditioning.text))
        tokens = picture.tokens.type_as(self.patch_embedding.weight)
        return (self.condition_embedder.picture(tokens),) * len(self.blocks)

    def text_of(self, conditioning: Conditioning) -> tuple[Tensor | KeysValues, ...]:
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
        only_text = Conditioning(conditioning.text)
        levels = {sigma: self.level_of(sigma, text, only_text) for sigma in sigmas}
        picture = picture_in(conditioning) if self.takes_picture else None
        pictures = self.picture_of(conditioning)
        text_kv = []
        picture_kv = []
        modulations: dict[float, list[Modulation]] = {sigma: [] for sigma in levels}
        for layer, block in enumerate(self.wan_blocks()):
            self.bring(layer)
            text_kv.append(block.attn2.keys_values(text))
            picture_kv.append(block.picture_kv(pictures[layer]))
            for sigma, level in levels.items():
                modulations[sigma].append(block.modulation(level.blocks[layer]))
        noise_levels = {
            sigma: NoiseLevel(tuple(modulations[sigma]), level.head)
            for sigma, level in levels.items()
        }
        return PreparedConditioning(
            conditioning.text, picture, tuple(text_kv), tuple(picture_kv), noise_levels
        )

    def run_block(self, block: nn.Module, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """One block; with gradient checkpointing it runs again in the backward pass.

        Then it does so with the adapters that work now.
        """
        run = partial(run_adapted, self.adapter, block) if self.adapter else block
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(run, *inputs)
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
            elif "embedder" in name and parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02, generator=generator)
            elif name == "proj_out.weight":
                nn.init.zeros_(parameter)
            elif "scale_shift_table" in name:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
            elif parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter.flatten(1), generator=generator)


class PlainWan(WanNetwork):
    """A network to be called, and no more.

    sizes: WanTransformer's arguments; patch_size and eps have its defaults.
    """

    def __init__(self, **sizes: Any) -> None:
        super().__init__()
        self.config = {"patch_size": (1, 2, 2), "eps": 1e-6, **sizes}
        self.build()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A network of a config's sizes, without its notes."""
        return cls(**{name: value for name, value in config.items() if name not in KEYS})

    def register_to_config(self, **notes: Any) -> None:
        """Add notes to the config, as diffusers' method of that name does."""
        self.config = {**self.config, **notes}
