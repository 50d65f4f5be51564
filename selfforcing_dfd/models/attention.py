"""The one attention function, in the kernels that a machine has: FlashAttention 3, 4 or 2 where it
fits, else torch's SDPA.

Chosen by compute capability and by what can be imported, never by a device's name: H200, H800 and
GH200 are Hopper too. SDPA is what every other kernel is tested against.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from selfforcing_dfd.common import UserError

log = logging.getLogger(__name__)

CUDA_ORDER = [
    # on Hopper about twice the rate of the flash kernel that comes with torch
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class AttentionError(UserError):
    """A kernel that cannot run here; the message says why and what to use instead."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A FlashAttention package: where its function is, the devices it is written for, and how to
    get it.
    """

    module: str
    capabilities: tuple[int, int]  # first and last major compute capability
    head_dim: int  # the largest
    install: str


KERNELS = {
    "fa3": Kernel("flash_attn_interface", (9, 9), 256, "build flash-attention's `hopper` folder"),
    "fa4": Kernel("flash_attn.cute", (9, 12), 128, "pip install .[flash]"),
    "fa2": Kernel(
        "flash_attn", (8, 10), 256, "pip install flash-attn --no-build-isolation, which needs nvcc"
    ),
}
"""In the order in which they are preferred."""


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention without a mask. q: [B, Lq, heads, head_dim]; k, v: [B, Lk, heads, head_dim] ->
    like q.
    """
    return scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    ).transpose(1, 2)


def attend_in_cuda_order(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` by the first of torch's own kernels that takes these tensors."""
    with sdpa_kernel(CUDA_ORDER, set_priority=True):
        return attend(q, k, v)


def select_kernel(
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    head_dim: int,
    installed: set[str],
    name: str = "auto",
) -> str:
    """The kernel's name: `sdpa`, or one of KERNELS that is installed and fits. capability: None
    without a GPU.

    Raises AttentionError for an unknown name, or one that is asked for and cannot run.
    """
    if name not in ("auto", "sdpa", *KERNELS):
        raise AttentionError(f"attention is {name!r}; use auto, sdpa, {', '.join(KERNELS)}")
    obstacles = {
        kernel: obstacle(kernel, capability, dtype, head_dim, installed) for kernel in KERNELS
    }
    if name in KERNELS and obstacles[name]:
        raise AttentionError(f"attention {name} cannot run: {obstacles[name]}; or use sdpa")
    fitting = [kernel for kernel in KERNELS if not obstacles[kernel]]
    chosen = name if name != "auto" else next(iter(fitting), "sdpa")
    left_out = "; ".join(
        f"{kernel}: {why}" for kernel, why in obstacles.items() if why and capability
    )
    log.info("attention by %s%s", chosen, f" ({left_out})" if left_out else "")
    return chosen


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
        return f"it is written for compute capability {first}.x to {last}.x, this is {capability[0]}.{capability[1]}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16, the model is {dtype}"
    if head_dim > needs.head_dim:
        return f"it takes heads of up to {needs.head_dim} values, the model has {head_dim}"
    return "" if kernel in installed else f"{needs.module} is not installed ({needs.install})"


def installed_kernels() -> set[str]:
    """Names of the kernels whose package can be imported."""
    return {name for name, kernel in KERNELS.items() if _function(kernel.module) is not None}


def load_kernel(name: str, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The function of a kernel, with `attend`'s signature."""
    if name == "sdpa":
        return attend_in_cuda_order if device.type == "cuda" else attend
    function = _function(KERNELS[name].module)
    assert function is not None, f"{name} was selected without being installed"

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q, k, v)
        # versions differ in whether they add the log-sum-exp
        return out[0] if isinstance(out, tuple) else out

    return run


def _function(module: str) -> Any:
    try:
        return importlib.import_module(module).flash_attn_func
    except (ImportError, AttributeError) as error:
        log.debug("%s: %s", module, error)
        return None
