"""Cosmos-Predict2.5 as a network of this package: diffusers' own transformer behind our interface.

It is bidirectional. Its latents are those of Wan2.1's VAE, its flow is `noise - x0`, and its time
is sigma itself. A picture or a clip to go on from is given as clean latent frames at sigma 0, as
`rollout.given` does it for every network: the frames at sigma 0 are the condition mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import CosmosTransformer3DModel
from torch import Tensor, nn

from selfforcing_dfd.common import UserError
from selfforcing_dfd.context import (
    ChunkContext,
    ChunkKV,
    Conditioning,
    Context,
    NetworkOutput,
    PackedContext,
)
from selfforcing_dfd.models.layers import sigma_per_frame

REPOSITORY = "nvidia/Cosmos-Predict2.5-2B"
REVISION = "diffusers/base/post-trained"
GIVEN_SIGMA = 1e-4
"""What the network is told of clean frames: `conditional_frame_timestep` of diffusers' pipeline."""
# of the published scheduler, as ratios of noise to signal (Karras et al., arXiv 2206.00364, Eq. 5)
MOST_NOISE = 200.0
LEAST_NOISE = 0.01
RHO = 7


class CosmosError(UserError):
    """Weights that are not Cosmos-Predict2.5's, or a call that it cannot answer."""


class CosmosNetwork(nn.Module):
    """A `context.Network` over diffusers' CosmosTransformer3DModel. It sees the whole clip at once.

    Raises CosmosError for a transformer that takes no condition mask, or that needs torchvision
    where it is not installed.
    """

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        config = transformer.config
        if config["in_channels"] != config["out_channels"] + 1:
            raise CosmosError(
                f"the transformer takes {config['in_channels']} channels and gives "
                f"{config['out_channels']}; Cosmos-Predict2.5 takes one more than it gives, the "
                "condition mask"
            )
        if config["concat_padding_mask"] and find_spec("torchvision") is None:
            raise CosmosError(
                "diffusers' transformer of Cosmos needs torchvision for its padding mask; "
                "pip install torchvision"
            )
        self.transformer = transformer

    @classmethod
    def from_pretrained(cls, folder: Path | str, dtype: torch.dtype = torch.bfloat16) -> Self:
        """From a diffusers folder of Cosmos-Predict2.5: its subfolder `transformer`.

        Raises CosmosError for a folder without one, and for missing or unknown tensors.
        """
        path = Path(folder) / "transformer"
        if not (path / "config.json").is_file():
            raise CosmosError(
                f"{path}/config.json does not exist; fetch it: hf download {REPOSITORY} --revision "
                f"{REVISION} --local-dir {folder}"
            )
        loaded: Any = CosmosTransformer3DModel.from_pretrained(
            path, torch_dtype=dtype, output_loading_info=True
        )
        transformer, report = loaded
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
        wrong = [str(key) for kind in kinds for key in report[kind]]
        if wrong:
            raise CosmosError(
                f"{path}: {len(wrong)} tensors are missing, unknown or of another shape, first "
                f"{wrong[0]}; fetch the folder again"
            )
        return cls(transformer)

    @property
    def config(self) -> Mapping[str, Any]:
        """CosmosTransformer3DModel's arguments."""
        config: Mapping[str, Any] = self.transformer.config
        return config

    def forward(
        self,
        x_t: Tensor,
        sigma: Tensor | float,
        conditioning: Conditioning,
        context: Context | None = None,
    ) -> NetworkOutput:
        """Flow at x_t [B, F, C, H, W] for noise level sigma: [B], [B, F] or one number.

        Frames at sigma 0 are given, clean. conditioning.text: states of Cosmos' own text encoder.
        No keys and values are returned. Raises CosmosError for a past to attend to.
        """
        if not is_whole_clip(context):
            raise CosmosError(
                "Cosmos-Predict2.5 is bidirectional and sees no earlier chunks; make whole clips: "
                "one chunk as long as the clip (rollout.chunk_frames = rollout.frames)"
            )
        level = sigma_per_frame(sigma, x_t).expand(x_t.shape[:2]).to(x_t)
        by_frame = level[:, None, :, None, None]  # B, 1, F, 1, 1
        given = (by_frame == 0).to(x_t)
        told = torch.where(by_frame == 0, GIVEN_SIGMA, by_frame)
        rows, columns = x_t.shape[3:]
        flow = self.transformer(
            hidden_states=x_t.transpose(1, 2),
            timestep=told,
            encoder_hidden_states=conditioning.text.to(x_t),
            condition_mask=given.expand(-1, -1, -1, rows, columns),
            padding_mask=x_t.new_zeros(1, 1, rows, columns),  # nothing is padded
            return_dict=False,
        )[0]
        return NetworkOutput(flow.transpose(1, 2), ChunkKV(x_t.shape[1], ()))


def is_whole_clip(context: Context | None) -> bool:
    """Whether the frames of a call see nothing besides each other."""
    if isinstance(context, PackedContext):
        return len(context.contexts) == 1 and is_whole_clip(context.contexts[0])
    if context is None:
        return True
    return isinstance(context, ChunkContext) and not context.chunks and context.next_frame == 0


def cosmos_sigmas(num_steps: int) -> tuple[float, ...]:
    """`num_steps + 1` noise levels of the published scheduler, down to 0.

    Evenly spaced roots of the ratio of noise to signal, from 200 to .01.
    """
    roots = torch.linspace(
        MOST_NOISE ** (1 / RHO), LEAST_NOISE ** (1 / RHO), num_steps, dtype=torch.float64
    )
    ratios = roots**RHO
    return (*(ratios / (1 + ratios)).tolist(), 0.0)
