"""Linear layers of the blocks in 8-bit floats (e4m3) through torchao, for inference only.

The weights take half the memory, and Hopper multiplies 8-bit floats at twice the rate. Each row of
the weights has a scale, found once; each token has a scale, found in every call. Without
compilation, finding them costs about what the products gain: use it with `compile_blocks`. The
picture changes a little; `evaluation.precision` measures by how much in the tiny world.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from selfforcing_dfd.common import UserError
from selfforcing_dfd.models.block import WanBlock
from selfforcing_dfd.models.network import WanNetwork

E4M3 = torch.float8_e4m3fn
SMALLEST = 1e-12  # of a row's largest value: a row of zeros must not be divided by zero
MULTIPLE = 16  # of both sizes of a layer: what the tensor cores take
FIRST_CAPABILITY = (8, 9)


class Fp8Error(UserError):
    """A device, package or layer that 8-bit products cannot run with; the message says why."""


def use_fp8(network: WanNetwork, device: torch.device | None = None) -> int:
    """Convert the blocks' linear layers in place and return how many they are.

    device: where the network will run; None is where it is. Embedders, head and the text's keys and
    values stay as they are. Raises Fp8Error, before anything is changed, without torchao, for a GPU
    older than compute capability 8.9, and for layers and weights that do not fit.
    """
    check_package()
    weight = network.patch_embedding.weight
    check_device(device or weight.device, weight.dtype)
    layers = linear_layers(network)
    for layer in layers:
        layer.weight = nn.Parameter(rounded_weight(layer.weight.detach()), requires_grad=False)
    return len(layers)


def rounded_weight(weight: Tensor) -> Tensor:
    """torchao's tensor of a weight [out, in]: products with it are products of 8-bit floats.

    With fast accumulation the sums of a product stay in the tensor cores, in some 14 bits (arXiv
    2412.19437, 3.3.2). Without it torchao's authors found row-wise products too slow to be of use.
    """
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor, PerRow
    from torchao.quantization.quantize_.common import KernelPreference
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    # torch's own product: the other one, of the package mslk, knows no smallest value
    product = KernelPreference.TORCH
    activations = QuantizeTensorToFloat8Kwargs(
        E4M3, PerRow(), hp_value_lb=SMALLEST, kernel_preference=product
    )
    return Float8Tensor.from_hp(
        weight,
        E4M3,
        PerRow(),
        mm_config=Float8MMConfig(use_fast_accum=True),
        hp_value_lb=SMALLEST,
        kernel_preference=product,
        act_quant_kwargs=activations,
    )


def check_package() -> None:
    if find_spec("torchao") is None:
        raise Fp8Error(
            "8-bit products need torchao, which is not installed; pip install .[fp8], or leave "
            "--fp8 out"
        )


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Raise Fp8Error for a device, or for a model's dtype on a GPU, that 8-bit products lack."""
    if device.type == "cpu":
        check_cpu()
    if device.type != "cuda":
        return
    if torch.cuda.get_device_capability(device) < FIRST_CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise Fp8Error(
            f"8-bit products need compute capability 8.9 or later, this is {found}; leave --fp8 out"
        )
    if dtype != torch.bfloat16:
        raise Fp8Error(
            f"8-bit products with a scale for each row give bfloat16 on a GPU, the model is "
            f"{dtype}; use --dtype bfloat16, or leave --fp8 out"
        )


def check_cpu() -> None:
    """Raise Fp8Error for a torch whose products on a CPU take one scale for all rows: 2.11 does."""
    ones = torch.ones(MULTIPLE, MULTIPLE, dtype=torch.bfloat16)
    try:
        linear(ones, rounded_weight(ones))
    except RuntimeError as error:
        raise Fp8Error(
            f"torch {torch.__version__} has no 8-bit products with a scale for each row on a CPU; "
            "use torch 2.13 or a GPU, or leave --fp8 out"
        ) from error


def plain_layer(layer: nn.Module) -> nn.Linear:
    """The layer; Fp8Error for what is no plain linear one, and for sizes that do not fit."""
    weight = layer.weight if isinstance(layer, nn.Linear) else None
    if not isinstance(layer, nn.Linear) or type(weight) is not nn.Parameter:
        raise Fp8Error(
            f"a layer is {type(layer).__name__} of {type(weight).__name__}, not a plain linear "
            "one; merge adapters into the weights first, and convert a network once"
        )
    if layer.out_features % MULTIPLE or layer.in_features % MULTIPLE:
        raise Fp8Error(
            f"a layer of {layer.in_features} to {layer.out_features} values: "
            f"both must be multiples of {MULTIPLE}; leave --fp8 out"
        )
    return layer


def linear_layers(network: WanNetwork) -> list[nn.Linear]:
    """The linear layers of the blocks that run in every call. Raises Fp8Error for other layers."""
    places = [place for block in network.wan_blocks() for place in places_in(block)]
    layers = [module.get_submodule(name) for module, name in places]
    return [plain_layer(layer) for layer in layers]


def places_in(block: WanBlock) -> list[tuple[nn.Module, str]]:
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
