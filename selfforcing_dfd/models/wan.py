"""Wan2.1's transformer with diffusers' methods: `from_pretrained`, `save_pretrained`, adapters."""

from __future__ import annotations

from accelerate.hooks import CpuOffload
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from selfforcing_dfd.context import Conditioning
from selfforcing_dfd.models.block import WanBlock as WanBlock
from selfforcing_dfd.models.hub import HubMixin
from selfforcing_dfd.models.lora import LoraMixin
from selfforcing_dfd.models.network import WanNetwork
from selfforcing_dfd.models.prepared import PreparedConditioning


class WanTransformer(  # type: ignore[misc]
    HubMixin, LoraMixin, WanNetwork, ModelMixin, ConfigMixin, PeftAdapterMixin
):
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
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
    ):
        """image_dim: width of an image encoder's states; None for text-to-video.

        Raises PictureError for sizes that no Wan2.1 model has together.
        """
        super().__init__()
        self.build()

    @apply_forward_hook
    def prepare(
        self, conditioning: Conditioning, sigmas: tuple[float, ...] = ()
    ) -> PreparedConditioning:
        """As `WanNetwork.prepare`. accelerate's hook, where there is one, moves the weights first.

        A call of the network would do so; this is none.
        """
        return super().prepare(conditioning, sigmas)


def is_offloaded(part: nn.Module) -> bool:
    """Whether accelerate moves a part of a pipeline to the device that it computes on, and back."""
    return isinstance(vars(part).get("_hf_hook"), CpuOffload)
