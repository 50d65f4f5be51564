"""Linear layers of the blocks in 8-bit floats (e4m3), for inference only.

The weights take half the memory, and Hopper multiplies 8-bit floats at twice the rate. Each row of
the weights has a scale, found once; each token has a scale, found in every call. Without
compilation, finding them costs about what the products gain: use it with `compile_blocks`. The
picture changes a little.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import ScalingType, scaled_mm

from selfforcing_dfd.common import UserError
from selfforcing_dfd.models.block import WanBlock
from selfforcing_dfd.models.network import WanNetwork

LARGEST = 448.0  # of e4m3
SMALLEST_SCALE = 1e-12  # a row of zeros must not be divided by zero
MULTIPLE = 16  # of both sizes of a layer: what the tensor cores take
FIRST_CAPABILITY = (8, 9)


class Fp8Error(UserError):
    """A device or layer that 8-bit products cannot run on; the message says why."""


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, n] as e4m3 values and float32 scales [rows, 1], whose product is x.

    The error is at most 2^-4 of each value, or 2^-9 of the row's scale for values near zero.
    """
    scale = (x.abs().amax(dim=-1, keepdim=True).float() / LARGEST).clamp(min=SMALLEST_SCALE)
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


class Fp8Linear(nn.Module):
    """A frozen linear layer of 8-bit floats with float32 sums. Inputs and outputs keep their dtype.

    Raises Fp8Error for sizes that tensor cores do not take.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
            raise Fp8Error(
                f"a layer of {layer.in_features} to {layer.out_features} values: "
                f"both must be multiples of {MULTIPLE}; leave --fp8 out"
            )
        weight, scale = to_fp8(layer.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.t().contiguous())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        rows, scale = to_fp8(x.flatten(0, -2))
        out = scaled_mm(
            rows,
            self.weight.t(),
            scale,
            ScalingType.RowWise,
            self.scale,
            ScalingType.RowWise,
            bias=self.bias,
            output_dtype=torch.bfloat16,
        )
        return out.unflatten(0, x.shape[:-1]).type_as(x)


def use_fp8(network: WanNetwork) -> int:
    """Convert the blocks' linear layers in place and return how many they are.

    Embedders, head and the text's keys and values stay as they are. Raises Fp8Error, before
    anything is changed, on a GPU older than compute capability 8.9 and for sizes that do not fit.
    """
    check_device(network.patch_embedding.weight)
    places = [place for block in network.wan_blocks() for place in linear_layers(block)]
    layers = [module.get_submodule(name) for module, name in places]
    others = sorted({type(layer).__name__ for layer in layers if not isinstance(layer, nn.Linear)})
    if others:
        raise Fp8Error(
            f"layers are {', '.join(others)}, not plain linear ones; "
            "merge adapters into the weights first"
        )
    converted = [Fp8Linear(layer) for layer in layers if isinstance(layer, nn.Linear)]
    for (module, name), layer in zip(places, converted, strict=True):
        setattr(module, name, layer)
    return len(converted)


def check_device(weight: Tensor) -> None:
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < FIRST_CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability(weight.device)))
        raise Fp8Error(
            f"8-bit products need compute capability 8.9 or later, this is {found}; leave --fp8 out"
        )


def linear_layers(block: WanBlock) -> list[tuple[nn.Module, str]]:
    """The linear layers of a block that run in every call, as their parent and their name there."""
    return [
        (block.attn1, "to_q"),
        (block.attn1, "to_k"),
        (block.attn1, "to_v"),
        (block.attn1.to_out, "0"),
        (block.attn2, "to_q"),
        (block.attn2.to_out, "0"),
        (block.ffn.net[0], "proj"),
        (block.ffn.net, "2"),
    ]
