"""Parts of Wan2.1's transformer: projections, norms, and the embedding of noise level and text.

Parameter names are those of diffusers' `WanTransformer3DModel`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, silu

from selfforcing_dfd.flow import expand_sigma


def start_values(*shape: int) -> Tensor:
    """Standard normal values over the square root of the width, which is last.

    On the meta device, where no values are, there is no arithmetic either: the first one there
    makes torch import its compiler, for a second.
    """
    table = torch.empty(shape)
    return table if table.is_meta else torch.randn(shape) / shape[-1] ** 0.5


def full_precision(x: Tensor) -> Tensor:
    """Half types as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class ParameterFreeNorm(nn.Module):
    """LayerNorm without weights, computed in float32 at least."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.dim = dim
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(full_precision(x), (self.dim,), eps=self.eps)


class WanAttention(nn.Module):
    """Projections with RMS-normed queries and keys, over all heads jointly.

    The caller decides which keys the queries see.
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
        k = self.norm_k(self.to_k(x))
        v = self.to_v(x)
        return k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))

    def output(self, attended: Tensor) -> Tensor:
        return self.to_out[0](attended.flatten(2))


class GeluProjection(nn.Module):
    """Linear, then GELU, in its tanh form or exact."""

    def __init__(self, dim: int, out_dim: int, approximate: str = "tanh"):
        super().__init__()
        self.approximate = approximate
        self.proj = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return gelu(self.proj(x), approximate=self.approximate)


class FeedForward(nn.Module):
    """Two layers; index 1 is the dropout that Wan does not use, kept so that names match."""

    def __init__(self, dim: int, inner_dim: int, out_dim: int = 0, approximate: str = "tanh"):
        """out_dim: 0 is dim. approximate: of the GELU, as torch names it."""
        super().__init__()
        inner = GeluProjection(dim, inner_dim, approximate)
        self.net = nn.Sequential(inner, nn.Identity(), nn.Linear(inner_dim, out_dim or dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def sigma_per_frame(sigma: Tensor | float, x_t: Tensor) -> Tensor:
    """Sigma [B] or [B, F] as [B, F]; a number as [1, 1] in float64, which is the same for all."""
    if isinstance(sigma, Tensor):
        return expand_sigma(sigma, x_t)[..., 0, 0, 0].expand(x_t.shape[:2])
    return torch.full((1, 1), sigma, dtype=torch.float64, device=x_t.device)


def add_gated(x: Tensor, y: Tensor, values: Tensor) -> Tensor:
    """x + y * values in float32 at least.

    x, y: [B, F * tokens, D]. values: [B, F, D], one for the tokens of each latent frame, or
    [1, 1, D] where they are equal for all.
    """
    frames = (values.shape[1], -1)
    x_by_frame = full_precision(x).unflatten(1, frames)
    y_by_frame = y.unflatten(1, frames)
    return torch.addcmul(x_by_frame, y_by_frame, values.unsqueeze(2)).flatten(1, 2).type_as(x)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * scale + shift. x: [B, F * tokens, D]; scale, shift: [B, F, D] or [1, 1, D]."""
    by_frame = x.unflatten(1, (scale.shape[1], -1))
    return torch.addcmul(shift.unsqueeze(2), by_frame, scale.unsqueeze(2)).flatten(1, 2)


class TwoLayers(nn.Module):
    """Weights of Wan's time and text embedders: linear_1, an activation, linear_2."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)


class PictureEmbedder(nn.Module):
    """States of an image encoder [B, T, D_image] to the blocks' width [B, T, D]."""

    def __init__(self, image_dim: int, dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(image_dim)
        self.ff = FeedForward(image_dim, image_dim, dim, approximate="none")
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm2(self.ff(self.norm1(tokens)))


class ConditionEmbedder(nn.Module):
    """Embeds noise level and text for the blocks, and with image_dim a picture."""

    def __init__(self, dim: int, freq_dim: int, text_dim: int, image_dim: int | None = None):
        super().__init__()
        self.freq_dim = freq_dim
        self.time_embedder = TwoLayers(freq_dim, dim)
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = TwoLayers(text_dim, dim)
        self.image_embedder = None if image_dim is None else PictureEmbedder(image_dim, dim)

    def time(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """sigma [B, F] -> (embedding [B, F, D], modulation [B, F, 6, D])."""
        layers = self.time_embedder
        features = sinusoid(1000 * sigma.double(), self.freq_dim).to(layers.linear_1.weight.dtype)
        embedding = layers.linear_2(silu(layers.linear_1(features)))
        return embedding, self.time_proj(silu(embedding)).unflatten(-1, (6, -1))

    def text(self, text: Tensor) -> Tensor:
        """[B, L, D_text] -> [B, L, D]; padding is attended to, as in Wan."""
        layers = self.text_embedder
        return layers.linear_2(gelu(layers.linear_1(text), approximate="tanh"))

    def picture(self, tokens: Tensor) -> Tensor:
        """[B, T, D_image] -> [B, T, D]."""
        assert self.image_embedder is not None, "a network without image_dim is given a picture"
        embedded: Tensor = self.image_embedder(tokens)
        return embedded


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """[...] -> [..., dim]: cosines, then sines, of timestep * 10000^(-k / (dim / 2)); float64."""
    k = torch.arange(dim // 2, dtype=torch.float64, device=timestep.device)
    angle = timestep[..., None] * 10000 ** -(k / (dim // 2))
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
