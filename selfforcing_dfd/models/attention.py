"""The attention kernels: FlashAttention 3, 4 or 2 where one fits, and torch's SDPA.

What fits follows from compute capability and from what is installed, never from a device's name:
H200, H800 and GH200 are Hopper too. Which of them is taken is measured, see `attention_choice`.
SDPA is what every other kernel is tested against.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from selfforcing_dfd.common import UserError
from selfforcing_dfd.context import Attention
from selfforcing_dfd.models.attention_fp8 import in_eight_bits

log = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)
ALIGNED = 8  # values of a head that are read at once: 16 bytes
HUB_PACKAGE = "kernels"  # Hugging Face's loader of prebuilt kernels
OTHERS = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
SDPA = {
    # on Hopper about twice the rate of the flash kernel that comes with torch
    "sdpa": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *OTHERS],
    "sdpa-flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, *OTHERS],
}
"""Torch's own kernels in the order in which they are asked on a GPU. On a CPU both are the same."""


class AttentionError(UserError):
    """A kernel that cannot run here; the message says why and what to use instead."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A FlashAttention version: where its function is, what it runs on, and how to get it.

    module: to import. hub: repository of a prebuilt one, which the `kernels` package downloads when
    it is first used, and the version there; None for none. eight_bits: it rounds its inputs to 8
    bits, so it is taken by name only, and without gradients.
    """

    module: str
    capabilities: tuple[int, int]  # first and last major compute capability
    head_dim: int  # the largest
    install: str
    hub: tuple[str, int] | None = None
    eight_bits: bool = False


FA3 = Kernel(
    "flash_attn_interface",
    (9, 9),
    256,
    "pip install kernels, or build flash-attention's `hopper` folder",
    ("kernels-community/flash-attn3", 1),
)
KERNELS = {
    "fa3": FA3,
    "fa4": Kernel("flash_attn.cute", (9, 12), 128, "pip install .[flash]"),
    "fa2": Kernel(
        "flash_attn", (8, 10), 256, "pip install flash-attn --no-build-isolation, which needs nvcc"
    ),
    "fa3-fp8": replace(FA3, eight_bits=True),
}
"""In the order in which they are preferred where nothing is measured."""


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention without a mask.

    q: [B, Lq, heads, head_dim]; k, v: [B, Lk, heads, head_dim] -> like q.
    """
    if attends_in_float32(q):
        return attend(q.float(), k.float(), v.float()).type_as(q)
    heads_first = scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    )
    return heads_first.transpose(1, 2)


def attends_in_float32(q: Tensor) -> bool:
    """Whether SDPA casts: on a CPU its backward pass in bfloat16 takes 8 times as long."""
    return q.device.type == "cpu" and torch.is_grad_enabled() and q.dtype in HALF


def torch_attention(name: str, device: torch.device) -> Attention:
    """`attend` by the first kernel of SDPA[name] that takes the tensors; on a CPU there is one."""
    if device.type != "cuda":
        return attend

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPA[name], set_priority=True):
            return attend(q, k, v)

    return run


def check_name(
    name: str,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    head_dim: int,
    installed: set[str],
) -> None:
    """Raise AttentionError for an unknown name, and for the name of a kernel that cannot run.

    capability: None without a GPU.
    """
    if name not in ("auto", *SDPA, *KERNELS):
        known = ", ".join((*SDPA, *KERNELS))
        raise AttentionError(f"attention is {name!r}; use auto, {known}")
    why = obstacle(name, capability, dtype, head_dim, installed) if name in KERNELS else ""
    if why:
        raise AttentionError(f"attention {name} cannot run: {why}; or use sdpa")


def fitting_kernels(
    capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int, installed: set[str]
) -> list[str]:
    """What `auto` may take: kernels that are installed and fit, then torch's own."""
    obstacles = {
        name: obstacle(name, capability, dtype, head_dim, installed)
        for name, kernel in KERNELS.items()
        if not kernel.eight_bits
    }
    left_out = "; ".join(f"{name}: {why}" for name, why in obstacles.items() if why)
    if capability and left_out:
        log.info("attention without %s", left_out)
    fitting = [name for name, why in obstacles.items() if not why]
    return fitting + list(SDPA) if capability else ["sdpa"]


def obstacle(
    kernel: str,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    head_dim: int,
    installed: set[str],
) -> str:
    """Why a kernel cannot run, with the cure; empty if it can."""
    needs = KERNELS[kernel]
    first, last = needs.capabilities
    if capability is None:
        return "it needs a CUDA device"
    if not first <= capability[0] <= last:
        found = ".".join(map(str, capability))
        return f"it is written for compute capability {first}.x to {last}.x, this is {found}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16, the model is {dtype}"
    if head_dim > needs.head_dim or head_dim % ALIGNED:
        return (
            f"it takes heads of up to {needs.head_dim} values, a multiple of {ALIGNED}; the model "
            f"has {head_dim}"
        )
    return "" if kernel in installed else f"{needs.module} is not installed ({needs.install})"


def installed_kernels() -> set[str]:
    """Kernels that can be imported, or that the `kernels` package can download. No network."""
    return {name for name, kernel in KERNELS.items() if is_installed(kernel)}


def is_installed(kernel: Kernel) -> bool:
    if kernel.hub is not None and find_spec(HUB_PACKAGE) is not None:
        return True
    return function_of(import_kernel(kernel.module)) is not None


def load_kernel(name: str, device: torch.device) -> Attention:
    """The function of a kernel that was selected, with `attend`'s signature.

    A prebuilt kernel is downloaded here, once, unless the machine has it built. Raises
    AttentionError where that fails.
    """
    if name in SDPA:
        return torch_attention(name, device)
    kernel = KERNELS[name]
    function = function_of(import_kernel(kernel.module)) or function_of(fetch_kernel(name))
    if function is None:
        raise AttentionError(f"attention {name}: its package has no flash_attn_func; use sdpa")

    def run(q: Tensor, k: Tensor, v: Tensor, **scales: Tensor) -> Tensor:
        out = function(q, k, v, **scales)
        # versions differ in whether they add the log-sum-exp
        return out[0] if isinstance(out, tuple) else out

    return in_eight_bits(run) if kernel.eight_bits else run


def import_kernel(module: str) -> ModuleType | None:
    """A module of that name; None where it cannot be imported, with a warning if it is there."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        log.debug("%s: %s", module, error)
    except Exception as error:  # of a package that was built for another torch, CUDA or compiler
        log.warning("%s is installed and cannot be imported: %s", module, error)
    return None


def fetch_kernel(name: str) -> ModuleType | None:
    """The prebuilt kernel from the Hugging Face Hub, or from its cache; None without one."""
    prebuilt = KERNELS[name].hub
    if prebuilt is None or find_spec(HUB_PACKAGE) is None:
        return None
    repository, version = prebuilt
    log.info("attention %s: %s version %s by the kernels package", name, repository, version)
    try:
        return importlib.import_module(HUB_PACKAGE).get_kernel(repository, version=version)
    except Exception as error:  # of the network, the Hub, or no build for this torch and CUDA
        raise AttentionError(
            f"attention {name}: {repository} cannot be loaded ({error}); use another kernel or sdpa"
        ) from error


def function_of(module: ModuleType | None) -> Callable[..., Tensor | tuple[Tensor, ...]] | None:
    """The module's attention over packed heads; None where it has none."""
    return vars(module).get("flash_attn_func") if module is not None else None
