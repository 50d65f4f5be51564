"""The one attention function: FlashAttention 3, 4 or 2 where one fits, else torch's SDPA.

Chosen by compute capability and by what is installed, never by a device's name: H200, H800 and
GH200 are Hopper too. SDPA is what every other kernel is tested against.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from selfforcing_dfd.common import UserError

log = logging.getLogger(__name__)

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
HALF = (torch.bfloat16, torch.float16)
HUB_PACKAGE = "kernels"  # Hugging Face's loader of prebuilt kernels
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
    """A FlashAttention version: where its function is, what it runs on, and how to get it.

    module: to import. hub: repository of a prebuilt one, which the `kernels` package downloads when
    it is first used, and the version there; None for none.
    """

    module: str
    capabilities: tuple[int, int]  # first and last major compute capability
    head_dim: int  # the largest
    install: str
    hub: tuple[str, int] | None = None


KERNELS = {
    "fa3": Kernel(
        "flash_attn_interface",
        (9, 9),
        256,
        "pip install kernels, or build flash-attention's `hopper` folder",
        ("kernels-community/flash-attn3", 1),
    ),
    "fa4": Kernel("flash_attn.cute", (9, 12), 128, "pip install .[flash]"),
    "fa2": Kernel(
        "flash_attn", (8, 10), 256, "pip install flash-attn --no-build-isolation, which needs nvcc"
    ),
}
"""In the order in which they are preferred."""


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention without a mask.

    q: [B, Lq, heads, head_dim]; k, v: [B, Lk, heads, head_dim] -> like q.
    """
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.dtype in HALF:
        # SDPA's backward pass on a CPU takes 8 times as long in bfloat16 as in float32
        return attend(q.float(), k.float(), v.float()).type_as(q)
    heads_first = scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    )
    return heads_first.transpose(1, 2)


def attend_in_cuda_order(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` by the first of torch's own kernels that takes these tensors."""
    with sdpa_kernel(CUDA_ORDER, set_priority=True):
        return attend(q, k, v)


def choose_attention(
    weight: Tensor, head_dim: int, name: str = "auto"
) -> tuple[str, AttentionFunction]:
    """The kernel's name and function for a model with such weights, where they now are.

    name: auto, sdpa or one of KERNELS. Raises AttentionError for one that cannot run here. `auto`
    goes on to the next kernel where one cannot be loaded.
    """
    capability = torch.cuda.get_device_capability(weight.device) if weight.is_cuda else None
    installed = installed_kernels() if capability else set()
    while True:
        chosen = select_kernel(capability, weight.dtype, head_dim, installed, name)
        try:
            return chosen, load_kernel(chosen, weight.device)
        except AttentionError as error:
            if name != "auto":
                raise
            log.warning("%s", error)
            installed.remove(chosen)


def select_kernel(
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    head_dim: int,
    installed: set[str],
    name: str = "auto",
) -> str:
    """The kernel to use: `sdpa`, or one of KERNELS that is installed and fits.

    capability: None without a GPU. Raises AttentionError for an unknown name, and for a name other
    than auto that cannot run.
    """
    if name not in ("auto", "sdpa", *KERNELS):
        raise AttentionError(f"attention is {name!r}; use auto, sdpa, {', '.join(KERNELS)}")
    obstacles = {
        kernel: obstacle(kernel, capability, dtype, head_dim, installed) for kernel in KERNELS
    }
    if obstacles.get(name):
        raise AttentionError(f"attention {name} cannot run: {obstacles[name]}; or use sdpa")
    fitting = [kernel for kernel, why in obstacles.items() if not why]
    chosen = name if name != "auto" else next(iter(fitting), "sdpa")
    left_out = "; ".join(f"{kernel}: {why}" for kernel, why in obstacles.items() if why)
    log.info("attention by %s%s", chosen, f" ({left_out})" if left_out and capability else "")
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
        found = ".".join(map(str, capability))
        return f"it is written for compute capability {first}.x to {last}.x, this is {found}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16, the model is {dtype}"
    if head_dim > needs.head_dim:
        return f"it takes heads of up to {needs.head_dim} values, the model has {head_dim}"
    return "" if kernel in installed else f"{needs.module} is not installed ({needs.install})"


def installed_kernels() -> set[str]:
    """Kernels that can be imported, or that the `kernels` package can download. No network."""
    return {name for name, kernel in KERNELS.items() if is_installed(kernel)}


def is_installed(kernel: Kernel) -> bool:
    if kernel.hub is not None and find_spec(HUB_PACKAGE) is not None:
        return True
    return function_of(import_kernel(kernel.module)) is not None


def load_kernel(name: str, device: torch.device) -> AttentionFunction:
    """The function of a kernel that was selected, with `attend`'s signature.

    A prebuilt kernel is downloaded here, once, unless the machine has it built. Raises
    AttentionError where that fails.
    """
    if name == "sdpa":
        return attend_in_cuda_order if device.type == "cuda" else attend
    kernel = KERNELS[name]
    function = function_of(import_kernel(kernel.module)) or function_of(fetch_kernel(name))
    if function is None:
        raise AttentionError(f"attention {name}: its package has no flash_attn_func; use sdpa")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q, k, v)
        # versions differ in whether they add the log-sum-exp
        return out[0] if isinstance(out, tuple) else out

    return run


def import_kernel(module: str) -> ModuleType | None:
    """A module of that name; None where it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        log.debug("%s: %s", module, error)
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
