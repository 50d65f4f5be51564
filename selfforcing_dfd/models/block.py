"""One block of Wan's transformer."""

from __future__ import annotations

from torch import Tensor, nn

from selfforcing_dfd.context import Context
from selfforcing_dfd.models.attention_operator import KernelAttention, SlotContext, Slots
from selfforcing_dfd.models.layers import (
    FeedForward,
    ParameterFreeNorm,
    WanAttention,
    add_gated,
    modulate,
    start_values,
)
from selfforcing_dfd.models.picture import KeysValues, PictureAttention
from selfforcing_dfd.models.prepared import Modulation
from selfforcing_dfd.models.rope import rotate
from selfforcing_dfd.models.sequence_parallel import SequenceParallel


class WanBlock(nn.Module):
    """Self-attention, text cross-attention and feed-forward.

    Self-attention and feed-forward are modulated by the noise level of each latent frame. picture:
    cross-attention attends to one as well.
    """

    def __init__(self, dim: int, ffn_dim: int, heads: int, eps: float, picture: bool = False):
        super().__init__()
        self.norm1 = ParameterFreeNorm(dim, eps)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.norm3 = ParameterFreeNorm(dim, eps)
        self.attn1 = WanAttention(dim, heads, eps)
        self.attn2 = (PictureAttention if picture else WanAttention)(dim, heads, eps)
        self.ffn = FeedForward(dim, ffn_dim)
        self.attend = KernelAttention()
        self.is_compiled = False
        self.sequence_parallel: SequenceParallel | None = None  # None: this process has all tokens
        self.scale_shift_table = nn.Parameter(start_values(1, 6, dim))

    def forward(
        self,
        x: Tensor,
        text: Tensor | KeysValues,
        picture: Tensor | KeysValues | None,
        modulation: Tensor | Modulation,
        rotary: tuple[Tensor, Tensor],
        context: Context,
        layer: int,
        frames: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x: [B, F * tokens, D] -> (x, keys, values). Of a sequence on several processes: its part.

        text, picture: [B, L, D], or their keys and values. modulation: the embedding [B, F, 6, D],
        or this block's. frames: F of the patches. What is not prepared is computed in here and not
        by the caller, so that gradient checkpointing and sharding, which wrap this call, cover it.
        """
        text_k, text_v = self.attn2.keys_values(text) if isinstance(text, Tensor) else text
        seen = (text_k, text_v, self.picture_kv(picture))
        modulation = self.modulation(modulation)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        if self.is_compiled and self.sequence_parallel is None and isinstance(context, SlotContext):
            slots = context.slots(layer)
            return self.over_slots(x, seen, modulation, rotary, slots)
        q, k, v = self.before_attention(x, shift1, scale1, *rotary)
        if self.sequence_parallel is None:
            attended = context.attend(self.attend, layer, q, k, v)
        else:
            q, k, v = self.sequence_parallel.split_heads((q, k, v), frames)
            attended = context.attend(self.attend, layer, q, k, v)
            attended = self.sequence_parallel.join_heads(attended, frames)
        return self.after_attention(x, attended, gate1, shift2, scale2, gate2, *seen), k, v

    def picture_kv(self, picture: Tensor | KeysValues | None) -> KeysValues | None:
        """Keys and values of the embedded picture [B, T, D], unless they are that already."""
        if not isinstance(picture, Tensor):
            return picture
        assert isinstance(self.attn2, PictureAttention), "this block sees no picture"
        return self.attn2.picture_keys_values(picture)

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
        seen: tuple[Tensor, Tensor, KeysValues | None],
        modulation: Modulation,
        rotary: tuple[Tensor, Tensor],
        slots: Slots,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The whole block over keys and values in slots: what is compiled for a stream.

        seen: keys and values of the text, and those of a picture.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        q, k, v = self.before_attention(x, shift1, scale1, *rotary)
        attended = slots.attend(self.attend, q, k, v)
        return self.after_attention(x, attended, gate1, shift2, scale2, gate2, *seen), k, v

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
        picture_kv: KeysValues | None = None,
    ) -> Tensor:
        """The rest of the block. attended: self-attention's output [B, F * tokens, heads, d]."""
        x = add_gated(x, self.attn1.output(attended), gate1)
        queries = self.attn2.queries(self.norm2(x))
        seen = self.attend(queries, text_k, text_v)
        if picture_kv is not None:
            seen = seen + self.attend(queries, *picture_kv)
        x = x + self.attn2.output(seen)
        return add_gated(x, self.ffn(modulate(self.norm3(x), scale, shift).type_as(x)), gate2)
